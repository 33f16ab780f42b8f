"""FLUX.1: double- and single-stream blocks over [text; image], packed latents, guidance as an input of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
from torch import Tensor

from rlt2i.policies.lora import FLOW_GRPO_TARGETS
from rlt2i.policies.pretrained import DATA, PretrainedPolicy, PretrainedSpec
from rlt2i.types import Conditioning


@attrs.frozen(kw_only=True, eq=False)
class FluxPolicy(PretrainedPolicy):
    """A loaded FLUX.1."""

    spec: Flux
    tokenizer: ClassVar = "tokenizer_2"

    @property
    def latent_channels(self) -> int:
        return int(self.network.config.in_channels) // 4

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        embeddings, pooled, _ = self.pipe.encode_prompt(
            text, None, device=self.device, max_sequence_length=self.spec.max_sequence_length
        )
        return {"embeddings": embeddings[0], "pooled": pooled[0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        n, c, h, w = latents.shape
        embeddings = conditioning["embeddings"]
        guidance = sigma.new_full((n,), self.spec.embedded_guidance) if self.network.config.guidance_embeds else None
        output = self.network(
            hidden_states=self.pipe._pack_latents(latents, n, c, h, w),
            encoder_hidden_states=embeddings,
            pooled_projections=conditioning["pooled"],
            timestep=(1000 * sigma).to(latents.dtype) / 1000,  # rounded as the pipeline rounds it
            img_ids=self.pipe._prepare_latent_image_ids(n, h // 2, w // 2, latents.device, latents.dtype),
            txt_ids=latents.new_zeros(embeddings.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        pixels = self.pixels_per_latent
        return self.pipe._unpack_latents(output, h * pixels, w * pixels, pixels)


@attrs.frozen(kw_only=True)
class Flux(PretrainedSpec):
    """A FLUX.1 pipeline to train: FLUX.1-dev, or a model of its layout.

    Attributes:
        embedded_guidance: the scale that a guidance-distilled model reads as an input. `guidance_scale` is another,
            true classifier-free guidance, which FLUX.1-dev needs no more.
        max_sequence_length: T5 tokens.
    """

    path: str = attrs.field(default="black-forest-labs/FLUX.1-dev", validator=attrs.validators.min_len(1))
    embedded_guidance: float = attrs.field(default=3.5, validator=attrs.validators.ge(0))
    max_sequence_length: int = attrs.field(default=512, validator=attrs.validators.ge(1))

    pipeline: ClassVar = "FluxPipeline"
    policy: ClassVar = FluxPolicy
    targets: ClassVar = FLOW_GRPO_TARGETS
    known: ClassVar = {"black-forest-labs/FLUX.1-dev": DATA / "flux1_dev.json"}
    licences: ClassVar = {"black-forest-labs/FLUX.1-dev": "FLUX.1 [dev] Non-Commercial; gated"}

    def stock_call(self) -> dict[str, Any]:
        return super().stock_call() | {"guidance_scale": float(self.embedded_guidance)}

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        return int(config["num_layers"] + config["num_single_layers"])

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.config("transformer")
        return {
            "embeddings": (self.max_sequence_length, config["joint_attention_dim"]),
            "pooled": (config["pooled_projection_dim"],),
        }

    def drawing(self) -> dict[str, Any] | None:
        return {**(super().drawing() or {}), "guidance_scale": self.embedded_guidance}
