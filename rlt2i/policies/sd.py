"""Stable Diffusion 1.x and 2.x: a UNet that predicts noise, as a flow policy, watched in its cross-attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from rlt2i.policies.epsilon import VPPolicy, VPSchedule
from rlt2i.policies.pretrained import PretrainedPolicy, PretrainedSpec
from rlt2i.policies.pretrained.policy import Order
from rlt2i.types import Conditioning

DDPO_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
"""The projections of self- and cross-attention, as DDPO adapts them."""


@attrs.frozen(kw_only=True, eq=False)
class StableDiffusionPolicy(VPPolicy, PretrainedPolicy):
    """A loaded Stable Diffusion: cross-attention at every resolution, read on a grid of 4 x 4 latents a cell.

    At 512 px that is 16 x 16 cells, where cross-attention tells objects apart.
    """

    spec: StableDiffusion
    attention: ClassVar = "attn2"
    patch: ClassVar = 4
    order: ClassVar[Order] = "cross"

    @functools.cached_property
    def schedule(self) -> VPSchedule:
        schedule = self.spec.schedule
        return attrs.evolve(schedule, alpha_bars=schedule.alpha_bars.to(self.device))

    def blocks(self) -> Sequence[torch.nn.Module]:
        parts = [*self.network.down_blocks, self.network.mid_block, *self.network.up_blocks]
        return [block for part in parts for block in part.modules() if hasattr(block, "attn2")]

    @property
    def granularity(self) -> int:
        coarsest = 2 ** (len(self.network.config.block_out_channels) - 1)
        return self.pixels_per_latent * max(coarsest, self.patch)

    @property
    def text_length(self) -> int:
        return int(self.pipe.tokenizer.model_max_length)

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        return {"embeddings": self.pipe.encode_prompt(text, self.device, 1, False)[0][0]}

    def predict(self, x_vp: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        x = x_vp.to(self.spec.compute_dtype)
        with self.precision():
            output: Tensor = self.network(
                x, timesteps, encoder_hidden_states=conditioning["embeddings"], return_dict=False
            )[0]
        return output


@attrs.frozen(kw_only=True)
class StableDiffusion(PretrainedSpec):
    """A Stable Diffusion 1.x or 2.x pipeline to train.

    Rollouts visit the timesteps of DDIM. The last step ends at its clean prediction; diffusers' DDIM ends there too
    where the scheduler says set_alpha_to_one, and otherwise leaves the noise of timestep 0 in the latents.
    """

    path: str = attrs.field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5", validator=attrs.validators.min_len(1)
    )

    pipeline: ClassVar = "StableDiffusionPipeline"
    policy: ClassVar = StableDiffusionPolicy
    network: ClassVar = "unet"
    targets: ClassVar = DDPO_TARGETS
    directions: ClassVar = ("image_to_text",)
    known: ClassVar = {"stable-diffusion-v1-5/stable-diffusion-v1-5": Path(__file__).parent / "data" / "sd15.json"}

    @property
    def schedule(self) -> VPSchedule:
        """The noise levels of its scheduler's configuration.

        Raises:
            ValueError: for a scheduler that the change of variables does not cover.
        """
        return VPSchedule.from_config(self.config("scheduler"), who=f"StableDiffusion(path={self.path!r})")

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        layers, down, up = config["layers_per_block"], config["down_block_types"], config["up_block_types"]
        middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        return int(
            layers * sum("CrossAttn" in kind for kind in down)
            + (middle is not None and "CrossAttn" in middle)
            + (layers + 1) * sum("CrossAttn" in kind for kind in up)
        )

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        text = self.config("text_encoder")
        return {"embeddings": (text["max_position_embeddings"], text["hidden_size"])}

    def components(self) -> dict[str, Any]:
        left_out = ("safety_checker", "feature_extractor", "image_encoder")
        return {**dict.fromkeys(left_out), "requires_safety_checker": False}

    def check(self) -> None:
        """Refuse schedules that are not covered, and relatives that need more than text: inpainting, SDXL."""
        who = f"StableDiffusion(path={self.path!r})"
        unet, vae = self.config("unet"), self.config("vae")
        _ = self.schedule
        if unet["in_channels"] != vae["latent_channels"]:
            raise ValueError(
                f"{who}: its UNet reads {unet['in_channels']} channels, its autoencoder has {vae['latent_channels']}; "
                "inpainting and upscaling models are not text-to-image models. Use the base model."
            )
        if unet.get("addition_embed_type") or unet.get("class_embed_type") or unet.get("num_class_embeds"):
            raise ValueError(
                f"{who}: its UNet needs more than a prompt, as SDXL's does. Use a Stable Diffusion 1.x or 2.x, or "
                "write a policy on rlt2i.policies.epsilon.VPPolicy."
            )
