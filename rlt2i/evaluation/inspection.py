"""Looking at a policy: images, evaluations and allocation maps, from a run's checkpoint or from a recipe's base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from torch import Tensor

from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.evaluation.auto import resolve_auto
from rlt2i.evaluation.draw import Draw
from rlt2i.evaluation.heldout import Evaluation, evaluate
from rlt2i.interfaces import CreditAssigner, CreditContext, Policy, RewardOutput
from rlt2i.recipes.recipe import Recipe
from rlt2i.rewards.gradient import reward_gradient
from rlt2i.runs.artifacts import MapSample
from rlt2i.runs.belonging import check_policy
from rlt2i.runs.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    tensor_names,
    verify_checkpoint,
)
from rlt2i.samplers.rollout import CLEAN_PREDICTIONS
from rlt2i.seeds import derive_seed, generator
from rlt2i.tasks.base import TaskPrompt
from rlt2i.tasks.reading import report_on
from rlt2i.types import Prompts, Rewards

if TYPE_CHECKING:
    from PIL.Image import Image

Weights = Literal["best", "online", "ema", "base"]


def find_weights(
    *, run_dir: Path | None = None, checkpoint: Path | None = None, weights: Weights = "best"
) -> tuple[Path, Weights] | None:
    """The checkpoint folder and the set in it that are meant; None for the base.

    Args:
        checkpoint: default the newest of the run.
        weights: "best" is the average where there is one, else the online weights.

    Raises:
        CheckpointError: when the run holds no complete checkpoint, or not the weights asked for.
    """
    if weights == "base" or (run_dir is None and checkpoint is None):
        return None
    if checkpoint is not None and run_dir is not None and checkpoint.resolve().parent != run_dir.resolve():
        raise CheckpointError(
            f"{checkpoint}: not a checkpoint of the run {run_dir}. Name its own run, or look at it through a recipe: "
            f"rlt2i sample RECIPE --checkpoint {checkpoint}"
        )
    path = checkpoint or latest_checkpoint(run_dir)  # type: ignore[arg-type]  # one of them is given
    if path is None:
        raise CheckpointError(f"{run_dir}: holds no complete checkpoint. Look at the base with --weights base.")
    saved = tensor_names(verify_checkpoint(path)["files"])
    name: Weights = ("ema" if "ema" in saved else "online") if weights == "best" else weights
    if name not in saved:
        raise CheckpointError(f"{path}: holds no {name!r} weights, only {saved}. Use --weights online.")
    return path, name


def load_policy(
    recipe: Recipe,
    *,
    run_dir: Path | None = None,
    checkpoint: Path | None = None,
    weights: Weights = "best",
    device: torch.device | str | None = None,
) -> Policy:
    """A recipe's policy with the weights of a checkpoint, or its base weights where there is no run.

    Args:
        run_dir, checkpoint, weights: see `find_weights`.
        device: default the accelerator, where there is one.

    Raises:
        CheckpointError: when the run holds no complete checkpoint or not the weights asked for, or when the checkpoint
            is of another policy.
    """
    source = find_weights(run_dir=run_dir, checkpoint=checkpoint, weights=weights)
    policy = recipe.algorithm().load(device or ("cuda" if torch.cuda.is_available() else "cpu")).policy
    assert isinstance(policy, Policy)
    if source is None:
        return policy
    path, name = source
    loaded = load_checkpoint(path)
    check_policy(loaded, recipe, policy)
    saved = loaded.tensors[name]
    with torch.no_grad():
        for key, parameter in policy.trainable_parameters().items():
            parameter.copy_(saved[key])
    return policy


def sample(
    recipe: Recipe,
    texts: Sequence[str],
    *,
    run_dir: Path | None = None,
    checkpoint: Path | None = None,
    weights: Weights = "best",
    count: int = 4,
    num_steps: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
    apart: Path | None = None,
) -> Image:
    """A grid of `count` images per prompt, drawn by the ODE.

    Args:
        say: told what a text encoder does not read of the prompts.
        apart: a folder for every image by itself: <number of the prompt>-<number of the image>.png, both from 1.
    """
    from rlt2i.report.grids import image_grid

    policy = load_policy(recipe, run_dir=run_dir, checkpoint=checkpoint, weights=weights)
    for line in report_on(policy, [TaskPrompt(text=text) for text in texts]).lines():
        say(line)
    prompts = Prompts.of(texts, group_size=count)
    images = drawing(recipe, _steps(num_steps, recipe.train.eval_steps), seed).images(policy, prompts).cpu()
    if apart is not None:
        _save_each(images, apart, count=count)
    return image_grid(images, captions=prompts.per_rollout(prompts.texts), columns=count)


def _save_each(images: Tensor, folder: Path, *, count: int) -> None:
    from torchvision.transforms.v2.functional import to_pil_image

    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        to_pil_image(image).save(folder / f"{i // count + 1:02d}-{i % count + 1:02d}.png")


def _steps(num_steps: int | None, otherwise: int) -> int:
    return otherwise if num_steps is None else num_steps


def maps(
    recipe: Recipe,
    text: str,
    *,
    run_dir: Path | None = None,
    checkpoint: Path | None = None,
    weights: Weights = "best",
    num_steps: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Image:
    """The weight that the recipe's credit gives each place at each denoising step of one rollout.

    Raises:
        ValueError: when the credit has no spatial weight, or a control that needs the reward of a known task prompt.
    """
    from rlt2i.report.maps import draw_maps

    if run_dir is None:
        recipe, _ = resolve_auto(recipe)
    if why := why_no_map(recipe):
        raise ValueError(f"maps: {why}")
    policy = load_policy(recipe, run_dir=run_dir, checkpoint=checkpoint, weights=weights)
    for line in report_on(policy, [TaskPrompt(text=text)]).lines():
        say(line)
    sample = map_of(recipe, policy, text, num_steps=num_steps, seed=seed)
    if sample is None:
        raise ValueError(f"maps: {uniform_in_space(recipe)}")
    assert sample.clean is not None
    return draw_maps(sample.clean, sample.weights, sample.sigmas, text)


def why_no_map(recipe: Recipe) -> str:
    """Why the maps of a recipe cannot be drawn for any prompt that a user may think of; "" where they can."""
    needs = _mapping_credit(recipe).needs.reward
    judged = (needs - {"gradient"}) | (recipe.reward.metadata_keys if "gradient" in needs else frozenset())
    if not judged:
        return ""
    return (
        f"the credit of {recipe.name!r} needs {sorted(judged)} from the reward, which a free prompt has not. "
        "Use a recipe whose map comes from the policy, such as star-shapes."
    )


def _mapping_credit(recipe: Recipe) -> CreditAssigner:
    """The recipe's credit with an advantage that asks for nothing, because no weight depends on it."""
    credit = recipe.credit
    return attrs.evolve(credit, advantage=GroupRelative()) if isinstance(credit, Product) else credit


def uniform_in_space(recipe: Recipe) -> str:
    """What to say of a recipe whose credit has no map."""
    return (
        f"the credit of {recipe.name!r} gives every place the same weight, so there is no map to draw. Use a recipe "
        "with a spatial allocation, such as star-shapes."
    )


def map_of(
    recipe: Recipe, policy: Policy, text: str, *, num_steps: int | None = None, seed: int = 0
) -> MapSample | None:
    """The weight of each place at each denoising step of one rollout of the ODE; None where it is uniform in space.

    Args:
        recipe: one of which `why_no_map` says nothing, without "auto".
        num_steps: default those of the recipe's sampler.

    Raises:
        ValueError: when the credit rewards intermediate images.
    """
    credit, prompts = _mapping_credit(recipe), Prompts.of([text])
    draw = drawing(recipe, _steps(num_steps, recipe.sampler.num_steps), seed)
    trajectory = draw.trajectory(policy, prompts, captures=credit.needs.captures | {CLEAN_PREDICTIONS})
    images = draw.decoded(policy, trajectory.clean_latents)
    context = CreditContext(
        prompts=prompts,
        trajectory=trajectory,
        rewards=Rewards(values=torch.zeros(1, trajectory.num_steps + 1), valid=torch.ones(1, dtype=torch.bool)),
        token_grid=policy.token_grid(draw.image_size),
        images=images,
        iteration=0,
        keys=torch.tensor([derive_seed("maps", seed)]),
        generator=generator(seed, "maps"),
        score=_no_score,
        reward_gradient=lambda latents, rollouts: reward_gradient(
            policy, recipe.reward, latents, prompts, rollout_batch_size=draw.rollout_batch_size
        ),
        complete=lambda latents, step, rollouts: latents,
    )
    weight = credit.assign(context).weight
    if weight.shape[2:] == (1, 1):
        return None
    return MapSample(
        prompt=text,
        score=math.nan,
        core=(),
        weights=weight[0].expand(trajectory.num_steps, -1, -1).float().cpu(),
        final=images[0].cpu(),
        clean=draw.decoded(policy, trajectory.captures[CLEAN_PREDICTIONS][0]).cpu(),
        sigmas=trajectory.sigmas.tolist(),
    )


def evaluate_run(
    recipe: Recipe,
    *,
    run_dir: Path | None = None,
    checkpoint: Path | None = None,
    weights: Weights = "best",
    num_prompts: int | None = None,
    num_steps: int | None = None,
) -> dict[str, float]:
    """Scores on held-out prompts with the run's own noise; for a run, also the base and the paired gain.

    Raises:
        ValueError: where neither the recipe nor the caller says on how many prompts.
    """
    train = recipe.train
    count = train.eval_prompts if num_prompts is None else num_prompts
    if count < 1:
        raise ValueError(
            f"eval: {recipe.name} evaluates on no prompts (train.eval_prompts is 0), so say on how many: --prompts N."
        )
    prompts = recipe.task.eval_prompts(count)

    def judged(which: Weights) -> Evaluation:
        policy = load_policy(recipe, run_dir=run_dir, checkpoint=checkpoint, weights=which)
        return evaluate(
            policy,
            recipe.reward,
            prompts,
            num_steps=_steps(num_steps, train.eval_steps),
            seed=train.eval_seed,
            image_size=train.image_size,
            rollout_batch_size=train.rollout_batch_size,
            heldout=recipe.heldout,
        )

    base = judged("base")
    if (run_dir is None and checkpoint is None) or weights == "base":
        return base.metrics()
    metrics: dict[str, Any] = judged(weights).metrics(base)
    return metrics | {name.replace("eval/", "base/", 1): value for name, value in base.metrics().items()}


def drawing(recipe: Recipe, num_steps: int, seed: int, device: torch.device | str = "cpu") -> Draw:
    """How a recipe's images are drawn by the ODE."""
    train = recipe.train
    return Draw(
        seed=seed,
        num_steps=num_steps,
        image_size=train.image_size,
        rollout_batch_size=train.rollout_batch_size,
        device=device,
    )


def _no_score(latents: torch.Tensor, rollouts: torch.Tensor) -> RewardOutput:
    raise ValueError("maps: this credit rewards intermediate images; it can only be drawn during training (`report`).")
