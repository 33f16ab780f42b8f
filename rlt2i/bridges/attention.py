"""Attention maps inside an engine: one more pass of the network, watched, without guidance and without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlt2i.policies.attention.maps import Where
from rlt2i.policies.attention.recorder import recording
from rlt2i.policies.attention.watch import watch
from rlt2i.policies.token_spans import character_ranges, find_spans, span_tensors


@contextmanager
def watched(transformer: Any) -> Iterator[Any]:
    """The network with watched attention; it is as it was afterwards.

    Args:
        transformer: diffusers' SD3 transformer, bare or inside of PEFT's wrapper.

    Raises:
        ValueError: for another network.
    """
    network = transformer.get_base_model() if hasattr(transformer, "get_base_model") else transformer
    blocks = getattr(network, "transformer_blocks", ())
    if not blocks or any(not hasattr(block.attn, "add_v_proj") for block in blocks):
        raise ValueError(
            f"{type(network).__name__}: inside an engine, attention is read from Stable Diffusion 3's joint attention. "
            "Use an allocation without attention, such as ResidualContrast()."
        )
    attentions, weight = [block.attn for block in blocks], network.pos_embed.proj.weight
    own = [vars(attention).get("forward") for attention in attentions]
    watch(attentions, weight.device, weight.dtype)
    try:
        yield network
    finally:
        for attention, forward in zip(attentions, own, strict=True):
            vars(attention).pop("forward", None)
            if forward is not None:
                attention.forward = forward


@torch.no_grad()
def attention_maps(
    transformer: Any,
    forward: Callable[[], object],
    names: frozenset[str],
    *,
    tokens: Tensor,
    members: Tensor,
    grid: tuple[int, int],
) -> dict[str, Tensor]:
    """name -> [N, K, h, w] float32: the maps of one pass of the network.

    Args:
        transformer: as in `watched`.
        forward: runs the network once, on N states and their prompts alone.
        names: of the attention maps.
        tokens, members: [N, M] positions in the text sequence and [N, M, K], see `rlt2i.policies.attention.maps.Where`.
        grid: (h, w) of the image tokens.
    """
    # Stable Diffusion 3 attends to image tokens first and text tokens behind them.
    where = Where(grid=grid, image=0, tokens=tokens + grid[0] * grid[1], members=members)
    with (
        watched(transformer) as network,
        recording(names, num_blocks=len(network.transformer_blocks), where=where) as recorder,
    ):
        forward()
    return recorder.captures()


def core_tokens(
    texts: Sequence[str], core: Sequence[Sequence[str]], *, clip: Any, t5: Any, text_length: int
) -> tuple[Tensor, Tensor]:
    """Where the core phrases of N prompts are among SD3's text tokens: CLIP's first, T5's behind them.

    Args:
        core: per prompt its core phrases; empty means its content words.
        clip, t5: tokenizers; t5 may be None.
        text_length: tokens of the joint text sequence.

    Returns:
        tokens [N, M] and members [N, M, K].
    """
    clip_length = int(clip.model_max_length)
    rows = []
    for text, phrases in zip(texts, core, strict=True):
        streams = {"clip": character_ranges(clip, text, clip_length)}
        if t5 is not None and text_length > clip_length:
            streams["t5"] = character_ranges(t5, text, text_length - clip_length)
        rows.append(find_spans(text, tuple(phrases), streams, {"clip": 0, "t5": clip_length}))
    return span_tensors(rows, "cpu")
