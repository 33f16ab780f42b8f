"""Commands that draw, score and report what was trained."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlt2i.inputs.arguments import check_file, check_folder, check_picture, home_path

if TYPE_CHECKING:
    from rlt2i.recipes import Recipe


def loaded(options: argparse.Namespace) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that a command is about, and where the weights are: `run_dir`, `checkpoint` and `weights`."""
    from rlt2i.recipes import load_recipe

    folder = Path(options.run)
    run_dir = folder if (folder / "recipe.yaml").is_file() else None
    return load_recipe(options.run, options.set), {
        "run_dir": run_dir,
        "checkpoint": options.checkpoint,
        "weights": options.weights,
    }


def _drawing(options: argparse.Namespace) -> dict[str, Any]:
    """How images are drawn: `num_steps`, `seed` and `say`."""
    return {"num_steps": options.steps, "seed": options.seed, "say": _tell}


def sample(options: argparse.Namespace) -> None:
    """`rlt2i sample`: one picture of what a policy draws."""
    check_picture(options.out)
    apart = options.out.with_suffix("") if options.separate else None
    if apart is not None:
        check_folder(apart, "--separate")
    from rlt2i.evaluation.inspection import sample as draw_samples

    recipe, trained = loaded(options)
    picture = draw_samples(
        recipe,
        options.prompt,
        **trained,
        count=options.count,
        **_drawing(options),
        apart=apart,
    )
    _save_picture(picture, options.out)
    if apart is not None:
        print(apart)


def maps(options: argparse.Namespace) -> None:
    """`rlt2i maps`: the allocation of every step over the image it belongs to."""
    check_picture(options.out)
    from rlt2i.evaluation.inspection import maps as draw_maps

    recipe, trained = loaded(options)
    picture = draw_maps(
        recipe,
        options.prompt,
        **trained,
        **_drawing(options),
    )
    _save_picture(picture, options.out)


def look(options: argparse.Namespace) -> None:
    """`rlt2i look`: base and trained side by side."""
    if options.out.suffix.lower() in (".html", ".htm"):
        check_file(options.out)
    else:
        check_picture(options.out)
    from rlt2i.evaluation.look import look as draw_both

    recipe, trained = loaded(options)
    print(
        draw_both(
            recipe, options.prompt, options.out, **trained, seeds=options.seed, num_steps=options.steps, say=_tell
        )
    )


def _tell(line: str) -> None:
    """Beside the results, which may be piped on."""
    print(f"rlt2i: {line}", file=sys.stderr)


def _save_picture(picture: object, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)  # type: ignore[attr-defined]
    print(out)


def evaluate(options: argparse.Namespace) -> None:
    """`rlt2i eval`: scores by the task of the recipe, or by a suite."""
    if options.suite or (Path(options.run) / "fingerprint.json").is_file():
        _eval_suite(options)
        return
    if used := [
        flag for flag in ("against", "shard", "score_only", "reward", "rescore", "features") if getattr(options, flag)
    ]:
        raise ValueError(
            f"eval: --{used[0].replace('_', '-')} goes with --suite NAME, or with the folder of an evaluation."
        )
    if options.out:
        check_file(options.out)
    import json

    from rlt2i.evaluation.inspection import evaluate_run

    recipe, trained = loaded(options)
    metrics = evaluate_run(
        recipe,
        **trained,
        num_prompts=options.prompts,
        num_steps=options.steps,
    )
    for name, value in metrics.items():
        print(f"{name:<36} {value:.4f}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _eval_suite(options: argparse.Namespace) -> None:
    import attrs

    from rlt2i.evaluation.suites import load_suite
    from rlt2i.evaluation.suites.evaluate import evaluate_suite, named_rewards
    from rlt2i.evaluation.suites.folder import Folder, Shard

    there = Folder(path=Path(options.run))
    target: Recipe | Folder
    if (there.path / "fingerprint.json").is_file():
        if options.suite:
            raise ValueError(f"eval: {options.run} is an evaluation and knows its suite; leave --suite out.")
        trained = {"checkpoint": options.checkpoint, "weights": options.weights}
        target, suite, score_only = there, load_suite(there.path / "suite.yaml", trusted=False), True
    else:
        target, trained = loaded(options)
        suite, score_only = load_suite(options.suite), options.score_only
        if options.steps is not None:
            suite = attrs.evolve(suite, steps=options.steps)
    scores = evaluate_suite(
        target,
        suite,
        **trained,
        prompts=options.prompts,
        out=options.out,
        against=options.against,
        shard=Shard.parse(options.shard) if options.shard else None,
        score_only=score_only,
        added=named_rewards(options.reward),
        rescore=options.rescore,
        features=options.features,
    )
    if scores is not None:
        print(scores.text(), end="")


def pairs(options: argparse.Namespace) -> None:
    """`rlt2i pairs`: the best and the worst image of every prompt."""
    check_folder(options.folder, str(options.folder))
    from rlt2i.evaluation.inspection import load_policy
    from rlt2i.evaluation.pairs import PAIRS, make_pairs

    recipe, trained = loaded(options)
    policy = load_policy(recipe, **trained)
    source = options.checkpoint or trained["run_dir"]
    count = make_pairs(
        recipe,
        policy,
        options.folder,
        prompts=options.prompts,
        images=options.images,
        seed=options.seed,
        num_steps=options.steps,
        weights=f"{options.weights} of {source}" if source else "base",
    )
    print(f"{options.folder / PAIRS}: {count} pairs")


def export(options: argparse.Namespace) -> None:
    """`rlt2i export`: a run's weights as other tools load them."""
    from rlt2i.export.command import export as write_export
    from rlt2i.export.hub import check_repository, push

    if options.push:
        check_repository(options.push)
    recipe, trained = loaded(options)
    home: Path = trained["run_dir"] or Path()
    done = write_export(recipe, options.to, options.out or home / "exports" / options.to, **trained)
    print("\n".join(done.lines))
    if options.push:
        print(push(done.folder, options.push, public=options.public))


def report(options: argparse.Namespace) -> None:
    """`rlt2i report`: the page of a run."""
    if options.out:
        check_file(options.out)
    from rlt2i.report import write_report

    print(write_report(options.run, options.out))


def compare(options: argparse.Namespace) -> None:
    """`rlt2i compare`: arms of several seeds, or a run beside the band of its recipe."""
    if options.reference:
        from rlt2i.bench.reference import compare_with_band, load_band

        band = load_band(options.reference)
        print("\n\n".join(compare_with_band(home_path(run), band) for run in options.arms))
        return
    check_folder(options.out, f"--out {options.out}")
    from rlt2i.report import compare_runs

    arms: dict[str, list[Path]] = {}
    for word in options.arms:
        arm, equals, runs = word.partition("=")
        if not equals or not arm or not runs:
            raise ValueError(f"compare: {word!r} should read ARM=RUN[,RUN...], for example star=runs/a,runs/b.")
        arms.setdefault(arm, []).extend(home_path(run) for run in runs.split(",") if run)
    comparison = compare_runs(arms, options.out, baseline=options.baseline, metric=options.metric)
    print(comparison.sentence)
    print(f"{comparison.csv}\n{comparison.svg}\n{comparison.text}")
