"""One function per pipeline class."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from rlt2i.policies.tiny.text import clip_encoder, clip_tokenizer, gemma_encoder, t5_encoder, unigram_tokenizer


def kl_autoencoder(*, widths: tuple[int, ...] = (8, 16), **options: Any) -> Any:
    """A convolutional autoencoder that halves each side once less than it has widths."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        mid_block_add_attention=False, **options,
    )  # fmt: skip


def stable_diffusion_3(*, with_t5: bool = True, shift: float = 3.0, clip_length: int = 77) -> Any:
    """Four blocks, two of them with image-only attention; two CLIPs and, unless without, T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = clip_tokenizer(clip_length)
    t5_tokenizer = unigram_tokenizer() if with_t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=16, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    encoders = [clip_encoder(tokenizer, projection=True) for _ in range(2)]
    t5 = t5_encoder(t5_tokenizer) if with_t5 else None
    vae = kl_autoencoder(scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), vae=vae,
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=t5, tokenizer_3=t5_tokenizer,
    )  # fmt: skip


DDIM_SCHEDULE: Mapping[str, Any] = MappingProxyType(
    {
        "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "steps_offset": 1,
    }
)  # fmt: skip


def stable_diffusion(*, clip_length: int = 77, **scheduler: Any) -> Any:
    """A UNet of two resolutions; `scheduler` overrides fields of its DDIM scheduler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(clip_length)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    text = clip_encoder(tokenizer, projection=False)
    return StableDiffusionPipeline(
        unet=unet, vae=kl_autoencoder(scaling_factor=0.5), text_encoder=text, tokenizer=tokenizer,
        scheduler=DDIMScheduler(**{**DDIM_SCHEDULE, **scheduler}), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(*, clip_length: int = 77, **scheduler: Any) -> Any:
    """A UNet of two resolutions with one and two layers a block, told size and crop; two CLIPs side by side."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(clip_length)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), norm_num_groups=4,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        use_linear_projection=True,
    )  # fmt: skip
    schedule = {name: value for name, value in DDIM_SCHEDULE.items() if name != "clip_sample"}
    return StableDiffusionXLPipeline(
        unet=unet, vae=kl_autoencoder(scaling_factor=0.5), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=clip_encoder(tokenizer, projection=False),
        text_encoder_2=clip_encoder(tokenizer, projection=True),
        scheduler=EulerDiscreteScheduler(**{**schedule, "timestep_spacing": "leading", **scheduler}),
        add_watermarker=False,
    )  # fmt: skip


def flux(*, clip_length: int = 77) -> Any:
    """Two double-stream and three single-stream blocks, guidance as an input, a shift by image size."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, t5_tokenizer = clip_tokenizer(clip_length), unigram_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=48, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=16,
        max_image_seq_len=256,
    )  # fmt: skip
    vae = kl_autoencoder(scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    return FluxPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae, tokenizer=tokenizer, tokenizer_2=t5_tokenizer,
        text_encoder=clip_encoder(tokenizer, projection=False), text_encoder_2=t5_encoder(t5_tokenizer),
    )  # fmt: skip


def sana(*, qk_norm: str | None = "rms_norm_across_heads") -> Any:
    """Three blocks; `qk_norm` as in SANA 1.5, None as in SANA 1.0. Its deep-compression autoencoder halves a side."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer = unigram_tokenizer(model_max_length=300)
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=4, attention_head_dim=8,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=32,
        sample_size=32, qk_norm=qk_norm,
    )  # fmt: skip
    return SanaPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=gemma_encoder(tokenizer, length=4096), tokenizer=tokenizer,
    )  # fmt: skip


def lumina2() -> Any:
    """Three joint layers and one refiner each for image and text; two queries share a pair of key and value heads.

    The pipeline takes its autoencoder to divide sides by 8, whatever it does.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = unigram_tokenizer(model_max_length=300)
    transformer = Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=48, num_layers=3, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(300, 64, 64),
        cap_feat_dim=32,
    )  # fmt: skip
    vae = kl_autoencoder(
        widths=(8, 8, 8, 8), scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False
    )
    return Lumina2Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=vae,
        text_encoder=gemma_encoder(tokenizer), tokenizer=tokenizer,
    )  # fmt: skip


TINY: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "StableDiffusion3Pipeline": stable_diffusion_3,
        "StableDiffusionPipeline": stable_diffusion,
        "StableDiffusionXLPipeline": stable_diffusion_xl,
        "FluxPipeline": flux,
        "SanaPipeline": sana,
        "Lumina2Pipeline": lumina2,
    }
)
"""Pipeline class -> what builds a small one."""


def save_tiny(pipeline: str, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """Write a tiny pipeline with random weights from `seed`; the global generator is not touched.

    Args:
        pipeline: a key of TINY.
        options: of the function that builds it.

    Returns:
        `folder`, to be given to a spec as its path.

    Raises:
        ValueError: for a pipeline that has no small one.
    """
    if pipeline not in TINY:
        raise ValueError(f"save_tiny({pipeline!r}): there is a tiny pipeline for {', '.join(TINY)}.")
    with torch.random.fork_rng(devices=[]), _quietly():
        torch.manual_seed(seed)
        built = TINY[pipeline](**options)
        for component in built.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        built.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """diffusers warns of every component that is absent."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
