"""The five interfaces: Policy, Sampler, Reward, CreditAssigner, Objective.

Each part is a frozen object whose fields are its configuration. Parts state what they need and what they offer, so an
`rlt2i.algorithm.Algorithm` refuses a combination that cannot work before any weight is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import attrs
import numpy as np
import torch
from torch import Tensor

from rlt2i.axes import Axes
from rlt2i.config.version import __version__
from rlt2i.functional.transfer import on_both, on_host
from rlt2i.seeds import RolloutNoise, derive_seed
from rlt2i.types import Conditioning, Credit, Experience, ImageSize, Loss, Prompts, Region, Rewards, Trajectory

# ----------------------------------------------------------------------------------------------------------- needs

Rows = Literal["advantage", "groups", "valid"]


def _names(values: Iterable[str]) -> frozenset[str]:
    return frozenset(values)


@attrs.frozen(kw_only=True)
class Needs:
    """What a credit or an objective needs of the other parts; checked before any weight is loaded.

    Attributes:
        captures: names of what rollouts must record, on the policy's side or the sampler's.
        reward: what the reward must offer besides scores, of {"maps", "regions", "gradient"}.
        noise: a sampler with stochastic steps; for an objective, because its loss is on their log-probabilities.
        groups: more than one rollout of a prompt.
        parameter_sets: named copies of the parameters, of {"old", "reference"}.
        old_log_probs: log-probabilities of the rollout's own policy, exact to the last bit: they are made again from
            the second optimizer step of a batch on.
        rows: which rollouts have a gradient. "advantage": those with some advantage, since the others would add nothing
            but the cost of their forward pass. "groups": all of a group of which one has some advantage, for losses
            that compare them. "valid": every rollout that could be judged, for losses that pull on the others too.
        remedies: name of a capture or of what a reward offers, or "noise" -> what to do where it is missing.
    """

    captures: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    reward: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    noise: bool = False
    groups: bool = False
    parameter_sets: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    old_log_probs: bool = False
    rows: Rows = "advantage"
    remedies: Mapping[str, str] = attrs.field(factory=dict, eq=False)

    @property
    def names(self) -> frozenset[str]:
        """All of them in one set of words, for engines that grant some: captures and parameter sets as they are called,
        "reward/maps", "noise", "groups", "old_log_probs"."""
        flags = {name for name in ("noise", "groups", "old_log_probs") if getattr(self, name)}
        return self.captures | self.parameter_sets | {f"reward/{name}" for name in self.reward} | flags

    @classmethod
    def of_all(cls, parts: Iterable[Needs]) -> Needs:
        """What several parts need together."""
        needs = tuple(parts)
        order = ("advantage", "groups", "valid")
        return cls(
            captures=frozenset().union(*(n.captures for n in needs)),
            reward=frozenset().union(*(n.reward for n in needs)),
            noise=any(n.noise for n in needs),
            groups=any(n.groups for n in needs),
            parameter_sets=frozenset().union(*(n.parameter_sets for n in needs)),
            old_log_probs=any(n.old_log_probs for n in needs),
            rows=max((n.rows for n in needs), key=order.index, default="advantage"),
            remedies={name: text for n in needs for name, text in n.remedies.items()},
        )


# ---------------------------------------------------------------------------------------------------------- policy


class PolicySpec(ABC):
    """A policy that has not been loaded yet: everything that can be known without its weights."""

    @property
    @abstractmethod
    def offers(self) -> frozenset[str]:
        """The captures the loaded policy can record."""

    def check_image_size(self, size: ImageSize) -> None:  # noqa: B027 - most take whatever they are given
        """Refuse, before any weight is read, a size that the loaded policy would refuse.

        Raises:
            ValueError: with the nearest size that works.
        """

    @abstractmethod
    def load(self, device: torch.device | str = "cpu") -> Policy:
        """Read the weights."""


class Policy(ABC):
    """The velocity field of one backbone, and its geometry. It never runs a denoising loop."""

    @property
    @abstractmethod
    def offers(self) -> frozenset[str]:
        """The captures that it can record."""

    @abstractmethod
    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        """[T+1] float32 noise levels, from 1 (or the model's own start) down to 0."""

    @abstractmethod
    def latent_shape(self, size: ImageSize) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image of this size in pixels; a size that does not fit is a ValueError."""

    @abstractmethod
    def token_grid(self, size: ImageSize) -> tuple[int, int]:
        """(h, w) of the image tokens, the grid of attention maps."""

    @abstractmethod
    def encode(self, prompts: Prompts) -> Conditioning:
        """Encode each prompt once and find its core phrases among the tokens; rows repeat for the group."""

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[tuple[int, int]]]]:
        """What each text encoder reads of a prompt; nothing where a policy cannot tell.

        Returns:
            Text stream -> (where it starts in the joint text sequence, the characters (start, end) of the prompt behind
            each of its tokens: (0, 0) for special tokens, none for what lies beyond the token limit).
        """
        return {}

    def encode_with_negative(self, prompts: Prompts, negative: str) -> Conditioning:
        """What `encode` gives, and behind the prompts' rows one of a negative prompt that no rollout refers to."""
        encoded = self.encode(
            attrs.evolve(
                prompts,
                texts=(*prompts.texts, negative),
                metadata=(*prompts.metadata, {}),
                core=(*prompts.core, ()),
                draws=(*prompts.draws, -1),
            )
        )
        return attrs.evolve(encoded, rows=encoded.rows[: prompts.num_rollouts])

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """v(x_sigma, sigma | prompt); gradients flow.

        Args:
            latents: [N, C, H, W] float32.
            sigma: [N] float32.
            conditioning: N rows.

        Returns:
            [N, C, H, W] float32.
        """

    @abstractmethod
    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same velocity, bit for bit, and the named captures [N, ...]."""

    def velocity_again(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, recorded: Mapping[str, Tensor]
    ) -> Tensor:
        """`velocity` at states of a rollout and under its weights, which may have recorded a part of the answer.

        Args:
            recorded: name -> [N, ...], captures of these states.
        """
        return self.velocity(latents, sigma, conditioning)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[N, 3, H', W'] images in [0, 1]."""

    def merged(self) -> AbstractContextManager[None]:
        """Within it passes without gradient may be cheaper and round otherwise: an adapter merged into the weights."""
        return nullcontext()

    def encode_images(self, images: Tensor) -> Tensor:
        """The inverse of `decode`, as far as there is one: what samplers need that read images rather than denoise.

        Args:
            images: [N, 3, H', W'] floats in [0, 1].

        Returns:
            [N, C, H, W] float32 clean latents; the same for the same images, so an autoencoder gives its mean.

        Raises:
            ValueError: when this policy cannot.
        """
        raise ValueError(
            f"{type(self).__name__} cannot turn images into latents. Use a sampler that denoises, such as ODE(), or "
            "implement encode_images with the policy's autoencoder."
        )

    def initial_latents(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """The state a rollout starts from, for a scalar `sigma`, the first of the schedule.

        sigma x noise, unless the model starts elsewhere: one that never saw pure noise and yet is fed it
        (Stable Diffusion) says so here.
        """
        return noise * sigma

    @abstractmethod
    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by stable name."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write what learned in the format that the ecosystem loads (diffusers LoRA, or a pipeline)."""


# --------------------------------------------------------------------------------------------------------- sampler


@attrs.frozen(kw_only=True, eq=False)
class RolloutRequest:
    """What a sampler is asked for: B rollouts.

    Attributes:
        noise: of the B rollouts, each a function of its own identity.
        captures: what to record on the way.
        image_size: in pixels.
        group_size: rollouts of one prompt that are adjacent; 1 unless the sampler asked for whole groups.
        iteration: number of the rollout batch; windows may slide with it.
        metadata: task data of the B rollouts, for samplers that read rather than denoise.
    """

    noise: RolloutNoise
    captures: frozenset[str]
    image_size: ImageSize
    group_size: int = 1
    iteration: int = 0
    metadata: Sequence[Mapping[str, Any]] = ()


class Sampler(ABC):
    """A transition kernel and where along the trajectory it is stochastic."""

    num_steps: int

    @property
    def offers(self) -> frozenset[str]:
        """Captures that the sampler records itself."""
        return frozenset({"clean_predictions"})

    @property
    def metadata_keys(self) -> frozenset[str]:
        """Keys of the training prompts, for samplers that read rather than denoise."""
        return frozenset()

    @property
    def whole_groups(self) -> bool:
        """Whether a group must be rolled out in one piece, since its rollouts share steps."""
        return False

    @abstractmethod
    def stochastic_steps(self, iteration: int) -> tuple[int, ...]:
        """The steps that have a log-probability in rollout batch number `iteration`."""

    @property
    def noisy_steps(self) -> int:
        """Of them, those at which one rollout draws noise: all, unless its group divides them up."""
        return len(self.stochastic_steps(0))

    @abstractmethod
    def rollout(self, policy: Policy, conditioning: Conditioning, request: RolloutRequest) -> Trajectory:
        """One trajectory per row of the conditioning, without gradient."""

    def check_group_size(self, group_size: int) -> None:  # noqa: B027 - most samplers take any
        """Refuse a group size that the sampler cannot make.

        Raises:
            ValueError: naming the sizes that work.
        """


# ---------------------------------------------------------------------------------------------------------- reward


@attrs.frozen(kw_only=True, eq=False)
class RewardBatch:
    """Images to judge. uint8 RGB is the only image contract.

    Attributes:
        images: [B, 3, H, W] uint8 RGB.
        prompts: B texts.
        metadata: B JSON-able mappings of task data.
        groups: [B] long, the prompt group of each image, for rewards that compare within a group.
        ids: B stable names, for caches and idempotent retries.
    """

    images: Tensor
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    groups: Tensor | None = None
    ids: Sequence[str] | None = None

    def __attrs_post_init__(self) -> None:
        axes = Axes("RewardBatch", B=len(self.prompts))
        axes.check("images", self.images, "B 3 H W")
        if self.images.dtype is not torch.uint8:
            raise ValueError(
                f"RewardBatch.images: got {self.images.dtype}, expected uint8 RGB. Convert with to_uint8(images)."
            )
        if len(self.metadata) != len(self.prompts):
            raise ValueError(f"RewardBatch: {len(self.metadata)} metadata entries for {len(self.prompts)} prompts.")

    @classmethod
    def of(cls, images: Tensor, prompts: Prompts) -> RewardBatch:
        """The images of whole groups, [P x G, 3, H, W], with what belongs to each."""
        return cls(
            images=images,
            prompts=prompts.per_rollout(prompts.texts),
            metadata=prompts.per_rollout(prompts.metadata),
            groups=torch.arange(len(prompts.texts)).repeat_interleave(prompts.group_size),
        )


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] floats to uint8 by rounding.

    Raises:
        ValueError: on NaN, which would silently become black.
    """
    if not torch.isfinite(images).all():
        raise ValueError("to_uint8: the images hold NaN or infinity; the sampler or the autoencoder diverged.")
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def _numbers(values: Any) -> Any:
    """A tensor as it is; arrays and sequences of real numbers or truth values as a tensor of their own."""
    if isinstance(values, Tensor):
        return values
    array = np.array(values, copy=True)
    if array.dtype.kind not in "buif" or isinstance(values, np.ma.MaskedArray | str):
        raise ValueError(
            f"RewardOutput: got {type(values).__name__} of {array.dtype}, expected a tensor or array of real numbers."
        )
    return torch.from_numpy(array if array.dtype.kind == "b" else array.astype(np.float32))


def _numbers_by_name(components: Any) -> Any:
    return {name: _numbers(v) for name, v in components.items()} if isinstance(components, Mapping) else components


@attrs.frozen(kw_only=True, eq=False)
class RewardOutput:
    """Scores with their validity. NumPy arrays and lists of numbers are taken for tensors.

    Attributes:
        scores: [B] float32 in the reward's documented unit.
        valid: [B] bool. A failure is invalid; it is never scored 0.
        components: name -> [B]; nan where a component does not apply.
        regions: per image, the regions judged.
        maps: [B, h, w] float32 >= 0, where the judged content is.
        info: per image, JSON-able details for the log.
    """

    scores: Tensor = attrs.field(converter=_numbers)
    valid: Tensor = attrs.field(converter=_numbers)
    components: Mapping[str, Tensor] = attrs.field(factory=dict, converter=_numbers_by_name)
    regions: Sequence[Sequence[Region]] | None = None
    maps: Tensor | None = attrs.field(default=None, converter=attrs.converters.optional(_numbers))
    info: Sequence[Mapping[str, Any]] | None = None

    def __attrs_post_init__(self) -> None:
        axes = Axes("RewardOutput")
        axes.check("scores", self.scores, "B")
        axes.check("valid", self.valid, "B")
        for name, values in self.components.items():
            axes.check(f"components[{name!r}]", values, "B")
        if self.maps is not None:
            axes.check("maps", self.maps, "B h w")

    @classmethod
    def all_valid(cls, scores: Tensor, **rest: Any) -> RewardOutput:
        """Of a reward that can judge every image.

        Args:
            scores: [B].
            rest: components, regions, maps and info.
        """
        return cls(scores=scores, valid=torch.ones(len(scores), dtype=torch.bool, device=scores.device), **rest)


CODE = f"rlt2i {__version__}"
"""The version of the code that scores, for fingerprints."""


class Reward(ABC):
    """Judges finished images."""

    @property
    def metadata_keys(self) -> frozenset[str]:
        """Of the prompts, checked when the prompts are loaded."""
        return frozenset()

    @property
    def offers(self) -> frozenset[str]:
        """Of {"maps", "regions"}, what `want` may ask for; "gradient" where `score_tensor` works."""
        return frozenset()

    @property
    def span(self) -> tuple[float, float] | None:
        """The documented range of the scores."""
        return None

    @property
    def scope(self) -> Literal["sample", "group"]:
        """ "group" when scores compare the images of one prompt."""
        return "sample"

    @property
    def concurrency(self) -> int:
        """Calls of `score` that may run at the same time. They run beside the rollout, in threads of their own."""
        return 1

    def networks(self) -> Mapping[str, int | None]:
        """Networks that scoring keeps on the policy's device -> bytes, for plans; None where that is not known.

        Parts that name the same weights share them.
        """
        return {type(self).__name__: None}

    @abstractmethod
    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        """Score each image; `want` names optional outputs ("maps", "regions")."""

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """[B] float32 scores, differentiable in the images; only where `offers` holds "gradient".

        Every score depends on its own image alone, and differs from that of `score` by the rounding to 8 bits only.

        Args:
            images: [B, 3, H, W] floats in [0, 1].
            prompts, metadata: of the B images.

        Raises:
            ValueError: when this reward has no gradient.
        """
        raise ValueError(
            f"{type(self).__name__} has no gradient with respect to the image. Use a reward that offers one (those of "
            "the CLIP family do), or an objective that learns from scores alone, such as DiffusionNFT()."
        )

    def fingerprint(self) -> dict[str, Any]:
        """What decides the scores (model id, revision, preprocessing, version); goes into the run log."""
        fields = attrs.asdict(self, recurse=False) if attrs.has(type(self)) else {}  # type: ignore[arg-type]
        return {"reward": type(self).__name__, **{k: repr(v) for k, v in fields.items()}, "code": CODE}

    def close(self) -> None:  # noqa: B027 - most rewards hold nothing
        """Release workers and connections."""


class RewardGradient(NamedTuple):
    """What a differentiable reward said of N decoded latents; both detached.

    Attributes:
        scores: [N] float32.
        gradient: [N, C, H, W], of each score with respect to its latents.
    """

    scores: Tensor
    gradient: Tensor


# ---------------------------------------------------------------------------------------------------------- credit


@attrs.frozen(kw_only=True, eq=False)
class CreditContext:
    """Everything a credit assigner may look at.

    Attributes:
        prompts, trajectory, rewards: of this batch (whole groups).
        token_grid: (h, w) of the image tokens.
        images: [B, 3, H, W] uint8 finished images.
        iteration: number of this rollout batch.
        keys: [B] long, a stable identity of each rollout; draws that belong to a rollout are functions of it.
        generator: for draws of a whole batch; a function of run and batch, the same on every process.
        score: (latents [N, C, H, W], rollouts [N]) -> scores of the decoded latents under the rollouts' prompts.
        reward_gradient: (latents [N, C, H, W], rollouts [N]) -> the same scores and their gradient; only for credit
            that needs the reward's gradient.
        complete: (latents [N, C, H, W], step, rollouts [N]) -> [N, C, H, W], the deterministic completion from `step`.
        gather: concatenates a [B] tensor over all processes; batch-wide statistics go through it.
        rank: number of this process; `local` are its rows of what `gather` returns.
    """

    prompts: Prompts
    trajectory: Trajectory
    rewards: Rewards
    token_grid: tuple[int, int]
    images: Tensor
    iteration: int
    keys: Tensor
    generator: torch.Generator
    score: Callable[[Tensor, Tensor], RewardOutput]
    reward_gradient: Callable[[Tensor, Tensor], RewardGradient]
    complete: Callable[[Tensor, int, Tensor], Tensor]
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    rank: int = 0

    @property
    def group_size(self) -> int:
        return self.prompts.group_size

    def local(self, gathered: Tensor) -> Tensor:
        """[B, ...] this process's rows of what was made of gathered rows; every process has equally many."""
        count = len(self.keys)
        return gathered[self.rank * count : (self.rank + 1) * count]


class CreditAssigner(ABC):
    """Distributes the reward of finished images over rollouts, steps and places."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What must be there."""

    @property
    def weight_needs(self) -> Needs:
        """The needs of weight and mask alone, for objectives that leave the advantage aside."""
        return self.needs

    @property
    def needs_by_part(self) -> tuple[tuple[str, Needs], ...]:
        """The same, by the part that has them: a refusal names it and gives its remedy."""
        return ((type(self).__name__, self.needs),)

    def who_needs(self, name: str) -> str:
        """Which of its parts have a need (one of `Needs.names`), for messages."""
        return ", ".join(part for part, needs in self.needs_by_part if name in needs.names)

    def scored_steps(self, num_steps: int) -> tuple[int, ...]:
        """The steps whose clean prediction is to be rewarded, besides the finished image."""
        return ()

    @abstractmethod
    def assign(self, context: CreditContext) -> Credit:
        """Detached credit for the batch."""


# ------------------------------------------------------------------------------------------------------- objective


@attrs.frozen(kw_only=True, eq=False)
class UpdateContext:
    """What an objective is given for one optimiser update.

    Attributes:
        seed: of this update. Draws are functions of it and of a rollout's key, so they do not depend on world size,
            order or micro-batches.
        micro_batch_size: (rollout, step) pairs per forward pass.
        num_rollouts: rollouts of this update over all processes, those without any advantage included: the denominator.
        num_groups: prompt groups of this update over all processes: the denominator of losses per group.
        num_pairs: (rollout, step) pairs with a log-probability that this update trains, over all processes, those
            without any advantage included: the denominator on the reverse process.
        on_policy: whether the weights are still those of the rollout; then the ratio is 1 by construction.
        weights: name -> context manager under which the policy carries that set ("old", "reference", "ema").
        reward_gradient: (latents [N, C, H, W], their N prompts) -> scores of the decoded latents and their gradient;
            only for objectives that need the reward's gradient.
    """

    seed: int
    micro_batch_size: int
    num_rollouts: int
    num_groups: int
    num_pairs: int
    on_policy: bool
    weights: Callable[[str], AbstractContextManager[None]]
    reward_gradient: Callable[[Tensor, Prompts], RewardGradient]

    def micro_batches(self, trainable: Tensor, *, passes: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Split the True entries of `trainable` [B, T] into (rollouts [N], steps [N]) with N <= micro_batch_size.

        Args:
            passes: forward passes that one backward pass goes through; N is smaller by that factor.
        """
        rollouts, steps = on_host(trainable).nonzero(as_tuple=True)
        size = max(1, self.micro_batch_size // passes)
        for start in range(0, len(rollouts), size):
            chunk = slice(start, start + size)
            batch = on_both(rollouts[chunk], trainable.device)
            self.handed_out(trainable, batch)
            yield batch, on_both(steps[chunk], trainable.device)

    def handed_out(self, trainable: Tensor, rows: Tensor) -> None:
        """Told of every micro-batch: what it was cut from, [B, T] bool, and its rows [N]; for objectives that wrap
        others and weigh their micro-batches."""

    def seeds(self, name: str, *keys: Tensor) -> list[int]:
        """One seed per row of the [N] integer `keys`."""
        return [derive_seed(self.seed, name, *row) for row in zip(*(on_host(k).tolist() for k in keys), strict=True)]


class Objective(ABC):
    """Turns credit into losses: one backward each. It knows nothing of how the credit came about."""

    @property
    def rollout_weights(self) -> Literal["online", "old"]:
        """Which parameter set samples."""
        return "online"

    @property
    def uses_advantage(self) -> bool:
        """Whether the loss depends on the advantage. Where it does not, a group of one will do."""
        return True

    @property
    def needs(self) -> Needs:
        """What must be there, and which rollouts have a gradient."""
        return Needs()

    @abstractmethod
    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        """Yield losses whose values add up to this process's share of the update's loss."""

    def starting_values(self, name: str) -> Mapping[str, Tensor] | None:
        """What a parameter set that it needs starts from, by the policy's parameter names; None for the policy's own.

        Such a set is read again when a run goes on, and kept in no checkpoint.
        """
        return None

    def trained_steps(self, sampler: Sampler) -> int:
        """(rollout, step) pairs of one rollout that an update learns from.

        Raises:
            ValueError: when the objective asks for steps that the sampler does not have.
        """
        return sampler.noisy_steps or sampler.num_steps

    def old_decay(self, optimizer_step: int) -> float:
        """Share of "old" that is kept when it follows the policy, after `optimizer_step` optimizer steps."""
        return 0.0
