"""Where metrics go besides metrics.jsonl: accelerate's trackers, imported when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = "rlt2i"


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
    from accelerate import tracking, utils
    from accelerate.state import PartialState

    known = {
        "tensorboard": (tracking.TensorBoardTracker, utils.is_tensorboard_available),
        "wandb": (tracking.WandBTracker, utils.is_wandb_available),
        "trackio": (tracking.TrackioTracker, utils.is_trackio_available),
    }
    if name not in known:
        raise ValueError(f"tracker {name!r}: unknown. Use some of {sorted(known)}.")
    tracker_class, available = known[name]
    if not available():
        if name == "tensorboard":
            return None
        raise ValueError(f"tracker {name!r}: not installed. `pip install {name}`, or leave it out of `trackers`.")
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
