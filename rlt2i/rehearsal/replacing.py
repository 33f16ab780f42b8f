"""From a recipe to the same recipe on something small: what was replaced is said, everything else stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from torchvision.io import write_png

from rlt2i.credit.feature_saliency import FeatureSaliency
from rlt2i.inputs.textfiles import user_path
from rlt2i.interfaces import Objective, PolicySpec, Reward
from rlt2i.objectives.distillation import OnPolicyDistillation
from rlt2i.policies.pretrained import PretrainedSpec
from rlt2i.policies.tiny import TINY, save_tiny
from rlt2i.recipes.recipe import Recipe
from rlt2i.rehearsal.stand_ins import StandInReward, StandInTask
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.ocr.task import OCRFileTask, OCRTask
from rlt2i.tasks.pairs import PairFileTask
from rlt2i.tasks.pickscore import PickScoreTask
from rlt2i.types import ImageSize, height_and_width
from rlt2i.voting.reward import HumanVotes

IMAGE_SIZE = 32
SIZES = {"Lumina2Pipeline": 64, "QwenImage21Pipeline": 64}
"""Pixels a side that tiny pipelines draw; IMAGE_SIZE where nothing is said."""
TEXT_LENGTHS = {
    "AuraFlowPipeline": 32, "FluxPipeline": 32, "Flux2KleinPipeline": 48, "Flux2Pipeline": 220, "Krea2Pipeline": 48,
    "SanaPipeline": 32, "StableDiffusion3Pipeline": 32,
}  # fmt: skip
"""Pipelines that pad every prompt -> tokens of text for a tiny one, enough for a template before a short prompt."""
NEEDS_NOTHING = frozenset({"JPEGCompressibility", "JPEGIncompressibility", "Function", "StandInReward"})
"""Rewards that judge without weights, beside those of embedded tasks."""
_SHRUNK = (
    "iterations",
    "prompts_per_iteration",
    "group_size",
    "rollout_batch_size",
    "image_size",
    "eval_prompts",
    "eval_steps",
)
FEW_STEPS = 10
FEW_PROMPTS = (2, 3, 4, 6, 8, 12)
VISION_SIZE = 32
"""Pixels a side of what the tiny vision transformer sees."""
GROUP_SIZES = (2, 3, 4, 6, 8, 9, 12, 16, 24)


@attrs.frozen(kw_only=True)
class Rehearsed:
    """A recipe made small.

    Attributes:
        recipe: which the acts run.
        replaced: what is other than in the recipe, a line each.
    """

    recipe: Recipe
    replaced: tuple[str, ...]


def make_small(recipe: Recipe, folder: Path, *, compile_blocks: bool = True) -> Rehearsed:
    """The recipe on a tiny pipeline of its own classes, with few prompts, small groups and stand-ins.

    Args:
        folder: gets the tiny pipeline, and pairs where the recipe learns from some.
        compile_blocks: keep `policy.compile`; without, that is one of the replacements.

    Raises:
        ValueError: when there is no tiny pipeline of the recipe's class, or no small group fits its parts.
    """
    said: list[str] = []
    policy, image_size = small_policy(
        recipe.policy, folder, recipe.train.image_size, compile_blocks=compile_blocks, said=said
    )
    reward = _reward(recipe.reward, said)
    heldout = {name: _reward(judge, said) for name, judge in recipe.heldout.items()}
    small = attrs.evolve(recipe, policy=policy, reward=reward, heldout=heldout)
    small = attrs.evolve(small, task=_task(recipe.task, folder, image_size, said))
    small = attrs.evolve(small, credit=_with_small_parts(small, folder, said))
    small = attrs.evolve(small, objective=_with_teachers(small, folder, said))
    small = _with_few_steps(small, said)
    return Rehearsed(recipe=attrs.evolve(small, train=_train(small, image_size, said)), replaced=tuple(said))


def small_policy(
    spec: Any, folder: Path, image_size: ImageSize, *, compile_blocks: bool, said: list[str]
) -> tuple[Any, ImageSize]:
    """The policy on a tiny pipeline of its own class, and an image size for it.

    Args:
        folder: gets the pipeline.
        image_size: where nothing is replaced.
        compile_blocks: keep `compile`.
        said: gets a line for every replacement.

    Raises:
        ValueError: when there is no tiny pipeline of that class.
    """
    if not isinstance(spec, PretrainedSpec):
        return spec, image_size
    if spec.compile and not compile_blocks:
        said.append("policy.compile: true -> false")
        spec = attrs.evolve(spec, compile=False)
    if spec.path.startswith("embedded:"):
        return spec, image_size
    if spec.pipeline not in TINY:
        raise ValueError(f"there is no tiny {spec.pipeline}. There are {', '.join(TINY)}.")
    place = folder / f"tiny-{spec.pipeline}"
    if not (place / "model_index.json").is_file():
        save_tiny(spec.pipeline, place)
    said.append(f"policy.path: {spec.path} -> a tiny {spec.pipeline} with random weights")
    small: dict[str, Any] = {"path": str(place), "revision": None}
    length = TEXT_LENGTHS.get(spec.pipeline)
    if length is not None and spec.max_sequence_length > length:
        small["max_sequence_length"] = length
        said.append(f"policy.max_sequence_length: {spec.max_sequence_length} -> {length}")
    return attrs.evolve(spec, **small), SIZES.get(spec.pipeline, IMAGE_SIZE)


def _reward(reward: Any, said: list[str]) -> Any:
    """The reward, with a stand-in for every judge inside it whose weights are not part of the package."""
    inside = {} if isinstance(reward, HumanVotes) else dict(_inner_rewards(reward))  # nobody votes in a rehearsal
    if inside:
        return attrs.evolve(reward, **{name: _replaced(value, said) for name, value in inside.items()})
    if type(reward).__name__ in NEEDS_NOTHING or type(reward).__module__.startswith("rlt2i.tasks."):
        return reward
    if not type(reward).__module__.startswith("rlt2i."):
        return reward
    stand_in = StandInReward.for_reward(reward)
    line = f"reward {stand_in.of} -> a stand-in that reads brightness"
    said.extend([] if line in said else [line])
    return stand_in


def _inner_rewards(reward: Any) -> Iterator[tuple[str, Any]]:
    for field in attrs.fields(type(reward)):
        value = getattr(reward, field.name)
        if isinstance(value, Reward) or _holds_rewards(value):
            yield field.alias or field.name, value


def _holds_rewards(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_rewards(item) or isinstance(item, Reward) for item in value.values())
    return isinstance(value, list | tuple) and any(isinstance(item, Reward) for item in value)


def _replaced(value: Any, said: list[str]) -> Any:
    if isinstance(value, Reward):
        return _reward(value, said)
    if isinstance(value, dict):
        return {key: _replaced(item, said) for key, item in value.items()}
    return type(value)(_replaced(item, said) for item in value) if isinstance(value, list | tuple) else value


def _task(task: Task, folder: Path, image_size: ImageSize, said: list[str]) -> Task:
    if isinstance(task, OCRFileTask):
        said.append("task OCRFileTask -> OCRTask, whose prompts need no download")
        return OCRTask()
    if isinstance(task, PickScoreTask):
        said.append("task PickScoreTask -> a few prompts of the package")
        return StandInTask(of="PickScoreTask")
    if isinstance(task, PairFileTask):
        said.append(f"task.pairs: {task.pairs} -> pairs of random pictures")
        inner = StandInTask(of="PairFileTask") if task.evaluation is None else task.evaluation
        inner = _task(inner, folder, image_size, said)
        return attrs.evolve(task, pairs=str(_write_pairs(inner, folder / "pairs", image_size)), evaluation=inner)
    return task


def with_whole_paths(part: Any) -> Any:
    """A part whose texts that name files of the working directory name them from anywhere; so do parts inside it."""
    if not attrs.has(type(part)):
        return part
    changed: dict[str, Any] = {}
    for field in attrs.fields(type(part)):
        value = getattr(part, field.name)
        if not field.init or not value:
            continue
        if isinstance(value, str | Path):
            path = user_path(value)
            if not path.is_absolute() and path.is_file():
                changed[field.alias or field.name] = type(value)(str(path.absolute()))
        elif (whole := with_whole_paths(value)) is not value:
            changed[field.alias or field.name] = whole
    return attrs.evolve(part, **changed) if changed else part


def _write_pairs(task: Task, folder: Path, image_size: ImageSize, count: int = 8) -> Path:
    """A pair file of random pictures for the training prompts of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for index, prompt in enumerate(task.train_prompts(seed=0, start=0, count=count)):
        names = {}
        for role in ("winner", "loser"):
            picture = torch.randint(256, (3, *height_and_width(image_size)), generator=draw, dtype=torch.uint8)
            write_png(picture, str(folder / f"{role}-{index}.png"))
            names[role] = f"{role}-{index}.png"
        rows.append(json.dumps({"prompt": _told_apart(prompt, index), **prompt.metadata, **names}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def _told_apart(prompt: TaskPrompt, index: int) -> str:
    return f"{prompt.text}, picture {index}"


def _with_small_parts(recipe: Recipe, folder: Path, said: list[str]) -> Any:
    """The credit, with attention blocks that the tiny network has, and a tiny vision transformer for features."""
    offered = recipe.policy.offers

    def walk(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(walk(item) for item in part)
        if not attrs.has(type(part)):
            return part
        changed = {f.alias or f.name: walk(getattr(part, f.name)) for f in attrs.fields(type(part)) if f.init}
        blocks, direction = changed.get("blocks"), changed.get("direction")
        if (
            isinstance(blocks, str)
            and direction
            and blocks != "auto"
            and f"attention/{direction}/{blocks}" not in offered
        ):
            said.append(f"{type(part).__name__}.blocks: {blocks} -> middle")
            changed["blocks"] = "middle"
        if isinstance(part, FeatureSaliency):
            said.append(f"FeatureSaliency.model: {part.model} -> a tiny vision transformer with random weights")
            changed["model"], changed["resolution"] = str(_save_vision(folder / "vision")), VISION_SIZE
        return type(part)(**{name: value for name, value in changed.items() if name in _settable(part)})

    return walk(recipe.credit)


def _with_teachers(recipe: Recipe, folder: Path, said: list[str]) -> Objective:
    """Where a recipe learns from other runs: the small policy's own weights, a little off."""
    objective = recipe.objective
    if not isinstance(objective, OnPolicyDistillation):
        return objective
    listed = ", ".join(map(str, objective.teachers.values()))
    said.append(f"OnPolicyDistillation.teachers: {listed} -> the small policy's own weights, scaled by 1.01")
    policy = recipe.policy.load("cpu") if isinstance(recipe.policy, PolicySpec) else recipe.policy
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "teacher.safetensors"
    save_file({k: (1.01 * v.detach()).contiguous() for k, v in policy.trainable_parameters().items()}, path)
    return attrs.evolve(objective, teachers=dict.fromkeys(objective.teachers, path))


def _settable(part: Any) -> set[str]:
    return {field.alias or field.name for field in attrs.fields(type(part)) if field.init}


def _save_vision(folder: Path) -> Path:
    """A vision transformer of one block, as timm saves it."""
    import timm
    from timm.models import save_for_hf

    sizes = {"img_size": VISION_SIZE, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("vit_tiny_patch16_224", **sizes)
    save_for_hf(network, str(folder), model_args=sizes, safe_serialization=True)
    return folder


def _with_few_steps(recipe: Recipe, said: list[str]) -> Recipe:
    """The recipe with a shorter schedule, where none of its parts names steps beyond it."""
    sampler: Any = recipe.sampler
    steps = sampler.num_steps
    if steps <= FEW_STEPS:
        return recipe
    try:
        shorter = attrs.evolve(recipe, sampler=attrs.evolve(sampler, num_steps=FEW_STEPS))
        shorter.algorithm()
        draws = getattr(recipe.objective, "sigmas", None)
        if draws is not None and draws.steps is not None and draws.steps[1] > FEW_STEPS:
            return recipe
    except (ValueError, TypeError):
        return recipe
    said.append(f"sampler.num_steps: {steps} -> {FEW_STEPS}")
    return shorter


def _eval_prompts(recipe: Recipe) -> int:
    """The smallest number of held-out prompts that the task deals."""
    for count in FEW_PROMPTS:
        try:
            recipe.task.eval_prompts(count)
        except ValueError:
            continue
        return count
    return recipe.train.eval_prompts


def _train(recipe: Recipe, image_size: ImageSize, said: list[str]) -> Any:
    train = recipe.train
    least = 4 if _judged_by_counting(recipe) else 2
    sizes = [g for g in GROUP_SIZES if least <= g <= train.group_size and _fits(recipe, g)]
    group = sizes[0] if sizes else train.group_size
    small = attrs.evolve(
        train,
        iterations=2,
        prompts_per_iteration=max(least, train.optimizer_steps_per_iteration),
        group_size=group if train.group_size > 1 else 1,
        rollout_batch_size=max(group, min(train.rollout_batch_size, 8)),
        image_size=image_size,
        sizes=_small_sizes(train.sizes, image_size),
        eval_every=1,
        eval_prompts=_eval_prompts(recipe),
        eval_steps=min(train.eval_steps, 2),
        checkpoint_every=1,
        trackers=(),
    )
    if small.sizes:
        small = attrs.evolve(
            small, prompts_per_iteration=least * len(small.sizes) * small.optimizer_steps_per_iteration
        )
    if small.prompts_per_iteration % small.optimizer_steps_per_iteration:
        small = attrs.evolve(small, prompts_per_iteration=small.optimizer_steps_per_iteration)
    for name in (
        "iterations",
        "prompts_per_iteration",
        "group_size",
        "rollout_batch_size",
        "image_size",
        "sizes",
        "eval_prompts",
    ):
        before, after = getattr(train, name), getattr(small, name)
        if before != after:
            said.append(f"train.{name}: {before} -> {after}")
    return small


def _small_sizes(sizes: tuple[ImageSize, ...], small: ImageSize) -> tuple[ImageSize, ...]:
    """As many, wide where they are wide and high where they are high."""
    side, _ = height_and_width(small)
    shapes = [height_and_width(size) for size in sizes]
    return tuple(
        small if height == width else (side, 2 * side) if height < width else (2 * side, side)
        for height, width in shapes
    )


def _judged_by_counting(recipe: Recipe) -> bool:
    """Whether few images may well have one score: the verifiers of embedded worlds count what is right."""
    return type(recipe.reward).__module__.startswith("rlt2i.tasks.")


def _fits(recipe: Recipe, group_size: int) -> bool:
    try:
        recipe.algorithm().check_group_size(group_size)
    except ValueError:
        return False
    return True
