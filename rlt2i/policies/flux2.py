"""FLUX.2: double- and single-stream blocks over [text; image], 2 x 2 latents as channels, a shift by size and steps.

FLUX.2-klein-base-4B is open under Apache-2.0; -9B and FLUX.2-dev (32B) are gated, under FLUX's non-commercial licence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from rlt2i.policies.lora import FLOW_GRPO_TARGETS
from rlt2i.policies.pretrained import DATA, PretrainedPolicy, PretrainedSpec, in_template
from rlt2i.types import Conditioning, ImageSize


@attrs.frozen(kw_only=True, eq=False)
class Flux2Policy(PretrainedPolicy):
    """A loaded FLUX.2."""

    spec: Flux2Spec
    patch: ClassVar = 1
    padded: ClassVar = True

    @property
    def pixels_per_latent(self) -> int:
        return 2 * int(self.pipe.vae_scale_factor)

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        h, w = self.token_grid(size)
        return self.scheduler_sigmas(num_steps, mu=compute_empirical_mu(h * w, num_steps))

    def written(self, text: str) -> tuple[str, int]:
        return in_template(lambda prompt: self.spec.chat(self.pipe, prompt), text)

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        length = self.spec.max_sequence_length
        return {"embeddings": self.pipe.encode_prompt(text, self.device, max_sequence_length=length)[0][0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        embeddings = conditioning["embeddings"]
        with latents.device:  # where the pipeline makes them on the CPU
            image_ids, text_ids = self.pipe._prepare_latent_ids(latents), self.pipe._prepare_text_ids(embeddings[:1])
        output: Tensor = self.network(
            hidden_states=self.pipe._pack_latents(latents),
            encoder_hidden_states=embeddings,
            timestep=(1000 * sigma).to(latents.dtype) / 1000,  # rounded as the pipeline rounds it
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=self.spec.embedded(sigma),
            return_dict=False,
        )[0]
        return output.mT.reshape(latents.shape)


@attrs.frozen(kw_only=True)
class Flux2Spec(PretrainedSpec):
    """What the models of FLUX.2 share.

    Attributes:
        max_sequence_length: tokens of the text, to which every prompt is padded; no mask hides the padding.
    """

    max_sequence_length: int = attrs.field(default=512, validator=attrs.validators.ge(1))

    policy: ClassVar = Flux2Policy
    targets: ClassVar = (*FLOW_GRPO_TARGETS, "attn.to_qkv_mlp_proj", "attn.to_out")

    @abstractmethod
    def chat(self, pipe: Any, text: str) -> str:
        """The conversation that the text encoder reads for a prompt."""

    def embedded(self, sigma: Tensor) -> Tensor | None:
        """[N] the guidance that the network reads as an input, if it does."""
        return None

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        return int(config["num_layers"] + config["num_single_layers"])

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embeddings": (self.max_sequence_length, self.config("transformer")["joint_attention_dim"])}


@attrs.frozen(kw_only=True)
class Flux2Klein(Flux2Spec):
    """A FLUX.2-klein pipeline to train: the base models, which true guidance steers, or the distilled ones."""

    path: str = attrs.field(default="black-forest-labs/FLUX.2-klein-base-4B", validator=attrs.validators.min_len(1))

    pipeline: ClassVar = "Flux2KleinPipeline"
    licences: ClassVar = {
        "black-forest-labs/FLUX.2-klein-base-4B": "Apache-2.0; open",
        "black-forest-labs/FLUX.2-klein-base-9B": "FLUX Non-Commercial; gated",
    }
    known: ClassVar = {
        f"black-forest-labs/FLUX.2-klein-base-{size}": DATA / f"flux2_klein_{size.lower()}.json"
        for size in ("4B", "9B")
    }

    def chat(self, pipe: Any, text: str) -> str:
        message = {"role": "user", "content": text}
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return str(pipe.tokenizer.apply_chat_template([message], **options))

    def check(self) -> None:
        if self.guided and self.config("").get("is_distilled"):
            raise ValueError(
                f"Flux2Klein(path={self.path!r}, guidance_scale={self.guidance_scale:g}): this model is distilled, and "
                "its pipeline ignores guidance. Set guidance_scale=1, or train a base model "
                "(black-forest-labs/FLUX.2-klein-base-4B)."
            )


@attrs.frozen(kw_only=True)
class Flux2(Flux2Spec):
    """FLUX.2-dev to train.

    Attributes:
        embedded_guidance: the scale that this guidance-distilled model reads as an input. Its pipeline has no other;
            `guidance_scale` is true classifier-free guidance all the same.
    """

    path: str = attrs.field(default="black-forest-labs/FLUX.2-dev", validator=attrs.validators.min_len(1))
    embedded_guidance: float = attrs.field(default=4.0, validator=attrs.validators.ge(0))

    pipeline: ClassVar = "Flux2Pipeline"
    licences: ClassVar = {"black-forest-labs/FLUX.2-dev": "FLUX Non-Commercial; gated"}
    known: ClassVar = {"black-forest-labs/FLUX.2-dev": DATA / "flux2_dev.json"}

    def chat(self, pipe: Any, text: str) -> str:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        conversation = format_input([text], system_message=pipe.system_message)
        return str(pipe.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)[0])

    def drawing(self) -> dict[str, Any] | None:
        return {**(super().drawing() or {}), "guidance_scale": self.embedded_guidance}

    def embedded(self, sigma: Tensor) -> Tensor:
        return torch.full_like(sigma, self.embedded_guidance)
