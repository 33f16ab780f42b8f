"""Where metrics go besides metrics.jsonl: accelerate's trackers, imported when one is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = "rlt2i"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that could not be started, before anything is loaded.

    Raises:
        ValueError: if one is unknown, not installed, or installed and broken.
    """
    for name in names:
        _tracker_class(name)
        if name == "tensorboard":
            try:
                importlib.import_module("torch.utils.tensorboard")
            except ModuleNotFoundError:
                continue  # it is left out where it is not installed
            except Exception as error:
                raise ValueError(
                    f"tracker 'tensorboard': installed, but it does not start ({type(error).__name__}: {error}). Mend "
                    "it with `pip install --upgrade tensorboard`, or leave it out: --set train.trackers=[]"
                ) from error


def _tracker_class(name: str) -> Any:
    """accelerate's class, or None where TensorBoard is not installed."""
    from accelerate import tracking, utils

    known = {
        "tensorboard": (tracking.TensorBoardTracker, utils.is_tensorboard_available),
        "wandb": (tracking.WandBTracker, utils.is_wandb_available),
        "trackio": (tracking.TrackioTracker, utils.is_trackio_available),
    }
    if name not in known:
        raise ValueError(f"tracker {name!r}: unknown. Use some of {sorted(known)}.")
    tracker_class, available = known[name]
    if available():
        return tracker_class
    if name == "tensorboard":
        return None
    raise ValueError(f"tracker {name!r}: not installed. `pip install {name}`, or leave it out of `trackers`.")


def start_tracker(name: str, run: Path, recipe_hash: str, *, first_step: int, options: Mapping[str, Any]) -> Any:
    """Start one tracker for a run directory.

    Args:
        name: "tensorboard", "wandb" or "trackio".
        run: the run directory, with its recipe.yaml.
        recipe_hash: logged with the recipe.
        first_step: what TensorBoard shows from this step on, of an earlier start of the run, is hidden.
        options: keyword arguments of its start (`wandb.init`, ...).

    Returns:
        An `accelerate.tracking.GeneralTracker`, or None where TensorBoard is not installed.

    Raises:
        ValueError: if the tracker is unknown or not installed.
    """
    from accelerate.state import PartialState

    tracker_class = _tracker_class(name)
    if tracker_class is None:
        return None
    PartialState()  # accelerate's trackers log through it
    if name == "tensorboard":
        own: dict[str, Any] = {"logging_dir": run, **({"purge_step": first_step} if first_step else {})}
        tracker = tracker_class("tensorboard", **{**own, **options})
        tracker.start()
        return tracker
    from rlt2i.config import read_yaml

    own = {"name": run.name, **({"dir": str(run)} if name == "wandb" else {})}
    tracker = tracker_class(PROJECT, **{**own, **options})
    tracker.start()
    tracker.store_init_configuration({"hash": recipe_hash, **read_yaml(run / "recipe.yaml")})
    return tracker
