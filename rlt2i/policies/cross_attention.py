"""What the image queries of a UNet's cross-attention look at, read beside the computation and never in its way.

Every transformer block of a Stable Diffusion UNet has a cross-attention `attn2`: queries from the image at the block's
own resolution, keys from the text. There are few text tokens, so the map of a few words costs next to nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rlt2i.captures import attention_names, parse_attention_name, select_blocks


def cross_attention_names(num_blocks: int) -> frozenset[str]:
    """The maps that a UNet can record: image queries, text keys. No text token asks, so there is no other direction."""
    return frozenset(name for name in attention_names(num_blocks) if parse_attention_name(name)[0] == "image_to_text")


def count_blocks(config: dict[str, Any]) -> int:
    """Transformer blocks of a UNet2DConditionModel, from its configuration alone."""
    layers = config["layers_per_block"]
    down, up = config["down_block_types"], config["up_block_types"]
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    return (
        layers * sum("CrossAttn" in kind for kind in down)
        + (middle is not None and "CrossAttn" in middle)
        + (layers + 1) * sum("CrossAttn" in kind for kind in up)
    )


def cross_attentions(unet: Any) -> list[Any]:
    """Its `attn2` modules in the order in which they run: down, middle, up."""
    parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return [m for part in parts for name, m in part.named_modules() if name.endswith(".attn2")]


def concept_map(query: Tensor, key: Tensor, heads: int, tokens: Tensor, members: Tensor) -> Tensor:
    """How much of each image query's attention goes to each concept: mean over heads, sum over the concept's tokens.

    Args:
        query: [N, S, D], key: [N, L, D], before the split into heads.
        tokens: [N, M] positions of the selected tokens in the text.
        members: [N, M, K] bool, whether token m belongs to concept k; a padding token belongs to none.

    Returns:
        [N, K, S] float32.
    """
    split = lambda x: x.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    q, k = split(query), split(key)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    chosen = tokens[:, None, None, :].expand(-1, heads, scores.shape[2], -1)
    selected = scores.gather(3, chosen) - scores.logsumexp(dim=3, keepdim=True)
    return (selected.exp().mean(dim=1) @ members.float()).mT


@attrs.define(eq=False)
class CrossRecorder:
    """Sums the maps of the blocks that a capture names, all brought to one grid.

    Attributes:
        wanted: capture name -> its blocks.
        tokens, members: as in `concept_map`.
        grid: (h, w) of the result: finer maps are averaged, coarser ones repeated.
    """

    wanted: dict[str, tuple[int, ...]]
    tokens: Tensor
    members: Tensor
    grid: tuple[int, int]
    _sums: dict[str, Tensor] = attrs.field(factory=dict, init=False)

    @torch.no_grad()
    def record(self, block: int, query: Tensor, key: Tensor, heads: int) -> None:
        names = [name for name, blocks in self.wanted.items() if block in blocks]
        if not names:
            return
        found = concept_map(query, key, heads, self.tokens, self.members)
        side = round(found.shape[-1] ** 0.5)
        found = adaptive_avg_pool2d(found.unflatten(-1, (side, side)), self.grid)
        for name in names:
            self._sums[name] = self._sums[name] + found if name in self._sums else found

    def captures(self) -> dict[str, Tensor]:
        """name -> [N, K, h, w] float32, the mean over the blocks."""
        return {name: self._sums[name] / len(blocks) for name, blocks in self.wanted.items()}


@contextlib.contextmanager
def recording(
    attentions: Sequence[Any], names: frozenset[str], *, tokens: Tensor, members: Tensor, grid: tuple[int, int]
) -> Iterator[CrossRecorder]:
    """Within this context the queries and keys of the named blocks are read as they are computed."""
    wanted = {name: select_blocks(parse_attention_name(name)[1], len(attentions)) for name in sorted(names)}
    recorder = CrossRecorder(wanted, tokens, members, grid)
    with contextlib.ExitStack() as hooks:
        for block, attention in enumerate(attentions):
            assert attention.norm_q is None, "queries that are normalised after the projection are not read"
            queries: list[Tensor] = []
            keep = attention.to_q.register_forward_hook(lambda *call, q=queries: q.append(call[2]))
            read = attention.to_k.register_forward_hook(
                lambda *call, b=block, q=queries, a=attention: recorder.record(b, q.pop(), call[2], a.heads)
            )
            hooks.callback(keep.remove)
            hooks.callback(read.remove)
        yield recorder
