"""Qwen-Image: double-stream blocks over [text; image], each prompt at its own length, the template's tokens dropped.

Qwen-Image and Qwen-Image-2512 (20B) are open, under Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
from torch import Tensor

from rlt2i.policies.guidance import GuidanceForm, RescaledGuidance
from rlt2i.policies.lora import FLOW_GRPO_TARGETS
from rlt2i.policies.pretrained import DATA, PretrainedPolicy, PretrainedSpec, in_template
from rlt2i.policies.token_spans import Characters
from rlt2i.types import Conditioning

_LONGEST = 1024
"""Tokens of a prompt that the pipeline accepts."""


@attrs.frozen(kw_only=True, eq=False)
class QwenImagePolicy(PretrainedPolicy):
    """A loaded Qwen-Image."""

    spec: QwenImage

    @property
    def latent_channels(self) -> int:
        return int(self.network.config.in_channels) // 4

    @property
    def text_length(self) -> int:
        return self.spec.max_sequence_length + int(self.pipe.prompt_template_encode_start_idx)

    def written(self, text: str) -> tuple[str, int]:
        return in_template(self.pipe.prompt_template_encode.format, text)

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[Characters]]]:
        dropped = int(self.pipe.prompt_template_encode_start_idx)
        return {"text": (-dropped, super().text_streams(text)["text"][1])}

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        length = self.spec.max_sequence_length
        return {"embeddings": self.pipe.encode_prompt(text, self.device, max_sequence_length=length)[0][0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        n, c, h, w = latents.shape
        output = self.network(
            hidden_states=self.pipe._pack_latents(latents, n, c, h, w),
            encoder_hidden_states=conditioning["embeddings"],
            encoder_hidden_states_mask=self.text_mask(conditioning),
            timestep=(1000 * sigma).to(latents.dtype) / 1000,  # rounded as the pipeline rounds it
            img_shapes=[[(1, h // 2, w // 2)]] * n,
            return_dict=False,
        )[0]
        pixels = self.pixels_per_latent
        unpacked: Tensor = self.pipe._unpack_latents(output, h * pixels, w * pixels, pixels)
        return unpacked[:, :, 0]


@attrs.frozen(kw_only=True)
class QwenImage(PretrainedSpec):
    """A Qwen-Image pipeline to train.

    Attributes:
        guidance: as its pipeline by default: every token of a guided velocity keeps the norm of the prompt's own.
        max_sequence_length: tokens of the prompt, its template not counted.
    """

    path: str = attrs.field(default="Qwen/Qwen-Image", validator=attrs.validators.min_len(1))
    guidance: GuidanceForm = attrs.field(factory=RescaledGuidance)
    max_sequence_length: int = attrs.field(
        default=512, validator=[attrs.validators.ge(1), attrs.validators.le(_LONGEST)]
    )

    pipeline: ClassVar = "QwenImagePipeline"
    licences: ClassVar = dict.fromkeys(("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"), "Apache-2.0; open")
    policy: ClassVar = QwenImagePolicy
    known: ClassVar = dict.fromkeys(("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"), DATA / "qwen_image.json")
    targets: ClassVar = FLOW_GRPO_TARGETS

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embeddings": (self.max_sequence_length, self.config("transformer")["joint_attention_dim"])}
