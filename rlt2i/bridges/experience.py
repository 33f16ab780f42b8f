"""An engine's data in the words of this package: its network as a `Policy`, its batch as an `Experience`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor

from rlt2i.credit.algebra import Advantage
from rlt2i.interfaces import CreditContext, Objective, Policy, RewardGradient, UpdateContext
from rlt2i.seeds import derive_seed, generator
from rlt2i.types import Conditioning, Credit, Experience, ImageSize, Prompts, Region, Rewards, Trajectory

TOKEN_SIDE = 2
"""Latent cells along a side of an image token, as in SD3, FLUX, Qwen-Image and Z-Image."""


def token_grid(latents: Tensor) -> tuple[int, int]:
    """(h, w) of the image tokens of latents [..., H, W]."""
    return (latents.shape[-2] // TOKEN_SIDE, latents.shape[-1] // TOKEN_SIDE)


def _engines(what: str) -> NoReturn:
    raise ValueError(f"{what} belongs to the engine: a bridge gives an objective the velocity of its network alone.")


@attrs.frozen(kw_only=True, eq=False)
class EnginePolicy(Policy):
    """A network that an engine owns.

    Attributes:
        predict: (latents [N, C, H, W] float32, sigma [N], rows [N] of the micro-batch) -> [N, C, H, W] velocity.
    """

    predict: Callable[[Tensor, Tensor, Tensor], Tensor]
    offers = frozenset()

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.predict(latents, sigma, conditioning.rows).float()

    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _engines("recording captures")

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        _engines("the noise schedule")

    def latent_shape(self, size: ImageSize) -> tuple[int, int, int]:
        _engines("the latents' shape")

    def token_grid(self, size: ImageSize) -> tuple[int, int]:
        _engines("the token grid")

    def encode(self, prompts: Prompts) -> Conditioning:
        _engines("encoding prompts")

    def decode(self, latents: Tensor) -> Tensor:
        _engines("decoding images")

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        _engines("the list of trained parameters")

    def export(self, folder: Path) -> None:
        _engines("exporting weights")


@attrs.frozen(kw_only=True)
class EngineAdvantage(Advantage):
    """The advantage that the engine computed itself: what `Product` multiplies when nothing else is wanted."""

    def advantage(self, context: CreditContext) -> Tensor:
        given = context.rewards.terms.get(ENGINE_ADVANTAGE)
        if given is None:
            raise ValueError(
                "EngineAdvantage: this engine passed no advantage of its own. Use GroupRelative() or another advantage."
            )
        return given.float()[:, None, None, None]


ENGINE_ADVANTAGE = "engine/advantage"
"""Term of the rewards under which a bridge passes on the engine's advantage [B]."""


class _NotHere:
    """Stands where the engine has nothing to give; any use of it says so."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError(
            f"this credit looks at {self._what}, which the engine does not hand to its algorithms. Use a credit that "
            "needs only rewards, states and attention, such as TextAttention() or ResidualContrast()."
        )

    def __call__(self, *_: object) -> NoReturn:
        self.__getattr__("")


def prompt_groups(labels: Sequence[str]) -> int:
    """G, when the rows come as whole groups of equal size, one after the other.

    Raises:
        ValueError: when they do not.
    """
    starts = [i for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    sizes = {end - start for start, end in zip(starts, [*starts[1:], len(labels)], strict=True)}
    if len(sizes) != 1 or len({labels[i] for i in starts}) != len(starts):
        raise ValueError(
            f"this process holds {len(labels)} rollouts whose prompt groups are not whole (runs of {sorted(sizes)}). "
            "Choose prompts per batch, group size and number of processes so that every process gets whole groups."
        )
    return sizes.pop()


def regions_of(metadata: Sequence[Mapping[str, Any]]) -> tuple[tuple[Region, ...], ...] | None:
    """What a reward wrote under "regions": per rollout, mappings with box, credit and perhaps label; or None.

    Raises:
        ValueError: when some rollouts have regions and others lack the key.
    """
    has = [row.get("regions") is not None for row in metadata]
    if not any(has):
        return None
    if not all(has):
        raise ValueError(
            f"metadata of rollout {has.index(False)} lacks 'regions' while others have it. Write an empty list where "
            "nothing was judged."
        )
    return tuple(
        tuple(
            Region(box=tuple(r["box"]), credit=float(r["credit"]), label=str(r.get("label", "")))
            for r in row["regions"]
        )
        for row in metadata
    )


def credit_context(
    *,
    trajectory: Trajectory,
    rewards: Rewards,
    texts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    keys: Tensor,
    seed: int,
    iteration: int,
) -> CreditContext:
    """What credit may look at inside an engine: whole groups, without images and without the reward itself.

    Args:
        texts, metadata: one entry per rollout.
    """
    size = trajectory.group_size
    first = range(0, trajectory.num_rollouts, size)
    prompts = Prompts(
        texts=tuple(texts[i] for i in first),
        group_size=size,
        metadata=tuple(metadata[i] for i in first),
        core=tuple(tuple(metadata[i].get("core", ())) for i in first),
        draws=tuple(range(len(first))),
    )
    missing: Any = _NotHere("more than rewards")
    return CreditContext(
        prompts=prompts,
        trajectory=trajectory,
        rewards=rewards,
        token_grid=token_grid(trajectory.latents),
        images=_NotHere("finished images"),  # type: ignore[arg-type]
        iteration=iteration,
        keys=keys,
        generator=generator(seed, "credit", iteration),
        score=missing,
        reward_gradient=missing,
        complete=missing,
    )


def make_experience(
    *, trajectory: Trajectory, log_probs: Tensor | None, trained: Tensor, credit: Credit, keys: Tensor, groups: Tensor
) -> Experience:
    """One micro-batch of an engine.

    Args:
        trajectory: of its B rollouts; states that no trained step reads may hold anything.
        log_probs: [B, T, H, W] of the rollout's policy, or None where the update is on policy.
        trained: [B, T] bool, the steps that this update trains.
        credit: of the B rollouts.
        keys, groups: [B] long.
    """
    num, device = trajectory.num_rollouts, trajectory.latents.device
    return Experience(
        trajectory=trajectory if log_probs is None else attrs.evolve(trajectory, log_probs=log_probs),
        rewards=Rewards(
            values=trajectory.latents.new_zeros(num, 1), valid=torch.ones(num, dtype=torch.bool, device=device)
        ),
        credit=attrs.evolve(credit, mask=credit.mask & trained[:, :, None, None]),
        prompts=Prompts.of([""] * num),
        token_grid=token_grid(trajectory.latents),
        keys=keys,
        groups=groups,
    )


def update_context(
    *,
    seed: int,
    num_rollouts: int,
    num_pairs: int,
    max_pairs: int,
    on_policy: bool,
    weights: Callable[[str], AbstractContextManager[None]],
) -> UpdateContext:
    """What a learner would lend the objective, for one micro-batch of an engine."""

    def no_gradient(latents: Tensor, prompts: Prompts) -> RewardGradient:
        _engines("the reward's gradient")

    return UpdateContext(
        seed=derive_seed(seed, "update"),
        micro_batch_size=max_pairs,
        num_rollouts=num_rollouts,
        num_groups=1,
        num_pairs=num_pairs,
        on_policy=on_policy,
        weights=weights,
        reward_gradient=no_gradient,
    )


def check_objective(objective: Objective, *, engine: str, allowed: frozenset[str]) -> None:
    """Refuse an objective that needs what an engine cannot give.

    Raises:
        ValueError: naming the need and objectives that work.
    """
    reasons = {
        "groups": f"compares the rollouts of a group in one forward pass, and {engine} cuts micro-batches anywhere",
        "reward/gradient": f"needs the reward's gradient, and {engine} scores images elsewhere",
        "old": f"needs the parameters of an old policy beside the current ones, which {engine} does not keep here",
        "reference": f"needs the reference policy, which {engine} does not offer here",
    }
    for need in sorted(objective.needs.names - allowed):
        raise ValueError(
            f"{type(objective).__name__} {reasons.get(need, f'needs {need!r}')}. Use ClippedSurrogate(), or train with "
            "`rlt2i train`."
        )


@attrs.define
class MetricMeans:
    """Means of the observations of several losses, and maxima of names that end in "max"."""

    count: int = 0
    _values: dict[str, list[Tensor]] = attrs.field(factory=dict)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, values in metrics.items():
            self._values.setdefault(name, []).append(values.detach().float().flatten())

    def result(self) -> dict[str, float]:
        joined = {name: torch.cat(values) for name, values in self._values.items()}
        return {name: float(v.max() if name.endswith("max") else v.mean()) for name, v in joined.items()}
