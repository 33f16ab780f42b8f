"""What a rehearsal does with a small recipe: train, be killed, resume, report, export, load elsewhere."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from rlt2i.learner import Learner
from rlt2i.policies.pretrained import PretrainedSpec
from rlt2i.policies.pretrained.loading import quietly
from rlt2i.recipes.recipe import Recipe, load_recipe
from rlt2i.rehearsal.bfloat16 import fast_bfloat16
from rlt2i.rehearsal.replacing import make_small, with_whole_paths
from rlt2i.report import write_report
from rlt2i.runs.checkpoint import EXPORT, latest_checkpoint
from rlt2i.runs.metrics import read_metrics
from rlt2i.training.dry_run import describe_run
from rlt2i.training.start import train
from rlt2i.types import ImageSize, height_and_width

WIDENED = "products of bfloat16 -> computed in float32 and rounded, as this CPU has no instructions for them"


@attrs.frozen(kw_only=True)
class Act:
    """One line of the table.

    Attributes:
        name: what was done.
        seconds: how long it took.
        problem: what went wrong; None when it passed.
    """

    name: str
    seconds: float
    problem: str | None = None


@attrs.frozen(kw_only=True)
class Rehearsal:
    """What came of one recipe.

    Attributes:
        name: of the recipe.
        replaced: what was other than in the recipe.
        acts: in their order; after one that failed there are none.
    """

    name: str
    replaced: tuple[str, ...]
    acts: tuple[Act, ...]

    @property
    def passed(self) -> bool:
        return all(act.problem is None for act in self.acts)

    def table(self) -> str:
        """Text for a terminal."""
        lines = [f"{self.name}: {'passed' if self.passed else 'FAILED'}"]
        lines += [f"  replaced  {line}" for line in self.replaced] or ["  replaced  nothing"]
        lines += [
            f"  {'passed' if act.problem is None else 'FAILED'}    {act.name:<10} {act.seconds:5.1f} s"
            + (f"  {act.problem}" if act.problem else "")
            for act in self.acts
        ]
        return "\n".join(lines)


def rehearse(recipe: Recipe, folder: Path, *, compile_blocks: bool = True) -> Rehearsal:
    """Run a recipe with its own settings on something small.

    Two iterations with an evaluation after each; the process that trains is killed in the second and the run resumes
    from its checkpoint; the report is written; what was exported is loaded by the stock pipeline and draws.

    Args:
        folder: for everything that is written.
        compile_blocks: keep `policy.compile`.
    """
    acts: list[Act] = []
    replaced: tuple[str, ...] = ()
    run = folder / "run"
    # Prompt files are named from where the command was given, and the acts are played in a folder of their own.
    recipe = attrs.evolve(recipe, task=with_whole_paths(recipe.task))
    with _one_thread(), _in_folder(folder), quietly(), fast_bfloat16() as widened:
        small: Recipe | None = None

        def prepare() -> None:
            nonlocal small, replaced
            made = make_small(recipe, folder, compile_blocks=compile_blocks)
            small, replaced = made.recipe, made.replaced
            spec = made.recipe.policy
            dtypes = (spec.compute_dtype, spec.image_dtype) if isinstance(spec, PretrainedSpec) else ()
            if widened and torch.bfloat16 in dtypes:
                replaced += (WIDENED,)

        prepare_act = _act("prepare", prepare)
        acts.append(prepare_act)
        if small is None:
            return Rehearsal(name=recipe.name, replaced=replaced, acts=tuple(acts))
        ready: Recipe = small
        for name, work in (
            ("plan", lambda: describe_run(ready)),
            ("kill", lambda: _train_and_be_killed(ready, run)),
            ("resume", lambda: _resume(ready, run)),
            ("report", lambda: _report(run)),
            ("export", lambda: _load_elsewhere(ready, run)),
        ):
            acts.append(_act(name, work))
            if acts[-1].problem is not None:
                break
    return Rehearsal(name=recipe.name, replaced=replaced, acts=tuple(acts))


def _act(name: str, work: Callable[[], Any]) -> Act:
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            work()
    except Exception as error:
        if os.environ.get("RLT2I_DEBUG"):
            traceback.print_exc(file=sys.stderr)
        problem = f"{type(error).__name__}: {error}"
        return Act(name=name, seconds=time.perf_counter() - start, problem=problem)
    return Act(name=name, seconds=time.perf_counter() - start)


def _train_and_be_killed(recipe: Recipe, run: Path) -> None:
    """Train in a process of its own that dies by SIGKILL while it learns from the second batch.

    Raises:
        RuntimeError: when it ended in another way, with what it wrote.
    """
    said = run.parent / "killed.txt"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child is killed
        with said.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            with contextlib.suppress(BaseException):
                try:
                    torch.set_num_threads(1)  # mends torch's pool after the fork, before threads race to do so
                    _die_while_learning(recipe.train.iterations)
                    train(recipe, run)
                except BaseException:
                    traceback.print_exc(file=file)
            file.flush()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        last = said.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["it said nothing"]
        raise RuntimeError(
            f"training ended before it could be killed in iteration {recipe.train.iterations}: {last[0]}"
        )


def _die_while_learning(iteration: int) -> None:
    """In this process, from now on: SIGKILL when learning from that many batches begins."""
    learn, calls = Learner.learn, 0

    def learn_or_die(self: Learner, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(self, *arguments, **options)

    Learner.learn = learn_or_die  # type: ignore[method-assign]


def _resume(recipe: Recipe, run: Path) -> None:
    train(load_recipe(str(run)), run, resume="latest")
    steps = [record["step"] for record in read_metrics(run, "train")]
    evaluated = [record["step"] for record in read_metrics(run, "eval")]
    if steps != [1, 2] or evaluated != [0, 1, 2]:
        raise RuntimeError(f"logged iterations {steps} and evaluations {evaluated}, expected [1, 2] and [0, 1, 2]")
    first, last = read_metrics(run, "train")
    for record in (first, last):
        broken = sorted(name for name, value in record.items() if isinstance(value, float) and math.isinf(value))
        if broken:
            raise RuntimeError(f"iteration {record['step']}: {', '.join(broken)} are not finite")
    norms = [record.get("grad_norm", 1.0) for record in (first, last)]
    if not max(norms) > 0:
        raise RuntimeError(f"both iterations had a gradient of {norms}: nothing was learned")


def _report(run: Path) -> None:
    page = write_report(run)
    if "<svg" not in page.read_text(encoding="utf-8"):
        raise RuntimeError(f"{page} holds no chart")


def _load_elsewhere(recipe: Recipe, run: Path) -> None:
    """The export, read by diffusers' own pipeline, draws an image."""
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    exported = checkpoint / EXPORT
    spec = recipe.policy
    if not isinstance(spec, PretrainedSpec):
        if not any(exported.iterdir()):
            raise RuntimeError(f"{exported} is empty")
        return
    draw_elsewhere(spec, exported, recipe.train.image_size)


def draw_elsewhere(spec: PretrainedSpec, exported: Path, size: ImageSize) -> int:
    """Have diffusers' own pipeline load an export and draw an image.

    Returns:
        How many tensors of an adapter it took; 0 for a whole pipeline.

    Raises:
        RuntimeError: when it took none, or the image is not finite or of another size.
    """
    import diffusers

    source = spec.source if spec.lora_rank is not None else exported
    pipe = getattr(diffusers, spec.pipeline).from_pretrained(
        source, **spec.components(), local_files_only=True, use_safetensors=True
    )
    pipe.set_progress_bar_config(disable=True)
    taken = 0
    if spec.lora_rank is not None:
        with _adapters_of_the_network_alone():
            pipe.load_lora_weights(exported)
        taken = sum(".lora_" in name for name, _ in getattr(pipe, spec.network).named_parameters())
        if not taken:
            raise RuntimeError(f"{type(pipe).__name__} took no key of {exported}")
    height, width = height_and_width(size)
    image = pipe(prompt="a lighthouse", num_inference_steps=2, height=height, width=width, output_type="pt").images
    if image.shape[-2:] != (height, width) or not torch.isfinite(image).all():
        raise RuntimeError(f"{type(pipe).__name__} drew {tuple(image.shape)} from {exported}, finite or not")
    return taken


@contextlib.contextmanager
def _adapters_of_the_network_alone() -> Iterator[None]:
    """diffusers warns of every text encoder that an adapter leaves alone."""
    logger = logging.getLogger("diffusers.loaders.lora_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So that a process can be forked: OpenMP's threads do not survive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """Relative paths of a recipe, such as a cache, stay inside the rehearsal."""
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
