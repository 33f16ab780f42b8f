"""Lumina-Image 2: one stream of [text; image], each prompt at its own length; time runs from 0 (noise) to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from rlt2i.functional.transfer import to_device
from rlt2i.policies.guidance import GuidanceForm, RescaledGuidance
from rlt2i.policies.pretrained import DATA, PretrainedPolicy, PretrainedSpec
from rlt2i.types import Conditioning, ImageSize


@attrs.frozen(kw_only=True, eq=False)
class Lumina2Policy(PretrainedPolicy):
    """A loaded Lumina-Image 2."""

    spec: Lumina2

    def blocks(self) -> Sequence[torch.nn.Module]:
        return list(self.network.layers)

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        # The pipeline measures the shift by the number of channels, whatever the size.
        return self.scheduler_sigmas(num_steps, mu=self.shift_of(self.latent_channels))

    def written(self, text: str) -> tuple[str, int]:
        template = f"{self.pipe.system_prompt} <Prompt Start> "
        return template + text, len(template)

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        written = text if negative else self.written(text)[0]  # negative prompts have no system prompt
        embeddings, mask = self.pipe._get_gemma_prompt_embeds(
            written, device=self.device, max_sequence_length=self.spec.max_sequence_length
        )
        return {"embeddings": embeddings[0], "mask": mask[0]}

    def text_end(self, conditioning: Conditioning) -> Tensor:
        return conditioning["mask"].sum(dim=1)

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        positions = self.network.rope_embedder  # whose tables are no buffers: every pass would copy them from the host
        positions.freqs_cis = [to_device(table, latents.device) for table in positions.freqs_cis]
        output: Tensor = self.network(
            hidden_states=latents,
            timestep=1 - 1000 * sigma / 1000,
            encoder_hidden_states=conditioning["embeddings"],
            encoder_attention_mask=conditioning["mask"],
            return_dict=False,
        )[0]
        return -output


@attrs.frozen(kw_only=True)
class Lumina2(PretrainedSpec):
    """A Lumina-Image 2 pipeline to train.

    Attributes:
        guidance: as its pipeline by default: guided velocities keep the norms of the prompt's own.
        max_sequence_length: Gemma tokens, the system prompt included.
    """

    path: str = attrs.field(default="Alpha-VLLM/Lumina-Image-2.0", validator=attrs.validators.min_len(1))
    guidance: GuidanceForm = attrs.field(factory=lambda: RescaledGuidance(over="row"))
    max_sequence_length: int = attrs.field(default=256, validator=attrs.validators.ge(1))

    pipeline: ClassVar = "Lumina2Pipeline"
    policy: ClassVar = Lumina2Policy
    known: ClassVar = {"Alpha-VLLM/Lumina-Image-2.0": DATA / "lumina2.json"}
    licences: ClassVar = {"Alpha-VLLM/Lumina-Image-2.0": "Apache-2.0; open"}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.config("transformer")["cap_feat_dim"]
        return {"embeddings": (self.max_sequence_length, width), "mask": (self.max_sequence_length,)}
