"""UNets that predict noise, as flow policies: what Stable Diffusion and SDXL share."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from rlt2i.functional.transfer import to_device
from rlt2i.policies.epsilon import VPPolicy, VPSchedule
from rlt2i.policies.pretrained import PretrainedPolicy, PretrainedSpec
from rlt2i.policies.pretrained.policy import Order
from rlt2i.types import Conditioning

DDPO_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
"""The projections of self- and cross-attention, as DDPO adapts them."""


@attrs.frozen(kw_only=True, eq=False)
class UNetPolicy(VPPolicy, PretrainedPolicy):
    """Cross-attention at every resolution, read on a grid of 4 x 4 latents a cell.

    At 512 px that is 16 x 16 cells, where cross-attention tells objects apart.
    """

    spec: UNetSpec
    attention: ClassVar = "attn2"
    patch: ClassVar = 4
    order: ClassVar[Order] = "cross"

    @functools.cached_property
    def schedule(self) -> VPSchedule:
        schedule = self.spec.schedule
        return attrs.evolve(schedule, alpha_bars=to_device(schedule.alpha_bars, self.device))

    def blocks(self) -> Sequence[torch.nn.Module]:
        parts = [*self.network.down_blocks, self.network.mid_block, *self.network.up_blocks]
        return [block for part in parts if part is not None for block in part.modules() if hasattr(block, "attn2")]

    @property
    def granularity(self) -> int:
        coarsest = 2 ** (len(self.network.config.block_out_channels) - 1)
        return self.pixels_per_latent * max(coarsest, self.patch)

    @property
    def text_length(self) -> int:
        return int(self.pipe.tokenizer.model_max_length)

    def predict(self, x_vp: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        x = x_vp.to(self.spec.compute_dtype)
        options = {"encoder_hidden_states": conditioning["embeddings"], **self.further(x, conditioning)}
        with self.precision():
            output: Tensor = self.network(x, timesteps, **options, return_dict=False)[0]
        return output

    def further(self, x: Tensor, conditioning: Conditioning) -> Mapping[str, Any]:
        """What else the UNet is told."""
        return {}


@attrs.frozen(kw_only=True)
class UNetSpec(PretrainedSpec):
    """A pipeline around a UNet that predicts noise.

    Rollouts visit the timesteps of DDIM. The last step ends at its clean prediction; diffusers' DDIM ends there too
    where the scheduler says set_alpha_to_one, and otherwise leaves the noise of timestep 0 in the latents.
    """

    network: ClassVar = "unet"
    targets: ClassVar = DDPO_TARGETS
    directions: ClassVar = ("image_to_text",)

    @property
    def schedule(self) -> VPSchedule:
        """The noise levels of its scheduler's configuration.

        Raises:
            ValueError: for a scheduler that the change of variables does not cover.
        """
        return VPSchedule.from_config(self.config("scheduler"), who=self.who)

    @property
    def who(self) -> str:
        """For messages."""
        return f"{type(self).__name__}(path={self.path!r})"

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        down, up, layers = config["down_block_types"], config["up_block_types"], config["layers_per_block"]
        depths = config.get("transformer_layers_per_block", 1)
        depths = [depths] * len(down) if isinstance(depths, int) else list(depths)
        middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        return int(
            sum(layers * depth for kind, depth in zip(down, depths, strict=True) if "CrossAttn" in kind)
            + (depths[-1] if middle is not None and "CrossAttn" in middle else 0)
            + sum((layers + 1) * depth for kind, depth in zip(up, depths[::-1], strict=True) if "CrossAttn" in kind)
        )

    def drawing(self) -> dict[str, Any] | None:
        return None  # the pipeline's scheduler steps in its own variables, and may end at another place

    def check(self) -> None:
        """Refuse schedules that are not covered, and networks that read more than latents and text."""
        unet, vae = self.config("unet"), self.config("vae")
        _ = self.schedule
        if unet["in_channels"] != vae["latent_channels"]:
            raise ValueError(
                f"{self.who}: its UNet reads {unet['in_channels']} channels, its autoencoder has "
                f"{vae['latent_channels']}; inpainting and upscaling models are not text-to-image models. Use the base "
                "model."
            )
