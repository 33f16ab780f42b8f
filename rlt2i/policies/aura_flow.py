"""AuraFlow: double- and single-stream blocks over [registers; text; image]; time is sigma itself.

AuraFlow (6.8B) is open, under Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from rlt2i.policies.lora import FLOW_GRPO_TARGETS
from rlt2i.policies.pretrained import DATA, PretrainedPolicy, PretrainedSpec
from rlt2i.policies.token_spans import Characters
from rlt2i.types import Conditioning, ImageSize


@attrs.frozen(kw_only=True, eq=False)
class AuraFlowPolicy(PretrainedPolicy):
    """A loaded AuraFlow."""

    spec: AuraFlow

    def blocks(self) -> Sequence[torch.nn.Module]:
        return [*self.network.joint_transformer_blocks, *self.network.single_transformer_blocks]

    @property
    def largest(self) -> int:
        return self.granularity * int(self.network.config.pos_embed_max_size**0.5)

    @property
    def registers(self) -> int:
        """Learnt tokens before the text, which stand for nothing."""
        return int(self.network.register_tokens.shape[1])

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        return self.scheduler_sigmas(num_steps)

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[Characters]]]:
        return {"text": (self.registers, super().text_streams(text)["text"][1])}

    def text_end(self, conditioning: Conditioning) -> int:
        return self.registers + conditioning["embeddings"].shape[1]

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        options: dict[str, Any] = {"device": self.device, "max_sequence_length": self.spec.max_sequence_length}
        return {"embeddings": self.pipe.encode_prompt(text, do_classifier_free_guidance=False, **options)[0][0]}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.network(
            latents,
            encoder_hidden_states=conditioning["embeddings"],
            timestep=(1000 * sigma / 1000).to(latents.dtype),  # rounded as the pipeline rounds it
            return_dict=False,
        )[0]
        return output


@attrs.frozen(kw_only=True)
class AuraFlow(PretrainedSpec):
    """An AuraFlow pipeline to train.

    Attributes:
        max_sequence_length: tokens of the text, to which every prompt is padded with zeros that no mask hides.
    """

    path: str = attrs.field(default="fal/AuraFlow-v0.3", validator=attrs.validators.min_len(1))
    max_sequence_length: int = attrs.field(default=256, validator=attrs.validators.ge(1))

    pipeline: ClassVar = "AuraFlowPipeline"
    known: ClassVar = {"fal/AuraFlow-v0.3": DATA / "aura_flow.json"}
    licences: ClassVar = {"fal/AuraFlow-v0.3": "Apache-2.0; open"}
    policy: ClassVar = AuraFlowPolicy
    targets: ClassVar = FLOW_GRPO_TARGETS

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        return int(config["num_mmdit_layers"] + config["num_single_dit_layers"])

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embeddings": (self.max_sequence_length, self.config("transformer")["joint_attention_dim"])}
