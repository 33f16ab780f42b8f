"""Classifier-free guidance around any policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from rlt2i.interfaces import Policy
from rlt2i.types import Conditioning, ImageSize, Prompts

_IS_EMPTY = "guidance/is_empty_prompt"


@attrs.frozen(kw_only=True, eq=False)
class Guided(Policy):
    """v = v_0 + scale (v_c - v_0), where v_0 is the velocity under the empty prompt; captures come from v_c alone.

    Without gradient (or with `uncond_grad`) both branches share one forward pass of 2N rows. Otherwise the
    unconditional branch runs on its own without gradient, which halves the memory of the backward pass.

    Attributes:
        policy: the conditional policy.
        scale: 1 gives the conditional velocity itself.
        uncond_grad: whether gradients flow through the unconditional branch.
    """

    policy: Policy
    scale: float
    uncond_grad: bool = False

    @property
    def offers(self) -> frozenset[str]:  # type: ignore[override]
        return self.policy.offers

    def encode(self, prompts: Prompts) -> Conditioning:
        """The prompts' rows, then one of the empty prompt that no rollout refers to."""
        if self.scale == 1.0:
            return self.policy.encode(prompts)
        with_empty = attrs.evolve(
            prompts,
            texts=(*prompts.texts, ""),
            metadata=(*prompts.metadata, {}),
            core=(*prompts.core, ()),
            draws=(*prompts.draws, -1),
        )
        encoded = self.policy.encode(with_empty)
        is_empty = torch.zeros(len(with_empty.texts), dtype=torch.bool, device=encoded.rows.device)
        is_empty[-1] = True
        return attrs.evolve(
            encoded, tensors={**encoded.tensors, _IS_EMPTY: is_empty}, rows=encoded.rows[: prompts.num_rollouts]
        )

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self._guided(latents, sigma, conditioning, None)[0]

    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._guided(latents, sigma, conditioning, names)

    def _guided(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.scale == 1.0:
            return self._run(latents, sigma, conditioning, names)
        empty = self._empty(conditioning)
        if torch.is_grad_enabled() and not self.uncond_grad:
            with torch.no_grad():
                unconditional = self.policy.velocity(latents, sigma, empty)
            conditional, captures = self._run(latents, sigma, conditioning, names)
        else:
            both = attrs.evolve(conditioning, rows=torch.cat([empty.rows, conditioning.rows]))
            velocity, captures = self._run(latents.repeat(2, 1, 1, 1), sigma.repeat(2), both, names)
            unconditional, conditional = velocity.chunk(2)
            captures = {name: capture[len(latents) :] for name, capture in captures.items()}
        return unconditional + self.scale * (conditional - unconditional), captures

    def _run(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if names is None:
            return self.policy.velocity(latents, sigma, conditioning), {}
        return self.policy.velocity_with_captures(latents, sigma, conditioning, names)

    def _empty(self, conditioning: Conditioning) -> Conditioning:
        if _IS_EMPTY not in conditioning.tensors:
            raise ValueError(
                "Guided: this conditioning has no empty prompt; encode the prompts with the guided policy."
            )
        row = conditioning.tensors[_IS_EMPTY].long().argmax()
        return attrs.evolve(conditioning, rows=row.expand(len(conditioning)))

    # ------------------------------------------------------------------------------------------------- delegated

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        return self.policy.sigmas(num_steps, size)

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[tuple[int, int]]]]:
        return self.policy.text_streams(text)

    def latent_shape(self, size: ImageSize) -> tuple[int, int, int]:
        return self.policy.latent_shape(size)

    def token_grid(self, size: ImageSize) -> tuple[int, int]:
        return self.policy.token_grid(size)

    def decode(self, latents: Tensor) -> Tensor:
        return self.policy.decode(latents)

    def encode_images(self, images: Tensor) -> Tensor:
        return self.policy.encode_images(images)

    def initial_latents(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return self.policy.initial_latents(noise, sigma)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.policy.trainable_parameters()

    def export(self, folder: Path) -> None:
        self.policy.export(folder)
