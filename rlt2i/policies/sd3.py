"""Stable Diffusion 3 and 3.5, on diffusers' own classes."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from rlt2i.captures import attention_names
from rlt2i.functional.schedules import even_sigmas, sd3_sigmas
from rlt2i.interfaces import Policy, PolicySpec
from rlt2i.policies.attention import choose_kernel, recording, watch
from rlt2i.policies.guidance import Guided
from rlt2i.policies.lora import FLOW_GRPO_TARGETS, save_lora
from rlt2i.policies.sd3_loading import compile_blocks, load_text_encoders, prepare_transformer, quietly
from rlt2i.policies.sd3_text import TextEncoders
from rlt2i.policies.token_spans import span_tensors
from rlt2i.types import Conditioning, Prompts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_EMBEDDED = {"embedded:shapes": Path(__file__).resolve().parents[1] / "tasks" / "shapes" / "pipeline"}
_KNOWN = {"stabilityai/stable-diffusion-3.5-medium": Path(__file__).parent / "data" / "sd35_medium.json"}


def _positive(instance: Any, attribute: Any, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"SD3({attribute.name}={value}): must be at least 1, or None.")


@attrs.frozen(kw_only=True)
class SD3(PolicySpec):
    """A Stable Diffusion 3 pipeline to train.

    Attributes:
        path: a pipeline directory, a repository of the hub, or "embedded:shapes", the small one that is part of this
            package.
        revision: of the hub repository.
        lora_rank: rank of the adapter that learns; None trains the whole transformer.
        lora_alpha: scale of the adapter is alpha / rank; default 2 * rank.
        lora_targets: layers that get an adapter.
        lora_seed: of the adapter's initial weights.
        guidance_scale: classifier-free guidance in rollout *and* update; 1 is none.
        uncond_grad: let gradients flow through the unconditional branch too.
        schedule: "sd3" (shifted, as diffusers' scheduler) or "even"; "auto" is even where the scheduler has shift 1.
        dtype: of the frozen weights and the computation. What learns is always kept in float32.
        vae_dtype: of the image decoder; default `dtype`.
        max_sequence_length: T5 tokens.
        text_encoder_3: use T5? Default: if the pipeline has one.
        zero_text_tokens: zero vectors in place of a T5 that is not used; diffusers' pipeline appends 256.
        gradient_checkpointing: recompute each block in the backward pass; less memory, a third more work.
        compile: compile each block.
    """

    path: str = attrs.field(default="embedded:shapes", validator=attrs.validators.min_len(1))
    revision: str | None = None
    lora_rank: int | None = attrs.field(default=None, validator=_positive)
    lora_alpha: int | None = attrs.field(default=None, validator=_positive)
    lora_targets: tuple[str, ...] = attrs.field(default=FLOW_GRPO_TARGETS, converter=tuple)
    lora_seed: int = 0
    guidance_scale: float = attrs.field(default=1.0)
    uncond_grad: bool = False
    schedule: Literal["auto", "sd3", "even"] = attrs.field(
        default="auto", validator=attrs.validators.in_(("auto", "sd3", "even"))
    )
    dtype: Literal["float32", "bfloat16"] = attrs.field(
        default="float32", validator=attrs.validators.in_(tuple(_DTYPES))
    )
    vae_dtype: Literal["float32", "bfloat16"] | None = attrs.field(
        default=None, validator=attrs.validators.in_((None, *_DTYPES))
    )
    max_sequence_length: int = attrs.field(default=128, validator=_positive)
    text_encoder_3: bool | None = None
    zero_text_tokens: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    gradient_checkpointing: bool = False
    compile: bool = False

    @lora_alpha.validator
    def _check_alpha(self, _: Any, value: int | None) -> None:
        if value is not None and self.lora_rank is None:
            raise ValueError(
                f"SD3(lora_alpha={value}, lora_rank=None): without an adapter there is nothing to scale. "
                "Set lora_rank, or drop lora_alpha to train the whole transformer."
            )

    @lora_targets.validator
    def _check_targets(self, _: Any, value: tuple[str, ...]) -> None:
        if not value or any(len(name) == 1 for name in value):
            raise ValueError(f"SD3(lora_targets={value}): name at least one layer, as a list of strings.")

    @guidance_scale.validator
    def _check_guidance(self, _: Any, value: float) -> None:
        if value < 0:
            raise ValueError(
                f"SD3(guidance_scale={value}): use 1.0 for no guidance, 4.5 as published SD3.5 recipes do."
            )

    @property
    def source(self) -> Path | str:
        """The pipeline directory, or the hub repository if there is no such directory.

        Raises:
            ValueError: when the path is meant to be local and is not there.
        """
        if self.path.startswith("embedded:") and self.path not in _EMBEDDED:
            raise ValueError(f"SD3(path={self.path!r}): the package contains {', '.join(_EMBEDDED)}.")
        folder = _EMBEDDED.get(self.path, Path(self.path))
        if folder.is_dir():
            return folder
        if self.path in _EMBEDDED or folder.is_absolute() or self.path.startswith(".") or self.path.count("/") != 1:
            raise ValueError(
                f"SD3(path={self.path!r}): {folder} is no directory. Give a pipeline directory (with model_index.json) "
                "or a hub repository such as 'stabilityai/stable-diffusion-3.5-medium'."
            )
        return self.path

    def config(self, component: str) -> dict[str, Any]:
        """config.json of one component (or of the pipeline, ""), read without weights."""
        known = json.loads(_KNOWN[self.path].read_text()) if self.path in _KNOWN else {}
        if component in known:
            return known[component]
        name = {"": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}.get(
            component, f"{component}/config.json"
        )
        source = self.source
        if isinstance(source, str):
            from huggingface_hub import hf_hub_download

            return json.loads(Path(hf_hub_download(source, name, revision=self.revision)).read_text())
        if not (source / name).is_file():
            raise ValueError(f"SD3(path={self.path!r}): {source / name} is missing; this is no diffusers SD3 pipeline.")
        return json.loads((source / name).read_text())

    @property
    def offers(self) -> frozenset[str]:
        return attention_names(self.config("transformer")["num_layers"])

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of frozen weights and activations."""
        return _DTYPES[self.dtype]

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the transformer's weights: float32 if they learn themselves."""
        return torch.float32 if self.lora_rank is None else self.compute_dtype

    @property
    def image_dtype(self) -> torch.dtype:
        """Of the image decoder."""
        return _DTYPES[self.vae_dtype or self.dtype]

    @property
    def uses_t5(self) -> bool:
        """Whether there is a third text encoder and it is wanted.

        Raises:
            ValueError: when it is wanted and not there.
        """
        present = self.path in _KNOWN or bool(self.config("").get("text_encoder_3", [None])[0])
        if self.text_encoder_3 and not present:
            raise ValueError(f"SD3(path={self.path!r}, text_encoder_3=True): this pipeline has no third text encoder.")
        return present if self.text_encoder_3 is None else self.text_encoder_3

    @property
    def text_tokens(self) -> int:
        """Length of the joint text sequence."""
        clip: int = self.config("text_encoder")["max_position_embeddings"]
        return clip + (self.max_sequence_length if self.uses_t5 else self.zero_text_tokens)

    def load(self, device: torch.device | str = "cpu") -> SD3Policy | Guided:
        policy = SD3Policy.load(self, torch.device(device))
        if self.guidance_scale == 1.0:
            return policy
        return Guided(policy=policy, scale=self.guidance_scale, uncond_grad=self.uncond_grad)


@attrs.frozen(kw_only=True, eq=False)
class SD3Policy(Policy):
    """A loaded Stable Diffusion 3: the conditional velocity, without guidance.

    Attributes:
        spec: how it was loaded.
        transformer, vae, text: the networks; only the transformer learns, none is ever in training mode.
        shift: of the noise schedule.
        device: of everything.
    """

    spec: SD3
    transformer: Any
    vae: Any
    text: TextEncoders
    shift: float
    device: torch.device

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: torch.device | str = "cpu", **options: Any) -> SD3Policy:
        """Shorthand for `SD3(path=path, **options).load(device)`; wrap the result in `Guided` for guidance."""
        return cls.load(SD3(path=str(path), **options), torch.device(device))

    @classmethod
    def load(cls, spec: SD3, device: torch.device) -> SD3Policy:
        """Read the weights that the spec names."""
        with quietly():
            return cls._load(spec, device)

    @classmethod
    def _load(cls, spec: SD3, device: torch.device) -> SD3Policy:
        from diffusers import AutoencoderKL, SD3Transformer2DModel

        source = {"pretrained_model_name_or_path": spec.source, "revision": spec.revision}
        scheduler = spec.config("scheduler")
        if scheduler.get("use_dynamic_shifting") and spec.schedule != "even":
            raise ValueError(
                f"SD3(path={spec.path!r}): its scheduler shifts by image size; only schedule='even' is supported."
            )
        transformer = SD3Transformer2DModel.from_pretrained(**source, subfolder="transformer", dtype=spec.weight_dtype)
        prepare_transformer(spec, transformer)
        transformer.to(device)
        watch(transformer, choose_kernel(device, spec.compute_dtype, transformer.config.attention_head_dim))
        if spec.compile:
            compile_blocks(transformer)

        vae = AutoencoderKL.from_pretrained(**source, subfolder="vae", dtype=spec.image_dtype)
        vae.eval().requires_grad_(False)
        vae.enable_gradient_checkpointing()  # only where a reward's gradient asks for it; nothing here is larger
        layout = torch.channels_last if spec.image_dtype == torch.bfloat16 else torch.preserve_format
        vae.to(device, memory_format=layout)
        text = load_text_encoders(spec, source, transformer.config.joint_attention_dim, device)
        return cls(
            spec=spec,
            transformer=transformer,
            vae=vae,
            text=text,
            shift=float(scheduler.get("shift", 1.0)),
            device=device,
        )

    @property
    def offers(self) -> frozenset[str]:  # type: ignore[override]
        return attention_names(len(self.transformer.transformer_blocks))

    def sigmas(self, num_steps: int, image_size: int) -> Tensor:
        schedule = self.spec.schedule
        if schedule == "even" or (schedule == "auto" and self.shift == 1.0):
            return even_sigmas(num_steps)
        return sd3_sigmas(num_steps, shift=self.shift)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        h, w = self.token_grid(image_size)
        patch = self.transformer.config.patch_size
        return self.transformer.config.in_channels, h * patch, w * patch

    def token_grid(self, image_size: int) -> tuple[int, int]:
        pixels = self.transformer.config.patch_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        largest = pixels * self.transformer.config.pos_embed_max_size
        if image_size % pixels or not 0 < image_size <= largest:
            raise ValueError(f"image_size={image_size}: this model needs a multiple of {pixels}, at most {largest}.")
        return image_size // pixels, image_size // pixels

    def encode(self, prompts: Prompts) -> Conditioning:
        rows = [self.text.encode(text) for text in prompts.texts]
        spans = tuple(self.text.spans(text, core) for text, core in zip(prompts.texts, prompts.core, strict=True))
        tokens, members = span_tensors(spans, self.device)
        tensors = {
            "embeddings": torch.stack([row.embeddings for row in rows]),
            "pooled": torch.stack([row.pooled for row in rows]),
            "core_tokens": tokens,
            "core_members": members,
        }
        prompt_of_rollout = torch.arange(len(rows), device=self.device).repeat_interleave(prompts.group_size)
        return Conditioning(tensors=tensors, rows=prompt_of_rollout, token_spans=spans)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with self._precision():
            output = self.transformer(
                hidden_states=latents.to(self.spec.compute_dtype),
                encoder_hidden_states=conditioning["embeddings"],
                pooled_projections=conditioning["pooled"],
                timestep=1000 * sigma,
                return_dict=False,
            )[0]
        return output.float()

    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.spec.compile and torch.is_grad_enabled():
            # A compiled graph with gradient does not report its attention; watch a pass without gradient instead.
            with torch.no_grad():
                captures = self.velocity_with_captures(latents, sigma, conditioning, names)[1]
            return self.velocity(latents, sigma, conditioning), captures
        patch = self.transformer.config.patch_size
        with recording(
            names,
            num_blocks=len(self.transformer.transformer_blocks),
            tokens=conditioning["core_tokens"],
            members=conditioning["core_members"],
            grid=(latents.shape[-2] // patch, latents.shape[-1] // patch),
        ) as recorder:
            velocity = self.velocity(latents, sigma, conditioning)
        return velocity, recorder.captures()

    def decode(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        scaled = (latents / config.scaling_factor + (config.shift_factor or 0.0)).to(self.vae.dtype)
        if self.vae.dtype == torch.bfloat16:
            scaled = scaled.contiguous(memory_format=torch.channels_last)
        images = self.vae.decode(scaled, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """The mean of the autoencoder's posterior, never a draw from it."""
        config = self.vae.config
        pixels = (2 * images - 1).to(self.device, self.vae.dtype)
        if self.vae.dtype == torch.bfloat16:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        mean = self.vae.encode(pixels).latent_dist.mode().float()
        return (mean - (config.shift_factor or 0.0)) * config.scaling_factor

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    def export(self, folder: Path) -> None:
        """A LoRA file for `load_lora_weights`, or the transformer (with the rest of a pipeline that is a directory)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.spec.lora_rank is not None:
            save_lora(self.transformer, folder)
            return
        self.transformer.save_pretrained(folder / "transformer", safe_serialization=True)
        source = self.spec.source
        if isinstance(source, Path):
            for name in set(self.spec.config("")) - {"transformer"}:
                if (source / name).is_dir():
                    shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
            shutil.copy(source / "model_index.json", folder)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.spec.weight_dtype != self.spec.compute_dtype:
            return torch.autocast(self.device.type, self.spec.compute_dtype)  # float32 masters, bf16 arithmetic
        return contextlib.nullcontext()
