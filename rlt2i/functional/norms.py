"""Norms of velocities: what grows when a policy chases a reward."""

import torch
from torch import Tensor

from .numerics import check_same_shape, full_precision


def norm_excess(v: Tensor, v_reference: Tensor) -> Tensor:
    """NormGuard's hinge, max(|v| - |v_ref|, 0) with the norm over all coordinates (arXiv 2606.27771).

    Norms are roots of means, so that the number of coordinates does not matter. A velocity that is no longer than the
    reference's has no gradient, one that is equal included.

    Args:
        v: [N, C, H, W]; gradients flow.
        v_reference: [N, C, H, W].

    Returns:
        [N].
    """
    check_same_shape(v=v, v_reference=v_reference)
    return torch.relu(_norm(v) - _norm(v_reference.detach()))


def _norm(v: Tensor) -> Tensor:
    flat = full_precision(v).flatten(1)
    return torch.linalg.vector_norm(flat, dim=1) / flat.shape[1] ** 0.5
