"""Short names for recipes. Nothing is imported until a recipe names it, and a part outside this table needs no entry:
`my_package.my_module:MyPart` or `my_file.py:MyPart` will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PARTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "PolicySpec": {
            "SD3": "rlt2i.policies.sd3:SD3",
        },
        "Sampler": {
            "ODE": "rlt2i.samplers.ode:ODE",
            "SDE": "rlt2i.samplers.sde:SDE",
        },
        "TransitionKernel": {
            "FlowSDE": "rlt2i.samplers.kernels:FlowSDE",
            "DanceSDE": "rlt2i.samplers.kernels:DanceSDE",
            "CPS": "rlt2i.samplers.kernels:CPS",
        },
        "Reward": {
            "Aesthetic": "rlt2i.rewards.aesthetic:Aesthetic",
            "Affine": "rlt2i.rewards.combinators:Affine",
            "Cached": "rlt2i.rewards.cached:Cached",
            "Clip": "rlt2i.rewards.combinators:Clip",
            "CLIPScore": "rlt2i.rewards.clipscore:CLIPScore",
            "Function": "rlt2i.rewards.combinators:Function",
            "GenEvalReward": "rlt2i.rewards.geneval:GenEvalReward",
            "Guarded": "rlt2i.rewards.guard:Guarded",
            "HPSv2": "rlt2i.rewards.hpsv2:HPSv2",
            "ImageReward": "rlt2i.rewards.imagereward:ImageReward",
            "JPEGCompressibility": "rlt2i.rewards.jpeg:JPEGCompressibility",
            "JPEGIncompressibility": "rlt2i.rewards.jpeg:JPEGIncompressibility",
            "OCRReward": "rlt2i.rewards.ocr:OCRReward",
            "PickScore": "rlt2i.rewards.pickscore:PickScore",
            "Pooled": "rlt2i.rewards.pooled:Pooled",
            "RubricJudge": "rlt2i.rewards.judge:RubricJudge",
            "WeightedSum": "rlt2i.rewards.combinators:WeightedSum",
            "YesNoJudge": "rlt2i.rewards.judge:YesNoJudge",
            "ShapesReward": "rlt2i.tasks.shapes.reward:ShapesReward",
        },
        "CreditAssigner": {
            "Product": "rlt2i.credit.algebra:Product",
        },
        "Advantage": {
            "GroupRelative": "rlt2i.credit.group_relative:GroupRelative",
            "StepGain": "rlt2i.credit.step_gain:StepGain",
        },
        "Allocation": {
            "TextAttention": "rlt2i.credit.text_attention:TextAttention",
            "Oracle": "rlt2i.credit.controls:Oracle",
            "Shuffled": "rlt2i.credit.controls:Shuffled",
            "Inverted": "rlt2i.credit.controls:Inverted",
        },
        "Objective": {
            "ClippedSurrogate": "rlt2i.objectives.clipped_surrogate:ClippedSurrogate",
            "DiffusionNFT": "rlt2i.objectives.nft:DiffusionNFT",
            "OnlineDPO": "rlt2i.objectives.online_dpo:OnlineDPO",
        },
        "Task": {
            "ShapesTask": "rlt2i.tasks.shapes.task:ShapesTask",
            "GenEvalTask": "rlt2i.tasks.geneval.task:GenEvalTask",
        },
    }
)
"""Abstract part -> short name -> "module:Class"."""
