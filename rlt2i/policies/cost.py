"""What a run will cost, before any weight is read: parameters, arithmetic and memory.

The networks are built on the meta device, where tensors have shapes but no storage. Arithmetic is counted operation by
operation in a pass over the meta network (matrix products, convolutions and attention, a multiply-add as two); memory
is the peak of such a pass, which allocates and frees exactly what the real one does. Kernel workspaces and the
allocator's slack come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import nn

from rlt2i.captures import attention_name
from rlt2i.policies.counts import PeakMemory, count_operations, fused_attention, longest_texts
from rlt2i.policies.pretrained import PretrainedPolicy, PretrainedSpec
from rlt2i.policies.pretrained.loading import cast, meta_text_encoders
from rlt2i.types import Conditioning, ImageSize, height_and_width

_FLOAT32 = 4
_ADAM_STATES = 2
_OF_CHUNKS = ("trajectories", "log-probabilities", "clean predictions", "negative velocities")
"""What a rollout leaves beside its images: put together from chunks, and copied for the rows that are learnt from."""


class NotCounted(Exception):
    """A network that cannot run without values; the message says why, and what to do."""


@attrs.frozen(kw_only=True)
class Plan:
    """The size of a run.

    Attributes:
        parameters, trainable: of the network that learns; adapters are not part of `parameters`.
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
        not_counted: what else takes memory there, nobody knows how much.
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
    not_counted: tuple[str, ...] = ()

    def table(self) -> str:
        """The plan as text."""
        rows = [
            ("network", f"{self.parameters:,} parameters"),
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
            *((part, "not counted") for part in self.not_counted),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _layers(self) -> str:
        return f" in {self.adapted_layers} adapted layers" if self.adapted_layers else " (full fine-tuning)"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.3f} TFLOP" if flops >= 1e10 else f"{flops / 1e9:,.3f} GFLOP"


def _giga(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@contextmanager
def _counting(spec: PretrainedSpec) -> Iterator[None]:
    """Say of a network that reads values that it cannot be counted without its weights."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
        raise NotCounted(
            f"{type(spec).__name__}: its network reads values of its input ({str(error).splitlines()[0]}), so it "
            "cannot be counted without its weights. Run a few iterations and read the memory in the log."
        ) from error


def make_plan(
    spec: PretrainedSpec,
    *,
    image_size: ImageSize,
    num_steps: int,
    trained_steps: int,
    rollouts_per_iteration: int,
    micro_batch_size: int,
    rollout_batch_size: int = 16,
    num_tokens: int = 20,
    weight_copies: int = 0,
    optimizer_steps: int | None = None,
    noisy_steps: int = 0,
    clean_predictions: int = 0,
    negatives: int = 0,
    parts: int = 1,
    judges: Mapping[str, int | None] | None = None,
    reward_gradient: bool = False,
) -> Plan:
    """Count a run of `spec`; reads configuration files, never weights.

    Args:
        spec: the policy, guidance included.
        image_size: in pixels.
        num_steps: denoising steps of a rollout.
        trained_steps: of them, steps that are trained per rollout.
        rollouts_per_iteration: rollouts that one optimiser update learns from.
        micro_batch_size: (rollout, step) pairs per training pass.
        rollout_batch_size: rollouts denoised and decoded together.
        num_tokens: text tokens recorded, for `capture_share`.
        weight_copies: further copies of what learns (average, reference, old policy).
        optimizer_steps: per iteration; where given, what a batch takes besides its latents is counted too: images,
            log-probabilities, clean predictions, the negative prompt's velocities, and the copies of rows that an
            optimizer step learns from.
        noisy_steps: steps with a log-probability, if any: then all steps have room for one.
        clean_predictions: steps whose clean prediction is kept for the credit.
        negatives: steps whose velocity under the negative prompt is kept for the first optimizer step.
        parts: processes that the weights, their gradients, their optimiser state and their copies are spread over.
        judges: networks of rewards and credit that stay on the device -> bytes, None where that is not known.
        reward_gradient: whether learning takes the gradient of a score through the decoder.

    Raises:
        ValueError: when the backbone refuses the size.
        NotCounted: when the network reads values of its input.
    """
    with _counting(spec):
        policy = spec.policy.on_meta(attrs.evolve(spec, gradient_checkpointing=False))
        network, vae = policy.network, policy.vae
        learnt = [p for p in network.parameters() if p.requires_grad]
        trainable = sum(p.numel() for p in learnt)
        adapter = trainable if spec.lora_rank is not None else 0
        encoders = _bytes(meta_text_encoders(spec))
        stay = spec.text_encoders == "device"
        resident = {
            "network": -(-_bytes(network) // parts),
            "optimiser": -(-trainable * _FLOAT32 * (_ADAM_STATES + weight_copies) // parts),
            **({"text encoders": encoders} if stay else {}),
            "image decoder": _bytes(vae),
            **{f"judge {name}": size for name, size in (judges or {}).items() if size is not None},
            "trajectories": rollouts_per_iteration
            * (num_steps + 1)
            * math.prod(policy.latent_shape(image_size))
            * _FLOAT32,
        }
        taken = chunks = 0
        if optimizer_steps is not None:
            channels, height, width = policy.latent_shape(image_size)
            prediction = rollouts_per_iteration * channels * height * width * _FLOAT32
            resident |= {
                "images": rollouts_per_iteration * 3 * math.prod(height_and_width(image_size)),
                "log-probabilities": rollouts_per_iteration * num_steps * height * width * _FLOAT32 * (noisy_steps > 0),
                "clean predictions": clean_predictions * prediction,
                "negative velocities": negatives * prediction,
            }
            chunks = sum(size for name, size in resident.items() if name in _OF_CHUNKS)
            # Rows are chosen by copying: once for the step at hand and, where there are several steps, once for all.
            taken = chunks if optimizer_steps == 1 else chunks + chunks // optimizer_steps
        base = sum(resident.values())
        # Autocast keeps a copy of every weight in the lower precision, in which the meta network runs throughout.
        mixed = spec.weight_dtype != spec.compute_dtype
        copies = trainable * spec.compute_dtype.itemsize * mixed
        wider_gradients = trainable * (_FLOAT32 - spec.compute_dtype.itemsize) * mixed
        if mixed:
            cast(network, spec.compute_dtype)
        if parts > 1:
            copies, wider_gradients = _gathered(policy), -(-trainable * _FLOAT32 // parts)
            _let_gradients_go(network)

        guided, several = spec.guided, rollouts_per_iteration > rollout_batch_size
        # Other negative passes keep no activations.
        update_rows = micro_batch_size * (1 + (guided and spec.uncond_grad))
        with fused_attention():
            # Counting takes some operations apart, which moves the peak of a pass without gradient: these have two.
            forward = forward_flops(policy, image_size)
            decode_flops = count_operations(lambda: _decode(policy, image_size, 1))
            with torch.no_grad(), PeakMemory(network) as denoise:
                _velocity(policy, image_size, rollout_batch_size)
            with PeakMemory(vae) as decode:
                _decode(policy, image_size, rollout_batch_size)
            with PeakMemory(vae) as judged:
                if reward_gradient:
                    _decode_backward(policy, image_size, micro_batch_size)
            with PeakMemory(network) as update:
                backward = count_operations(lambda: _backward(policy, image_size, update_rows)) / update_rows - forward
            if spec.gradient_checkpointing:
                network.enable_gradient_checkpointing()
                with PeakMemory(network) as update:
                    _backward(policy, image_size, update_rows)
            share = _captured_flops(policy, image_size, num_tokens, "middle") / forward - 1
        negative = forward + spec.uncond_grad * backward - (negatives > 0) * forward / (optimizer_steps or 1)
        train = forward + backward + guided * negative
        train += spec.gradient_checkpointing * forward * (1 + guided * spec.uncond_grad)
        return Plan(
            parameters=sum(p.numel() for p in network.parameters()) - adapter,
            trainable=trainable,
            adapted_layers=len(learnt) // 2 if adapter else 0,
            image_tokens=math.prod(policy.token_grid(image_size)),
            text_tokens=spec.text_tokens,
            forward_flops=forward,
            backward_flops=backward,
            rollout_flops=rollouts_per_iteration * num_steps * (1 + guided) * forward,
            decode_flops=decode_flops,
            update_flops=rollouts_per_iteration * trained_steps * train,
            capture_share=share,
            memory={
                "encode": base + (0 if stay else encoders),
                # A chunk is decoded while the next one is denoised; chunks are put together while they are still there.
                "rollout": base + max(copies + denoise.peak + several * decode.peak, chunks + decode.peak),
                "update": base + taken + max(copies + wider_gradients + update.peak, judged.peak),
            },
            resident=resident,
            not_counted=tuple(f"judge {name}" for name, size in (judges or {}).items() if size is None),
        )


def _gathered(policy: PretrainedPolicy) -> int:
    """Bytes of a sharded network that are whole at a time, in the precision of its parameters.

    Two units, because the next is fetched while one computes; what belongs to none; and the gradient of a unit, as it
    is and in the float32 in which it is summed.
    """
    own: dict[int, int] = {}  # the inner units come first and own what is in both
    largest = 0
    for unit in policy.units():
        own_parameters = [p for p in unit.parameters() if id(p) not in own]
        own |= {id(p): p.nbytes for p in own_parameters}
        largest = max(largest, sum(p.nbytes for p in own_parameters))
    rest = sum(p.nbytes for p in policy.network.parameters() if id(p) not in own)
    float32 = largest * _FLOAT32 // policy.spec.compute_dtype.itemsize
    return rest + 2 * largest + largest + float32


def _let_gradients_go(network: nn.Module) -> None:
    """Sharded gradients are handed out as soon as they are there, and counted elsewhere."""

    def let_go(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(let_go)


def capture_share(
    spec: PretrainedSpec, *, image_size: ImageSize, num_tokens: int = 20, blocks: str = "middle"
) -> float:
    """Arithmetic of recording attention from the image to the text, relative to the forward pass that it watches."""
    policy = spec.policy.on_meta(spec)
    cast(policy.network, spec.compute_dtype)
    with fused_attention():
        return _captured_flops(policy, image_size, num_tokens, blocks) / forward_flops(policy, image_size) - 1


@torch.no_grad()
def forward_flops(policy: PretrainedPolicy, size: ImageSize) -> float:
    """Arithmetic of the velocity of one sequence, of a policy on the meta device within `fused_attention`."""
    return count_operations(lambda: _velocity(policy, size, 1))


def _inputs(policy: PretrainedPolicy, size: ImageSize, rows: int, num_tokens: int = 1) -> tuple[Any, Any, Conditioning]:
    """Latents, noise levels and conditioning without values; each prompt has one concept of so many words."""
    device = policy.device
    tensors = {name: _blank(name, shape, policy) for name, shape in policy.spec.text_shapes().items()}
    tensors["core_tokens"] = torch.empty(1, num_tokens, dtype=torch.long, device=device)
    tensors["core_members"] = torch.empty(1, num_tokens, 1, dtype=torch.bool, device=device)
    conditioning = Conditioning(tensors=tensors, rows=torch.empty(rows, dtype=torch.long, device=device))
    latents = torch.empty(rows, *policy.latent_shape(size), device=device)
    return latents, torch.empty(rows, device=device), conditioning


def _blank(name: str, shape: tuple[int, ...], policy: PretrainedPolicy) -> torch.Tensor:
    dtype = torch.long if name == "mask" else policy.spec.compute_dtype
    return torch.empty(1, *shape, dtype=dtype, device=policy.device)


def _velocity(policy: PretrainedPolicy, size: ImageSize, rows: int) -> torch.Tensor:
    with longest_texts(policy.spec.text_tokens):
        return policy.velocity(*_inputs(policy, size, rows))


@torch.enable_grad()
def _backward(policy: PretrainedPolicy, size: ImageSize, rows: int) -> None:
    _velocity(policy, size, rows).square().mean().backward()
    policy.network.zero_grad(set_to_none=True)


@torch.no_grad()
def _decode(policy: PretrainedPolicy, size: ImageSize, rows: int) -> None:
    policy.decode(torch.empty(rows, *policy.latent_shape(size), device=policy.device))


@torch.enable_grad()
def _decode_backward(policy: PretrainedPolicy, size: ImageSize, rows: int) -> None:
    latents = torch.empty(rows, *policy.latent_shape(size), device=policy.device, requires_grad=True)
    torch.autograd.grad(policy.decode(latents).mean(), latents)


@torch.no_grad()
def _captured_flops(policy: PretrainedPolicy, size: ImageSize, num_tokens: int, blocks: str) -> float:
    names = frozenset({attention_name("image_to_text", blocks)})
    with longest_texts(policy.spec.text_tokens):
        return count_operations(lambda: policy.velocity_with_captures(*_inputs(policy, size, 1, num_tokens), names))
