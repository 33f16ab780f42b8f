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
            "StableDiffusion": "rlt2i.policies.sd:StableDiffusion",
        },
        "Sampler": {
            "BranchSDE": "rlt2i.samplers.branching:BranchSDE",
            "DPM2": "rlt2i.samplers.dpm2:DPM2",
            "ODE": "rlt2i.samplers.ode:ODE",
            "RandomWindowSDE": "rlt2i.samplers.mixed:RandomWindowSDE",
            "Recorded": "rlt2i.samplers.recorded:Recorded",
            "SDE": "rlt2i.samplers.sde:SDE",
            "SlidingSDE": "rlt2i.samplers.mixed:SlidingSDE",
            "TreeSDE": "rlt2i.samplers.branching:TreeSDE",
        },
        "TransitionKernel": {
            "FlowSDE": "rlt2i.samplers.kernels:FlowSDE",
            "DanceSDE": "rlt2i.samplers.kernels:DanceSDE",
            "CPS": "rlt2i.samplers.kernels:CPS",
            "DDIM": "rlt2i.samplers.kernels:DDIM",
        },
        "Reward": {
            "Aesthetic": "rlt2i.rewards.aesthetic:Aesthetic",
            "Affine": "rlt2i.rewards.combinators:Affine",
            "Cached": "rlt2i.rewards.cached:Cached",
            "Clip": "rlt2i.rewards.combinators:Clip",
            "CLIPScore": "rlt2i.rewards.clipscore:CLIPScore",
            "Function": "rlt2i.rewards.combinators:Function",
            "GenEvalReward": "rlt2i.rewards.geneval:GenEvalReward",
            "Guarded": "rlt2i.rewards.validity:Guarded",
            "HPSv2": "rlt2i.rewards.hpsv2:HPSv2",
            "ImageReward": "rlt2i.rewards.imagereward:ImageReward",
            "JPEGCompressibility": "rlt2i.rewards.jpeg:JPEGCompressibility",
            "JPEGIncompressibility": "rlt2i.rewards.jpeg:JPEGIncompressibility",
            "OCRReward": "rlt2i.rewards.ocr:OCRReward",
            "OnDevice": "rlt2i.rewards.sharded:OnDevice",
            "PickScore": "rlt2i.rewards.pickscore:PickScore",
            "Pooled": "rlt2i.rewards.pooled:Pooled",
            "RemoteReward": "rlt2i.serve.client:RemoteReward",
            "RubricJudge": "rlt2i.rewards.judge:RubricJudge",
            "Sharded": "rlt2i.rewards.sharded:Sharded",
            "WeightedSum": "rlt2i.rewards.combinators:WeightedSum",
            "YesNoJudge": "rlt2i.rewards.judge:YesNoJudge",
            "ShapesColours": "rlt2i.tasks.shapes.colours:ShapesColours",
            "ShapesReward": "rlt2i.tasks.shapes.reward:ShapesReward",
        },
        "CreditAssigner": {
            "Product": "rlt2i.credit.algebra:Product",
        },
        "Advantage": {
            "BestOfGroup": "rlt2i.credit.best_of_group:BestOfGroup",
            "CoCA": "rlt2i.credit.coca:CoCA",
            "CompletionGain": "rlt2i.credit.completion_gain:CompletionGain",
            "GDPO": "rlt2i.credit.gdpo:GDPO",
            "GroupRelative": "rlt2i.credit.group_relative:GroupRelative",
            "RecordedPreference": "rlt2i.credit.recorded_preference:RecordedPreference",
            "RewardWeights": "rlt2i.credit.rwr:RewardWeights",
            "StepGain": "rlt2i.credit.step_gain:StepGain",
            "TreeAdvantage": "rlt2i.credit.tree:TreeAdvantage",
            "TurningPoints": "rlt2i.credit.turning_points:TurningPoints",
            "WinRate": "rlt2i.credit.win_rate:WinRate",
        },
        "Allocation": {
            "TextAttention": "rlt2i.credit.text_attention:TextAttention",
            "Oracle": "rlt2i.credit.controls:Oracle",
            "Shuffled": "rlt2i.credit.controls:Shuffled",
            "TorusShift": "rlt2i.credit.controls:TorusShift",
            "OtherRollout": "rlt2i.credit.controls:OtherRollout",
            "Inverted": "rlt2i.credit.controls:Inverted",
            "FeatureSaliency": "rlt2i.credit.feature_saliency:FeatureSaliency",
            "Influence": "rlt2i.credit.influence:Influence",
            "InverseDt": "rlt2i.credit.inverse_dt:InverseDt",
            "NoiseAware": "rlt2i.credit.noise_aware:NoiseAware",
            "ProportionalDt": "rlt2i.credit.proportional_dt:ProportionalDt",
            "RegionMaps": "rlt2i.credit.region_maps:RegionMaps",
            "RelativeL1Chunks": "rlt2i.credit.relative_l1_chunks:RelativeL1Chunks",
            "ResidualContrast": "rlt2i.credit.residual_contrast:ResidualContrast",
            "RewardSaliency": "rlt2i.credit.reward_saliency:RewardSaliency",
        },
        "Mask": {
            "RandomSubset": "rlt2i.credit.random_subset:RandomSubset",
            "RandomWindow": "rlt2i.credit.random_window:RandomWindow",
            "SlidingWindow": "rlt2i.credit.sliding_window:SlidingWindow",
        },
        "Objective": {
            "AWM": "rlt2i.objectives.awm:AWM",
            "CRD": "rlt2i.objectives.crd:CRD",
            "ClippedSurrogate": "rlt2i.objectives.clipped_surrogate:ClippedSurrogate",
            "DGPO": "rlt2i.objectives.dgpo:DGPO",
            "DRaFT": "rlt2i.objectives.draft:DRaFT",
            "DiffusionNFT": "rlt2i.objectives.nft:DiffusionNFT",
            "FlowDPPO": "rlt2i.objectives.dppo:FlowDPPO",
            "GRPOGuard": "rlt2i.objectives.grpo_guard:GRPOGuard",
            "DiffusionDPO": "rlt2i.objectives.diffusion_dpo:DiffusionDPO",
            "OnlineDPO": "rlt2i.objectives.online_dpo:OnlineDPO",
            "ReFL": "rlt2i.objectives.refl:ReFL",
            "Reinforce": "rlt2i.objectives.reinforce:Reinforce",
            "WeightedMatching": "rlt2i.objectives.sft:WeightedMatching",
        },
        "Task": {
            "OCRFileTask": "rlt2i.tasks.ocr.task:OCRFileTask",
            "OCRTask": "rlt2i.tasks.ocr.task:OCRTask",
            "ShapesTask": "rlt2i.tasks.shapes.task:ShapesTask",
            "GenEvalTask": "rlt2i.tasks.geneval.task:GenEvalTask",
            "PickScoreTask": "rlt2i.tasks.pickscore:PickScoreTask",
            "PublishedPrompts": "rlt2i.tasks.published:PublishedPrompts",
            "PairFileTask": "rlt2i.tasks.pairs:PairFileTask",
            "PromptFileTask": "rlt2i.tasks.promptfile:PromptFileTask",
        },
    }
)
"""Abstract part -> short name -> "module:Class"."""
