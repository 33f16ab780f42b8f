"""The command line. Everything heavy is imported by the command that needs it, so `rlt2i --help` answers at once;
argparse suffices for that, and costs no dependency.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from rlt2i.inputs.arguments import (
    check_counts,
    check_file,
    check_folder,
    check_picture,
    examples,
    home_name,
    home_path,
)
from rlt2i.inputs.display import VisibleStream

if TYPE_CHECKING:
    from rlt2i.recipes import Recipe

DEBUG = "RLT2I_DEBUG"
EXTRAS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "timm": "dino",
    "rapidocr": "ocr",
    "onnxruntime": "ocr",
    "starlette": "serve",
    "uvicorn": "serve",
    "httpx": "serve",
    "ray": "ray",
}
_SAYS_ENOUGH = (
    "CheckpointError",
    "LaunchError",
    "OtherProcessFailed",
    "ProcessLost",
    "RayRunError",
    "RunDirectoryError",
    "RunStopped",
    "UpdateRefused",
)
"""Errors whose message is written for the user; by name, because importing them costs seconds."""
_WEIGHTS = ("best", "online", "ema", "base")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. 0 when it did what was asked, 2 when the user can mend it, with one message and no traceback."""
    with (
        contextlib.redirect_stdout(cast(TextIO, VisibleStream(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, VisibleStream(sys.stderr))),
    ):
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that a recipe can name `my_module:MyPart`, as `python -m` can
    options = parser().parse_args(arguments)
    if os.environ.get(DEBUG):
        return _obey(options)
    try:
        return _obey(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        print(f"rlt2i: {message}", file=sys.stderr)
        return 2


def _obey(options: argparse.Namespace) -> int:
    check_counts(options)
    command: Callable[[argparse.Namespace], int | None] = options.command
    return command(options) or 0


def _user_message(error: Exception) -> str | None:
    """What to tell the user; None for an error that is ours and deserves its traceback."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "rlt2i").partition(".")[0]
        wanted = f"'rlt2i[{EXTRAS[package]}]'" if package in EXTRAS else package
        return None if package == "rlt2i" else f"{error}. Install it with: pip install {wanted}"
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        from rlt2i.runs.files import advice

        return f"{error}. {advice(error, Path(str(error.filename or '.')))}"
    if isinstance(error, ValueError | FileNotFoundError) or type(error).__name__ in _SAYS_ENOUGH:
        return f"{error}\n({DEBUG}=1 shows where this came from.)"
    return None


# ---------------------------------------------------------------------------------------------------------- parser


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    root = argparse.ArgumentParser(prog="rlt2i", description="RL post-training of text-to-image flow models.")
    root.add_argument("--version", action=_Version, nargs=0, help="say which rlt2i this is")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int | None], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    listing = add("list", _list, "show the recipes by model and by the evidence there is for each")
    listing.add_argument("words", nargs="*", metavar="WORD", help="only recipes that hold every word somewhere")
    listing.add_argument(
        "--evidence", action="append", default=[], metavar="LEVEL", help="only this evidence; may be repeated"
    )
    listing.add_argument("--flat", action="store_true", help="one line a recipe, without headings")

    doctor = add("doctor", _doctor, "look whether this machine can run a recipe, and say what to mend")
    doctor.add_argument(
        "recipe", type=home_name, nargs="*", help="recipes to look after (default: a survey of all that are shipped)"
    )
    _add_set(doctor)
    doctor.add_argument("--run-dir", type=home_path, metavar="DIR", dest="run", default=Path("runs"))

    rehearse = add(
        "rehearse", _rehearse, "run a recipe with its own settings on a tiny model: train, kill, resume, export"
    )
    rehearse.add_argument("recipe", type=home_name, nargs="*", help="name, YAML file, or module:function")
    rehearse.add_argument("--all", action="store_true", help="every recipe that the package ships")
    _add_set(rehearse)
    rehearse.add_argument("--no-compile", action="store_true", help="leave torch.compile out; saves minutes")
    rehearse.add_argument(
        "--keep", type=home_path, metavar="DIR", help="keep what was written (default: a temporary folder)"
    )

    train = add("train", _train, "train a recipe")
    train.add_argument(
        "recipe",
        type=home_name,
        nargs="?",
        help="name, YAML file, run directory, or module:function; not needed with --run-dir and --resume",
    )
    _add_set(train)
    train.add_argument(
        "--run-dir",
        type=home_path,
        metavar="DIR",
        dest="run",
        help="run directory (default runs/<recipe>-<hash>-s<seed>)",
    )
    train.add_argument(
        "--resume",
        type=home_name,
        nargs="?",
        const="latest",
        metavar="auto|PATH",
        help="go on from the newest checkpoint, or from PATH; start where there is none yet",
    )
    train.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: go on although data files or code that the recipe reads have changed; it is written down",
    )
    train.add_argument("--dry-run", action="store_true", help="print batches, sizes and memory; train nothing")
    train.add_argument("--processes", type=int, default=1, help="with --dry-run: on how many devices (default 1)")
    train.add_argument("--report", action="store_true", help="write the HTML report at the end")
    _add_ray(train)

    sample = add("sample", _sample, "draw images with a trained policy")
    _add_run(sample)
    sample.add_argument("--prompt", action="append", required=True, help="may be repeated")
    sample.add_argument("--count", type=int, default=4, help="images per prompt (default 4)")
    sample.add_argument(
        "--separate", action="store_true", help="also write every image by itself, into a folder beside the picture"
    )
    _add_drawing(sample, "sample.png")

    evaluate = add("eval", _eval, "score a policy on held-out prompts, by its own task or by a suite")
    _add_run(evaluate)
    evaluate.add_argument("--prompts", type=int, help="how many (default: as in the recipe, or all of the suite)")
    evaluate.add_argument("--steps", type=int, help="denoising steps (default: as in the suite or recipe)")
    evaluate.add_argument(
        "--out", type=home_path, help="also write the numbers as JSON; with --suite, the folder to use"
    )
    _add_suite(evaluate)

    maps = add("maps", _maps, "draw the allocation map of every denoising step over the image")
    _add_run(maps)
    maps.add_argument("--prompt", required=True)
    _add_drawing(maps, "maps.png")

    pairs = add("pairs", _pairs, "draw, score and keep the best and the worst image of every prompt, for offline DPO")
    _add_run(pairs)
    pairs.add_argument("folder", type=home_path, help="gets pairs.jsonl and images/; goes on where it was cut off")
    pairs.add_argument("--prompts", type=int, default=600, help="how many of the training stream (default 600)")
    pairs.add_argument("--images", type=int, default=4, help="drawn per prompt (default 4)")
    pairs.add_argument("--seed", type=int, default=0)
    pairs.add_argument("--steps", type=int, help="denoising steps (default: those of the recipe's evaluation)")

    report = add("report", _report, "write the report of a run, one self-contained HTML page")
    report.add_argument("run", type=home_path, help="run directory")
    report.add_argument("--out", type=home_path, help="file to write (default RUN/report.html)")

    compare = add("compare", _compare, "compare arms of several seeds at equal numbers of iterations")
    compare.add_argument(
        "arms", nargs="+", metavar="ARM=RUN[,RUN...]", help="for example star=runs/a,runs/b uniform=runs/c"
    )
    compare.add_argument(
        "--baseline", default="uniform", help="arm that the others are compared with (default uniform)"
    )
    compare.add_argument("--metric", default="eval/strict", help="default eval/strict")
    compare.add_argument(
        "--reference",
        metavar="RECIPE",
        help="instead: is RUN inside the band of several seeds of a recipe, and where not",
    )
    compare.add_argument("--out", type=home_path, default=Path("comparison"), help="folder (default comparison)")

    bench = add("bench", _bench, "compare credits by a plan: paired seeds, controls, intervals, verdicts")
    bench.add_argument("plan", type=home_name, help="name of a shipped plan, or a YAML file; or: lab, probe")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="options; try: rlt2i bench PLAN --help")

    pretrain = add("pretrain", _pretrain, "train the pipeline of an embedded world")
    pretrain.add_argument("task", choices=["shapes", "cells"])
    pretrain.add_argument(
        "rest", nargs=argparse.REMAINDER, help="options of the world; try: rlt2i pretrain shapes --help"
    )

    serve = add("serve-reward", _serve_reward, "serve a reward over HTTP")
    serve.add_argument(
        "name", type=home_name, help="short name, module:Class, file.py:Class, or a YAML file with a reward or a recipe"
    )
    serve.add_argument("rest", nargs=argparse.REMAINDER, help="options; try: rlt2i serve-reward NAME --help")

    reward = add("reward", _reward, "test a reward on good and bad pictures, or convert its released weights")
    reward.add_argument("action", choices=["test", "convert"])
    reward.add_argument(
        "name",
        help="test: short name, module:Class, file.py:Class, or a YAML file with a reward or a recipe; "
        "convert: name of the weights, such as hpsv2.1",
    )
    reward.add_argument("rest", nargs=argparse.REMAINDER, help="options; try: rlt2i reward test NAME --help")
    return root


class _Version(argparse.Action):
    """Asks for the version when it is wanted, so that `--help` stays free of the package's imports."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from rlt2i.config.version import __version__

        print(f"rlt2i {__version__}")
        parser.exit()


def _add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field; may be repeated")


def _add_ray(sub: argparse.ArgumentParser) -> None:
    ray = sub.add_argument_group("Ray", "Train on the workers of a Ray cluster; see docs/scaling.md.")
    ray.add_argument("--on", choices=["ray"], help="join the cluster of RAY_ADDRESS, or start one on this machine")
    ray.add_argument("--workers", type=int, help="with --on ray: processes, one device each")
    ray.add_argument("--gpus-per-worker", type=float, default=0, help="with --on ray: default 0, which trains on CPUs")
    ray.add_argument("--max-failures", type=int, default=3, help="with --on ray: lost workers to survive (default 3)")


def _add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", type=home_name, help="run directory, or a recipe for its base weights")
    _add_set(sub)
    sub.add_argument("--checkpoint", type=home_path, help="checkpoint folder (default: the newest of the run)")
    sub.add_argument(
        "--weights",
        choices=_WEIGHTS,
        default="best",
        help="best is the average where there is one (default best)",
    )


def _add_suite(sub: argparse.ArgumentParser) -> None:
    suite = sub.add_argument_group(
        "suites",
        "Draws the images of a suite into a folder, scores them, and reports with intervals. Every stage goes on where "
        "it was cut off. Instead of a run, name the folder of an evaluation to judge its images again.",
    )
    suite.add_argument(
        "--suite", type=home_name, metavar="NAME", help="a shipped suite, or a YAML file; see docs/evaluation.md"
    )
    suite.add_argument(
        "--against", type=home_path, metavar="DIR", help="evaluation to pair with (default the base's, beside)"
    )
    suite.add_argument(
        "--shard", metavar="I/N", help="this process's share, where independent processes share the work"
    )
    suite.add_argument("--score-only", action="store_true", help="draw nothing, judge what is saved")
    suite.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="[NAME=]REWARD",
        help="judge by one more reward: short name, module:Class, or YAML file; may be repeated",
    )
    suite.add_argument("--rescore", action="append", default=[], metavar="NAME", help="forget a reward's scores first")
    suite.add_argument("--features", metavar="MODEL", help="measure diversity in a timm model's features, or 'pixels'")


def _add_drawing(sub: argparse.ArgumentParser, out: str) -> None:
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--steps", type=int, help="denoising steps (default: as in the recipe)")
    sub.add_argument("--out", type=home_path, default=Path(out), help=f"picture to write (default {out})")


# -------------------------------------------------------------------------------------------------------- commands


def _list(options: argparse.Namespace) -> None:
    from rlt2i.recipes.catalogue import list_recipes, listing

    for line in listing(list_recipes(), words=options.words, evidence=options.evidence, flat=options.flat):
        print(line)


def _doctor(options: argparse.Namespace) -> int:
    from rlt2i.recipes import list_recipes, load_recipe
    from rlt2i.training.doctor import examine, table

    names = options.recipe or [entry.name for entry in list_recipes()]
    recipes = [load_recipe(name, options.set) for name in names]
    findings = examine(recipes, folder=options.run, strict=bool(options.recipe))
    print(table(findings))
    return int(any(finding.verdict == "broken" for finding in findings))


def _rehearse(options: argparse.Namespace) -> int:
    import tempfile

    from rlt2i.recipes import list_recipes, load_recipe
    from rlt2i.rehearsal.acts import rehearse

    names = [entry.name for entry in list_recipes()] if options.all else options.recipe
    if not names:
        raise ValueError("rehearse: name a recipe (see `rlt2i list`), or rehearse them --all.")
    failed = []
    for name in names:
        recipe = load_recipe(name, options.set)
        with tempfile.TemporaryDirectory(prefix="rlt2i-rehearsal-") as place:
            folder = options.keep / recipe.name if options.keep else Path(place)
            done = rehearse(recipe, folder.absolute(), compile_blocks=not options.no_compile)
        print(done.table(), flush=True)
        failed += [] if done.passed else [name]
    print(
        f"{len(names) - len(failed)} of {len(names)} recipes rehearsed"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return int(bool(failed))


def _train(options: argparse.Namespace) -> None:
    from rlt2i.recipes import load_recipe
    from rlt2i.runs.names import new_run_dir, newest_run_dir, run_dir_of

    resume: str | None = options.resume
    folder: Path | None = options.run
    resume = "latest" if resume == "auto" else resume
    if resume not in (None, "latest"):
        folder = folder or run_dir_of(Path(resume))
        resume = "latest" if Path(resume) == folder else resume
    if options.recipe is None and not (resume and folder):
        raise ValueError(
            "train: name a recipe (see `rlt2i list`), or continue a run: rlt2i train --run-dir DIR --resume."
        )
    recipe = load_recipe(options.recipe or str(folder), options.set)
    if options.dry_run:
        from rlt2i.training.dry_run import describe_run

        print(describe_run(recipe, world_size=options.processes))
        return
    if folder is None:
        folder = (newest_run_dir(recipe, or_new=options.resume == "auto") if resume else None) or new_run_dir(recipe)
    if options.on == "ray":
        _train_on_ray(options, folder, resume)
    else:
        from rlt2i.training.start import train

        where = resume if resume in (None, "latest") else Path(resume)
        train(recipe, folder, resume=where, accept_changes=options.accept_changes)
    if options.report and os.environ.get("RANK", "0") == "0":
        from rlt2i.report import write_report

        print(f"report: {write_report(folder)}")


def _train_on_ray(options: argparse.Namespace, folder: Path, resume: str | None) -> None:
    from rlt2i.training.on_ray import RayRun

    if options.workers is None:
        raise ValueError("train --on ray: how many processes? Give --workers N.")
    if resume not in (None, "latest"):
        raise ValueError(
            f"train --on ray --resume {resume}: on Ray a run goes on from its newest checkpoint, whenever a worker was "
            "lost. Use --resume alone."
        )
    RayRun(
        recipe=options.recipe or str(folder),
        overrides=tuple(options.set),
        run_dir=folder,
        resume=resume,
        workers=options.workers,
        gpus_per_worker=options.gpus_per_worker,
        max_failures=options.max_failures,
    ).start()


def _loaded(options: argparse.Namespace) -> tuple[Recipe, Path | None]:
    """The recipe that a command is about, and the run directory it comes from, if any."""
    from rlt2i.recipes import load_recipe

    folder = Path(options.run)
    return load_recipe(options.run, options.set), folder if (folder / "recipe.yaml").is_file() else None


def _sample(options: argparse.Namespace) -> None:
    check_picture(options.out)
    apart = options.out.with_suffix("") if options.separate else None
    if apart is not None:
        check_folder(apart, "--separate")
    from rlt2i.evaluation.inspection import sample

    recipe, folder = _loaded(options)
    picture = sample(
        recipe,
        options.prompt,
        run_dir=folder,
        checkpoint=options.checkpoint,
        weights=options.weights,
        count=options.count,
        num_steps=options.steps,
        seed=options.seed,
        say=_tell,
        apart=apart,
    )
    _save_picture(picture, options.out)
    if apart is not None:
        print(apart)


def _maps(options: argparse.Namespace) -> None:
    check_picture(options.out)
    from rlt2i.evaluation.inspection import maps

    recipe, folder = _loaded(options)
    picture = maps(
        recipe,
        options.prompt,
        run_dir=folder,
        checkpoint=options.checkpoint,
        weights=options.weights,
        num_steps=options.steps,
        seed=options.seed,
        say=_tell,
    )
    _save_picture(picture, options.out)


def _tell(line: str) -> None:
    """Beside the results, which may be piped on."""
    print(f"rlt2i: {line}", file=sys.stderr)


def _save_picture(picture: object, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)  # type: ignore[attr-defined]
    print(out)


def _eval(options: argparse.Namespace) -> None:
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

    recipe, folder = _loaded(options)
    metrics = evaluate_run(
        recipe,
        run_dir=folder,
        checkpoint=options.checkpoint,
        weights=options.weights,
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
        target, run_dir, suite, score_only = there, None, load_suite(there.path / "suite.yaml"), True
    else:
        target, run_dir = _loaded(options)
        suite, score_only = load_suite(options.suite), options.score_only
        if options.steps is not None:
            suite = attrs.evolve(suite, steps=options.steps)
    report = evaluate_suite(
        target,
        suite,
        run_dir=run_dir,
        checkpoint=options.checkpoint,
        weights=options.weights,
        prompts=options.prompts,
        out=options.out,
        against=options.against,
        shard=Shard.parse(options.shard) if options.shard else None,
        score_only=score_only,
        added=named_rewards(options.reward),
        rescore=options.rescore,
        features=options.features,
    )
    if report is not None:
        print(report.text(), end="")


def _pairs(options: argparse.Namespace) -> None:
    check_folder(options.folder, str(options.folder))
    from rlt2i.evaluation.inspection import load_policy
    from rlt2i.evaluation.pairs import PAIRS, make_pairs

    recipe, folder = _loaded(options)
    policy = load_policy(recipe, run_dir=folder, checkpoint=options.checkpoint, weights=options.weights)
    trained = folder is not None or options.checkpoint is not None
    count = make_pairs(
        recipe,
        policy,
        options.folder,
        prompts=options.prompts,
        images=options.images,
        seed=options.seed,
        num_steps=options.steps,
        weights=f"{options.weights} of {options.checkpoint or folder}" if trained else "base",
    )
    print(f"{options.folder / PAIRS}: {count} pairs")


def _report(options: argparse.Namespace) -> None:
    if options.out:
        check_file(options.out)
    from rlt2i.report import write_report

    print(write_report(options.run, options.out))


def _compare(options: argparse.Namespace) -> None:
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


def _bench(options: argparse.Namespace) -> int:
    from rlt2i.bench.command import main as bench

    return bench(options.plan, options.rest)


def _pretrain(options: argparse.Namespace) -> None:
    from importlib import import_module

    import_module(f"rlt2i.tasks.{options.task}.pretrain").main(options.rest)


def _serve_reward(options: argparse.Namespace) -> int:
    from rlt2i.serve.server import main as serve_reward

    return serve_reward([options.name, *options.rest])


def _reward(options: argparse.Namespace) -> int:
    if options.action == "convert":
        from rlt2i.rewards.releases import main as convert

        convert([options.name, *options.rest])
        return 0
    from rlt2i.recipes.parts import PARTS
    from rlt2i.rewards.selftest import main as test_reward

    return test_reward([options.name, *options.rest], parts=PARTS)


if __name__ == "__main__":
    sys.exit(main())
