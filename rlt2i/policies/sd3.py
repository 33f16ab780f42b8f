"""Stable Diffusion 3 and 3.5: joint attention over image, then CLIP, then T5 tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import attrs
from torch import Tensor

from rlt2i.functional.schedules import even_sigmas, sd3_sigmas
from rlt2i.policies.lora import FLOW_GRPO_TARGETS
from rlt2i.policies.pretrained import DATA, PretrainedPolicy, PretrainedSpec
from rlt2i.policies.token_spans import Characters, character_ranges
from rlt2i.types import Conditioning, ImageSize


@attrs.frozen(kw_only=True, eq=False)
class SD3Policy(PretrainedPolicy):
    """A loaded Stable Diffusion 3."""

    spec: SD3
    order: ClassVar = "image_text"

    @property
    def largest(self) -> int:
        return self.granularity * int(self.network.config.pos_embed_max_size)

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        shift = float(self.pipe.scheduler.config.shift)
        if self.spec.schedule == "even" or (self.spec.schedule == "auto" and shift == 1.0):
            return even_sigmas(num_steps)
        return sd3_sigmas(num_steps, shift=shift)

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        tail = self.spec.max_sequence_length if self.spec.uses_t5 else self.spec.zero_text_tokens
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            text, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=tail
        )
        return {"embeddings": embeddings[0], "pooled": pooled[0]}

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[Characters]]]:
        # Both CLIP tokenizers share vocabulary and merges, so one of them gives the positions.
        clip = self.pipe.tokenizer.model_max_length
        streams = {"clip": (0, character_ranges(self.pipe.tokenizer, text, clip))}
        if self.spec.uses_t5:
            streams["t5"] = (clip, character_ranges(self.pipe.tokenizer_3, text, self.spec.max_sequence_length))
        return streams

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.network(
            hidden_states=latents,
            encoder_hidden_states=conditioning["embeddings"],
            pooled_projections=conditioning["pooled"],
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
        return output


@attrs.frozen(kw_only=True)
class SD3(PretrainedSpec):
    """A Stable Diffusion 3 pipeline to train.

    Attributes:
        path: a pipeline directory, a repository of the hub, or one of the small ones that are part of this package,
            "embedded:shapes" and "embedded:cells".
        schedule: "sd3" (shifted, as diffusers' scheduler) or "even"; "auto" is even where the scheduler has shift 1.
        max_sequence_length: T5 tokens.
        text_encoder_3: use T5? Default: if the pipeline has one.
        zero_text_tokens: zero vectors in place of a T5 that is not used. Default: 256, as diffusers' pipeline appends,
            and none for the pipelines of this package, which were trained so.
    """

    path: str = attrs.field(default="embedded:shapes", validator=attrs.validators.min_len(1))
    schedule: Literal["auto", "sd3", "even"] = attrs.field(
        default="auto", validator=attrs.validators.in_(("auto", "sd3", "even"))
    )
    max_sequence_length: int = attrs.field(default=128, validator=attrs.validators.ge(1))
    text_encoder_3: bool | None = None
    zero_text_tokens: int = attrs.field(
        default=attrs.Factory(lambda self: 0 if self.path.startswith("embedded:") else 256, takes_self=True),
        validator=attrs.validators.ge(0),
    )

    pipeline: ClassVar = "StableDiffusion3Pipeline"
    policy: ClassVar = SD3Policy
    targets: ClassVar = FLOW_GRPO_TARGETS
    alpha_per_rank: ClassVar = 2
    known: ClassVar = {
        "stabilityai/stable-diffusion-3.5-medium": DATA / "sd35_medium.json",
        "stabilityai/stable-diffusion-3.5-large": DATA / "sd35_large.json",
    }
    licences: ClassVar = {
        "stabilityai/stable-diffusion-3.5-medium": "Stability AI Community; gated",
        "stabilityai/stable-diffusion-3.5-large": "Stability AI Community; gated",
    }

    @property
    def uses_t5(self) -> bool:
        """Whether there is a third text encoder and it is wanted.

        Raises:
            ValueError: when it is wanted and not there.
        """
        present = bool(self.config("").get("text_encoder_3", [None])[0])
        if self.text_encoder_3 and not present:
            raise ValueError(f"SD3(path={self.path!r}, text_encoder_3=True): this pipeline has no third text encoder.")
        return present if self.text_encoder_3 is None else self.text_encoder_3

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config, clip = self.config("transformer"), self.config("text_encoder")["max_position_embeddings"]
        tail = self.max_sequence_length if self.uses_t5 else self.zero_text_tokens
        return {
            "embeddings": (clip + tail, config["joint_attention_dim"]),
            "pooled": (config["pooled_projection_dim"],),
        }

    def stock_call(self) -> dict[str, Any]:
        tail = self.max_sequence_length if self.uses_t5 else self.zero_text_tokens
        return super().stock_call() | {"max_sequence_length": tail}

    def components(self) -> dict[str, Any]:
        without_t5 = {} if self.uses_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        return {"image_encoder": None, "feature_extractor": None, **without_t5}

    def drawing(self) -> dict[str, Any] | None:
        if self.schedule == "even" or (self.schedule == "auto" and self.config("scheduler").get("shift", 1.0) == 1.0):
            return None
        tail = self.max_sequence_length if self.uses_t5 else self.zero_text_tokens
        return {**(super().drawing() or {}), "max_sequence_length": tail}

    def check(self) -> None:
        if self.config("scheduler").get("use_dynamic_shifting") and self.schedule != "even":
            raise ValueError(
                f"SD3(path={self.path!r}): its scheduler shifts by image size; only schedule='even' is supported."
            )
