"""A recipe over the toy policy, importable by name from a subprocess."""

from __future__ import annotations

import os

import attrs
import torch
from torch import Tensor

from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.credit.tree import TreeAdvantage
from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.penalty import KLPenalty, VelocityPenalty
from rlt2i.recipes import Recipe
from rlt2i.recipes.train_config import TrainConfig
from rlt2i.rewards.jpeg import JPEGCompressibility
from rlt2i.samplers.branching import TreeSDE
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.types import Conditioning, ImageSize, height_and_width
from tests.helpers.toy import QuadrantBrightness, ToyPolicy, ToySpec, ToyTask

STAR = Product(
    advantage=GroupRelative(), allocations=(TextAttention(blocks="0", doubt=0.0),)
)  # fmt: skip


def clipped(**train: object) -> Recipe:
    """STAR, clipped surrogate, two optimiser steps per batch, an average, a KL penalty: every kind of state."""
    settings = {
        "iterations": 4,
        "prompts_per_iteration": 4,
        "group_size": 4,
        "optimizer_steps_per_iteration": 2,
        "rollout_batch_size": 8,
        "micro_batch_size": 16,
        "image_size": 8,
        "learning_rate": 0.05,
        "ema_decay": 0.9,
        "reference": True,
        "eval_every": 2,
        "eval_prompts": 6,
        "eval_steps": 4,
        "checkpoint_every": 1,
        "keep_checkpoints": 10,
        "trackers": (),
    }
    return Recipe(
        name="toy",
        policy=ToySpec(),
        sampler=SDE(num_steps=5, window=(0, 3)),
        reward=QuadrantBrightness(),
        credit=STAR,
        objective=ClippedSurrogate(clip_range=1e-3, kl_penalty=KLPenalty(weight=0.01)),
        task=ToyTask(),
        train=TrainConfig(**(settings | train)),  # type: ignore[arg-type]
    )


def tree() -> Recipe:
    """Rollouts that share steps."""
    recipe = clipped()
    sampler = TreeSDE(num_steps=4, splits=(0, 2))
    return attrs.evolve(recipe, sampler=sampler, credit=Product(advantage=TreeAdvantage()))


def sized() -> Recipe:
    """Images of two sizes in every batch, one of them no square."""
    recipe = clipped(prompts_per_iteration=8, group_size=2, sizes=((8, 8), (4, 8)), eval_every=0)
    return attrs.evolve(recipe, policy=SizedSpec())


class SizedPolicy(ToyPolicy):
    """A ToyPolicy that paints any part of its picture."""

    def latent_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        return (3, *height_and_width(image_size))

    def token_grid(self, image_size: ImageSize) -> tuple[int, int]:
        height, width = height_and_width(image_size)
        return height // 2, width // 2

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = latents.shape[-2:]
        return latents + self.image[..., :height, :width] + self.network(latents)

    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pooled = torch.nn.functional.avg_pool2d(latents, 2).mean(dim=1, keepdim=True).exp().detach()
        return self.velocity(latents, sigma, conditioning), dict.fromkeys(names, pooled)


@attrs.frozen(kw_only=True)
class SizedSpec(ToySpec):
    """Loads a `SizedPolicy`."""

    def load(self, device: torch.device | str = "cpu") -> SizedPolicy:
        return SizedPolicy(self.seed)


def nft() -> Recipe:
    """A forward-process objective with an old policy that lags."""
    objective = DiffusionNFT(decay=0.5, kl_penalty=VelocityPenalty(weight=0.01))
    return attrs.evolve(clipped(), sampler=ODE(num_steps=5), objective=objective)


def slow() -> Recipe:
    """Long enough to be interrupted; every update takes at least a tenth of a second."""
    return attrs.evolve(clipped(iterations=500, eval_prompts=0), reward=Slow())


def killed() -> Recipe:
    """Dies without warning in the third update."""
    return attrs.evolve(clipped(), reward=Deadly())


def broken() -> Recipe:
    """A reward that returns NaN as if it were valid, from the third batch on."""
    return attrs.evolve(clipped(eval_prompts=0), reward=Broken())


def failing() -> Recipe:
    """A reward that fails for most images."""
    return attrs.evolve(clipped(eval_prompts=0), reward=MostlyInvalid())


@attrs.frozen(kw_only=True)
class Slow(QuadrantBrightness):
    """Takes its time."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        import time

        time.sleep(0.1)
        return super().score(batch, want)


@attrs.frozen(kw_only=True)
class Deadly(QuadrantBrightness):
    """Kills its process with SIGKILL when asked to score the third training batch, unless told to spare it."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        if batch.ids is not None and "SPARE" not in os.environ and str(batch.ids[0]).split("/")[2] == "8":
            os.kill(os.getpid(), 9)
        return super().score(batch, want)


@attrs.frozen(kw_only=True)
class Broken(QuadrantBrightness):
    """NaN from the third training batch on."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        if batch.ids is not None and int(str(batch.ids[0]).split("/")[2]) >= 8:
            return attrs.evolve(output, scores=output.scores * torch.nan)
        return output


@attrs.frozen(kw_only=True)
class MostlyInvalid(QuadrantBrightness):
    """Three of four images cannot be judged."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        return attrs.evolve(output, valid=torch.arange(len(output.scores)) % 4 == 0)


def watched(**train: object) -> Recipe:
    """`clipped`, beside two held-out rewards: one sound, and one that draws from the global generator and dies."""
    return attrs.evolve(clipped(**train), heldout={"size": JPEGCompressibility(), "dying": Dying()})


@attrs.frozen(kw_only=True)
class Dying(QuadrantBrightness):
    """Works twice, for the base and the first evaluation; raises from then on."""

    calls: list[int] = attrs.field(factory=list, init=False, eq=False)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        torch.rand(7)
        self.calls.append(len(batch.prompts))
        if len(self.calls) > 2:
            raise RuntimeError("out of memory")
        return super().score(batch, want)

    def close(self) -> None:
        self.calls.append(-1)
