"""Which attention finds the objects? Measured, not assumed, on tasks whose regions are known."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rlt2i.captures import parse_attention_name
from rlt2i.evaluation.draw import Draw
from rlt2i.interfaces import Policy, Reward
from rlt2i.rewards.agreement import FailureCounts
from rlt2i.types import ImageSize, Prompts


def area_under_roc(scores: Tensor, inside: Tensor) -> Tensor:
    """Probability that a random inside cell scores above a random outside cell; ties count half.

    Args:
        scores: [N, cells].
        inside: [N, cells] bool.

    Returns:
        [N]; nan where a row has no cell on one of the sides.
    """
    ordered = scores.sort(dim=1).values
    below, upto = (torch.searchsorted(ordered, scores.contiguous(), right=right) for right in (False, True))
    ranks = (below + upto + 1).double() / 2  # tied cells share the mean of their ranks
    count = inside.sum(dim=1)
    pairs = count * (inside.shape[1] - count)
    wins = (ranks * inside).sum(dim=1) - count * (count + 1) / 2  # Mann and Whitney's statistic
    return torch.where(pairs > 0, wins / pairs.clamp_min(1), torch.nan).float()


@attrs.frozen(kw_only=True, eq=False)
class Localisation:
    """Area under the ROC curve of each map against the regions of the finished image.

    Attributes:
        auc: (direction, block) -> [T], one value per denoising step, averaged over images.
        images: how many images had regions.
    """

    auc: dict[tuple[str, int], Tensor]
    images: int

    def best(self) -> tuple[str, int]:
        """The direction and block with the highest mean over steps."""
        return max(self.auc, key=lambda key: float(self.auc[key].mean()))

    def table(self) -> str:
        """A line per map: AUC at the first, middle and last step, and the mean."""
        lines = [f"{'direction':<15} {'block':>5} {'first':>7} {'middle':>7} {'last':>7} {'mean':>7}"]
        for (direction, block), values in self.auc.items():
            first, middle, last = values[0], values[len(values) // 2], values[-1]
            lines.append(f"{direction:<15} {block:>5} {first:7.3f} {middle:7.3f} {last:7.3f} {values.mean():7.3f}")
        return "\n".join(lines)


@torch.no_grad()
def measure_localisation(
    policy: Policy,
    reward: Reward,
    prompts: Prompts,
    *,
    num_steps: int,
    image_size: ImageSize,
    rollout_batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Localisation:
    """Sample the prompts and compare every block's attention, in both directions, with the regions that the reward
    found.

    Args:
        reward: one that offers "maps".

    Raises:
        ValueError: when the reward knows no regions, or none was found in any image.
    """
    if "maps" not in reward.offers:
        raise ValueError(
            f"{type(reward).__name__} offers no maps, so attention cannot be compared with what it judged. Name the "
            "blocks instead of 'auto' ('middle' is the choice for large models)."
        )
    parsed = {name: parse_attention_name(name) for name in policy.offers if name.startswith("attention/")}
    names: dict[tuple[str, int], str] = {(d, int(b)): n for n, (d, b) in sorted(parsed.items()) if b.isdigit()}
    draw = Draw(
        seed=seed, num_steps=num_steps, image_size=image_size, rollout_batch_size=rollout_batch_size, device=device
    )
    drawn = draw.judged(policy, reward, prompts, want=frozenset({"maps"}), captures=frozenset(names.values()))
    trajectory, judged = drawn.trajectory, drawn.output
    if judged.maps is None or not judged.valid.any():
        raise ValueError(
            f"measure_localisation: the reward could judge none of {len(drawn.images)} images, so there are no "
            f"regions to compare attention with. Why: {FailureCounts.of(judged)}."
        )
    maps = judged.maps.to(trajectory.latents.device)
    grid = policy.token_grid(image_size)
    inside = interpolate(maps[:, None].float(), size=grid, mode="area")[:, 0].flatten(1) > 0.25
    usable = inside.any(dim=1) & ~inside.all(dim=1)
    if not usable.any():
        raise ValueError("measure_localisation: no image shows any region; the policy is too weak to localise with.")
    auc = {}
    for key, name in names.items():
        captured = trajectory.captures[name]  # [B, T, K, h, w]
        relative = captured / captured.mean(dim=(3, 4), keepdim=True).clamp_min(1e-12)
        scores = relative.sum(dim=2).flatten(2)[usable]
        auc[key] = torch.stack([area_under_roc(scores[:, t], inside[usable]).nanmean() for t in range(num_steps)])
    return Localisation(auc=auc, images=int(usable.sum()))
