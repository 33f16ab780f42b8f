"""The words that the command line knows, and which function obeys them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rlt2i.cli import inspecting, rewards, training, voting
from rlt2i.inputs.arguments import examples, home_name, home_path

_WEIGHTS = ("best", "online", "ema", "base")


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

    listing = add("list", training.list_all, "show the recipes by model and by the evidence there is for each")
    listing.add_argument("words", nargs="*", metavar="WORD", help="only recipes that hold every word somewhere")
    listing.add_argument(
        "--evidence", action="append", default=[], metavar="LEVEL", help="only this evidence; may be repeated"
    )
    listing.add_argument("--flat", action="store_true", help="one line a recipe, without headings")

    doctor = add("doctor", training.doctor, "look whether this machine can run a recipe, and say what to mend")
    doctor.add_argument(
        "recipe", type=home_name, nargs="*", help="recipes to look after (default: a survey of all that are shipped)"
    )
    _add_set(doctor)
    doctor.add_argument("--run-dir", type=home_path, metavar="DIR", dest="run", default=Path("runs"))

    plan = add("plan", training.plan, "say what a recipe will cost, and whether it fits a device")
    plan.add_argument("recipe", type=home_name, help="name, YAML file, run directory, or module:function")
    _add_set(plan)
    plan.add_argument("--processes", type=int, default=1, help="on how many devices (default 1)")
    device = plan.add_mutually_exclusive_group()
    device.add_argument("--gpu", metavar="DEVICE", help="a device by name (rtx4090) or memory (24GB); 1 if it is short")
    device.add_argument("--fit", metavar="DEVICE", help="likewise; 0 if the smallest change that is found makes it fit")
    plan.add_argument("--out", type=home_path, metavar="FILE", help="with --fit: write the recipe that fits there")

    rehearse = add(
        "rehearse", training.rehearse, "run a recipe with its own settings on a tiny model: train, kill, resume, export"
    )
    rehearse.add_argument("recipe", type=home_name, nargs="*", help="name, YAML file, or module:function")
    rehearse.add_argument("--all", action="store_true", help="every recipe that the package ships")
    _add_set(rehearse)
    rehearse.add_argument("--no-compile", action="store_true", help="leave torch.compile out; saves minutes")
    rehearse.add_argument(
        "--keep", type=home_path, metavar="DIR", help="keep what was written (default: a temporary folder)"
    )

    check = add("check", training.check, "examine a recipe on its own weights, or a policy, law by law")
    check.add_argument(
        "what",
        type=home_name,
        nargs="+",
        help="a recipe as `train` takes it; or the word policy and a short name, module:Class, file.py:Class, or a "
        "YAML file with the part or a recipe",
    )
    _add_set(check, "a field of the part, such as path=DIR; may be repeated")
    check.add_argument("--size", metavar="HxW", help="of images (default: the smallest usual one that it takes)")
    check.add_argument("--device", default="cpu", help="where it is loaded (default cpu)")
    check.add_argument("--tiny", action="store_true", help="on random weights of a tiny pipeline of its class")
    check.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="of a recipe: devices that it will be trained on (default 1)",
    )

    train = add("train", training.train, "train a recipe")
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

    sample = add("sample", inspecting.sample, "draw images with a trained policy")
    _add_run(sample)
    sample.add_argument("--prompt", action="append", required=True, help="may be repeated")
    sample.add_argument("--count", type=int, default=4, help="images per prompt (default 4)")
    sample.add_argument(
        "--separate", action="store_true", help="also write every image by itself, into a folder beside the picture"
    )
    _add_drawing(sample, "sample.png")

    evaluate = add("eval", inspecting.evaluate, "score a policy on held-out prompts, by its own task or by a suite")
    _add_run(evaluate)
    evaluate.add_argument("--prompts", type=int, help="how many (default: as in the recipe, or all of the suite)")
    evaluate.add_argument("--steps", type=int, help="denoising steps (default: as in the suite or recipe)")
    evaluate.add_argument(
        "--out", type=home_path, help="also write the numbers as JSON; with --suite, the folder to use"
    )
    _add_suite(evaluate)

    maps = add("maps", inspecting.maps, "draw the allocation map of every denoising step over the image")
    _add_run(maps)
    maps.add_argument("--prompt", required=True)
    _add_drawing(maps, "maps.png")

    look = add("look", inspecting.look, "show base and trained side by side, for any prompt and seed, with credit maps")
    _add_run(look)
    look.add_argument("--prompt", action="append", required=True, help="may be repeated")
    look.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several (default 0)")
    look.add_argument("--steps", type=int, help="denoising steps (default: as in the recipe)")
    look.add_argument(
        "--out", type=home_path, default=Path("look.html"), help="page, or picture without maps (default look.html)"
    )

    pairs = add(
        "pairs", inspecting.pairs, "draw, score and keep the best and the worst image of every prompt, for offline DPO"
    )
    _add_run(pairs)
    pairs.add_argument("folder", type=home_path, help="gets pairs.jsonl and images/; goes on where it was cut off")
    pairs.add_argument("--prompts", type=int, default=600, help="how many of the training stream (default 600)")
    pairs.add_argument("--images", type=int, default=4, help="drawn per prompt (default 4)")
    pairs.add_argument("--seed", type=int, default=0)
    pairs.add_argument("--steps", type=int, help="denoising steps (default: those of the recipe's evaluation)")

    vote = add(
        "vote", voting.vote, "vote on pairs of images on a local page; the votes are a pair file for offline DPO"
    )
    _add_run(vote)
    vote.add_argument("folder", type=home_path, help="gets pairs.jsonl, images and votes; goes on where it was cut off")
    vote.add_argument("--prompts", type=int, default=50, help="how many of the training stream (default 50)")
    vote.add_argument("--prompt", action="append", default=[], help="instead: a prompt of your own; may be repeated")
    vote.add_argument("--images", type=int, default=2, help="compared per prompt, 2 to 6 (default 2)")
    vote.add_argument("--seed", type=int, default=0)
    vote.add_argument("--steps", type=int, help="denoising steps (default: those of the recipe's evaluation)")
    vote.add_argument("--port", type=int, help="of the page (default 8918, or a free one where that is taken)")

    export = add("export", inspecting.export, "write what a run has learned for other tools, with a model card")
    _add_run(export)
    export.add_argument(
        "--to",
        required=True,
        choices=["diffusers", "comfyui", "kohya", "merged", "peft"],
        help="an adapter under the names of a tool, or the whole pipeline with the adapter merged",
    )
    export.add_argument("--out", type=home_path, metavar="DIR", help="folder to make (default RUN/exports/FORMAT)")
    export.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the hub, into a private repository")
    export.add_argument("--public", action="store_true", help="with --push: everybody may see a new repository")

    report = add("report", inspecting.report, "write the report of a run, one self-contained HTML page")
    report.add_argument("run", type=home_path, help="run directory")
    report.add_argument("--out", type=home_path, help="file to write (default RUN/report.html)")

    compare = add("compare", inspecting.compare, "compare arms of several seeds at equal numbers of iterations")
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

    bench = add("bench", training.bench, "compare credits by a plan: paired seeds, controls, intervals, verdicts")
    bench.add_argument("plan", type=home_name, help="name of a shipped plan, or a YAML file; or: lab, probe")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="options; try: rlt2i bench PLAN --help")

    pretrain = add("pretrain", training.pretrain, "train the pipeline of an embedded world")
    pretrain.add_argument("task", choices=["shapes", "cells"])
    pretrain.add_argument(
        "rest", nargs=argparse.REMAINDER, help="options of the world; try: rlt2i pretrain shapes --help"
    )

    serve = add("serve-reward", rewards.serve_reward, "serve a reward over HTTP")
    serve.add_argument(
        "name", type=home_name, help="short name, module:Class, file.py:Class, or a YAML file with a reward or a recipe"
    )
    serve.add_argument("rest", nargs=argparse.REMAINDER, help="options; try: rlt2i serve-reward NAME --help")

    reward = add("reward", rewards.reward, "test a reward on good and bad pictures, or convert its released weights")
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


def _add_set(sub: argparse.ArgumentParser, about: str = "override a field; may be repeated") -> None:
    sub.add_argument(
        "--trust-code",
        action="store_true",
        help="run code that a run directory names and that was never run here; look at it first",
    )
    sub.add_argument("--set", action="append", default=[], metavar="a.b=c", help=about)


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
