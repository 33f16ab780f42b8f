"""RL post-training of text-to-image flow models: a zoo of parts that compose.

    from rlt2i import Algorithm, load_recipe, train

The names below are imported when they are first used, so `import rlt2i` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "rlt2i.algorithm": ("Algorithm",),
    "rlt2i.config": ("ConfigError",),
    "rlt2i.credit.algebra": ("Advantage", "Allocation", "Mask", "Product"),
    "rlt2i.credit.controls": ("Inverted", "Oracle", "Shuffled"),
    "rlt2i.credit.group_relative": ("GroupRelative",),
    "rlt2i.credit.step_gain": ("StepGain",),
    "rlt2i.credit.text_attention": ("TextAttention",),
    "rlt2i.interfaces": (
        "CreditAssigner",
        "CreditContext",
        "Objective",
        "Policy",
        "PolicySpec",
        "Reward",
        "RewardBatch",
        "RewardOutput",
        "Sampler",
        "UpdateContext",
    ),
    "rlt2i.objectives.clipped_surrogate": ("ClippedSurrogate",),
    "rlt2i.objectives.nft": ("DiffusionNFT",),
    "rlt2i.objectives.online_dpo": ("OnlineDPO",),
    "rlt2i.policies.sd3": ("SD3",),
    "rlt2i.recipes.catalogue": ("list_recipes",),
    "rlt2i.recipes.recipe": ("Recipe", "load_recipe"),
    "rlt2i.report": ("compare_runs", "write_report"),
    "rlt2i.samplers.kernels": ("CPS", "DanceSDE", "FlowSDE"),
    "rlt2i.samplers.ode": ("ODE",),
    "rlt2i.samplers.sde": ("SDE",),
    "rlt2i.tasks.base": ("Task", "TaskPrompt"),
    "rlt2i.tasks.shapes.reward": ("ShapesReward",),
    "rlt2i.tasks.shapes.task": ("ShapesTask",),
    "rlt2i.train_config": ("TrainConfig",),
    "rlt2i.run": ("train",),
    "rlt2i.types": ("Conditioning", "Credit", "Experience", "Loss", "Prompts", "Rewards", "Trajectory"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rlt2i' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
