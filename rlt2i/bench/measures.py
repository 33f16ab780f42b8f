"""What training did beyond the score: to the rest of the image, to diversity, to judges that were not trained on.

Numbers of the training half of the credit benchmark. Base and trained images share prompt and noise, so they are
compared pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rlt2i.evaluation.health import edge_density, mean_cosine_distance, pixel_features, vendi_score
from rlt2i.evaluation.heldout import Evaluation
from rlt2i.interfaces import Reward, RewardBatch


def evaluation_measures(now: Evaluation, base: Evaluation, reward: Reward) -> dict[str, float]:
    """Means over the held-out images of one evaluation.

    Args:
        now, base: the same prompts and noise, with the weights at hand and with those training began from.
        reward: the trained one; where it offers maps, inside and outside of the judged regions are told apart.

    Returns:
        "reward" and its components (means over valid images), "heldout/<name>" of judges never trained on, "valid",
        "edges", "diversity/*" of images of one prompt, and with maps "drift/inside", "drift/outside", "selectivity",
        "edges/outside".
    """
    kept = now.valid & base.valid
    values = {"valid": float(now.valid.float().mean())}
    for name in ("reward", *now.components):
        values[name] = float(now.values(name)[now.valid].nanmean())
    for name, judged in now.heldout.items():
        values[f"heldout/{name}"] = float(judged.scores[judged.valid].mean())
    values["edges"] = float(edge_density(now.images).mean())
    values |= diversity([p.text for p in now.prompts], now.images)
    if "maps" in reward.offers and kept.any():
        inside = judged_places(now, reward)
        values |= drift(base.images[kept], now.images[kept], inside[kept])
        values["edges/outside"] = edges_outside(now.images[kept], inside[kept])
    return values


def judged_places(now: Evaluation, reward: Reward) -> Tensor:
    """[N, H, W] in [0, 1]: which pixels the reward looked at."""
    batch = RewardBatch(
        images=now.images, prompts=[p.text for p in now.prompts], metadata=[p.metadata for p in now.prompts]
    )
    maps = reward.score(batch, frozenset({"maps"})).maps
    assert maps is not None, "the reward offers maps"
    sized = interpolate(maps[:, None].float(), size=tuple(now.images.shape[-2:]), mode="area")[:, 0]
    return (sized > 0.5).float()


def drift(before: Tensor, after: Tensor, inside: Tensor) -> dict[str, float]:
    """Mean absolute change of pixels, in [0, 1], inside and outside of a region, and their ratio.

    Args:
        before, after: [N, 3, H, W] uint8 of the same prompts and noise.
        inside: [N, H, W], 1 in the region and 0 outside.

    Returns:
        "drift/inside" and "drift/outside", means over all pixels of a kind; "selectivity" is inside over outside: 1
        for a change that is everywhere the same. What has no pixel, or did not change, is left out.
    """
    change = (after.float() - before.float()).abs().mean(dim=1) / 255
    values = {}
    for name, weight in (("drift/inside", inside), ("drift/outside", 1 - inside)):
        if weight.sum() > 0:
            values[name] = float((change * weight).sum() / weight.sum())
    if values.get("drift/outside", 0) > 0 and "drift/inside" in values:
        values["selectivity"] = values["drift/inside"] / values["drift/outside"]
    return values


def edges_outside(images: Tensor, inside: Tensor) -> float:
    """How rich the background is: mean gradient of the luma, per pixel outside of the region.

    Args:
        images: [N, 3, H, W] uint8.
        inside: [N, H, W], 1 in the region.

    Returns:
        Mean of |dx| + |dy| of the luma in [0, 1] over pixels that lie outside together with their neighbours to the
        right and below; 0 where there are none.
    """
    luma = torch.einsum("bchw,c->bhw", images.float() / 255, torch.tensor((0.299, 0.587, 0.114)))
    outside = 1 - inside
    dx = (luma[:, :-1, 1:] - luma[:, :-1, :-1]).abs() * outside[:, :-1, 1:]
    dy = (luma[:, 1:, :-1] - luma[:, :-1, :-1]).abs() * outside[:, 1:, :-1]
    both = outside[:, :-1, :-1] * outside[:, :-1, 1:] * outside[:, 1:, :-1]
    return float(((dx + dy) * both).sum() / both.sum().clamp_min(1))


def diversity(texts: Sequence[str], images: Tensor) -> dict[str, float]:
    """How much images of one prompt differ: mean over prompts of at least two images.

    Returns:
        "diversity/cosine_distance" and "diversity/vendi" (divided by the number of images, so in (0, 1]); nothing
        where every prompt has one image.
    """
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text, []).append(row)
    groups = [members for members in rows.values() if len(members) > 1]
    if not groups:
        return {}
    features = pixel_features(images)
    distance = [float(mean_cosine_distance(features[g], len(g))) for g in groups]
    vendi = [float(vendi_score(features[g], len(g))) / len(g) for g in groups]
    return {
        "diversity/cosine_distance": sum(distance) / len(groups),
        "diversity/vendi": sum(vendi) / len(groups),
    }
