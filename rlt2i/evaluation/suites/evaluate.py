"""`rlt2i eval RUN --suite NAME`: draw, score, compare; each stage goes on where it was cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from rlt2i.config import dump_yaml, to_mapping
from rlt2i.config.secrets import redacted
from rlt2i.distributed import Distributed
from rlt2i.evaluation.draw import Draw
from rlt2i.evaluation.inspection import Weights, find_weights, load_policy
from rlt2i.evaluation.suites import results
from rlt2i.evaluation.suites.catalogue import load_suite, suite_mapping
from rlt2i.evaluation.suites.folder import (
    FINGERPRINT,
    RESULTS,
    SUITE,
    EvaluationError,
    Folder,
    PartWriter,
    Record,
    Shard,
    scores_of,
)
from rlt2i.evaluation.suites.generate import generate
from rlt2i.evaluation.suites.report import Report
from rlt2i.evaluation.suites.score import claim_reward, score, share_of
from rlt2i.evaluation.suites.suite import Drawing, Suite, check_reward_name, drawing_id, drawings, prompts_sha256
from rlt2i.inputs.textfiles import has_suffix
from rlt2i.interfaces import Reward
from rlt2i.parameter_sets import tensors_sha256
from rlt2i.recipes.parts import PARTS
from rlt2i.recipes.recipe import Recipe
from rlt2i.rewards.naming import named_reward
from rlt2i.runs.files import replace_text
from rlt2i.runs.provenance import versions
from rlt2i.runs.terminal import Progress
from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import check_metadata
from rlt2i.tasks.reading import report_on

Say = Callable[[str], None]
_MADE_WITH = ("rlt2i", "torch", "diffusers", "transformers", "numpy", "device")


@attrs.frozen(kw_only=True)
class Job:
    """What to do in a folder, and this process's part of it.

    Attributes:
        shard: this process's share.
        wait: returns when every process has come to it; at once where there is no other, or shards are independent.
        is_main: writes the report.
        device: where images are drawn and judged.
        say: prints a line for the user.
    """

    shard: Shard = attrs.field(factory=Shard)
    wait: Callable[[], None] = lambda: None
    is_main: bool = True
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=torch.device)
    say: Say = print


def make_job(shard: Shard | None, say: Say = print) -> Job:
    """The job of this process: one of several under torchrun or accelerate, an independent shard, or all of it.

    Raises:
        ValueError: when both are asked for.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if shard is not None:
            raise ValueError(
                "--shard is for processes that know nothing of each other; under torchrun or accelerate every process "
                "has its share already. Leave it out."
            )
        processes = Distributed()
        return Job(
            shard=Shard(index=processes.rank, count=processes.world_size),
            wait=processes.wait,
            is_main=processes.is_main,
            device=processes.device,
            say=say if processes.is_main else lambda _: None,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Job(shard=shard or Shard(), device=torch.device(device), say=say)


def default_folder(
    recipe: Recipe, suite: Suite, *, run_dir: Path | None, weights: str, checkpoint: Path | None, prompts: int | None
) -> Path:
    """<run>/eval/<suite>[-<n>prompts]-<weights>[-<update>]; without a run, runs/eval/<recipe>-<hash>/... ."""
    root = run_dir / "eval" if run_dir is not None else Path("runs") / "eval" / f"{recipe.name}-{recipe.hash[:8]}"
    parts = [suite.name, *([f"{prompts}prompts"] if prompts is not None else []), weights]
    if weights != "base" and checkpoint is not None:
        parts.append(checkpoint.name.removeprefix("checkpoint-"))
    return root / "-".join(parts)


def draw_suite(
    recipe: Recipe,
    suite: Suite,
    job: Job,
    *,
    run_dir: Path | None = None,
    checkpoint: Path | None = None,
    weights: Weights = "best",
    prompts: int | None = None,
    out: Path | None = None,
) -> Folder:
    """The first stage: all images of this process's share, in the folder of the evaluation.

    Args:
        prompts: how many of the suite's prompts; default all.
        out: the folder; default see `default_folder`.

    Raises:
        ValueError: when prompts and rewards do not fit, or the folder holds another evaluation.
    """
    for reward in suite.rewards.values():
        check_metadata(suite.task, reward)
    size = suite.image_size or recipe.train.image_size
    suite.task.check_image_size(size)
    recipe.policy.check_image_size(size)
    chosen = suite.chosen_prompts(prompts)
    source = find_weights(run_dir=run_dir, checkpoint=checkpoint, weights=weights)
    path, name = source or (None, "base")
    folder = Folder(
        path=out or default_folder(recipe, suite, run_dir=run_dir, weights=name, checkpoint=path, prompts=prompts)
    )
    policy = load_policy(recipe, checkpoint=path, weights=name, device=job.device)
    draw = Draw(
        seed=derive_seed("suite", suite.seed),
        num_steps=recipe.train.eval_steps if suite.steps is None else suite.steps,
        image_size=size,
        rollout_batch_size=recipe.train.rollout_batch_size,
        device=job.device,
    )
    found_versions = versions()
    fingerprint = {
        "suite": {
            "name": suite.name,
            "version": suite.version,
            "seed": suite.seed,
            "prompts": len(chosen),
            "prompts_sha256": prompts_sha256(chosen),
            "images_per_prompt": suite.images_per_prompt,
            "steps": draw.num_steps,
            "image_size": draw.image_size if isinstance(draw.image_size, int) else list(draw.image_size),
        },
        "recipe": {"name": recipe.name, "hash": recipe.hash},
        "policy": redacted(to_mapping(recipe.policy, parts=PARTS)),
        "weights": {
            "set": name,
            "checkpoint": None if path is None else path.name,
            "sha256": tensors_sha256(policy.trainable_parameters()),
        },
        "made_with": {key: found_versions.get(key) for key in _MADE_WITH},
    }
    everything = drawings(chosen, suite.images_per_prompt)
    own = job.shard.of(everything)
    done = folder.records("images") if folder.path.is_dir() else {}
    missing = sum(drawing.id not in done for drawing in own)
    folder.claim(fingerprint, suite=dump_yaml(suite_mapping(suite)), finished=not missing)
    job.say(f"{folder.path}: {len(everything)} images, {len(done)} drawn already")
    for line in report_on(policy, chosen).lines():
        job.say(line)
    job.wait()  # nobody appends before everybody has looked
    if missing:
        _draw_missing(draw, policy, own, done, folder, job)
    return folder


def _draw_missing(
    draw: Draw, policy: Any, drawings: Sequence[Drawing], done: Mapping[str, Record], folder: Folder, job: Job
) -> None:
    with PartWriter(folder, "images", job.shard) as writer, Progress().phase("draw", len(drawings)) as advance:
        generate(draw, policy, drawings, done, folder=folder, writer=writer, advance=advance)


def score_folder(folder: Folder, rewards: Mapping[str, Reward], job: Job, *, rescore: Sequence[str] = ()) -> bool:
    """The second stage: what this process judges of the images that are there.

    Args:
        rewards: name -> reward.
        rescore: rewards whose scores are forgotten first.

    Returns:
        Whether every image is there, so that results can be put together.

    Raises:
        ValueError: when scores of another reward are there under the same name.
    """
    if unknown := sorted(set(rescore) - set(rewards)):
        raise ValueError(f"--rescore {unknown[0]}: no such reward here; there are {', '.join(rewards)}.")
    job.wait()
    if job.is_main:
        for name, reward in rewards.items():
            claim_reward(folder, name, reward, rescore=name in rescore)
    job.wait()
    drawn, wanted = folder.records("images"), _wanted(folder)
    for name, reward in rewards.items():
        _check_metadata(name, reward, drawn.values())
    complete = set(drawn) == set(wanted)
    there = [drawn[name] for name in wanted if name in drawn]
    for name, reward in rewards.items():
        if reward.scope == "group" and not complete:
            continue  # it compares the images of a prompt, and some are missing
        # A share is a share of everything, whatever has been drawn so far.
        share = share_of(reward, there, job.shard) if complete else _present(job.shard.of(wanted), drawn)
        with (
            PartWriter(folder, scores_of(name), job.shard) as writer,
            Progress().phase(name, len(share)) as advance,
        ):
            score(folder, name, reward, share, writer=writer, device=job.device, advance=advance)
    job.wait()
    return complete


def _check_metadata(name: str, reward: Reward, drawn: Iterable[Record]) -> None:
    for record in drawn:
        if missing := sorted(reward.metadata_keys - record["metadata"].keys()):
            raise ValueError(
                f"{name}: {type(reward).__name__} needs the metadata {missing}, but the prompt {record['prompt']!r} "
                f"carries {sorted(record['metadata']) or 'none'}. Use a reward that judges any picture."
            )


def _present(names: Sequence[str], drawn: Mapping[str, Record]) -> list[Record]:
    return [drawn[name] for name in names if name in drawn]


def _wanted(folder: Folder) -> list[str]:
    suite = folder.fingerprint()["suite"]
    return [drawing_id(n, i) for n in range(suite["prompts"]) for i in range(suite["images_per_prompt"])]


def report_folder(
    folder: Folder, job: Job, *, against: Path | None = None, features: str | None = None
) -> Report | None:
    """Put everything together: results.jsonl, report.json, report.md.

    Args:
        against: folder of another evaluation of the same suite, to pair with.
        features: what diversity is measured in; default as the suite says.

    Returns:
        The report; None while images or scores of other shards are missing, which is said.

    Raises:
        EvaluationError: when ids are missing or there twice, or `against` cannot be paired.
    """
    fingerprint = folder.fingerprint()
    suite = load_suite(folder.path / SUITE)
    names = _in_order(suite, folder.reward_names())
    if lacking := _lacking(folder, names):
        job.say(
            f"{folder.path}: {lacking}. When the other shards are done, put it together with: "
            f"rlt2i eval {folder.path} --score-only"
        )
        return None
    count, per_prompt = fingerprint["suite"]["prompts"], fingerprint["suite"]["images_per_prompt"]
    rows = results.merged(folder, count, per_prompt, names)
    replace_text(folder.path / RESULTS, results.write_results(rows))
    before: list[dict[str, Any]] | None = None
    notes: list[str] = []
    other = Folder(path=against) if against is not None else None
    if other is not None:
        theirs = other.fingerprint()
        notes = results.check_pairs(fingerprint, theirs, other.path)
        shared = [name for name in other.reward_names() if name in names and not _lacking(other, [name])]
        before = results.merged(other, count, per_prompt, shared)
        for name in shared:
            if _reward_file(other, name) != _reward_file(folder, name):
                raise EvaluationError(
                    f"{other.path}: its scores called {name!r} are of a reward with other settings or weights, so a "
                    f"difference would mean nothing. Score it again there: rlt2i eval {other.path} --rescore {name}."
                )
    chosen = features or suite.features
    diversity = {}
    if per_prompt > 1:
        now = results.diversity(folder, rows, per_prompt, chosen, job.device)
        then = None if before is None else results.diversity(other, before, per_prompt, chosen, job.device)  # type: ignore[arg-type]
        texts = list(dict.fromkeys(row["prompt"] for row in rows))
        diversity = results.diversity_measures(now, then, texts)
    weights = fingerprint["weights"]
    made = " of ".join(filter(None, [weights["set"], weights["checkpoint"]]))
    report = Report(
        title=f"{suite.name} (version {suite.version}): {fingerprint['recipe']['name']}, {made} weights",
        headline=suite.headline,
        overall=suite.overall,
        prompts=count,
        images_per_prompt=per_prompt,
        rewards={n: results.judged(rows, n, overall=suite.overall, before=before) for n in names},
        diversity=diversity,
        features=chosen,
        health=results.health(rows, before),
        against=str(other.path) if other is not None else "",
        notes=notes,
        fixed=all(row.get("fixed") for row in rows),
    )
    replace_text(folder.path / "report.json", json.dumps(report.mapping(), indent=1, ensure_ascii=False) + "\n")
    replace_text(folder.path / "report.md", report.markdown())
    return report


def _in_order(suite: Suite, names: Sequence[str]) -> list[str]:
    """The suite's own rewards first."""
    return [*(name for name in suite.rewards if name in names), *(name for name in names if name not in suite.rewards)]


def _lacking(folder: Folder, rewards: Sequence[str]) -> str:
    """What is missing, in words; empty when nothing is."""
    wanted = set(_wanted(folder))
    kinds = {"images": "images", **{scores_of(name): f"scores of {name}" for name in rewards}}
    for kind, words in kinds.items():
        if missing := wanted - set(folder.records(kind)):
            return f"{len(missing)} of {len(wanted)} {words} are missing"
    return ""


def _reward_file(folder: Folder, name: str) -> str:
    return (folder.path / "rewards" / f"{name}.json").read_text(encoding="utf-8")


def base_beside(folder: Folder) -> Path | None:
    """The evaluation of the same policy's base by the same suite next to this one, if there is a complete one."""
    fingerprint = folder.fingerprint()
    for path in sorted(folder.path.parent.iterdir()):
        if path == folder.path or not ((path / FINGERPRINT).is_file() and (path / RESULTS).is_file()):
            continue
        other = Folder(path=path).fingerprint()
        same = all(other[key] == fingerprint[key] for key in ("suite", "policy"))
        if same and other["weights"]["set"] == "base":
            return path
    return None


def named_rewards(words: Sequence[str]) -> dict[str, Reward]:
    """Rewards from what a user types: `PickScore`, `module:Class`, `mine.yaml`, or `name=` and one of these.

    Raises:
        ValueError: when a name cannot be one, is there twice, or leads to no reward.
    """
    rewards: dict[str, Reward] = {}
    for word in words:
        name, equals, reference = word.partition("=")
        if not equals:
            reference = word
            name = Path(word).stem if has_suffix(word, ".yaml", ".yml") else word.rpartition(":")[2].lower()
        check_reward_name(name)
        if name in rewards:
            raise ValueError(
                f"--reward {word}: {name!r} is there twice; give one of them another name with NAME=REWARD."
            )
        rewards[name] = named_reward(reference, parts=PARTS)
    return rewards


def evaluate_suite(
    target: Recipe | Folder,
    suite: Suite,
    *,
    run_dir: Path | None = None,
    checkpoint: Path | None = None,
    weights: Weights = "best",
    prompts: int | None = None,
    out: Path | None = None,
    against: Path | None = None,
    shard: Shard | None = None,
    score_only: bool = False,
    added: Mapping[str, Reward] | None = None,
    rescore: Sequence[str] = (),
    features: str | None = None,
    say: Say = print,
) -> Report | None:
    """Evaluate a policy by a suite, or go on with an evaluation that is there.

    Args:
        target: the recipe of the policy, or the folder of an evaluation whose images are to be judged again.
        suite: what is measured.
        run_dir, checkpoint, weights: which weights of the recipe; see `find_weights`.
        prompts: how many of the suite's prompts; default all.
        out: the folder; default `default_folder`.
        against: the folder of another evaluation to pair with; default the base's next to this one, if it is there.
        shard: this process's share, where several that know nothing of each other work on one folder.
        score_only: draw nothing.
        added: rewards besides those of the suite. With `score_only`, only these are asked.
        rescore: names of rewards whose scores are forgotten and made again.
        features: what diversity is measured in; default as the suite says.
        say: prints a line for the user.

    Returns:
        The report, on the first process; None elsewhere, and while parts of other shards are missing.

    Raises:
        ValueError: with the reason and the way out.
    """
    job = make_job(shard, say)
    if shard is not None and rescore:
        raise ValueError("--rescore forgets the scores of all shards; use it without --shard.")
    added = added or {}
    if both := sorted(set(added) & set(suite.rewards)):
        raise ValueError(f"--reward {both[0]}: the suite has a reward of that name; use --rescore, or another name.")
    if isinstance(target, Folder):
        folder = target
    elif score_only:
        source = find_weights(run_dir=run_dir, checkpoint=checkpoint, weights=weights)
        path, name = source or (None, "base")
        where = default_folder(target, suite, run_dir=run_dir, weights=name, checkpoint=path, prompts=prompts)
        folder = Folder(path=out or where)
    else:
        folder = draw_suite(
            target, suite, job, run_dir=run_dir, checkpoint=checkpoint, weights=weights, prompts=prompts, out=out
        )
    _check_suite(folder, suite)
    available = {**suite.rewards, **added}
    requested = available
    if score_only and (added or rescore):
        requested = {name: reward for name, reward in available.items() if name in added or name in rescore}
    elif score_only:
        requested = {name: reward for name, reward in available.items() if _lacking(folder, [name])}
    try:
        score_folder(folder, requested, job, rescore=rescore)
    finally:
        for reward in requested.values():
            reward.close()
    if not job.is_main:
        return None
    return report_folder(folder, job, against=against or base_beside(folder), features=features)


def _check_suite(folder: Folder, suite: Suite) -> None:
    folder.fingerprint()  # there must be an evaluation
    if suite_mapping(load_suite(folder.path / SUITE)) != suite_mapping(suite):
        raise EvaluationError(
            f"{folder.path / SUITE}: the suite has changed since, in its rewards or in how they are averaged. Choose "
            f"another folder with --out, or go on with the suite as it was: rlt2i eval {folder.path} --score-only."
        )
