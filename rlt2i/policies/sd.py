"""Stable Diffusion 1.x and 2.x: a UNet that predicts noise, as a flow policy, watched in its cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
from torch import Tensor

from rlt2i.policies.pretrained import DATA
from rlt2i.policies.unet import UNetPolicy, UNetSpec


@attrs.frozen(kw_only=True, eq=False)
class StableDiffusionPolicy(UNetPolicy):
    """A loaded Stable Diffusion."""

    spec: StableDiffusion

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        return {"embeddings": self.pipe.encode_prompt(text, self.device, 1, False)[0][0]}


@attrs.frozen(kw_only=True)
class StableDiffusion(UNetSpec):
    """A Stable Diffusion 1.x or 2.x pipeline to train."""

    path: str = attrs.field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5", validator=attrs.validators.min_len(1)
    )

    pipeline: ClassVar = "StableDiffusionPipeline"
    policy: ClassVar = StableDiffusionPolicy
    known: ClassVar = {"stable-diffusion-v1-5/stable-diffusion-v1-5": DATA / "sd15.json"}
    licences: ClassVar = {"stable-diffusion-v1-5/stable-diffusion-v1-5": "CreativeML Open RAIL-M; open"}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        text = self.config("text_encoder")
        return {"embeddings": (text["max_position_embeddings"], text["hidden_size"])}

    def components(self) -> dict[str, Any]:
        left_out = ("safety_checker", "feature_extractor", "image_encoder")
        return {**dict.fromkeys(left_out), "requires_safety_checker": False}

    def check(self) -> None:
        """Refuse relatives that need more than text, such as SDXL."""
        super().check()
        unet = self.config("unet")
        if unet.get("addition_embed_type") or unet.get("class_embed_type") or unet.get("num_class_embeds"):
            raise ValueError(
                f"{self.who}: its UNet needs more than a prompt, as SDXL's does. Use policy.type=SDXL for SDXL, a "
                "Stable Diffusion 1.x or 2.x here, or write a policy on rlt2i.policies.epsilon.VPPolicy."
            )
