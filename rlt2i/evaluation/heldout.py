"""Judging a policy on held-out prompts: the ODE, fixed noise, the same prompts every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from rlt2i.distributed import Distributed
from rlt2i.evaluation.draw import Draw
from rlt2i.evaluation.statistics import Interval, clustered_mean, mean_of_fixed_prompts
from rlt2i.interfaces import Policy, Reward, RewardOutput
from rlt2i.rewards.agreement import FailureCounts, all_gather_notes, with_same_components
from rlt2i.rewards.validity import score_safely
from rlt2i.runs.artifacts import UnreadableFileError, read_evaluation, write_evaluation
from rlt2i.runs.generators import undisturbed_generators
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

    def take(self, rows: Tensor) -> Scores:
        """Of some of the images."""
        components = {name: values[rows] for name, values in self.components.items()}
        return Scores(scores=self.scores[rows], valid=self.valid[rows], components=components)


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

    def write(self, path: Path) -> None:
        """Keep it in a file of the run, in one step."""
        kept = {"images": self.images, "scores": self.scores, "valid": self.valid}
        kept |= {f"component/{name}": values for name, values in self.components.items()}
        for name, judged in self.heldout.items():
            kept |= {f"heldout/{name}/scores": judged.scores, f"heldout/{name}/valid": judged.valid}
            kept |= {f"heldout/{name}/component/{part}": values for part, values in judged.components.items()}
        write_evaluation(
            path,
            kept,
            prompts=[p.text for p in self.prompts],
            categories=[p.category for p in self.prompts],
            headline=[float(v) for v in self.values(self.headline)],
            notes=self.notes,
        )

    @classmethod
    def read(cls, path: Path, prompts: Sequence[TaskPrompt]) -> Evaluation:
        """The evaluation written at `path`.

        Raises:
            UnreadableFileError: when the file is missing or damaged, or was made with other prompts, so that it cannot
                be paired with a new one.
        """
        saved = read_evaluation(path)
        if saved.prompts != [p.text for p in prompts]:
            raise UnreadableFileError(
                f"{path}: made with other held-out prompts than this recipe asks for, so gains cannot be paired. "
                "Resume with the recipe of the run directory."
            )
        tensors = saved.tensors
        rewards = dict.fromkeys(name.split("/")[1] for name in tensors if name.startswith("heldout/"))
        return cls(
            prompts=prompts,
            images=tensors["images"],
            scores=tensors["scores"],
            valid=tensors["valid"],
            components=_below("component/", tensors),
            heldout={
                name: Scores(
                    scores=tensors[f"heldout/{name}/scores"],
                    valid=tensors[f"heldout/{name}/valid"],
                    components=_below(f"heldout/{name}/component/", tensors),
                )
                for name in rewards
            },
        )

    def unseen(self) -> Evaluation:
        """The part of it whose prompts are not trained on; the whole, where that is none of them or all."""
        rows = [i for i, prompt in enumerate(self.prompts) if not prompt.trained_on]
        if len(rows) in (0, len(self.prompts)):
            return self
        kept = torch.tensor(rows)
        return attrs.evolve(
            self,
            prompts=[self.prompts[i] for i in rows],
            images=self.images[kept],
            scores=self.scores[kept],
            valid=self.valid[kept],
            components={name: values[kept] for name, values in self.components.items()},
            heldout={name: judged.take(kept) for name, judged in self.heldout.items()},
            notes=[self.notes[i] for i in rows] if self.notes else (),
        )

    @property
    def headline(self) -> str:
        """The component that decides success: "strict" where there is one, else the reward itself."""
        return "strict" if "strict" in self.components else "reward"

    def values(self, name: str) -> Tensor:
        """[N] of a component, or of the reward."""
        return self.scores if name == "reward" else self.components[name]

    def metrics(self, base: Evaluation | None = None) -> dict[str, float]:
        """Means for the log, with intervals for the headline and, given the base, its paired gain.

        Where the prompts are all there are of their categories (`TaskPrompt.fixed`), the headline is the mean of the
        categories' means, and its interval is over the images of these very prompts; else it is over prompts. Where
        some of them are trained on, the headline is told of the others and of them alone too: `eval/unseen/strict`
        and `eval/seen/strict`.
        """
        kept = self.valid
        metrics = {"eval/reward": float(self.scores[kept].mean()), "eval/images": float(kept.sum())}
        metrics |= {f"eval/{name}": float(values[kept].nanmean()) for name, values in self.components.items()}
        name = self.headline
        both = kept & base.valid if base is not None else None
        trained_on = torch.tensor([p.trained_on for p in self.prompts])
        parts = {"": torch.ones_like(kept)}
        if trained_on.any() and not trained_on.all():
            parts |= {"unseen/": ~trained_on, "seen/": trained_on}
        for part, rows in parts.items():
            if part:
                metrics[f"eval/{part}images"] = float((rows & kept).sum())
            if (rows & kept).any():
                mean = self._mean(self.values(name), rows & kept)
                metrics |= {f"eval/{part}{name}": mean.mean} | _interval(f"eval/{part}{name}", mean)
            if base is not None and both is not None and (rows & both).any():
                gain = self._mean(self.values(name).double() - base.values(name).double(), rows & both)
                metrics |= {f"eval/{part}{name}_gain": gain.mean} | _interval(f"eval/{part}{name}_gain", gain)
        for category in dict.fromkeys(p.category for p in self.prompts):
            rows = torch.tensor([p.category == category for p in self.prompts]) & kept
            metrics[f"eval/{category}"] = float(self.values(name)[rows].mean())
        for name, judged in self.heldout.items():
            before = base.heldout.get(name) if base is not None else None
            metrics |= self._heldout_metrics(f"eval/heldout/{name}", judged, before)
        return metrics

    def _mean(self, values: Tensor, kept: Tensor) -> Interval:
        """Of some images."""
        chosen = [p for p, ok in zip(self.prompts, kept.tolist(), strict=True) if ok]
        texts = [p.text for p in chosen]
        if all(p.fixed for p in chosen):
            return mean_of_fixed_prompts(values[kept], texts, [p.category for p in chosen])
        return clustered_mean(values[kept], texts, seed=0)

    def _heldout_metrics(self, name: str, now: Scores, before: Scores | None) -> dict[str, float]:
        """Mean, spread over images and share of failures; given the base, the paired gain with its interval."""
        metrics = {f"{name}/invalid": 1 - float(now.valid.float().mean())}
        if not now.valid.any():
            return metrics
        kept = now.scores[now.valid]
        metrics |= {name: float(kept.mean()), f"{name}_std": float(kept.std(correction=0))}
        metrics |= {f"{name}/{part}": float(v[now.valid].nanmean()) for part, v in now.components.items()}
        both = now.valid & before.valid if before is not None else torch.zeros_like(now.valid)
        if before is not None and both.any():
            gain = self._mean(now.scores.double() - before.scores.double(), both)
            metrics |= {f"{name}_gain": gain.mean} | _interval(f"{name}_gain", gain)
        return metrics


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}


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
    distributed: Distributed | None = None,
    heldout: Mapping[str, Reward] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Sample every prompt once and score it.

    The noise of an image is a function of (seed, prompt, position), so evaluations of different weights are paired.
    Processes share the work; all of them get the whole result.

    Args:
        distributed: this process among the others, and its device; default alone, on the CPU.
        heldout: name -> a reward to score as well. One that fails is invalid for the images concerned and stops
            nothing; whatever it draws from global generators, training does not notice.
        stop: asked after every chunk; where it holds on any process, all of them leave.

    Raises:
        Stopped: because of `stop`.
        OtherProcessFailed: when images could not be drawn elsewhere; the error itself where it happened.
    """
    group = distributed or Distributed.alone()
    count = -(-len(prompts) // group.world_size)
    share = [(group.rank * count + i) % len(prompts) for i in range(count)]
    batch = as_prompts([prompts[i] for i in share], group_size=1)
    batch = attrs.evolve(batch, draws=tuple(share))
    draw = Draw(
        seed=derive_seed("evaluation", seed),
        num_steps=num_steps,
        image_size=image_size,
        rollout_batch_size=rollout_batch_size,
        device=group.device,
    )
    judged = group.in_step(
        lambda step: draw.judged(policy, reward, batch, advance=lambda _: step()), stop=stop, doing="evaluating"
    )

    def whole(tensor: Tensor) -> Tensor:
        return group.gather(tensor.to(group.device))[: len(prompts)].cpu()

    def scores(output: RewardOutput) -> Scores:
        parts = with_same_components(output.components, count, group.gather, group.device)
        return Scores(
            scores=whole(output.scores),
            valid=whole(output.valid),
            components={part: whole(values) for part, values in parts.items()},
        )

    def watched(held_out: Reward) -> Scores:
        with undisturbed_generators():
            return scores(score_safely(held_out, judged.batch))

    trained = scores(judged.output)
    return Evaluation(
        prompts=prompts,
        images=whole(judged.images),
        scores=trained.scores,
        valid=trained.valid,
        components=trained.components,
        heldout={name: watched(held_out) for name, held_out in (heldout or {}).items()},
        reasons=FailureCounts.of(judged.output).together(group.gather, group.device).reasons,
        notes=all_gather_notes(judged.output, group.gather, group.device)[: len(prompts)],
    )
