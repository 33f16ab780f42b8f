"""Reading and preparing the networks of a Stable Diffusion 3 pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from rlt2i.policies.lora import add_lora
from rlt2i.policies.sd3_text import TextEncoders

_GRAPH_LIMIT = 64
"""Blocks share one code object. Its variants x shapes x gradient modes exceed dynamo's default of 8 graphs."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Load weights without a progress bar for every component."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def prepare_transformer(spec: Any, transformer: Any) -> None:
    """Decide, in place, what learns and how."""
    full = spec.lora_rank is None
    transformer.eval().requires_grad_(full)
    if spec.lora_rank is not None:
        alpha = spec.lora_alpha or 2 * spec.lora_rank
        add_lora(transformer, rank=spec.lora_rank, alpha=alpha, targets=spec.lora_targets, seed=spec.lora_seed)
    if spec.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()


def load_text_encoders(spec: Any, source: dict[str, Any], joint_dim: int, device: torch.device) -> TextEncoders:
    """The tokenizers and text encoders that the spec names."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    def network(kind: Any, name: str) -> Any:
        return (
            kind.from_pretrained(**source, subfolder=name, dtype=spec.compute_dtype)
            .eval()
            .requires_grad_(False)
            .to(device)
        )

    return TextEncoders(
        clip_tokenizers=tuple(CLIPTokenizer.from_pretrained(**source, subfolder=f"tokenizer{n}") for n in ("", "_2")),
        clip_encoders=tuple(network(CLIPTextModelWithProjection, f"text_encoder{n}") for n in ("", "_2")),
        t5_tokenizer=T5TokenizerFast.from_pretrained(**source, subfolder="tokenizer_3") if spec.uses_t5 else None,
        t5_encoder=network(T5EncoderModel, "text_encoder_3") if spec.uses_t5 else None,
        joint_dim=joint_dim,
        t5_length=spec.max_sequence_length,
        zero_tokens=spec.zero_text_tokens,
        dtype=spec.compute_dtype,
        device=device,
    )


def compile_blocks(transformer: Any) -> None:
    """Compile each block in place, whole; fullgraph, so that a graph break is an error and not a slow surprise."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPH_LIMIT)
    for block in transformer.transformer_blocks:
        block.compile(fullgraph=True, dynamic=False)
