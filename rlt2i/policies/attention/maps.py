"""Maps between image tokens and a few words, exactly, from the log-sum-exp of each query's scores.

    P[i, t] = exp(q_i . k_t * scale + bias_it - lse_i)

costs the selected columns alone; the matrix of all queries and keys never exists.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from rlt2i.captures import DIRECTIONS


@attrs.frozen(kw_only=True, eq=False)
class Where:
    """Where the image and the selected words are in what a block attends to.

    Attributes:
        grid: (h, w) of the image tokens.
        image: where the image tokens begin; one number, or [N] where rows have texts of different lengths.
        tokens: [N, M] positions of the selected words among the keys.
        members: [N, M, K] 1 where word m belongs to concept k; a padding token belongs to none.
        joint: whether image and words share one sequence. In cross-attention every query is an image token, and no
            word asks.
        keys: how many keys a call has in which the image asks, where a block also attends to text alone, in a call
            that nobody watches; None where a block attends once.
    """

    grid: tuple[int, int]
    image: int | Tensor
    tokens: Tensor
    members: Tensor
    joint: bool = True
    keys: int | None = None

    def image_rows(self, sequence: Tensor) -> Tensor:
        """[N, H, S, ...] -> [N, H, h * w, ...], the image tokens of queries, keys or log-sum-exps."""
        if not self.joint:
            return sequence
        count = self.grid[0] * self.grid[1]
        if isinstance(self.image, int):
            return sequence[:, :, self.image : self.image + count]
        return take(sequence, self.image[:, None] + torch.arange(count, device=sequence.device))


def take(sequence: Tensor, positions: Tensor) -> Tensor:
    """[N, H, S, ...], [N, M] -> [N, H, M, ...]."""
    index = positions[(slice(None), None, slice(None), *[None] * (sequence.ndim - 3))]
    return sequence.gather(2, index.expand(-1, sequence.shape[1], -1, *sequence.shape[3:]))


def image_to_text(
    query: Tensor, key: Tensor, lse: Tensor, where: Where, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """How much of each image token's attention goes to each concept: mean over heads, sum over the concept's words.

    Args:
        query, key: [N, H, S, D] and [N, H, L, D] as the kernel saw them.
        lse: [N, H, S] log-sum-exp of each query's scores, bias included.
        bias, scale: of the scores, as in `attend`.

    Returns:
        [N, K, image tokens] probabilities, float32 at least.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = where.image_rows(query).to(wide) @ take(key, where.tokens).to(wide).mT * _scale(query, scale)
    if bias is not None:
        observed = where.image_rows(bias.expand(len(query), -1, query.shape[2], -1)).mT
        scores = scores + take(observed, where.tokens).mT
    probability = (scores - where.image_rows(lse)[..., None].to(wide)).exp_().mean(dim=1)
    return (probability @ where.members.to(wide)).mT


def text_to_image(
    query: Tensor, key: Tensor, lse: Tensor, where: Where, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Where each concept's own words look: rows of the joint softmax read at the image tokens.

    Mean over heads and over the concept's words; arguments and result as in `image_to_text`.
    """
    assert where.joint, "no word asks in cross-attention"
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = take(query, where.tokens).to(wide) @ where.image_rows(key).to(wide).mT * _scale(query, scale)
    if bias is not None:
        asking = take(bias.expand(len(query), -1, query.shape[2], -1), where.tokens)
        scores = scores + where.image_rows(asking.mT).mT
    probability = (scores - take(lse, where.tokens)[..., None].to(wide)).exp_().mean(dim=1)
    share = where.members.to(wide) / where.members.sum(dim=1, keepdim=True).clamp_min(1).to(wide)
    return share.mT @ probability


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


MAPS = dict(zip(DIRECTIONS, (image_to_text, text_to_image), strict=True))
