"""RL post-training of text-to-image flow models: a zoo of parts that compose.

    from rlt2i import Algorithm, DiffusionNFT, TextAttention, load_recipe, train

`rlt2i.__all__` is the public surface: every part that a recipe can name, under its short name, the interfaces and
records that own parts are made of, and what a script calls (`load_recipe`, `list_recipes`, `train`, `write_report`,
`compare_runs`). It is complete: what is not in it may change without notice. Names are imported when they are first
used, so `import rlt2i` costs nothing.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

_WORDS = {
    "rlt2i.algorithm": ("Algorithm",),
    "rlt2i.config": ("ConfigError",),
    "rlt2i.config.version": ("__version__",),
    "rlt2i.credit.algebra": ("Advantage", "Allocation", "Mask"),
    "rlt2i.interfaces": (
        "CreditAssigner",
        "CreditContext",
        "Needs",
        "Objective",
        "Policy",
        "PolicySpec",
        "Reward",
        "RewardBatch",
        "RewardOutput",
        "Sampler",
        "UpdateContext",
    ),
    "rlt2i.objectives.draws": ("SigmaDraws",),
    "rlt2i.objectives.penalty": ("KLPenalty", "VelocityPenalty"),
    "rlt2i.recipes.catalogue": ("list_recipes",),
    "rlt2i.recipes.recipe": ("Recipe", "load_recipe"),
    "rlt2i.report": ("compare_runs", "write_report"),
    "rlt2i.tasks.base": ("Task", "TaskPrompt"),
    "rlt2i.recipes.train_config": ("TrainConfig",),
    "rlt2i.training.start": ("train",),
    "rlt2i.types": (
        "Conditioning",
        "Credit",
        "Experience",
        "Loss",
        "Prompts",
        "Rewards",
        "Trajectory",
        "TransitionKernel",
    ),
}
"""What is public and no part: module -> names."""


@functools.cache
def _module_of() -> dict[str, str]:
    """Public name -> module, the parts of `rlt2i.recipes.PARTS` included."""
    from rlt2i.recipes.parts import PARTS

    parts = {name: home.partition(":")[0] for table in PARTS.values() for name, home in table.items()}
    return parts | {name: module for module, names in _WORDS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_module_of())
    if name not in _module_of():
        raise AttributeError(f"module 'rlt2i' has no attribute {name!r}")
    return getattr(importlib.import_module(_module_of()[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_module_of()})
