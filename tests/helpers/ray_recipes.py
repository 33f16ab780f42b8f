"""Recipes for workers of a Ray cluster, importable by name; what goes wrong does so once, as a file remembers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import attrs
import torch

from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.recipes import Recipe
from tests.helpers import toy_recipe
from tests.helpers.toy import QuadrantBrightness

MARK = "RLT2I_TEST_MARK"
"""Names the file that says whether the accident has happened."""


def happens_now() -> bool:
    """True the first time that anybody asks, anywhere."""
    try:
        os.close(os.open(os.environ[MARK], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@attrs.frozen(kw_only=True)
class KillsItsWorker(QuadrantBrightness):
    """On the second worker of the first start, at its fifth batch, in the third iteration: gone without a word."""

    seen: list[int] = attrs.field(factory=list, init=False, eq=False)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        self.seen.append(len(batch.prompts))
        if os.environ.get("RANK") == "1" and len(self.seen) == 5 and happens_now():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(batch, want)


@attrs.frozen(kw_only=True)
class Brightness(Reward):
    """Mean brightness in [0, 1]; `accident` happens once, or always."""

    accident: str = ""
    always: bool = False

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        if self.accident and (self.always or happens_now()):
            if self.accident == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.accident == "raises":
                raise RuntimeError("no lamp")
            time.sleep(60)
        scores = batch.images.float().mean(dim=(1, 2, 3)) / 255
        return RewardOutput(scores=scores, valid=torch.ones(len(scores), dtype=torch.bool))


@attrs.frozen(kw_only=True)
class CannotBeBuilt(Brightness):
    """Raises wherever it is built for the first time from its recipe in an actor."""

    def __attrs_post_init__(self) -> None:
        import ray

        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            raise RuntimeError("no lamp at all")


def whole() -> Recipe:
    return toy_recipe.clipped(iterations=3)


def one_lost() -> Recipe:
    return attrs.evolve(whole(), reward=KillsItsWorker())


def judged_by_actors() -> Recipe:
    from rlt2i.serve.on_ray import RayReward

    return attrs.evolve(whole(), reward=RayReward(reward=QuadrantBrightness(), replicas=2, cpus=0, chunk=3))


@attrs.frozen(kw_only=True)
class Broken(QuadrantBrightness):
    """Judges nothing, and writes down how often a worker asked it."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        if os.environ.get("RANK") == "0":
            with Path(os.environ[MARK]).open("a") as file:
                file.write("asked\n")
        raise RuntimeError("no lamp")


def gives_up() -> Recipe:
    return attrs.evolve(toy_recipe.clipped(iterations=3, eval_prompts=0, eval_every=0), reward=Broken())


def refused() -> Recipe:
    return toy_recipe.clipped(iterations=3, prompts_per_iteration=3)


def mark(folder: Path) -> str:
    return str(folder / "accident")
