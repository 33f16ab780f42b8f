"""The same training on the workers of a Ray cluster, taken up again from its checkpoint when one is lost."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from rlt2i.distributed import ProcessLost

REPEAT = 3
"""Times that a run is taken up again after a worker was lost, unless the user says otherwise."""


class RayRunError(RuntimeError):
    """A run on Ray that ended without its result."""


def _absolute(path: Path) -> Path:
    return path.resolve()


@attrs.frozen(kw_only=True)
class RayRun:
    """One run on Ray.

    Attributes:
        recipe: name, YAML file, run directory or module:function; every worker reads it by itself.
        overrides: of its fields.
        run_dir: on storage that all workers share.
        resume: None for a new run, "latest" for one that goes on.
        workers: processes, one device each.
        gpus_per_worker: 0 trains on CPUs, with gloo.
        max_failures: times that the run is taken up again after a worker was lost.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    run_dir: Path = attrs.field(converter=_absolute)
    resume: str | None = attrs.field(default=None, validator=attrs.validators.in_((None, "latest")))
    workers: int = attrs.field(validator=attrs.validators.ge(1))
    gpus_per_worker: float = attrs.field(default=0, validator=attrs.validators.ge(0))
    max_failures: int = attrs.field(default=REPEAT, validator=attrs.validators.ge(0))

    def start(self) -> None:
        """Train until the end.

        Raises:
            RayRunError: when training cannot go on, with its reason; or when workers were lost too often.
            ValueError: when the recipe does not work out, before Ray is started; or when the cluster is too small.
        """
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from rlt2i.recipes import load_recipe
        from rlt2i.training.preflight import check_before_weights

        self._check_run_dir()
        recipe = load_recipe(self.recipe, self.overrides)
        # Which workers share a machine is known to them alone, so `hybrid` is checked there.
        whole = "full" if recipe.train.sharding == "hybrid" else recipe.train.sharding
        checked = attrs.evolve(recipe, train=attrs.evolve(recipe.train, sharding=whole))
        check_before_weights(checked, world_size=self.workers)
        if not ray.is_initialized():
            ray.init(runtime_env={"env_vars": _environment()}, include_dashboard=False)
        self._check_size(ray.cluster_resources())
        timeout = max(1, round(recipe.train.process_timeout))
        per_worker: dict[str, float] = {"CPU": 1} | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})
        trainer = TorchTrainer(
            train_on_worker,
            train_loop_config={
                "recipe": self.recipe,
                "overrides": list(self.overrides),
                "run_dir": str(self.run_dir),
                "resume": self.resume,
                "cwd": os.getcwd(),
            },
            torch_config=TorchConfig(backend="nccl" if self.gpus_per_worker else "gloo", timeout_s=timeout),
            scaling_config=ScalingConfig(
                num_workers=self.workers, use_gpu=self.gpus_per_worker > 0, resources_per_worker=per_worker
            ),
            run_config=RunConfig(
                name="ray",  # Ray's own notes on the run
                storage_path=str(self.run_dir),
                failure_config=FailureConfig(max_failures=self.max_failures),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise RayRunError(
                f"{self.run_dir}: workers were lost more than {self.max_failures} times ({last}). Go on from the last "
                f"checkpoint with --resume, or allow more with --max-failures."
            ) from error
        if result.return_value:
            raise RayRunError(result.return_value)

    def _check_run_dir(self) -> None:
        from rlt2i.runs.checkpoint import has_checkpoint
        from rlt2i.runs.directory import RunDirectoryError

        if self.resume is None and has_checkpoint(self.run_dir):
            raise RunDirectoryError(
                f"{self.run_dir}: already holds a run. Continue it with --resume, or choose another with --run-dir."
            )

    def _check_size(self, resources: Mapping[str, float]) -> None:
        for kind, wanted in (("CPU", float(self.workers)), ("GPU", self.workers * self.gpus_per_worker)):
            if wanted > resources.get(kind, 0):
                raise ValueError(
                    f"--workers {self.workers} want {wanted:g} {kind}s and the Ray cluster has "
                    f"{resources.get(kind, 0):g}. Use fewer workers, or start Ray on more machines "
                    "(ray start --address=HEAD:6379)."
                )


def train_on_worker(config: Mapping[str, Any]) -> str | None:
    """What every worker runs. None when it is done; else the reason why it would fail again.

    A lost worker is an exception: then Ray starts all of them again, and they find the run's checkpoint.
    """
    from rlt2i.recipes import load_recipe
    from rlt2i.runs.checkpoint import latest_checkpoint
    from rlt2i.training.start import train

    with contextlib.suppress(OSError):
        os.chdir(config["cwd"])
    if config["cwd"] not in sys.path:
        sys.path.append(config["cwd"])
    run_dir, resume = Path(config["run_dir"]), config["resume"]
    again = latest_checkpoint(run_dir) if run_dir.is_dir() else None
    try:
        recipe = load_recipe(config["recipe"], config["overrides"], trusted=True)  # the driver has looked
        train(recipe, run_dir, resume=resume if again is None else "latest")
    except ProcessLost:
        raise
    except _final_errors() as error:
        _leave_group()
        return str(error)
    return None


def _final_errors() -> tuple[type[Exception], ...]:
    """Errors that another start would meet again."""
    from rlt2i.distributed import OtherProcessFailed
    from rlt2i.learner import UpdateRefused
    from rlt2i.runs.checkpoint import CheckpointError
    from rlt2i.runs.directory import RunDirectoryError
    from rlt2i.training.trainer import RunStopped

    return (
        ValueError,
        FileNotFoundError,
        CheckpointError,
        OtherProcessFailed,
        RunDirectoryError,
        RunStopped,
        UpdateRefused,
    )


def _leave_group() -> None:
    """Close the connections, so that a process that still waits for this one learns of it at once."""
    import torch

    if torch.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.distributed.destroy_process_group()


def _environment() -> dict[str, str]:
    """What workers inherit: modules that lie in the working directory are found there too."""
    paths = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    kept = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "RLT2I_"))}
    # Ray would print every line of a worker twice, once as a log record.
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
