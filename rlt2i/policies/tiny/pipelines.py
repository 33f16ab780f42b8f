"""One function per pipeline class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from rlt2i.policies.pretrained.loading import quietly, without_warnings
from rlt2i.policies.tiny.text import (
    clip_encoder,
    clip_tokenizer,
    gemma_encoder,
    mistral3_encoder,
    pixtral_processor,
    qwen3_encoder,
    qwen3_vl_encoder,
    qwen3_vl_processor,
    qwen25_vl_encoder,
    qwen_tokenizer,
    t5_encoder,
    umt5_encoder,
    unigram_tokenizer,
)


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


def flux2_klein(*, is_distilled: bool = False) -> Any:
    """Two double-stream and three single-stream blocks; an autoencoder whose statistics are not those of no data."""
    from diffusers import Flux2KleinPipeline

    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        **_flux2_parts(guidance_embeds=False), text_encoder=qwen3_encoder(tokenizer), tokenizer=tokenizer,
        is_distilled=is_distilled,
    )  # fmt: skip


def flux2(*, padding_side: str = "left") -> Any:
    """As the small FLUX.2-klein, with guidance as an input, and Mistral 3 to read a conversation."""
    from diffusers import Flux2Pipeline

    processor = pixtral_processor(padding_side=padding_side)
    return Flux2Pipeline(
        **_flux2_parts(guidance_embeds=True), text_encoder=mistral3_encoder(processor.tokenizer), tokenizer=processor
    )


def _flux2_parts(*, guidance_embeds: bool) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1,
        mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}


def z_image(*, use_dynamic_shifting: bool = False) -> Any:
    """Three joint layers and one refiner each for image and text."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=3, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=16,
        axes_dims=[4, 4, 4], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # learnt; zeros when new
        torch.nn.init.normal_(token)
    vae = kl_autoencoder(scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    return ZImagePipeline(
        transformer=transformer, vae=vae, tokenizer=tokenizer, text_encoder=qwen3_encoder(tokenizer, layers=2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=use_dynamic_shifting),
    )  # fmt: skip


def _qwen_autoencoder() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.7, 0.4, 0.1, -0.2], latents_std=[2.8, 1.4, 2.3, 0.6],
    )  # fmt: skip


def _qwen_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=8192, base_shift=0.5, max_shift=0.9,
        shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip


def qwen_image() -> Any:
    """Three double-stream blocks; the autoencoder of a video model, with a mean and a deviation for every channel."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    tokenizer = qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return QwenImagePipeline(
        transformer=transformer, vae=_qwen_autoencoder(), tokenizer=tokenizer, scheduler=_qwen_scheduler(),
        text_encoder=qwen25_vl_encoder(tokenizer),
    )  # fmt: skip


def qwen_image21(*, sample_sigmas: list[float] | None = None) -> Any:
    """Three blocks; an autoencoder of colours and opacity, which divides sides by 16, as its pipeline assumes."""
    from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel

    processor = qwen3_vl_processor()
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4, context_in_dim=16,
        mlp_ratio=2, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False] * 4, latents_mean=[-0.7, 0.4, 0.1, -0.2], latents_std=[2.8, 1.4, 2.3, 0.6],
    )  # fmt: skip
    return QwenImage21Pipeline(
        transformer=transformer, scheduler=_qwen_scheduler(), vae=vae, processor=processor,
        sample_sigmas=sample_sigmas,
        text_encoder=qwen3_vl_encoder(processor.tokenizer, with_head=True),
    )  # fmt: skip


def krea2(*, is_distilled: bool = False) -> Any:
    """Three blocks of four query heads to two pairs of key and value heads; text as a stack of three hidden states."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

    tokenizer = qwen_tokenizer()
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=6400, base_shift=0.5, max_shift=1.15
    )
    return Krea2Pipeline(
        transformer=transformer, scheduler=scheduler, vae=_qwen_autoencoder(), tokenizer=tokenizer,
        text_encoder=qwen3_vl_encoder(tokenizer), text_encoder_select_layers=(1, 2, 3), is_distilled=is_distilled,
    )  # fmt: skip


def aura_flow() -> Any:
    """One double-stream and two single-stream blocks; images of at most 20 tokens a side."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tokenizer = unigram_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64,
        pos_embed_max_size=400,
    )  # fmt: skip
    with torch.no_grad():  # new, its gates are all but closed, and neither text nor adapters matter
        for parameter in transformer.parameters():
            parameter.mul_(1.8)
    return AuraFlowPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73), vae=kl_autoencoder(),
        tokenizer=tokenizer, text_encoder=umt5_encoder(tokenizer),
    )  # fmt: skip


TINY: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "StableDiffusion3Pipeline": stable_diffusion_3,
        "StableDiffusionPipeline": stable_diffusion,
        "StableDiffusionXLPipeline": stable_diffusion_xl,
        "FluxPipeline": flux,
        "Flux2KleinPipeline": flux2_klein,
        "Flux2Pipeline": flux2,
        "ZImagePipeline": z_image,
        "QwenImagePipeline": qwen_image,
        "QwenImage21Pipeline": qwen_image21,
        "Krea2Pipeline": krea2,
        "AuraFlowPipeline": aura_flow,
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
    with torch.random.fork_rng(devices=[]), quietly(), without_warnings():
        torch.manual_seed(seed)
        built = TINY[pipeline](**options)
        for component in built.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        built.save_pretrained(folder, safe_serialization=True)
    return Path(folder)
