"""What every objective needs, in one import: drawing, stepping, pooling, reducing.

The reduction law, once: on the reverse process the loss of an optimizer step is the mean over the (rollout, step) pairs
that are trained, of all processes, `context.num_pairs`; on the forward process the mean over rollouts of the mean over
their draws, `share`. A pair or a draw is the mean over its unmasked locations, `masked_mean`. Pairs without advantage
count in the denominator, so their number does not change the step size.
"""

from rlt2i.functional.surrogate import clipped_surrogate, scaled_clip_range
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.draws import SigmaDraws, shared_noise
from rlt2i.objectives.forward import NoisyPairs, noisy_pairs, whole_groups
from rlt2i.objectives.penalty import KLPenalty, VelocityPenalty
from rlt2i.objectives.reduction import (
    Granularity,
    masked_mean,
    on_grid,
    ratio_grid,
    share,
    share_of_mean,
    trainable_steps,
    weight_and_mask,
)
from rlt2i.objectives.reverse import (
    NO_LIKELIHOOD,
    Pooled,
    Step,
    at_ratio_grid,
    denoising_step,
    old_transition,
    surrogate_metrics,
    whole_sample,
)
from rlt2i.objectives.reward_backprop import rewarded, scale_credit_gradient
from rlt2i.types import Experience, Loss, StepBatch

__all__ = [
    "NO_LIKELIHOOD",
    "Experience",
    "Granularity",
    "KLPenalty",
    "Loss",
    "Needs",
    "NoisyPairs",
    "Objective",
    "Policy",
    "Pooled",
    "SigmaDraws",
    "Step",
    "StepBatch",
    "UpdateContext",
    "VelocityPenalty",
    "at_ratio_grid",
    "clipped_surrogate",
    "denoising_step",
    "masked_mean",
    "noisy_pairs",
    "old_transition",
    "on_grid",
    "ratio_grid",
    "rewarded",
    "scale_credit_gradient",
    "scaled_clip_range",
    "share",
    "share_of_mean",
    "shared_noise",
    "surrogate_metrics",
    "trainable_steps",
    "weight_and_mask",
    "whole_groups",
    "whole_sample",
]
