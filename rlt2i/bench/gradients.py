"""How well a gradient knows where to go: signal, noise and agreement of the gradients of independent batches.

From n batches with gradients g_1 .. g_n (uncentred; the batches are independent, the weights fixed):

    signal = mean over i != j of <g_i, g_j>            unbiased for |E g|^2
    noise  = mean over i of |g_i|^2, minus signal      unbiased for tr Cov g
    SNR    = signal / noise
    cosine = mean over i != j of cos(g_i, g_j)

Standard errors by the jackknife over batches. Credits that share batches share their luck, so ratios between them are
much surer than either.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from rlt2i.interfaces import CreditAssigner, CreditContext, Needs, Objective, Policy, Reward, UpdateContext
from rlt2i.learner import informative_rows
from rlt2i.objectives.reduction import trainable_steps
from rlt2i.parameter_sets import ParameterSets
from rlt2i.rewards.gradient import reward_gradient
from rlt2i.types import Credit, Experience


@attrs.define
class AllCredits(CreditAssigner):
    """Assigns several credits on the same rollouts; hands out the first and keeps the others at hand.

    Attributes:
        credits: by name.
        also: needs of whoever looks at the context afterwards.
        made: what they said of the last batch.
        context: what they saw of it.
    """

    credits: Mapping[str, CreditAssigner]
    also: frozenset[str] = frozenset()
    made: dict[str, Credit] = attrs.field(factory=dict)
    context: CreditContext | None = None

    @property
    def needs(self) -> Needs:
        return Needs.of_all((Needs(captures=self.also), *(credit.needs for credit in self.credits.values())))

    def scored_steps(self, num_steps: int) -> tuple[int, ...]:
        steps = {credit.scored_steps(num_steps) for credit in self.credits.values()}
        if len(steps) > 1:
            raise ValueError(
                f"the credits {', '.join(self.credits)} reward different steps ({sorted(steps)}), so they cannot share "
                "one batch. Measure them apart."
            )
        return steps.pop()

    def assign(self, context: CreditContext) -> Credit:
        self.context = context
        self.made = {name: credit.assign(context) for name, credit in self.credits.items()}
        return next(iter(self.made.values()))


def update_gradient(
    policy: Policy,
    objective: Objective,
    reward: Reward,
    experience: Experience,
    sets: ParameterSets,
    *,
    seed: int,
    micro_batch_size: int,
) -> Tensor:
    """[D] the gradient that the learner's first update of a batch would take; the weights stay as they are."""
    rows = informative_rows(experience) if objective.uses_advantage else experience.rewards.valid.nonzero()[:, 0]
    trained = trainable_steps(experience, stochastic_only=True) & experience.rewards.valid[:, None]
    context = UpdateContext(
        seed=seed,
        micro_batch_size=micro_batch_size,
        num_rollouts=max(1, int(experience.rewards.valid.sum())),
        num_groups=len(experience.groups.unique()),
        num_pairs=max(1, int(trained.sum())),
        on_policy=True,
        weights=sets.use,
        reward_gradient=functools.partial(reward_gradient, policy, reward, rollout_batch_size=micro_batch_size),
    )
    parameters = list(policy.trainable_parameters().values())
    for parameter in parameters:
        parameter.grad = None
    if len(rows):
        for loss in objective.losses(policy, experience.take(rows), context=context):
            loss.value.backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return gradient


@attrs.frozen(kw_only=True)
class GradientQuality:
    """What n gradients of one credit say; every number with its jackknife standard error.

    Attributes:
        snr, snr_error: |E g|^2 / tr Cov g of one batch.
        cosine, cosine_error: between the gradients of two batches.
        gain, gain_error: SNR over that of the first credit, paired by batch.
        batches: n.
    """

    snr: float
    snr_error: float
    cosine: float
    cosine_error: float
    gain: float
    gain_error: float
    batches: int


def gradient_quality(gradients: Mapping[str, Sequence[Tensor]]) -> dict[str, GradientQuality]:
    """Of several credits on the same batches; gains are over the first.

    Args:
        gradients: credit -> n gradients [D] each, in the same order of batches; n >= 3.
    """
    grams = {}
    for name, values in gradients.items():
        stacked = torch.stack(list(values)).float()
        grams[name] = (stacked @ stacked.T).double()
    return quality_of_grams(grams)


def quality_of_grams(grams: Mapping[str, Tensor]) -> dict[str, GradientQuality]:
    """The same from Gram matrices [n, n] of the gradients.

    Raises:
        ValueError: for fewer than three batches, or different numbers of them.
    """
    n = len(next(iter(grams.values())))
    if n < 3 or {len(gram) for gram in grams.values()} != {n}:
        raise ValueError(f"quality of gradients: {[len(g) for g in grams.values()]} batches; use 3 or more, all alike.")
    first_all, first_without = None, None
    quality = {}
    for name, gram in grams.items():
        whole, without = _snr_and_cosine(gram), _leave_one_out(gram)
        if first_all is None or first_without is None:
            first_all, first_without = whole, without
        gain, gain_without = whole[0] / first_all[0], without[:, 0] / first_without[:, 0]
        errors = jackknife_error(without)
        quality[name] = GradientQuality(
            snr=float(whole[0]),
            snr_error=float(errors[0]),
            cosine=float(whole[1]),
            cosine_error=float(errors[1]),
            gain=float(gain),
            gain_error=float(jackknife_error(gain_without)),
            batches=n,
        )
    return quality


def jackknife_error(without: Tensor) -> Tensor:
    """Standard error of a statistic from its n values with one batch left out each: [n, ...] -> [...]."""
    n = len(without)
    return ((n - 1) / n * (without - without.mean(dim=0)).square().sum(dim=0)).sqrt()


def _snr_and_cosine(gram: Tensor) -> Tensor:
    """[2] of a Gram matrix."""
    return _ratios(gram.sum(), gram.diagonal().sum(), _cosines(gram).sum(), len(gram))


def _leave_one_out(gram: Tensor) -> Tensor:
    """[n, 2]: the same without batch i; sums over the others are the whole sum less what i takes part in."""
    squares, cosines = gram.diagonal(), _cosines(gram)
    total = gram.sum() - 2 * gram.sum(dim=1) + squares
    return _ratios(
        total, squares.sum() - squares, cosines.sum() - 2 * cosines.sum(dim=1) + cosines.diagonal(), len(gram) - 1
    )


def _cosines(gram: Tensor) -> Tensor:
    norms = gram.diagonal().clamp_min(0).sqrt().clamp_min(1e-300)
    return gram / norms[:, None] / norms[None, :]


def _ratios(total: Tensor, squares: Tensor, cosines: Tensor, n: int) -> Tensor:
    """[..., 2] SNR and mean cosine from sums over all pairs, over |g_i|^2, and over all cosines (ones included)."""
    signal = (total - squares) / (n * (n - 1))
    noise = squares / n - signal
    return torch.stack([signal / noise, (cosines - n) / (n * (n - 1))], dim=-1)
