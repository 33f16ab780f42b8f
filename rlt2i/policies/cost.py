"""What a run will cost, before any weight is read: parameters, arithmetic and memory.

The networks are built on the meta device, where tensors have shapes but no storage. Arithmetic is counted by formula
(every linear layer and both attentions, a multiply-add as two); memory is the peak of a pass over the meta network,
which allocates and frees exactly what the real one does. Kernel workspaces and the allocator's slack come on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn

from rlt2i.captures import select_blocks
from rlt2i.policies.attention import watch
from rlt2i.policies.counts import PeakMemory, capture_flops, fused_attention, transformer_flops
from rlt2i.policies.sd3 import SD3
from rlt2i.policies.sd3_loading import prepare_transformer

_FLOAT32 = 4
_ADAM_STATES = 2


@attrs.frozen(kw_only=True)
class Plan:
    """The size of a run.

    Attributes:
        parameters, trainable: of the transformer; adapters are not part of `parameters`.
        adapted_layers: layers with an adapter.
        image_tokens, text_tokens: per sequence.
        forward_flops: one sequence, adapters included.
        backward_flops: what the gradient of one conditional sequence adds.
        rollout_flops: all rollouts of one update, guidance included, without decoding.
        decode_flops: one image.
        update_flops: all (rollout, step) pairs of one update, guidance included.
        capture_share: arithmetic of recording 20 tokens in the middle blocks, relative to the denoising step.
        memory: phase -> bytes at its peak.
        resident: what stays in memory throughout -> bytes.
    """

    parameters: int
    trainable: int
    adapted_layers: int
    image_tokens: int
    text_tokens: int
    forward_flops: float
    backward_flops: float
    rollout_flops: float
    decode_flops: float
    update_flops: float
    capture_share: float
    memory: Mapping[str, int]
    resident: Mapping[str, int]

    def table(self) -> str:
        """The plan as text."""
        rows = [
            ("transformer", f"{self.parameters:,} parameters"),
            ("trainable", f"{self.trainable:,} parameters" + self._layers()),
            ("sequence", f"{self.image_tokens} image + {self.text_tokens} text tokens"),
            ("forward", f"{_tera(self.forward_flops)} per sequence"),
            ("backward", f"{_tera(self.backward_flops)} per sequence"),
            ("decode", f"{_tera(self.decode_flops)} per image"),
            ("rollout", f"{_tera(self.rollout_flops)} per update"),
            ("training", f"{_tera(self.update_flops)} per update"),
            ("attention capture", f"{100 * self.capture_share:.4f} % of a step"),
            *((f"memory, {phase}", _giga(size)) for phase, size in self.memory.items()),
            *((f"  of which {part}", _giga(size)) for part, size in self.resident.items()),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _layers(self) -> str:
        return f" in {self.adapted_layers} adapted layers" if self.adapted_layers else " (full fine-tuning)"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.3f} TFLOP" if flops >= 1e10 else f"{flops / 1e9:,.3f} GFLOP"


def _giga(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.to(dtype)


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def build_transformer(spec: SD3) -> Any:
    """The spec's transformer on the meta device, prepared as for training."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(spec.config("transformer"))
    _cast(transformer, spec.weight_dtype)
    prepare_transformer(spec, transformer)
    watch(transformer, "cpu")
    return transformer


def build_vae(spec: SD3) -> Any:
    """The spec's autoencoder on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(spec.config("vae")).requires_grad_(False)
    _cast(vae, spec.image_dtype)
    return vae


def build_text_encoders(spec: SD3) -> nn.ModuleList:
    """The spec's text encoders on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clips = [CLIPTextConfig(**spec.config(name)) for name in ("text_encoder", "text_encoder_2")]
    with torch.device("meta"):
        encoders: list[nn.Module] = [CLIPTextModelWithProjection(config) for config in clips]
        if spec.uses_t5:
            encoders.append(T5EncoderModel(T5Config(**spec.config("text_encoder_3"))))
    return nn.ModuleList(encoders).to(spec.compute_dtype)


def make_plan(
    spec: SD3,
    *,
    image_size: int,
    num_steps: int,
    trained_steps: int,
    rollouts_per_iteration: int,
    micro_batch_size: int,
    rollout_batch_size: int = 16,
    num_tokens: int = 20,
    weight_copies: int = 0,
) -> Plan:
    """Count a run of `spec`; reads configuration files, never weights.

    Args:
        spec: the policy, guidance included.
        image_size: pixels a side.
        num_steps: denoising steps of a rollout.
        trained_steps: of them, steps that are trained per rollout.
        rollouts_per_iteration: rollouts that one optimiser update learns from.
        micro_batch_size: (rollout, step) pairs per training pass.
        rollout_batch_size: rollouts denoised and decoded together.
        num_tokens: text tokens recorded, for `capture_share`.
        weight_copies: further copies of what learns (average, reference, old policy).
    """
    transformer, vae = build_transformer(spec), build_vae(spec)
    config = transformer.config
    side = image_size // 2 ** (len(vae.config.block_out_channels) - 1)
    num_image, num_text = (side // config.patch_size) ** 2, spec.text_tokens
    learnt = [p for p in transformer.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in learnt)
    adapter = trainable if spec.lora_rank is not None else 0

    forward, backward = transformer_flops(
        transformer, num_image, num_text, lora_rank=spec.lora_rank, lora_targets=spec.lora_targets
    )
    guided = spec.guidance_scale != 1.0
    train = forward + backward + guided * (forward + spec.uncond_grad * backward)
    train += spec.gradient_checkpointing * forward * (1 + guided * spec.uncond_grad)
    rollout_rows, update_rows = (
        rollout_batch_size * (1 + guided),
        micro_batch_size * (1 + (guided and spec.uncond_grad)),
    )

    num_middle = len(select_blocks("middle", config.num_layers))
    latent_bytes = config.in_channels * side**2 * _FLOAT32
    resident = {
        "transformer": _bytes(transformer),
        "optimiser": trainable * _FLOAT32 * (_ADAM_STATES + weight_copies),
        "text encoders": _bytes(build_text_encoders(spec)),
        "image decoder": _bytes(vae),
        "trajectories": rollouts_per_iteration * (num_steps + 1) * latent_bytes,
    }
    base = sum(resident.values())
    # Autocast keeps a copy of every weight in the lower precision; the meta network runs in that precision throughout.
    mixed = spec.weight_dtype != spec.compute_dtype
    copies = trainable * spec.compute_dtype.itemsize * mixed
    wider_gradients = trainable * (_FLOAT32 - spec.compute_dtype.itemsize) * mixed
    if mixed:
        _cast(transformer, spec.compute_dtype)
    with fused_attention():
        with torch.no_grad(), PeakMemory(transformer) as denoise:
            _velocity(spec, transformer, rollout_rows, side)
        with torch.no_grad(), PeakMemory(vae) as decode:
            vae.decode(
                torch.empty(rollout_batch_size, config.in_channels, side, side, device="meta", dtype=spec.image_dtype)
            )
        with torch.enable_grad(), PeakMemory(transformer) as update:
            _velocity(spec, transformer, update_rows, side).square().mean().backward()
    return Plan(
        parameters=sum(p.numel() for p in transformer.parameters()) - adapter,
        trainable=trainable,
        adapted_layers=len(learnt) // 2 if adapter else 0,
        image_tokens=num_image,
        text_tokens=num_text,
        forward_flops=forward,
        backward_flops=backward,
        rollout_flops=rollouts_per_iteration * num_steps * (1 + guided) * forward,
        decode_flops=_decode_flops(vae, config.in_channels, side),
        update_flops=rollouts_per_iteration * trained_steps * train,
        capture_share=capture_flops(config, num_image, num_tokens, num_middle) / forward,
        memory={
            "encode": base,
            "rollout": base + max(copies + denoise.peak, decode.peak),
            "update": base + copies + wider_gradients + update.peak,
        },
        resident=resident,
    )


def capture_share(spec: SD3, *, image_size: int, num_tokens: int = 20, blocks: str = "middle") -> float:
    """Arithmetic of recording one attention direction, relative to the forward pass that it watches."""
    transformer, vae = build_transformer(spec), spec.config("vae")
    config = transformer.config
    num_image = (image_size // 2 ** (len(vae["block_out_channels"]) - 1) // config.patch_size) ** 2
    forward, _ = transformer_flops(
        transformer, num_image, spec.text_tokens, lora_rank=spec.lora_rank, lora_targets=spec.lora_targets
    )
    num_blocks = len(select_blocks(blocks, config.num_layers))
    return capture_flops(config, num_image, num_tokens, num_blocks) / forward


def _velocity(spec: SD3, transformer: Any, rows: int, side: int) -> torch.Tensor:
    """One pass over the meta network, gradients and all."""
    config = transformer.config

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=spec.compute_dtype)

    return transformer(
        hidden_states=empty(rows, config.in_channels, side, side),
        encoder_hidden_states=empty(rows, spec.text_tokens, config.joint_attention_dim),
        pooled_projections=empty(rows, config.pooled_projection_dim),
        timestep=torch.empty(rows, device="meta"),
        return_dict=False,
    )[0].float()


def _decode_flops(vae: Any, channels: int, side: int) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(torch.empty(1, channels, side, side, device="meta", dtype=vae.dtype))
    return float(counter.get_total_flops())
