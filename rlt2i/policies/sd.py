"""Stable Diffusion 1.x and 2.x, on diffusers' own classes: a UNet that predicts noise, as a flow policy."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.interfaces import PolicySpec
from rlt2i.policies.cross_attention import count_blocks, cross_attention_names, cross_attentions, recording
from rlt2i.policies.epsilon import VPPolicy, VPSchedule
from rlt2i.policies.guidance import Guided
from rlt2i.policies.lora import add_lora, save_unet_lora
from rlt2i.policies.sd3_loading import quietly
from rlt2i.policies.token_spans import Characters, character_ranges, find_spans, span_tensors
from rlt2i.types import Conditioning, Prompts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_KNOWN = {"stable-diffusion-v1-5/stable-diffusion-v1-5": Path(__file__).parent / "data" / "sd15.json"}
_TOKEN_STRIDE = 4
"""Latents per side of a cell of the token grid: 16 x 16 cells at 512 px, where cross-attention tells objects apart."""

DDPO_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
"""The projections of self- and cross-attention, as DDPO adapts them."""


@attrs.frozen(kw_only=True)
class StableDiffusion(PolicySpec):
    """A Stable Diffusion 1.x or 2.x pipeline to train, in the layout of diffusers' StableDiffusionPipeline.

    Rollouts visit the timesteps of DDIM. The last step ends at its clean prediction; diffusers' DDIM ends there too
    where the scheduler says set_alpha_to_one, and otherwise leaves the noise of timestep 0 in the latents.

    Attributes:
        path: a pipeline directory, or a repository of the hub.
        revision: of the hub repository.
        lora_rank: rank of the adapter that learns; None trains the whole UNet.
        lora_alpha: scale of the adapter is alpha / rank; default: the rank.
        lora_targets: layers that get an adapter.
        lora_seed: of the adapter's initial weights.
        guidance_scale: classifier-free guidance in rollout *and* update; 1 is none.
        uncond_grad: let gradients flow through the unconditional branch too.
        dtype: of the frozen weights and the computation. What learns is always kept in float32.
        vae_dtype: of the autoencoder; default `dtype`.
        gradient_checkpointing: recompute each block in the backward pass; less memory, a third more work.
    """

    path: str = attrs.field(default="stable-diffusion-v1-5/stable-diffusion-v1-5", validator=validators.min_len(1))
    revision: str | None = None
    lora_rank: int | None = attrs.field(default=None, validator=validators.optional(validators.ge(1)))
    lora_alpha: int | None = attrs.field(default=None, validator=validators.optional(validators.ge(1)))
    lora_targets: tuple[str, ...] = attrs.field(default=DDPO_TARGETS, converter=tuple)
    lora_seed: int = 0
    guidance_scale: float = attrs.field(default=1.0, validator=validators.ge(0))
    uncond_grad: bool = False
    dtype: Literal["float32", "bfloat16"] = attrs.field(default="float32", validator=validators.in_(tuple(_DTYPES)))
    vae_dtype: Literal["float32", "bfloat16"] | None = attrs.field(
        default=None, validator=validators.in_((None, *_DTYPES))
    )
    gradient_checkpointing: bool = False

    @lora_alpha.validator
    def _check_alpha(self, _: Any, value: int | None) -> None:
        if value is not None and self.lora_rank is None:
            raise ValueError(
                f"StableDiffusion(lora_alpha={value}, lora_rank=None): without an adapter there is nothing to scale. "
                "Set lora_rank, or drop lora_alpha to train the whole UNet."
            )

    @lora_targets.validator
    def _check_targets(self, _: Any, value: tuple[str, ...]) -> None:
        if not value or any(len(name) == 1 for name in value):
            raise ValueError(f"StableDiffusion(lora_targets={value}): name at least one layer, as a list of strings.")

    @property
    def source(self) -> Path | str:
        """The pipeline directory, or the hub repository if there is no such directory.

        Raises:
            ValueError: when the path is meant to be local and is not there.
        """
        folder = Path(self.path)
        if folder.is_dir():
            return folder
        if folder.is_absolute() or self.path.startswith(".") or self.path.count("/") != 1:
            raise ValueError(
                f"StableDiffusion(path={self.path!r}): {folder} is no directory. Give a pipeline directory (with "
                "model_index.json) or a hub repository such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'."
            )
        return self.path

    def config(self, component: Literal["unet", "scheduler", "vae"]) -> dict[str, Any]:
        """The configuration of one component, read without weights.

        Raises:
            ValueError: when the directory holds no such component.
        """
        known = json.loads(_KNOWN[self.path].read_text()) if self.path in _KNOWN else {}
        if component in known:
            found: dict[str, Any] = known[component]
            return found
        name = f"{component}/{'scheduler_config' if component == 'scheduler' else 'config'}.json"
        source = self.source
        if isinstance(source, str):
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(source, name, revision=self.revision))
        else:
            file = source / name
        if not file.is_file():
            raise ValueError(
                f"StableDiffusion(path={self.path!r}): {file} is missing; this is no diffusers Stable Diffusion "
                "pipeline. Stable Diffusion 3 has a policy of its own, SD3."
            )
        found = json.loads(file.read_text())
        return found

    @property
    def offers(self) -> frozenset[str]:
        return cross_attention_names(count_blocks(self.config("unet")))

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of frozen weights and activations."""
        return _DTYPES[self.dtype]

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the UNet's weights: float32 if they learn themselves."""
        return torch.float32 if self.lora_rank is None else self.compute_dtype

    @property
    def image_dtype(self) -> torch.dtype:
        """Of the autoencoder."""
        return _DTYPES[self.vae_dtype or self.dtype]

    def load(self, device: torch.device | str = "cpu") -> StableDiffusionPolicy | Guided:
        policy = StableDiffusionPolicy.load(self, torch.device(device))
        if self.guidance_scale == 1.0:
            return policy
        return Guided(policy=policy, scale=self.guidance_scale, uncond_grad=self.uncond_grad)


@attrs.frozen(kw_only=True, eq=False)
class StableDiffusionPolicy(VPPolicy):
    """A loaded Stable Diffusion: the conditional velocity, without guidance.

    Attributes:
        spec: how it was loaded.
        schedule: of its scheduler's configuration.
        unet, vae, tokenizer, text_encoder: the networks; only the UNet learns, none is ever in training mode.
        device: of everything.
    """

    spec: StableDiffusion
    schedule: VPSchedule
    unet: Any
    vae: Any
    tokenizer: Any
    text_encoder: Any
    device: torch.device

    @classmethod
    def load(cls, spec: StableDiffusion, device: torch.device) -> StableDiffusionPolicy:
        """Read the weights that the spec names.

        Raises:
            ValueError: for a scheduler or a UNet that is not that of a Stable Diffusion 1.x or 2.x.
        """
        with quietly():
            return cls._load(spec, device)

    @classmethod
    def _load(cls, spec: StableDiffusion, device: torch.device) -> StableDiffusionPolicy:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        who = f"StableDiffusion(path={spec.path!r})"
        num_blocks = count_blocks(spec.config("unet"))
        schedule = VPSchedule.from_config(spec.config("scheduler"), who=who)
        source = {"pretrained_model_name_or_path": spec.source, "revision": spec.revision}
        safe = {**source, "use_safetensors": True}
        unet = UNet2DConditionModel.from_pretrained(**safe, subfolder="unet", dtype=spec.weight_dtype)
        vae = AutoencoderKL.from_pretrained(**safe, subfolder="vae", dtype=spec.image_dtype)
        _check_unet(unet.config, vae.config, who)
        unet.eval().requires_grad_(spec.lora_rank is None)
        if spec.lora_rank is not None:
            alpha = spec.lora_alpha or spec.lora_rank
            add_lora(unet, rank=spec.lora_rank, alpha=alpha, targets=spec.lora_targets, seed=spec.lora_seed)
        if spec.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        assert len(cross_attentions(unet)) == num_blocks
        text = CLIPTextModel.from_pretrained(**safe, subfolder="text_encoder", dtype=spec.compute_dtype)
        return cls(
            spec=spec,
            schedule=attrs.evolve(schedule, alpha_bars=schedule.alpha_bars.to(device)),
            unet=unet.to(device),
            vae=vae.eval().requires_grad_(False).to(device),
            tokenizer=CLIPTokenizer.from_pretrained(**source, subfolder="tokenizer"),
            text_encoder=text.eval().requires_grad_(False).to(device),
            device=device,
        )

    @property
    def offers(self) -> frozenset[str]:  # type: ignore[override]
        return cross_attention_names(len(cross_attentions(self.unet)))

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        h, w = self.token_grid(image_size)
        return self.unet.config.in_channels, h * _TOKEN_STRIDE, w * _TOKEN_STRIDE

    def token_grid(self, image_size: int) -> tuple[int, int]:
        per_latent = 2 ** (len(self.vae.config.block_out_channels) - 1)
        coarsest = 2 ** (len(self.unet.config.block_out_channels) - 1)
        pixels = per_latent * max(coarsest, _TOKEN_STRIDE)
        if image_size <= 0 or image_size % pixels:
            raise ValueError(f"image_size={image_size}: this model needs a multiple of {pixels}.")
        cells = image_size // (per_latent * _TOKEN_STRIDE)
        return cells, cells

    def encode(self, prompts: Prompts) -> Conditioning:
        rows = [self._encode(text) for text in prompts.texts]
        spans = tuple(
            find_spans(text, core, {"clip": self._characters(text)}, {"clip": 0})
            for text, core in zip(prompts.texts, prompts.core, strict=True)
        )
        tokens, members = span_tensors(spans, self.device)
        tensors = {"embeddings": torch.stack(rows), "core_tokens": tokens, "core_members": members}
        prompt_of_rollout = torch.arange(len(rows), device=self.device).repeat_interleave(prompts.group_size)
        return Conditioning(tensors=tensors, rows=prompt_of_rollout, token_spans=spans)

    def predict(self, x_vp: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        with self._precision():
            output: Tensor = self.unet(
                x_vp.to(self.spec.compute_dtype),
                timesteps,
                encoder_hidden_states=conditioning["embeddings"],
                return_dict=False,
            )[0]
        return output

    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with recording(
            cross_attentions(self.unet),
            names,
            tokens=conditioning["core_tokens"],
            members=conditioning["core_members"],
            grid=(latents.shape[-2] // _TOKEN_STRIDE, latents.shape[-1] // _TOKEN_STRIDE),
        ) as recorder:
            velocity = self.velocity(latents, sigma, conditioning)
        return velocity, recorder.captures()

    def decode(self, latents: Tensor) -> Tensor:
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        images = self.vae.decode(scaled, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """The mean of the autoencoder's posterior, never a draw from it."""
        pixels = (2 * images - 1).to(self.device, self.vae.dtype)
        mean: Tensor = self.vae.encode(pixels).latent_dist.mode().float()
        return mean * self.vae.config.scaling_factor

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    def export(self, folder: Path) -> None:
        """A LoRA file for `load_lora_weights`, or the UNet (with the rest of a pipeline that is a directory)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.spec.lora_rank is not None:
            save_unet_lora(self.unet, folder)
            return
        self.unet.save_pretrained(folder / "unet", safe_serialization=True)
        source = self.spec.source
        if isinstance(source, Path):
            index = json.loads((source / "model_index.json").read_text())
            for name in set(index) - {"unet"}:
                if (source / name).is_dir():
                    shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
            shutil.copy(source / "model_index.json", folder)

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        """[L, D]; one prompt at a time, so that an embedding never depends on what shared its batch."""
        padded = self.tokenizer(
            [text],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        hidden: Tensor = self.text_encoder(padded.input_ids.to(self.device))[0][0]
        return hidden.to(self.spec.compute_dtype)

    def _characters(self, text: str) -> list[Characters]:
        return character_ranges(self.tokenizer, text, self.tokenizer.model_max_length)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.spec.weight_dtype != self.spec.compute_dtype:
            return torch.autocast(self.device.type, self.spec.compute_dtype)  # float32 masters, bf16 arithmetic
        return contextlib.nullcontext()


def _check_unet(unet: Any, vae: Any, who: str) -> None:
    """Refuse relatives that need more than text: inpainting, upscaling, SDXL."""
    if unet.in_channels != vae.latent_channels:
        raise ValueError(
            f"{who}: its UNet reads {unet.in_channels} channels, its autoencoder has {vae.latent_channels}; inpainting "
            "and upscaling models are not text-to-image models. Use the base model."
        )
    if unet.addition_embed_type or unet.class_embed_type or unet.num_class_embeds:
        raise ValueError(
            f"{who}: its UNet needs more than a prompt, as SDXL's does. Use a Stable Diffusion 1.x or 2.x, or write a "
            "policy on rlt2i.policies.epsilon.VPPolicy."
        )
