"""The policy under examination, and the prompts, latents and noise levels that it is shown."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor

from rlt2i.captures import DIRECTIONS, Direction, parse_attention_name
from rlt2i.interfaces import Policy, PolicySpec
from rlt2i.policies.epsilon import VPPolicy
from rlt2i.policies.guidance import Guided
from rlt2i.types import Conditioning, ImageSize, Prompts, height_and_width

TEXTS = ("a red cat and a blue dog", 'a sign saying "HELLO" on two boxes', "")
GROUP_SIZE = 2
SIDES = (32, 64, 128, 256, 512, 1024)
"""Tried in this order where no size is given."""


class Mistake(AssertionError):
    """What a policy does wrong, and what it should do."""


def require(condition: object, message: str) -> None:
    """
    Raises:
        Mistake: with the message, unless the condition holds.
    """
    if not condition:
        raise Mistake(message)


@attrs.frozen(eq=False, kw_only=True)
class Subject:
    """A policy to examine.

    Attributes:
        spec: of the policy.
        device: where it is loaded.
        asked_size: the image size to use, or None for the smallest of SIDES that the policy takes.
    """

    spec: PolicySpec
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=torch.device)
    asked_size: ImageSize | None = None

    def __attrs_post_init__(self) -> None:
        _ = self.policy, self.size  # what cannot be loaded or shown an image is no subject

    def __hash__(self) -> int:
        return id(self)

    @functools.cached_property
    def policy(self) -> Policy:
        """Loaded."""
        return self.spec.load(self.device)

    @functools.cached_property
    def size(self) -> ImageSize:
        """Of the images.

        Raises:
            ValueError: when no usual size is taken.
        """
        if self.asked_size is not None:
            self.policy.latent_shape(self.asked_size)
            return self.asked_size
        said = ""
        for side in SIDES:
            try:
                self.policy.latent_shape(side)
            except ValueError as error:
                said = str(error)
            else:
                return side
        raise ValueError(f"the policy takes none of the sizes {SIDES}: {said} Give one it takes: --size 48x80.")

    @functools.cached_property
    def oblong(self) -> ImageSize | None:
        """A size that is no square, where the policy takes one."""
        height, width = height_and_width(self.size)
        for size in ((height, 2 * width), (2 * height, width), (height, width // 2), (height // 2, width)):
            try:
                self.policy.latent_shape(size)
            except ValueError:
                continue
            if size[0] != size[1]:
                return size
        return None

    @property
    def sizes(self) -> list[ImageSize]:
        """The size, and the one that is no square."""
        return [self.size] if self.oblong is None else [self.size, self.oblong]

    @functools.cached_property
    def prompts(self) -> Prompts:
        """Three, one of them empty, two rollouts each."""
        return Prompts.of(TEXTS, group_size=GROUP_SIZE)

    @functools.cached_property
    def conditioning(self) -> Conditioning:
        """The prompts, encoded."""
        return self.policy.encode(self.prompts)

    @property
    def num_rows(self) -> int:
        return self.prompts.num_rollouts

    @functools.cached_property
    def sigma(self) -> Tensor:
        """[6] levels of the policy's own schedule."""
        return self.policy.sigmas(self.num_rows, self.size)[:-1].float().to(self.device)

    @functools.cached_property
    def latents(self) -> Tensor:
        """[6, C, H, W] standard normal."""
        return self.noise(self.size)

    def noise(self, size: ImageSize, seed: int = 0) -> Tensor:
        """[6, C, H, W] standard normal latents of an image size."""
        shape = (self.num_rows, *self.policy.latent_shape(size))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def velocity(self, *, grad: bool = False) -> Tensor:
        """Of the latents above."""
        with torch.set_grad_enabled(grad):
            return self.policy.velocity(self.latents, self.sigma, self.conditioning)

    @property
    def tolerance(self) -> float:
        """Relative rounding that another batch geometry may bring; clean predictions of noise predictors amplify it."""
        if getattr(self.spec, "compute_dtype", torch.float32) != torch.float32:
            return 5e-2
        inner = self.policy.policy if isinstance(self.policy, Guided) else self.policy
        return 5e-3 if isinstance(inner, VPPolicy) else 1e-4

    @property
    def directions(self) -> list[Direction]:
        """Of the maps on offer."""
        return [d for d in DIRECTIONS if any(n.startswith(f"attention/{d}/") for n in self.attention_names)]

    @functools.cached_property
    def attention_names(self) -> list[str]:
        """Attention maps on offer."""
        return sorted(name for name in self.spec.offers if name.startswith("attention/"))

    @functools.cached_property
    def some_names(self) -> frozenset[str]:
        """A few captures: of the first block, of all and of the middle, in every direction."""
        some = {n for n in self.attention_names if parse_attention_name(n)[1] in ("0", "all", "middle")}
        return frozenset(some or self.spec.offers)

    @contextmanager
    def moved(self) -> Iterator[dict[str, torch.nn.Parameter]]:
        """The trainable parameters, moved off their start, where half of an adapter is zero; put back afterwards."""
        parameters = self.policy.trainable_parameters()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        draw = torch.Generator().manual_seed(1)
        try:
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter), alpha=0.02)
            yield parameters
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])
                    parameter.grad = None


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the scale of `b`."""
    if a.shape != b.shape:
        return float("inf")
    scale = float(b.detach().float().abs().mean()) or 1.0
    return float((a.detach().float() - b.detach().float()).abs().max()) / scale
