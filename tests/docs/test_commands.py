"""Commands of the pages parse and name what exists; each is run, here or by a named test, or not for a reason."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from rlt2i import cli
from rlt2i.bench.plan import shipped_plans
from rlt2i.evaluation.suites.catalogue import list_suites
from rlt2i.recipes import load_recipe
from tests.docs.shown import ROOT, Shown, shown_commands

COMMANDS = shown_commands()
OURS = [shown for shown in COMMANDS if shown.arguments is not None]
OTHERS = [shown for shown in COMMANDS if shown.arguments is None]

TRAIN = "--set train.iterations=1 --set train.prompts_per_iteration=2 --set train.group_size=4 --set train.eval_steps=2"
TRAIN = f"{TRAIN} --set train.rollout_batch_size=8 --set train.micro_batch_size=8 --set train.eval_prompts=6"
DRAW = "--steps 2"
RUN_HERE = {
    "rlt2i list": "",
    "rlt2i train star-nft-shapes --report": TRAIN,
    "rlt2i train star-shapes --set credit.mix=0.7 --report": TRAIN,
    ".venv/bin/rlt2i train star-nft-cells --report": TRAIN,
    "rlt2i train oracle-cells --set reward.type=CornerReward": TRAIN,
    "rlt2i train --run-dir runs/... --resume": "--set train.iterations=2 --accept-changes",
    'rlt2i maps runs/... --prompt "a red circle and a blue square"': DRAW,
    'rlt2i sample runs/... --prompt "two squares"': DRAW,
    'rlt2i look runs/... --prompt "two squares" --seed 0 1 2': DRAW,
    "rlt2i eval runs/...": f"{DRAW} --prompts 6",
    "rlt2i eval runs/... --suite shapes": f"{DRAW} --prompts 6",
    "rlt2i eval runs/RUN --suite shapes --prompts 24 --weights base": f"{DRAW} --prompts 6",
    "rlt2i eval runs/RUN --suite shapes --prompts 24": f"{DRAW} --prompts 6",
    "rlt2i export runs/mine --to comfyui": "",
    "rlt2i compare star=runs/a,runs/b uniform=runs/c,runs/d": "--metric eval/reward",
    "rlt2i pairs dpo-shapes pairs/shapes --prompts 600": "--steps 6 --prompts 12 --images 4",
    "rlt2i train offline-dpo-shapes": f"{TRAIN} --set train.group_size=2 --set train.optimizer_steps_per_iteration=1",
    "rlt2i bench mine.yaml --dry-run": "",
}
"""Command -> words that make it small. One test runs them in this order, in one folder with a finished run in it."""

SITE, BRAND = "tests/docs/test_site.py", "tests/test_brand_text.py"
REHEARSALS, LAWS = "tests/rehearsal/test_rehearsals.py", "tests/conformance/test_policy_laws.py"
SELFTEST, SUITES = "tests/rewards/test_selftest.py", "tests/evaluation/suites/test_suites.py"
BY_TEST = {
    "rlt2i doctor star-sd35-geneval": "tests/training/test_doctor.py",
    "rlt2i doctor star-sd35-ocr": "tests/training/test_doctor.py",
    "rlt2i plan star-sd35-ocr --fit 24GB": SITE,
    "rlt2i plan star-sd35-ocr --fit 24GB --out mine.yaml": SITE,
    "rlt2i plan star-flux2-klein-4b-ocr-24gb --gpu rtx4090": SITE,
    "rlt2i plan star-sd35-ocr --gpu h100": SITE,
    "rlt2i plan star-sd35-ocr --processes 8 --gpu h100": SITE,
    "rlt2i rehearse star-sd35-geneval": REHEARSALS,
    "rlt2i rehearse star-sd35-ocr": REHEARSALS,
    "rlt2i rehearse --no-compile mine.yaml": REHEARSALS,
    "rlt2i rehearse --no-compile examples/brand_text/star-brand-sd35.yaml": REHEARSALS,
    "rlt2i check mine.yaml --tiny": "tests/conformance/test_recipe_laws.py",
    "rlt2i check policy Flux --tiny": LAWS,
    "rlt2i check policy my_backbone.py:MySpec --set path=weights/mine --size 64x96": LAWS,
    "rlt2i reward test OCRReward": SELFTEST,
    'rlt2i reward test my_rewards.py:Mine --good a.png --bad b.png --prompt "a red car"': SELFTEST,
    "rlt2i serve-reward OCRReward --set match=full --port 8917": "tests/serve/test_another_process.py",
    "rlt2i serve-reward OCRReward --host 0.0.0.0": "tests/serve/test_server.py",
    "rlt2i vote runs/... votes/mine": "tests/voting/test_command.py",
    "rlt2i vote runs/mine votes/mine --prompts 50": "tests/voting/test_command.py",
    "rlt2i train offline-dpo-shapes --set task.pairs=votes/mine/pairs.jsonl": "tests/objectives/test_offline_dpo.py",
    "rlt2i train dpo-votes-shapes": "tests/voting/test_human_votes.py",
    "rlt2i export runs/mine --to merged --out mine --push me/mine": "tests/export/test_formats.py",
    "rlt2i bench mine.yaml --out bench/mine": "tests/bench/test_bench.py",
    "rlt2i bench cells-clipped --power": "tests/bench/test_bench.py",
    "rlt2i bench cells-maps --reuse bench/cells-nft": "tests/bench/test_bench.py",
    "rlt2i bench probe star-cells": "tests/bench/test_probe.py",
    "rlt2i bench lab": "tests/bench/test_lab.py",
    "rlt2i compare RUN --reference star-nft-cells": "tests/bench/test_reference.py",
    "rlt2i eval DIR --rescore ocr": SUITES,
    "rlt2i eval DIR --reward taste=my_reward.py:Taste": SUITES,
    "rlt2i train examples/brand_text/star-brand-sd35.yaml --dry-run": "tests/recipes/test_extends.py",
    "rlt2i train examples/brand_text/palette-shapes.yaml --run-dir runs/brand --report": BRAND,
    'rlt2i sample runs/brand --prompt "a red circle" --prompt "two blue squares" --weights base --out before.png': BRAND,  # noqa: E501
    'rlt2i sample runs/brand --prompt "a red circle" --prompt "two blue squares" --out after.png': BRAND,
    "rlt2i train $RECIPE --run-dir runs/ray --on ray --workers 2": "tests/training/test_on_ray.py",
    "torchrun --nproc-per-node 2 -m rlt2i train $RECIPE --run-dir runs/torchrun": "tests/training/test_launch.py",
}  # fmt: skip
"""Command -> the file whose tests run it or one of its kind, smaller."""

HUB = "reads weights or data of the hub, and no test may need a network"
GPU = "needs a CUDA device"
CLUSTER = (
    "needs several devices or machines; the launchers are tried with two CPU processes in tests/training/test_launch.py"
)
HOURS = "takes an hour or more; its parts are run by tests/bench"
NOT_RUN = {
    "rlt2i check star-sd35-geneval --device cuda": GPU,
    "rlt2i check mine.yaml --device cuda": GPU,
    "rlt2i train mine.yaml --report": GPU,
    "rlt2i train --run-dir runs/mine --resume --set train.micro_batch_size=1": GPU,
    "rlt2i train star-sd35-ocr --report": GPU,
    "rlt2i train examples/brand_text/star-brand-sd35.yaml": GPU,
    "rlt2i serve-reward PickScore": HUB,
    "rlt2i reward test PickScore": HUB,
    "rlt2i reward test PickScore --released": HUB,
    "rlt2i reward test PickScore --released --record PickScore.json": HUB,
    "rlt2i reward test PickScore --released --expect PickScore.json": HUB,
    "rlt2i reward convert mask2former_swin-s_mmdet": HUB,
    "rlt2i reward convert hpsv2.1": HUB,
    "rlt2i reward convert hpsv3": HUB,
    "rlt2i reward convert imagereward-v1.0": HUB,
    "rlt2i reward convert aesthetic_sac_logos_ava1_l14": HUB,
    "rlt2i eval runs/RUN --suite geneval": HUB,
    "rlt2i eval runs/RUN --suite geneval --shard 0/4": HUB,
    "rlt2i eval runs/RUN --suite geneval2": HUB,
    "rlt2i eval DIR --reward HPSv2": HUB,
    "rlt2i bench cells-nft --jobs 2": HOURS,
    "rlt2i bench cells-demo --jobs 2": "takes minutes: it is `make demo`, which is run before a release",
    "rlt2i bench cells-clipped --jobs 2": HOURS,
}
"""Command -> why no test runs it."""
NOT_RUN |= {
    shown.text: CLUSTER
    for shown in OURS
    if re.match(r"torchrun |accelerate |RANK=", shown.text) and shown.text not in BY_TEST
}


def test_every_command_is_run_or_not_for_a_reason():
    known = [*RUN_HERE, *BY_TEST, *NOT_RUN]
    assert len(known) == len(set(known))
    ours = [shown.text for shown in OURS]
    assert set(known) <= set(ours), "these commands are on no page any more"
    left = [text for text in ours if text not in known]
    assert left == [], "say in this file how they are tested, or why not"
    for test in set(BY_TEST.values()):
        assert "def test_" in (ROOT / test).read_text(encoding="utf-8")
    assert all("cuda" in text or "train " in text for text, why in NOT_RUN.items() if why is GPU)


@pytest.mark.parametrize("shown", OURS, ids=lambda shown: shown.text[:60])
def test_a_command_parses_and_names_what_exists(shown: Shown, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert shown.arguments
    options = cli.parser().parse_args(shown.arguments)
    recipes = {path.stem for path in (ROOT / "rlt2i" / "recipes" / "library").glob("*.yaml")}
    names = [getattr(options, key, None) for key in ("recipe", "run", "what", "plan")]
    for name in [part for each in names for part in (each if isinstance(each, list) else [each]) if part]:
        text = str(name)
        if options.command.__name__ == "bench":
            assert text in {*shipped_plans(), "lab", "probe", "mine.yaml"}, text
        elif text.startswith("examples/"):
            assert load_recipe(text, options.set).name
        elif re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", text):
            assert text in recipes, text
            if fields := [field for field in options.set if not field.startswith("task.pairs=")]:
                assert load_recipe(text, fields).name == text
    if getattr(options, "suite", None):
        assert options.suite in list_suites()


@pytest.mark.parametrize("shown", OTHERS, ids=lambda shown: shown.text[:60])
def test_a_command_of_another_program_names_what_exists(shown: Shown):
    words = [word for word in shown.words if "=" not in word or word.startswith(("unirl", "-"))]
    match words[0]:
        case "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
        case "pip":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            for extra in re.findall(r"rlt2i\[(\w+)\]", shown.text):
                assert extra in project["optional-dependencies"]
        case "python" if words[1] == "-m" and words[2].startswith("benchmarks"):
            assert importlib.util.find_spec(words[2])
        case "python" if words[1] != "-m":
            assert (ROOT / words[1]).is_file()
        case other:  # other people's programs
            assert other in ("ssh", "srun", "python", "accelerate", "torchrun"), shown.text


def test_prose_names_commands_that_exist():
    actions = {name: sub for action in cli.parser()._subparsers._group_actions for name, sub in action.choices.items()}  # type: ignore[union-attr]
    for path in {ROOT / shown.page for shown in COMMANDS} | set((ROOT / "docs").rglob("*.md")):
        for text in re.findall(r"`rlt2i ([a-z-]+)([^`]*)`", path.read_text(encoding="utf-8")):
            assert text[0] in actions, f"{path.name}: rlt2i {text[0]}"
            known = actions[text[0]].format_help()
            for option in re.findall(r"(--[a-z-]+)", text[1]):
                assert option in known or "..." in known, f"{path.name}: rlt2i {text[0]} {option}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs under the names that the pages use; four of them are two arms with two seeds."""
    folder = tmp_path_factory.mktemp("reader")
    lora = ["--set", "policy.lora_rank=2", "--set", "credit.mix=0.7"]
    for name, seed in (("a", 0), ("b", 1)):
        words = ["train", "star-shapes", *TRAIN.split(), *lora, "--set", f"train.seed={seed}"]
        assert cli.main([*words, "--run-dir", str(folder / "runs" / name)]) == 0
    for source, copies in (("a", ("c", "mine", "RUN", "...")), ("b", ("d",))):
        for name in copies:
            shutil.copytree(folder / "runs" / source, folder / "runs" / name)
    shutil.copy(ROOT / "rlt2i" / "bench" / "plans" / "cells-demo.yaml", folder / "mine.yaml")
    return folder


@pytest.mark.slow(days=24)
@pytest.mark.parametrize("text", RUN_HERE)
def test_a_command_runs(text: str, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    if text.startswith("rlt2i train offline-dpo") and not (home / "pairs").exists():
        words = "pairs dpo-shapes pairs/shapes --steps 6 --prompts 12 --images 4"
        assert cli.main(words.split()) == 0
    shown = next(shown for shown in OURS if shown.text == text)
    assert shown.arguments
    assert cli.main([*shown.arguments, *RUN_HERE[text].split()]) == 0
