"""SANA: linear self-attention, softmax cross-attention to Gemma's tokens, latents of 32 x 32 pixels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
from torch import Tensor

from rlt2i.policies.pretrained import DATA, PretrainedPolicy, PretrainedSpec
from rlt2i.policies.token_spans import Characters
from rlt2i.types import Conditioning, ImageSize


@attrs.frozen(kw_only=True, eq=False)
class SanaPolicy(PretrainedPolicy):
    """A loaded SANA."""

    spec: Sana
    attention: ClassVar = "attn2"
    patch: ClassVar = 1
    order: ClassVar = "cross"

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        return self.scheduler_sigmas(num_steps)

    @property
    def instruction(self) -> list[str]:
        """What the pipeline asks Gemma to do with a prompt."""
        default = inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default
        return list(default) if self.spec.instruction else []

    @property
    def text_length(self) -> int:
        template = self.written("")[0]
        return self.spec.max_sequence_length + (len(self.pipe.tokenizer.encode(template)) - 2 if template else 0)

    def written(self, text: str) -> tuple[str, int]:
        template = "\n".join(self.instruction)
        return template + text.lower().strip(), len(template) - (len(text) - len(text.lstrip()))

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[Characters]]]:
        # Of the padded sequence the pipeline keeps the first token and the last ones.
        ranges = list(super().text_streams(text)["text"][1])
        ranges += [(0, 0)] * (self.text_length - len(ranges))
        return {"text": (0, [ranges[0], *ranges[len(ranges) - self.spec.max_sequence_length + 1 :]])}

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        options: dict[str, Any] = {"complex_human_instruction": None if negative else self.instruction}
        embeddings, mask, *_ = self.pipe.encode_prompt(
            text, False, device=self.device, max_sequence_length=self.spec.max_sequence_length, **options
        )
        return {"embeddings": embeddings[0], "mask": mask[0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.network(
            hidden_states=latents,
            encoder_hidden_states=conditioning["embeddings"].to(latents.dtype),
            timestep=1000 * sigma * self.network.config.timestep_scale,
            encoder_attention_mask=conditioning["mask"],
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]  # some predict a variance too


@attrs.frozen(kw_only=True)
class Sana(PretrainedSpec):
    """A SANA 1.0 or 1.5 pipeline to train.

    Attributes:
        instruction: put the pipeline's own instruction to Gemma before each prompt, as it does by default.
        max_sequence_length: Gemma tokens that the network sees.
    """

    path: str = attrs.field(
        default="Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", validator=attrs.validators.min_len(1)
    )
    instruction: bool = True
    max_sequence_length: int = attrs.field(default=300, validator=attrs.validators.ge(2))

    pipeline: ClassVar = "SanaPipeline"
    policy: ClassVar = SanaPolicy
    targets: ClassVar = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v")
    directions: ClassVar = ("image_to_text",)
    known: ClassVar = {"Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": DATA / "sana15.json"}
    licences: ClassVar = {"Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": "NSCL v2, non-commercial; open"}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.config("transformer")["caption_channels"]
        return {"embeddings": (self.max_sequence_length, width), "mask": (self.max_sequence_length,)}
