"""A recipe on its own weights, before the first iteration: what a long run would find out too late."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import torch
from safetensors import safe_open

from rlt2i.algorithm import Algorithm
from rlt2i.conformance.laws import Finding, find
from rlt2i.conformance.stock import same_image_as_the_pipeline
from rlt2i.conformance.subject import Subject, require
from rlt2i.distributed import Distributed
from rlt2i.engine import Collected
from rlt2i.evaluation.draw import Draw
from rlt2i.interfaces import Policy
from rlt2i.policies.pretrained import PretrainedSpec
from rlt2i.recipes.recipe import Recipe
from rlt2i.rehearsal.acts import draw_elsewhere
from rlt2i.rewards.selftest import case_for, judge_case
from rlt2i.tasks.base import as_prompts
from rlt2i.training.preflight import check_before_weights
from rlt2i.training.signals import GracefulStop
from rlt2i.training.start import assemble
from rlt2i.training.trainer import Trainer

STANDSTILL = 1e-30
"""A learning rate that moves no weight, however often it is applied."""
MOST_CLIPPED = 0.01
"""Share of ratios that may be beyond half of the clip range when no weight has moved."""


@attrs.frozen(eq=False, kw_only=True)
class Candidate:
    """A recipe to examine.

    Attributes:
        recipe: as it will be trained.
        device: where its policy is loaded.
        world_size: processes that it will be trained on.
    """

    recipe: Recipe
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=torch.device)
    world_size: int = 1

    def __hash__(self) -> int:
        return id(self)

    @property
    def num_prompts(self) -> int:
        """As few as every optimiser step of an iteration needs, and two at the least."""
        return max(2, self.recipe.train.optimizer_steps_per_iteration)

    @functools.cached_property
    def algorithm(self) -> Algorithm:
        """Loaded."""
        return self.recipe.algorithm().load(self.device)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The recipe's own engine and learner, for few prompts, at a learning rate that moves nothing.

        Ratios are clipped at half of the objective's clip range, where it has one.
        """
        train = attrs.evolve(
            self.recipe.train, learning_rate=STANDSTILL, prompts_per_iteration=self.num_prompts, trackers=()
        )
        alone = Distributed.alone(self.device)
        narrow: Any = self.recipe.objective
        if self.clip_range is not None:
            narrow = attrs.evolve(narrow, clip_range=self.clip_range / 2)
        recipe = attrs.evolve(self.recipe, train=train, objective=narrow)
        algorithm = attrs.evolve(self.algorithm, objective=narrow)
        return assemble(recipe, algorithm, Path(), None, alone, lambda _: None, GracefulStop())

    @property
    def clip_range(self) -> float | None:
        """The objective's, where it has one."""
        clip: float | None = getattr(self.recipe.objective, "clip_range", None)
        return clip

    @functools.cached_property
    def batch(self) -> Collected:
        """One batch of whole groups, rolled out, judged and with credit."""
        train = self.recipe.train
        drawn = self.recipe.task.train_prompts(seed=train.seed, start=0, count=self.num_prompts)
        learner = self.trainer.learner
        with learner.sets.use(learner.objective.rollout_weights):
            return self.trainer.engine.collect(as_prompts(drawn, group_size=train.group_size), iteration=0)


def settings_work_out(candidate: Candidate) -> str:
    """Parts fit, batches work out, prompts can be read and have what the rewards need; no weight is read."""
    batch = check_before_weights(candidate.recipe, world_size=candidate.world_size)
    return f"{batch.rollouts} images per iteration, {batch.optimizer_steps} optimiser steps"


def reward_tells_good_from_bad(candidate: Candidate) -> str:
    """The trained reward prefers the good one of the pictures that are bundled for it."""
    try:
        case = case_for(candidate.recipe.reward)
    except ValueError as error:
        return f"not examined: {error}"
    verdict = judge_case(candidate.recipe.reward, case)
    if case.general and verdict.problems:
        return f"not decided: {'; '.join(verdict.problems)}. Wrong if your reward compares an image with its prompt"
    require(
        not verdict.problems,
        f"{'; '.join(verdict.problems)}. Training would learn the wrong thing. Look at `rlt2i reward test`.",
    )
    return f"{verdict.seconds:.2f} s per image"


def policy_draws_as_its_pipeline(candidate: Candidate) -> str:
    """From the same noise and prompt the stock pipeline draws the same image, in float32, without guidance."""
    spec = candidate.recipe.policy
    if not isinstance(spec, PretrainedSpec):
        return "no diffusers pipeline"
    exact = attrs.evolve(spec, dtype="float32", vae_dtype=None, compile=False)
    subject = Subject(spec=exact, device=candidate.device, asked_size=candidate.recipe.train.image_size)
    return same_image_as_the_pipeline(subject)


def groups_have_spread(candidate: Candidate) -> str:
    """The images of a prompt can be judged, and get different rewards: without spread there is no advantage."""
    rewards = candidate.batch.experience.rewards
    share = 1 - float(rewards.valid.float().mean())
    require(
        share <= candidate.recipe.train.max_invalid_share,
        f"{share:.0%} of the rewards are invalid: {candidate.batch.tally}. A run stops beyond max_invalid_share="
        f"{candidate.recipe.train.max_invalid_share:.0%}.",
    )
    groups = rewards.final.cpu().masked_fill(~rewards.valid.cpu(), torch.nan).view(candidate.num_prompts, -1)
    spread = groups.nan_to_num(-torch.inf).amax(dim=1) - groups.nan_to_num(torch.inf).amin(dim=1)
    if candidate.recipe.objective.uses_advantage:
        require(
            bool((spread > 0).any()),
            f"none of {len(groups)} groups has any spread, rewards are {float(groups.nanmean()):.4g} throughout: "
            "nothing would be learned. Take prompts that the policy solves sometimes, or a reward with partial credit.",
        )
    return f"reward {float(groups.nanmean()):.4g}, in {int((spread > 0).sum())} of {len(groups)} groups it differs"


def first_ratio_is_one(candidate: Candidate) -> str:
    """Learning with weights that stand still gives a finite gradient, and a ratio that noise does not move."""
    metrics = candidate.trainer.learner.learn(candidate.batch.experience)
    require(
        metrics["grad_norm"] > 0,
        "the gradient is zero: no rollout of this batch teaches anything. See whether groups have spread, and whether "
        "the credit's masks leave a step.",
    )
    learned, noise = f"gradient norm {metrics['grad_norm']:.3g}", metrics.get("ratio/abs_minus_one_max")
    clip = candidate.clip_range
    if noise is None or clip is None:
        return f"{learned}; this objective clips no ratio"
    clipped = metrics["clip/high"] + metrics["clip/low"]
    require(
        clipped <= MOST_CLIPPED,
        f"with weights that stand still {clipped:.1%} of the ratios are further from one than half of clip_range="
        f"{clip:g}, the furthest by {noise:.1e}: rounding alone is clipped. Use policy.dtype=float32, or a wider "
        "objective.clip_range.",
    )
    return f"{learned}; with weights that stand still a ratio is off one by {noise:.1e} at most"


def export_loads_elsewhere(candidate: Candidate) -> str:
    """What learned is written, taken key by key by the stock pipeline, and draws."""
    recipe, policy = candidate.recipe, candidate.algorithm.policy
    assert isinstance(policy, Policy)
    with tempfile.TemporaryDirectory(prefix="rlt2i-check-") as folder:
        policy.export(Path(folder))
        files = sorted(Path(folder).rglob("*.safetensors"))
        require(files, "the export holds no safetensors file. Write one in the policy's `export`.")
        if not isinstance(recipe.policy, PretrainedSpec):
            return ", ".join(file.name for file in files)
        taken = draw_elsewhere(recipe.policy, Path(folder), recipe.train.image_size)
        if recipe.policy.lora_rank is None:
            return "loaded as a pipeline, and drew"
        saved = 0
        for file in files:
            with safe_open(file, "pt") as tensors:
                saved += len(tensors.keys())
        require(taken == saved, f"the stock pipeline took {taken} of {saved} keys. Look at policy.lora_targets.")
        return f"{taken} of {saved} keys taken, and drew"


def evaluation_is_judged(candidate: Candidate) -> str:
    """Held-out prompts, drawn as evaluations draw them, can be judged by the trained and by every held-out reward."""
    recipe, train = candidate.recipe, candidate.recipe.train
    if not train.eval_prompts:
        return "no evaluation asked for"
    draw = Draw(
        seed=train.eval_seed,
        num_steps=train.eval_steps,
        image_size=train.image_size,
        rollout_batch_size=train.rollout_batch_size,
        device=candidate.device,
    )
    prompts = as_prompts(recipe.task.eval_prompts(train.eval_prompts)[:2], group_size=1)
    policy = candidate.algorithm.policy
    assert isinstance(policy, Policy)
    means = []
    for name, reward in {"trained": recipe.reward, **recipe.heldout}.items():
        output = draw.judged(policy, reward, prompts).output
        require(output.valid.any(), f"{name}: {type(reward).__name__} could judge none of {len(output.valid)} images.")
        means.append(f"{name} {float(output.scores[output.valid].mean()):.4g}")
    return ", ".join(means)


Law = Callable[[Candidate], str]
RECIPE_LAWS = MappingProxyType(
    {
        law.__name__: law
        for law in (
            settings_work_out,
            reward_tells_good_from_bad,
            policy_draws_as_its_pipeline,
            groups_have_spread,
            first_ratio_is_one,
            export_loads_elsewhere,
            evaluation_is_judged,
        )
    }
)
"""Name -> law, the cheap ones first."""


def check_recipe(
    recipe: Recipe, *, device: torch.device | str = "cpu", world_size: int = 1, leave_out: Collection[str] = ()
) -> list[Finding]:
    """Examine a recipe on its own weights. Nothing is written, and no weight moves.

    Args:
        device: where its policy is loaded.
        world_size: processes that it will be trained on.
        leave_out: laws that are not asked for.

    Returns:
        One finding for each law, up to and with the first that is broken before any weight is read.
    """
    candidate = Candidate(recipe=recipe, device=device, world_size=world_size)
    findings = []
    for name, law in RECIPE_LAWS.items():
        if name in leave_out:
            continue
        findings.append(find(name, law, candidate))
        if name == "settings_work_out" and findings[-1].mistake is not None:
            break
    return findings
