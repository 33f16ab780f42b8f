"""Krea 2: one stream of [text; image], the text as a stack of hidden states, four queries to a pair of key and value.

Krea 2 (12.8B) is gated, under Krea's community licence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
from torch import Tensor

from rlt2i.policies.guidance import GuidanceForm, OffsetGuidance
from rlt2i.policies.pretrained import DATA, PretrainedPolicy, PretrainedSpec
from rlt2i.policies.token_spans import Characters
from rlt2i.types import Conditioning, ImageSize

_DISTILLED_SHIFT = 1.15


@attrs.frozen(kw_only=True, eq=False)
class Krea2Policy(PretrainedPolicy):
    """A loaded Krea 2."""

    spec: Krea2

    @property
    def latent_channels(self) -> int:
        return int(self.network.config.in_channels) // 4

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        h, w = self.token_grid(size)
        distilled = self.pipe.config.is_distilled
        return self.scheduler_sigmas(num_steps, mu=_DISTILLED_SHIFT if distilled else self.shift_of(h * w))

    @property
    def text_length(self) -> int:
        pipe = self.pipe  # the prompt's own tokens and those of the template before it; those after it always fit
        around = pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens
        return int(self.spec.max_sequence_length + around)

    def written(self, text: str) -> tuple[str, int]:
        prefix = self.pipe.prompt_template_encode_prefix
        return prefix + text, len(prefix)

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[Characters]]]:
        dropped = int(self.pipe.prompt_template_encode_start_idx)
        return {"text": (-dropped, super().text_streams(text)["text"][1])}

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        length = self.spec.max_sequence_length
        embeddings, mask = self.pipe.encode_prompt(text, self.device, max_sequence_length=length)
        return {"embeddings": embeddings[0], "mask": mask[0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        n, c, h, w = latents.shape
        embeddings = conditioning["embeddings"]
        output = self.network(
            hidden_states=self.pipe._pack_latents(latents, n, c, h, w),
            encoder_hidden_states=embeddings,
            encoder_attention_mask=conditioning["mask"].bool(),
            timestep=(1000 * sigma / 1000).to(latents.dtype),  # rounded as the pipeline rounds it
            position_ids=self.pipe.prepare_position_ids(embeddings.shape[1], h // 2, w // 2, latents.device),
            return_dict=False,
        )[0]
        pixels = self.pixels_per_latent
        unpacked: Tensor = self.pipe._unpack_latents(output, h * pixels, w * pixels)
        return unpacked[:, :, 0]


@attrs.frozen(kw_only=True)
class Krea2(PretrainedSpec):
    """A Krea 2 pipeline to train.

    Attributes:
        guidance_scale: as its pipeline counts it: 0 is none (the distilled model), g is linear guidance of 1 + g.
        max_sequence_length: tokens of the text, to which every prompt is padded; a mask hides the padding.
    """

    path: str = attrs.field(default="krea/Krea-2-Raw", validator=attrs.validators.min_len(1))
    guidance_scale: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    guidance: GuidanceForm = attrs.field(factory=OffsetGuidance)
    max_sequence_length: int = attrs.field(default=512, validator=attrs.validators.ge(6))

    pipeline: ClassVar = "Krea2Pipeline"
    known: ClassVar = {"krea/Krea-2-Raw": DATA / "krea2_raw.json"}
    licences: ClassVar = {"krea/Krea-2-Raw": "Krea 2 Community; gated"}
    policy: ClassVar = Krea2Policy

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.config("transformer")
        stack = (self.max_sequence_length, config["num_text_layers"], config["text_hidden_dim"])
        return {"embeddings": stack, "mask": (self.max_sequence_length,)}
