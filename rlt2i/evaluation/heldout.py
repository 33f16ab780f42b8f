"""Judging a policy on held-out prompts: the ODE, fixed noise, the same prompts every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from rlt2i.engine import decode, rollout
from rlt2i.evaluation.statistics import Interval, clustered_mean, paired_difference
from rlt2i.interfaces import Policy, Reward, RewardBatch
from rlt2i.rewards.agreement import FailureCounts, all_gather_notes, with_same_components
from rlt2i.rewards.validity import score_safely
from rlt2i.samplers.ode import ODE
from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import TaskPrompt, as_prompts
from rlt2i.types import ImageSize


@attrs.frozen(kw_only=True, eq=False)
class Scores:
    """What one reward said of N images.

    Attributes:
        scores, valid: [N].
        components: name -> [N].
    """

    scores: Tensor
    valid: Tensor
    components: Mapping[str, Tensor]


@attrs.frozen(kw_only=True, eq=False)
class Evaluation:
    """One image per held-out prompt, with its scores.

    Attributes:
        prompts: N prompts.
        images: [N, 3, H, W] uint8.
        scores, valid: [N]; what the reward said.
        components: name -> [N].
        heldout: name -> what a reward said that is never trained on.
        reasons: why images are invalid -> how many.
        notes: N lines, what the reward told of each image; or none.
    """

    prompts: Sequence[TaskPrompt]
    images: Tensor
    scores: Tensor
    valid: Tensor
    components: Mapping[str, Tensor]
    heldout: Mapping[str, Scores] = attrs.field(factory=dict)
    reasons: Mapping[str, int] = attrs.field(factory=dict)
    notes: Sequence[str] = ()

    @property
    def headline(self) -> str:
        """The component that decides success: "strict" where there is one, else the reward itself."""
        return "strict" if "strict" in self.components else "reward"

    def values(self, name: str) -> Tensor:
        """[N] of a component, or of the reward."""
        return self.scores if name == "reward" else self.components[name]

    def metrics(self, base: Evaluation | None = None) -> dict[str, float]:
        """Means for the log, with intervals for the headline and, given the base, its paired gain."""
        kept = self.valid
        clusters = [p.text for p, ok in zip(self.prompts, kept.tolist(), strict=True) if ok]
        found = {"eval/reward": float(self.scores[kept].mean()), "eval/images": float(kept.sum())}
        found |= {f"eval/{name}": float(values[kept].nanmean()) for name, values in self.components.items()}
        name = self.headline
        found |= _interval(f"eval/{name}", clustered_mean(self.values(name)[kept], clusters, seed=0))
        for category in dict.fromkeys(p.category for p in self.prompts):
            rows = torch.tensor([p.category == category for p in self.prompts]) & kept
            found[f"eval/{category}"] = float(self.values(name)[rows].mean())
        if base is not None:
            both = kept & base.valid
            clusters = [p.text for p, ok in zip(self.prompts, both.tolist(), strict=True) if ok]
            gain = paired_difference(self.values(name)[both], base.values(name)[both], clusters, seed=0)
            found |= {f"eval/{name}_gain": gain.mean} | _interval(f"eval/{name}_gain", gain)
        for name, judged in self.heldout.items():
            before = base.heldout.get(name) if base is not None else None
            found |= self._heldout_metrics(f"eval/heldout/{name}", judged, before)
        return found

    def _heldout_metrics(self, name: str, now: Scores, before: Scores | None) -> dict[str, float]:
        """Mean, spread over images and share of failures; given the base, the paired gain with its interval."""
        found = {f"{name}/invalid": 1 - float(now.valid.float().mean())}
        if not now.valid.any():
            return found
        kept = now.scores[now.valid]
        found |= {name: float(kept.mean()), f"{name}_std": float(kept.std(correction=0))}
        found |= {f"{name}/{part}": float(v[now.valid].nanmean()) for part, v in now.components.items()}
        both = now.valid & before.valid if before is not None else torch.zeros_like(now.valid)
        if before is not None and both.any():
            clusters = [p.text for p, ok in zip(self.prompts, both.tolist(), strict=True) if ok]
            gain = paired_difference(now.scores[both], before.scores[both], clusters, seed=0)
            found |= {f"{name}_gain": gain.mean} | _interval(f"{name}_gain", gain)
        return found


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {f"{name}_low": interval.low, f"{name}_high": interval.high}


def evaluate(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[TaskPrompt],
    *,
    num_steps: int,
    seed: int,
    image_size: ImageSize,
    rollout_batch_size: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    heldout: Mapping[str, Reward] | None = None,
) -> Evaluation:
    """Sample every prompt once and score it.

    The noise of an image is a function of (seed, prompt, position), so evaluations of different weights are paired.
    Processes share the work; all of them get the whole result.

    Args:
        heldout: name -> a reward to score as well. One that fails is invalid for the images concerned and stops
            nothing; whatever it draws from torch's generators, training does not notice.
    """
    count = -(-len(prompts) // world_size)
    mine = [(rank * count + i) % len(prompts) for i in range(count)]
    batch = as_prompts([prompts[i] for i in mine], group_size=1)
    batch = attrs.evolve(batch, draws=tuple(mine))
    trajectory = rollout(
        policy,
        ODE(num_steps=num_steps),
        batch,
        seed=derive_seed("evaluation", seed),
        image_size=image_size,
        rollout_batch_size=rollout_batch_size,
        device=device,
    )
    images = decode(policy, trajectory.clean_latents, rollout_batch_size=rollout_batch_size)
    pictures = RewardBatch(images=images, prompts=batch.texts, metadata=batch.metadata)
    output = score_safely(reward, pictures)
    components = with_same_components(output.components, len(mine), gather, device)

    def whole(tensor: Tensor) -> Tensor:
        return gather(tensor.to(device))[: len(prompts)].cpu()

    def other(held_out: Reward) -> Scores:
        with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
            judged = score_safely(held_out, pictures)
        parts = with_same_components(judged.components, len(mine), gather, device)
        return Scores(
            scores=whole(judged.scores),
            valid=whole(judged.valid),
            components={part: whole(values) for part, values in parts.items()},
        )

    return Evaluation(
        prompts=prompts,
        images=whole(images),
        scores=whole(output.scores),
        valid=whole(output.valid),
        components={name: whole(values) for name, values in components.items()},
        heldout={name: other(held_out) for name, held_out in (heldout or {}).items()},
        reasons=FailureCounts.of(output).together(gather, device).reasons,
        notes=all_gather_notes(output, gather, device)[: len(prompts)],
    )
