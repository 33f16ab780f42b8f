"""The records that flow through an algorithm.

    Prompts -> Conditioning -> Trajectory -> images -> Rewards -> Credit -> Experience -> Loss, Loss, ...

Axes: B = P * G rollouts (group-major: the G rollouts of one of the P prompts are adjacent), T denoising steps, latents
C x H x W, credit grid h x w. `sigma` runs from 1 (pure noise) to 0; `x_sigma = (1 - sigma) x_0 + sigma eps` and
`v = eps - x_0`. Reward, credit, log-ratio and loss all live in [B, T, h, w]; an axis that a part does not resolve has
size 1 there and broadcasts. Channels never carry credit.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import attrs
import torch
from torch import Tensor

from rlt2i.axes import Axes
from rlt2i.functional.numerics import Scalar
from rlt2i.functional.transfer import chosen, on_both, on_host, to_device
from rlt2i.functional.transitions import Transition

Causality = Literal["state", "action", "outcome", "exogenous"]
CAUSALITIES: tuple[Causality, ...] = ("exogenous", "state", "action", "outcome")
Record = TypeVar("Record")
ImageSize = int | tuple[int, int]
"""(height, width) in pixels; one number means a square."""


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Both sides in pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def image_size(value: Any) -> Any:
    """The one way of writing a size, for fields: a number for a square, (height, width) for anything else."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return value[0] if value[0] == value[1] else tuple(value)
    return value


def image_sizes(values: Any) -> Any:
    """The same for fields of several sizes."""
    return tuple(map(image_size, values)) if isinstance(values, list | tuple) else values


def at_least_a_pixel(instance: Any, attribute: Any, value: Any) -> None:
    """A validator of fields that are an `ImageSize`, sizes, or None.

    Raises:
        ValueError: from the validator, for a side below 1.
    """
    for size in value if attribute.name == "sizes" else [value]:
        if size is not None and min(height_and_width(size)) < 1:
            raise ValueError(f"{attribute.name}={value}: a side of an image has at least 1 pixel.")


def _replaced(record: Record, **fields: Any) -> Record:
    """`attrs.evolve` for rows of a record that was checked: to check again would make the host wait for the device."""
    rows = copy.copy(record)
    for name, value in fields.items():
        object.__setattr__(rows, name, value)
    return rows


@attrs.frozen(kw_only=True, eq=False)
class Prompts:
    """P prompts, each to be sampled `group_size` times.

    Attributes:
        texts: P prompt strings.
        group_size: G, the rollouts per prompt.
        metadata: P JSON-able mappings of task data (what a verifier needs).
        core: per prompt, the phrases the user cares about; empty means "the content words of the prompt".
        draws: per prompt, its position in the run's endless prompt stream; makes the seeds of a prompt that is drawn
            twice differ.
    """

    texts: tuple[str, ...]
    group_size: int
    metadata: tuple[Mapping[str, Any], ...]
    core: tuple[tuple[str, ...], ...]
    draws: tuple[int, ...]

    def __attrs_post_init__(self) -> None:
        sizes = {"texts": len(self.texts), "metadata": len(self.metadata), "core": len(self.core)}
        if len({*sizes.values(), len(self.draws)}) != 1:
            raise ValueError(
                f"Prompts: one entry per prompt is needed in every field, got {sizes}, draws={len(self.draws)}."
            )
        if self.group_size < 1:
            raise ValueError(f"Prompts(group_size={self.group_size}): at least one rollout per prompt is needed.")

    @classmethod
    def of(cls, texts: Sequence[str], *, group_size: int = 1) -> Prompts:
        """Plain texts without task data, numbered from 0."""
        empty: tuple[Mapping[str, Any], ...] = tuple({} for _ in texts)
        return cls(
            texts=tuple(texts),
            group_size=group_size,
            metadata=empty,
            core=tuple(() for _ in texts),
            draws=tuple(range(len(texts))),
        )

    @property
    def num_rollouts(self) -> int:
        """B = P * G."""
        return len(self.texts) * self.group_size

    def take(self, rows: Sequence[int]) -> Prompts:
        """The prompts at the given positions."""
        pick = lambda field: tuple(field[i] for i in rows)
        return attrs.evolve(
            self, texts=pick(self.texts), metadata=pick(self.metadata), core=pick(self.core), draws=pick(self.draws)
        )

    def per_rollout(self, field: Sequence[Any]) -> list[Any]:
        """Repeats a per-prompt sequence for each rollout of the group."""
        return [value for value in field for _ in range(self.group_size)]

    def ungrouped(self) -> Prompts:
        """One entry per rollout: B prompts in groups of one."""
        return attrs.evolve(self.take(self.per_rollout(range(len(self.texts)))), group_size=1)


@attrs.frozen(kw_only=True, eq=False)
class TokenSpan:
    """Where one core phrase sits in the text sequence the network attends to.

    Attributes:
        phrase: the words, as the prompt writes them.
        positions: per text stream ("clip", "t5"), indices into the joint text sequence, special and padding tokens
            excluded.
    """

    phrase: str
    positions: Mapping[str, tuple[int, ...]]


@attrs.frozen(kw_only=True, eq=False)
class Conditioning:
    """Encoded prompts: one row per *prompt*, indexed by rollout, so a group shares its embeddings.

    Attributes:
        tensors: name -> [P, ...], opaque to all but the policy that made them.
        rows: [B] long, the prompt row of each rollout.
        token_spans: per prompt, the core phrases that were found in its tokens.
    """

    tensors: Mapping[str, Tensor]
    rows: Tensor
    token_spans: tuple[tuple[TokenSpan, ...], ...] = ()

    def __attrs_post_init__(self) -> None:
        axes = Axes("Conditioning")
        axes.check("rows", self.rows, "B")
        for name, tensor in self.tensors.items():
            axes.check(
                f"tensors[{name!r}]",
                tensor.flatten(1) if tensor.ndim > 2 else tensor.reshape(len(tensor), -1),
                f"P {name}_size",
            )

    def __getitem__(self, name: str) -> Tensor:
        """[B, ...]: the named tensor, one row per rollout."""
        return self.tensors[name][self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Tensor) -> Conditioning:
        """The conditioning of some rollouts (repeats allowed)."""
        return attrs.evolve(self, rows=chosen(self.rows, rows))

    def to(self, device: torch.device | str) -> Conditioning:
        return attrs.evolve(self, tensors={k: v.to(device) for k, v in self.tensors.items()}, rows=self.rows.to(device))


class TransitionKernel(ABC):
    """p(x' | x) of one denoising step, as a function of the velocity.

    A trajectory carries the kernel that made it, so rollout and update cannot disagree.
    """

    @abstractmethod
    def transition(
        self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, *, sigma_max: Scalar
    ) -> Transition:
        """Mean and standard deviation of x'.

        Args:
            latents, velocity: [N, C, H, W].
            sigma, sigma_next: [N], decreasing.
            sigma_max: sigma_1, the second entry of the schedule; Flow-SDE needs it at sigma = 1. A number, or a tensor
                without axes on the device, which nobody waits for.
        """

    @abstractmethod
    def log_prob_map(self, next_latents: Tensor, transition: Transition) -> Tensor:
        """[N, H, W] log-density of x', averaged over channels only."""


@attrs.frozen(kw_only=True, eq=False)
class Trajectory:
    """B rollouts through T denoising steps.

    Attributes:
        latents: [B, T+1, C, H, W] float32; index 0 is the initial noise, index T the clean latents.
        sigmas: [T+1] float32, decreasing to 0.
        log_probs: [B, T, H, W] float32 at rollout time, channel mean; 0 at deterministic steps. May be a broadcast
            view.
        stochastic: [T] bool; only these steps have a log-probability, and only of the rollouts that are `noisy` there.
        noisy: [B, T] bool: where a rollout drew noise. By default at all stochastic steps; rollouts that branch at
            different ones say which.
        captures: name -> [B, T, ...], what the credit asked for, reduced on the fly.
        kernel: the transition of the stochastic steps; None where there are none.
        conditioning: of the B rollouts.
        group_size: G; divides B.
    """

    latents: Tensor
    sigmas: Tensor
    log_probs: Tensor
    stochastic: Tensor
    kernel: TransitionKernel | None
    conditioning: Conditioning
    group_size: int
    captures: Mapping[str, Tensor] = attrs.field(factory=dict)
    noisy: Tensor = attrs.field(
        default=attrs.Factory(lambda self: self.stochastic.expand(len(self.latents), -1), takes_self=True)
    )

    def __attrs_post_init__(self) -> None:
        axes = Axes("Trajectory")
        axes.check("sigmas", self.sigmas, "T+1")
        axes.check("latents", self.latents, "B T+1 C H W")
        axes.check("log_probs", self.log_probs, "B T H W")
        axes.check("stochastic", self.stochastic, "T")
        axes.check("noisy", self.noisy, "B T")
        axes.check("conditioning.rows", self.conditioning.rows, "B")
        for name, tensor in self.captures.items():
            axes.check(f"captures[{name!r}]", tensor[..., None].flatten(2), f"B T {name}")
        if self.group_size < 1 or self.num_rollouts % self.group_size:
            raise ValueError(f"Trajectory: {self.num_rollouts} rollouts do not split into groups of {self.group_size}.")

    @property
    def num_rollouts(self) -> int:
        return self.latents.shape[0]

    @property
    def num_steps(self) -> int:
        return self.latents.shape[1] - 1

    @property
    def sigma_max(self) -> Tensor:
        """sigma_1, a tensor without axes: stands in for 1 in the denominator of Flow-SDE's first step."""
        return self.sigmas[1]

    @property
    def clean_latents(self) -> Tensor:
        """[B, C, H, W], the end of the trajectory."""
        return self.latents[:, -1]

    def transition(self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Transition:
        """p(x' | x) of stochastic steps of this trajectory, for any velocity; see `TransitionKernel.transition`."""
        return self._kernel.transition(latents, velocity, sigma, sigma_next, sigma_max=self.sigma_max)

    def log_prob_map(self, next_latents: Tensor, transition: Transition) -> Tensor:
        """[N, H, W] log-density of x', averaged over channels only."""
        return self._kernel.log_prob_map(next_latents, transition)

    @property
    def _kernel(self) -> TransitionKernel:
        if self.kernel is None:
            raise ValueError(
                "Trajectory: the rollout is deterministic, so its steps have no density. Use a stochastic sampler such "
                "as SDE."
            )
        return self.kernel

    def take(self, rows: Tensor) -> Trajectory:
        """Some rollouts; groups need not stay whole, so the group size becomes 1 unless all are taken."""
        whole = len(rows) == self.num_rollouts
        rows = to_device(rows, self.latents.device)
        return attrs.evolve(
            self,
            latents=self.latents[rows],
            log_probs=self.log_probs[rows],
            conditioning=self.conditioning.take(rows),
            captures={k: v[rows] for k, v in self.captures.items()},
            group_size=self.group_size if whole else 1,
            noisy=self.noisy[rows],
        )

    def to(self, device: torch.device | str) -> Trajectory:
        return attrs.evolve(
            self,
            latents=self.latents.to(device),
            sigmas=self.sigmas.to(device),
            log_probs=self.log_probs.to(device),
            stochastic=self.stochastic.to(device),
            noisy=self.noisy.to(device),
            conditioning=self.conditioning.to(device),
            captures={k: v.to(device) for k, v in self.captures.items()},
        )


@attrs.frozen(kw_only=True, eq=False)
class Region:
    """A part of an image that a reward judged.

    Attributes:
        box: (x1, y1, x2, y2) in [0, 1].
        credit: signed; > 0 helped the score, < 0 hurt it.
        label: what was seen there.
        mask: [H', W'] bool, or None when only the box is known.
    """

    box: tuple[float, float, float, float]
    credit: float
    label: str = ""
    mask: Tensor | None = None


@attrs.frozen(kw_only=True, eq=False)
class Rewards:
    """What the environment said about B rollouts.

    Attributes:
        values: [B, K] float32 at `scored_steps`; the last column is the finished image.
        valid: [B] bool; an invalid rollout leaves group statistics and loss. It is never scored as 0.
        terms: name -> [B], the parts of the score, for the log.
        scored_steps: K step indices; T stands for the finished image.
        maps: [B, h, w] float32 >= 0, where the judged content is; optional ground truth for oracle credit.
        regions: per rollout, the regions the reward found.
    """

    values: Tensor
    valid: Tensor
    terms: Mapping[str, Tensor] = attrs.field(factory=dict)
    scored_steps: tuple[int, ...] = ()
    maps: Tensor | None = None
    regions: tuple[tuple[Region, ...], ...] | None = None

    def __attrs_post_init__(self) -> None:
        axes = Axes("Rewards")
        axes.check("values", self.values, "B K")
        axes.check("valid", self.valid, "B")
        for name, tensor in self.terms.items():
            axes.check(f"terms[{name!r}]", tensor, "B")
        if self.maps is not None:
            axes.check("maps", self.maps, "B h w")
            if not (torch.isfinite(self.maps).all() and (self.maps >= 0).all()):
                low, high = float(self.maps.min()), float(self.maps.max())
                raise ValueError(
                    f"Rewards.maps: values from {low:g} to {high:g}; a map says how much of the judged content is at a "
                    "place, so it is finite and not negative. Give 0 where nothing was judged."
                )
        # Asked of the host's copy where there is one: rewards come from there.
        bad = ~torch.isfinite(on_host(self.values)).all(dim=1) & on_host(self.valid)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"Rewards.values: rollout {row} is {on_host(self.values)[row].tolist()} but marked valid. "
                "A reward that failed must say valid=False, so that it leaves the statistics instead of poisoning them."
            )

    @property
    def final(self) -> Tensor:
        """[B], the reward of the finished images."""
        return self.values[:, -1]


@attrs.frozen(kw_only=True, eq=False)
class Credit:
    """How much each rollout, step and place is to be praised or blamed.

    `advantage` and `weight` stay apart because clipping needs the sign, advantage clipping comes before weighting, a
    forward-process objective turns the advantage into a bounded label, and preference objectives put the weight inside
    the logit. A `mask` is not weight 0: it changes the denominator, a weight does not.

    Attributes:
        advantage: signed, broadcastable to [B, T, h, w].
        weight: >= 0, broadcastable; mean one over the axes it resolves.
        mask: bool, broadcastable; False leaves the loss *and* its denominator.
        grid: (h, w) of the finest field.
        causality: the latest information the weights depend on.
    """

    advantage: Tensor
    weight: Tensor
    mask: Tensor
    grid: tuple[int, int]
    causality: Causality = "exogenous"

    def __attrs_post_init__(self) -> None:
        axes = Axes("Credit", B=self.advantage.shape[0], h=self.grid[0], w=self.grid[1])
        steps = max(field.shape[1] if field.ndim == 4 else 1 for field in (self.advantage, self.weight, self.mask))
        axes.sizes["T"] = steps
        for name in ("advantage", "weight", "mask"):
            field: Tensor = getattr(self, name)
            axes.check(name, field, "1|B 1|T 1|h 1|w")
            if field.requires_grad:
                raise ValueError(f"Credit.{name} carries a gradient; credit is a constant of the update: detach it.")
        if self.advantage.shape[0] != axes.sizes["B"]:
            raise ValueError("Credit.advantage must have one row per rollout.")
        if self.mask.dtype is not torch.bool:
            raise ValueError(f"Credit.mask: got {self.mask.dtype}, expected torch.bool.")
        finite = torch.isfinite(self.advantage).all() & torch.isfinite(self.weight).all()
        if bool(finite & (self.weight >= 0).all()):
            return
        if not bool(finite):
            raise ValueError("Credit: advantage and weight must be finite; mask out what could not be judged.")
        raise ValueError(f"Credit.weight: minimum is {float(self.weight.min()):g}; the sign belongs in the advantage.")

    @property
    def num_rollouts(self) -> int:
        return self.advantage.shape[0]

    def take(self, rows: Tensor) -> Credit:
        rows = to_device(rows, self.advantage.device)
        pick = lambda field: field if field.shape[0] == 1 and self.num_rollouts > 1 else field[rows]
        return _replaced(self, advantage=self.advantage[rows], weight=pick(self.weight), mask=pick(self.mask))

    def to(self, device: torch.device | str) -> Credit:
        return attrs.evolve(
            self, advantage=self.advantage.to(device), weight=self.weight.to(device), mask=self.mask.to(device)
        )


@attrs.frozen(kw_only=True, eq=False)
class StepBatch:
    """N (rollout, step) pairs, flattened for one forward pass of the network.

    Attributes:
        rollouts, steps: [N] long, which pair each row is.
        latents, next_latents, clean_latents: [N, C, H, W].
        sigma, sigma_next: [N].
        conditioning: of the N rows.
        old_log_probs: [N, H, W].
        advantage, weight, mask: [N, 1|h, 1|w], as in `Credit`.
    """

    rollouts: Tensor
    steps: Tensor
    latents: Tensor
    next_latents: Tensor
    clean_latents: Tensor
    sigma: Tensor
    sigma_next: Tensor
    conditioning: Conditioning
    old_log_probs: Tensor
    advantage: Tensor
    weight: Tensor
    mask: Tensor


@attrs.frozen(kw_only=True, eq=False)
class Experience:
    """What an objective learns from: trajectories, their rewards and the credit assigned to them.

    Attributes:
        trajectory, rewards, credit: of B rollouts.
        prompts: B prompts in groups of one, what each rollout was asked for.
        token_grid: (h, w) of the policy's image tokens; the grid of token-level ratios.
        keys: [B] long, a stable identity of each rollout; the randomness of an update is a function of it.
        groups: [B] long, a stable identity of each rollout's prompt group.
    """

    trajectory: Trajectory
    rewards: Rewards
    credit: Credit
    prompts: Prompts
    token_grid: tuple[int, int]
    keys: Tensor
    groups: Tensor

    def __attrs_post_init__(self) -> None:
        axes = Axes("Experience", B=self.trajectory.num_rollouts)
        if (len(self.prompts.texts), self.prompts.group_size) != (self.trajectory.num_rollouts, 1):
            raise ValueError(
                f"Experience.prompts: {len(self.prompts.texts)} prompts in groups of {self.prompts.group_size} for "
                f"{self.trajectory.num_rollouts} rollouts; one entry per rollout is needed. Use prompts.ungrouped()."
            )
        axes.check("keys", self.keys, "B")
        axes.check("groups", self.groups, "B")
        axes.check("credit.advantage", self.credit.advantage, "B ... ... ...")
        axes.check("rewards.valid", self.rewards.valid, "B")
        steps = max(self.credit.advantage.shape[1], self.credit.weight.shape[1], self.credit.mask.shape[1])
        if steps not in (1, self.trajectory.num_steps):
            raise ValueError(
                f"Experience: credit resolves {steps} steps, the trajectory has {self.trajectory.num_steps}."
            )
        sides = tuple(self.trajectory.latents.shape[-2:])
        if any(side % cells for side, cells in zip(sides, self.credit.grid, strict=True)):
            raise ValueError(
                f"Experience: a credit grid of {self.credit.grid} does not divide latents of {sides} into equal cells, "
                "so a map could not be laid over the loss without moving it. Use a grid whose sides divide those of "
                "the latents, such as the policy's token grid."
            )

    @property
    def num_rollouts(self) -> int:
        return self.trajectory.num_rollouts

    def take(self, rows: Tensor) -> Experience:
        """Some rollouts; given on the host, nobody waits for the device. All of them, in order, are the record itself.

        Args:
            rows: [N] long.
        """
        here = on_host(rows)
        if here.equal(torch.arange(self.num_rollouts)):
            return self
        rows = on_both(here, self.keys.device)
        rewards = _replaced(
            self.rewards,
            values=self.rewards.values[rows],
            valid=self.rewards.valid[rows],
            terms={k: v[rows] for k, v in self.rewards.terms.items()},
            maps=None if self.rewards.maps is None else self.rewards.maps[rows],
            regions=None if self.rewards.regions is None else tuple(self.rewards.regions[i] for i in here.tolist()),
        )
        return attrs.evolve(
            self,
            trajectory=self.trajectory.take(rows),
            rewards=rewards,
            credit=self.credit.take(rows),
            prompts=self.prompts.take(here.tolist()),
            keys=on_both(on_host(self.keys)[here], self.keys.device),
            groups=on_both(on_host(self.groups)[here], self.groups.device),
        )

    def step_batch(self, rollouts: Tensor, steps: Tensor) -> StepBatch:
        """Gather N (rollout, step) pairs; `rollouts` and `steps` are [N] long."""
        trajectory, credit = self.trajectory, self.credit

        def at(field: Tensor) -> Tensor:
            row = rollouts if field.shape[0] > 1 else torch.zeros_like(rollouts)
            step = steps if field.shape[1] > 1 else torch.zeros_like(steps)
            return field[row, step]

        return StepBatch(
            rollouts=rollouts,
            steps=steps,
            latents=trajectory.latents[rollouts, steps],
            next_latents=trajectory.latents[rollouts, steps + 1],
            clean_latents=trajectory.latents[rollouts, -1],
            sigma=trajectory.sigmas[steps],
            sigma_next=trajectory.sigmas[steps + 1],
            conditioning=trajectory.conditioning.take(rollouts),
            old_log_probs=at(trajectory.log_probs),
            advantage=at(credit.advantage),
            weight=at(credit.weight),
            mask=at(credit.mask),
        )


@attrs.frozen(kw_only=True, eq=False)
class Loss:
    """One scalar to run backward on.

    Attributes:
        value: scalar with a gradient. The values of all losses of an update *add up* to the update's loss.
        metrics: name -> detached tensor [N] of observations; the log averages them over the update, or takes the
            maximum where the name ends in "max".
        steps: [N] long, the denoising step of each observation; then the log also shows each metric per step.
    """

    value: Tensor
    metrics: Mapping[str, Tensor] = attrs.field(factory=dict)
    steps: Tensor | None = None

    def __attrs_post_init__(self) -> None:
        if self.value.ndim != 0:
            raise ValueError(f"Loss.value: got shape {list(self.value.shape)}, expected a scalar.")
        attached = [k for k, v in self.metrics.items() if v.requires_grad]
        if attached:
            raise ValueError(f"Loss.metrics {attached} carry a gradient: detach what leaves an objective.")


def latest_cause(causes: Sequence[Causality]) -> Causality:
    """The causality of a product of weights: that of its latest factor."""
    return max(causes, key=CAUSALITIES.index, default="exogenous")


def cells(grid: tuple[int, int]) -> int:
    """Number of locations of a grid."""
    return math.prod(grid)
