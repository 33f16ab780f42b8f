"""Z-Image: one stream of [image; text], each padded with learnt tokens to a multiple of 32; time runs from 0 (noise).

Z-Image and Z-Image-Turbo (6B) are open, under Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from rlt2i.policies.guidance import GuidanceForm, OffsetGuidance
from rlt2i.policies.pretrained import DATA, PretrainedPolicy, PretrainedSpec, in_template
from rlt2i.types import Conditioning

_MULTIPLE = 32
"""Tokens of either kind are padded to a multiple of it."""


@attrs.frozen(kw_only=True, eq=False)
class ZImagePolicy(PretrainedPolicy):
    """A loaded Z-Image."""

    spec: ZImage
    attention: ClassVar = "attention"
    order: ClassVar = "image_text"

    def blocks(self) -> Sequence[torch.nn.Module]:
        return list(self.network.layers)

    @property
    def largest(self) -> int:
        return self.granularity * int(min(self.network.config.axes_lens[1:]))

    def written(self, text: str) -> tuple[str, int]:
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        chat = self.pipe.tokenizer.apply_chat_template
        return in_template(lambda prompt: str(chat([{"role": "user", "content": prompt}], **options)), text)

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        length = self.spec.max_sequence_length
        return {"embeddings": self.pipe.encode_prompt(text, self.device, False, max_sequence_length=length)[0][0]}

    def image_length(self, grid: tuple[int, int]) -> int:
        return -(-grid[0] * grid[1] // _MULTIPLE) * _MULTIPLE

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        images: Sequence[Tensor] = self.network(
            list(latents[:, :, None]),
            (1000 - 1000 * sigma) / 1000,
            self.text_rows(conditioning),
            return_dict=False,
        )[0]
        return -torch.stack(list(images))[:, :, 0]


@attrs.frozen(kw_only=True)
class ZImage(PretrainedSpec):
    """A Z-Image pipeline to train.

    Attributes:
        guidance_scale: as its pipeline counts it: 0 is none (Z-Image-Turbo), g is linear guidance of 1 + g.
        guidance: as its pipeline's by default. `RescaledGuidance(of=OffsetGuidance(), over="image", limit=1)` is its
            cfg_normalization, `IntervalGuidance(low=1 - t, of=OffsetGuidance())` its cfg_truncation t.
        max_sequence_length: tokens of the prompt in its template.
    """

    path: str = attrs.field(default="Tongyi-MAI/Z-Image", validator=attrs.validators.min_len(1))
    guidance_scale: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    guidance: GuidanceForm = attrs.field(factory=OffsetGuidance)
    max_sequence_length: int = attrs.field(default=512, validator=attrs.validators.ge(1))

    pipeline: ClassVar = "ZImagePipeline"
    licences: ClassVar = dict.fromkeys(("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"), "Apache-2.0; open")
    policy: ClassVar = ZImagePolicy
    known: ClassVar = dict.fromkeys(("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"), DATA / "z_image.json")
    targets: ClassVar = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        return int(config["n_layers"])

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embeddings": (self.max_sequence_length, self.config("transformer")["cap_feat_dim"])}

    def check(self) -> None:
        longest = (int(self.config("transformer")["axes_lens"][0]) - 2) // _MULTIPLE * _MULTIPLE
        if self.max_sequence_length > longest:
            raise ValueError(
                f"ZImage(max_sequence_length={self.max_sequence_length}): the positions of this model end at {longest} "
                "tokens of text."
            )
