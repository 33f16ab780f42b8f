"""GDPO: several rewards that each compare on their own scale before they are added."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Advantage
from rlt2i.functional.advantages import gdpo, group_std
from rlt2i.interfaces import CreditContext


@attrs.frozen(kw_only=True)
class GDPO(Advantage):
    """Every reward term is normalised in its group, weighted and added; the sum is normalised over the whole batch.

    A weighted sum of raw rewards lets the term with the widest spread decide; here a weight means what it says. A term
    that is nan for a whole group does not apply to its prompt and adds nothing. Where it is nan for some rollouts of a
    group only, those could not be judged: they leave the statistics and get 0.

    Attributes:
        weights: name of a term of the reward (a component in its documentation, in the log `reward/<name>`) -> weight.
        clip: bound on the absolute advantage.
        min_std: floor of every standard deviation.
    """

    weights: Mapping[str, float] = attrs.field()
    clip: float = attrs.field(default=5.0, validator=validators.gt(0))
    min_std: float = attrs.field(default=1e-6, validator=validators.gt(0))

    @weights.validator
    def _check_weights(self, _: object, value: Mapping[str, float]) -> None:
        if not value:
            raise ValueError("GDPO(weights={}): a sum of nothing compares nothing. Name at least one reward term.")
        for name, weight in value.items():
            if not math.isfinite(weight) or weight == 0:
                raise ValueError(f"GDPO: the weight of {name!r} is {weight}; leave the term out instead.")

    def advantage(self, context: CreditContext) -> Tensor:
        rewards, size = context.rewards, context.group_size
        missing = sorted(set(self.weights) - set(rewards.terms))
        if missing:
            raise ValueError(
                f"GDPO: the reward has no term {missing}. It has {sorted(rewards.terms) or 'none'}; use those names, "
                "or a reward that reports its parts, such as WeightedSum."
            )
        terms = context.gather(torch.stack([rewards.terms[name].float() for name in self.weights], dim=1))
        judged = torch.isfinite(terms) & context.gather(rewards.valid)[:, None]
        applies = judged.view(-1, size, terms.shape[1]).any(dim=1).repeat_interleave(size, dim=0)
        valid = (judged | ~applies).all(dim=1) & context.gather(rewards.valid)
        terms = torch.where(judged, terms, 0)

        weights = terms.new_tensor(list(self.weights.values()))
        advantage = gdpo(terms, weights, size, min_std=self.min_std, valid=valid)
        # The batch statistics leave rounding noise in groups that no term tells apart.
        spread = torch.stack([group_std(term, size, valid=valid) for term in terms.unbind(dim=1)])
        advantage = torch.where((spread > 0).any(dim=0).repeat_interleave(size), advantage, 0)
        return context.local(advantage).clamp(-self.clip, self.clip).float()[:, None, None, None]
