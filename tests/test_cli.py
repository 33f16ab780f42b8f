"""The command line: what it prints, what it returns, and what it calls."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rlt2i import cli
from rlt2i.config import ConfigError
from rlt2i.inputs import arguments
from rlt2i.recipes import list_recipes
from rlt2i.runs.names import new_run_dir, newest_run_dir, run_dir_of, run_name
from tests.helpers.toy import SIDE
from tests.recipes.test_recipes import TOY, toy

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a toy recipe in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    (tmp_path / "toy.yaml").write_text(TOY)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one message of a command that ends with 2."""
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rlt2i: ")
    assert "Traceback" not in captured.err
    return captured.err


# ------------------------------------------------------------------------------------------------------------- speed


def test_help_needs_no_torch_and_no_time():
    code = (
        "import sys, rlt2i.cli\n"
        "try:\n    rlt2i.cli.main(['--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "print('heavy:', sorted({'torch', 'numpy', 'diffusers', 'yaml', 'attrs'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        with_help = time.perf_counter() - start
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], cwd=ROOT, check=True)
        seconds.append(with_help - (time.perf_counter() - start))
    assert "usage: rlt2i" in done.stdout
    assert "heavy: []" in done.stdout
    assert min(seconds) < 0.3


@pytest.mark.parametrize("command", ["list", "train", "sample", "eval", "maps", "report", "compare", "pretrain"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    assert f"usage: rlt2i {command}" in capsys.readouterr().out


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "rlt2i", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("rlt2i 0.")


# ---------------------------------------------------------------------------------------------------- list, refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "star-shape"), "unknown recipe 'star-shape'; did you mean 'star-shapes'?"),
        (("train", "missing.yaml"), "missing.yaml: no such recipe file"),
        (("train",), "train: name a recipe"),
        (("train", "--resume"), "train: name a recipe"),
        (("train", "--resume", "toy.yaml"), "--resume toy.yaml: neither a run directory nor a checkpoint in one"),
        (("train", "toy.yaml", "--resume"), "--resume: there is no run runs/toy-"),
        (
            ("train", "toy.yaml", "--set", "credit.mix=2"),
            "credit.allocations[0].mix: got 2.0 (float), expected float in [0, 1]",
        ),
        (("train", "toy.yaml", "--set", "train.iteratons=2"), "there is no such field; did you mean 'iterations'?"),
        (("train", "toy.yaml", "--set", "train.group_size=1"), "a group of one has no spread"),
        (("report", "nowhere"), "nowhere"),
        (("compare", "star"), "compare: 'star' should read ARM=RUN[,RUN...]"),
        (("compare", "star=a", "--baseline", "uniform"), "uniform"),
    ],
)
def test_users_get_one_message_and_no_traceback(
    words: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert message in refusal(capsys, *words)


def test_debug_shows_where_it_came_from(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(ConfigError):
        cli.main(["train", "star-shape"])


def test_a_missing_package_names_its_extra(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "needy.py").write_text("import rapidocr_not_here\n")
    (folder / "toy.yaml").write_text(TOY.replace("tests.helpers.toy:QuadrantBrightness", "needy.py:X"))
    assert "Install it with: pip install rapidocr_not_here" in refusal(capsys, "train", "toy.yaml")
    missing = ModuleNotFoundError("No module named 'rapidocr'", name="rapidocr")
    assert cli._user_message(missing) == "No module named 'rapidocr'. Install it with: pip install 'rlt2i[ocr]'"


def test_our_own_mistakes_keep_their_traceback():
    assert cli._user_message(TypeError("a bug")) is None
    assert cli._user_message(ModuleNotFoundError("No module named 'rlt2i.x'", name="rlt2i.x")) is None


def test_parts_of_the_working_directory_can_be_named(folder: Path):
    """The console script does not put the working directory on the path by itself."""
    (folder / "local_parts.py").write_text("from tests.helpers.toy import QuadrantBrightness\n")
    (folder / "toy.yaml").write_text(
        TOY.replace("tests.helpers.toy:QuadrantBrightness", "local_parts:QuadrantBrightness")
    )
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; from rlt2i.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "toy.yaml", "--set", "train.iterations=0"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "train.iterations: got 0" in done.stderr


# --------------------------------------------------------------------------------------------------- run directories


def test_run_directories_are_named_after_recipe_hash_and_seed(folder: Path):
    recipe = toy()
    assert run_name(recipe) == f"toy-{recipe.hash[:8]}-s0"
    root = folder / "runs"
    first = new_run_dir(recipe, root)
    assert first == root / run_name(recipe)
    first.mkdir(parents=True)
    assert new_run_dir(recipe, root) == root / f"{run_name(recipe)}-2"


def test_the_newest_run_is_the_one_with_the_highest_number(folder: Path):
    recipe, root = toy(), folder / "runs"
    for suffix in ("", "-2", "-10", "-x"):
        (root / f"{run_name(recipe)}{suffix}").mkdir(parents=True)
    assert newest_run_dir(recipe, root) == root / f"{run_name(recipe)}-10"


def test_runs_with_other_settings_are_pointed_out(folder: Path):
    other = folder / "runs" / "toy-00000000-s0"
    other.mkdir(parents=True)
    (other / "recipe.yaml").write_text(toy().to_yaml())
    with pytest.raises(ConfigError, match=r"Runs of toy with other settings: toy-00000000-s0; continue one with --run"):
        newest_run_dir(toy(), folder / "runs")


def test_several_processes_must_agree_on_a_directory(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="name the run directory with --run-dir DIR"):
        new_run_dir(toy())


def test_a_checkpoint_knows_its_run(folder: Path):
    run = folder / "runs" / "a"
    (run / "checkpoint-000002").mkdir(parents=True)
    (run / "recipe.yaml").write_text(toy().to_yaml())
    assert run_dir_of(run / "checkpoint-000002") == run_dir_of(run) == run


# -------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `train` was called with, in place of training."""
    import rlt2i.training.start

    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        rlt2i.training.start,
        "train",
        lambda recipe, run_dir, resume=None, accept_changes=False: seen.append((recipe, run_dir, resume)),
    )
    return seen


def test_train_resolves_recipe_directory_and_checkpoint(folder: Path, calls: list[tuple[Any, ...]]):
    run = Path("runs") / run_name(toy())
    assert cli.main(["train", "toy.yaml"]) == 0
    assert calls[-1] == (toy(), run, None)
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(toy().to_yaml())
    (run / "checkpoint-000001").mkdir()
    for words, resume in (
        (["toy.yaml", "--resume"], "latest"),
        (["toy.yaml", "--resume", "latest"], "latest"),
        (["--run-dir", str(run), "--resume"], "latest"),
        (["--resume", str(run)], "latest"),
        (["--resume", str(run / "checkpoint-000001")], run / "checkpoint-000001"),
        (["toy.yaml", "--run-dir", str(run), "--resume", str(run / "checkpoint-000001")], run / "checkpoint-000001"),
    ):
        assert cli.main(["train", *words]) == 0
        assert calls[-1] == (toy(), run, resume), words
    assert cli.main(["train", "toy.yaml"]) == 0
    assert calls[-1][1] == run.with_name(f"{run.name}-2")
    assert cli.main(["train", "toy.yaml", "--run-dir", "elsewhere", "--set", "train.seed=4"]) == 0
    assert calls[-1][0].train.seed == 4
    assert calls[-1][1:] == (Path("elsewhere"), None)


def test_a_recipe_trains_resumes_and_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "toy.yaml", "--run-dir", "run", "--report"]) == 0
    shown = capsys.readouterr().out
    assert "4 prompts x 4 rollouts = 16 images" in shown
    assert "report: run/report.html" in shown
    assert Path("run/report.html").is_file()
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    assert "already holds a run" in refusal(capsys, "train", "toy.yaml", "--run-dir", "run")
    assert cli.main(["train", "--run-dir", "run", "--resume", "--set", "train.iterations=3"]) == 0
    assert json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_a_run_can_be_looked_at(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "toy.yaml", "--run-dir", "run"]) == 0
    capsys.readouterr()
    assert cli.main(["sample", "run", "--prompt", "bright corner", "--count", "2", "--out", "out/sample.png"]) == 0
    assert cli.main(["maps", "run", "--prompt", "bright corner", "--out", "out/maps.png"]) == 0
    assert capsys.readouterr().out.split() == ["out/sample.png", "out/maps.png"]
    assert cli.main(["eval", "run", "--prompts", "6", "--out", "out/eval.json"]) == 0
    assert "eval/strict" in capsys.readouterr().out
    assert {"eval/strict", "base/strict", "eval/strict_gain"} <= set(json.loads(Path("out/eval.json").read_text()))


def test_dry_run_trains_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "toy.yaml", "--dry-run"]) == 0
    assert "4 prompts x 4 rollouts = 16 images" in capsys.readouterr().out
    assert not Path("runs").exists()
    words = ("train", "toy.yaml", "--dry-run", "--processes", "3")
    assert "cannot be shared out to 3 processes" in refusal(capsys, *words)


# ------------------------------------------------------------------------------------------ what people type, refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "runs/toi-123"), "runs/toi-123: no such run directory or recipe file; did you mean 'runs/toy-123'?"),
        (("train", "toy-123"), "did you mean 'runs/toy-123'?"),
        (("train", "runs"), "runs: is no run directory, since it has no recipe.yaml. It holds runs: toy-123."),
        (("sample", "./nowhere", "--prompt", "x"), "nowhere: no such run directory or recipe file"),
        (("sample", "toy.yaml", "--prompt", "x", "--steps", "0"), "--steps 0: use 1 or more"),
        (("maps", "toy.yaml", "--prompt", "x", "--steps", "-3"), "--steps -3: use 1 or more"),
        (("eval", "toy.yaml", "--steps", "0"), "--steps 0: use 1 or more"),
        (("eval", "toy.yaml", "--prompts", "0"), "--prompts 0: use 1 or more"),
        (("sample", "toy.yaml", "--prompt", "x", "--count", "0"), "--count 0: use 1 or more"),
        (("pairs", "toy.yaml", "out", "--prompts", "0"), "--prompts 0: use 1 or more"),
        (("train", "toy.yaml", "--dry-run", "--processes", "0"), "--processes 0: use 1 or more"),
        (
            ("sample", "toy.yaml", "--prompt", "x", "--out", "grid"),
            "--out grid: it has no suffix; end the name in .png",
        ),
        (("maps", "toy.yaml", "--prompt", "x", "--out", "a.txt"), "--out a.txt: no format that can be written"),
        (("sample", "toy.yaml", "--prompt", "x", "--out", "toy.yaml/a.png"), "toy.yaml is a file, so there can be no"),
        (("eval", "toy.yaml", "--out", "runs"), "--out runs: is a folder; name a file in it"),
        (("report", "runs/toy-123", "--out", "runs"), "--out runs: is a folder"),
        (("compare", "a=b", "--out", "toy.yaml"), "toy.yaml is a file"),
        (("pairs", "toy.yaml", "toy.yaml"), "toy.yaml is a file"),
        (("eval", "toy.yaml", "--set", "train.eval_prompts=0"), "so say on how many: --prompts N"),
        (("compare", "a=runs/toy-123", "b=runs/../runs/toy-123", "--baseline", "a"), "is in 'a' and in 'b'"),
        (("compare", "a=runs/toy-123,runs/toy-123", "--baseline", "a"), "is twice in 'a'"),
        (("list", "--evidence", "gatd"), "--evidence gatd; did you mean 'gated'?"),
        (("list", "nothing-like-it"), "no recipe matches 'nothing-like-it'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    words: tuple[str, ...],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be loaded for this")

    monkeypatch.setattr("rlt2i.algorithm.Algorithm.load", never)
    (folder / "runs" / "toy-123").mkdir(parents=True)
    (folder / "runs" / "toy-123" / "recipe.yaml").write_text(toy().to_yaml())
    said = refusal(capsys, *words)
    assert message in said
    assert len(said) < 1000


def test_a_home_folder_is_one_everywhere(
    folder: Path, capsys: pytest.CaptureFixture[str], calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(folder))
    assert cli.main(["train", "~/toy.yaml", "--run-dir", "~/run"]) == 0
    assert calls[-1][1] == folder / "run"
    (folder / "run" / "checkpoint-000001").mkdir(parents=True)
    (folder / "run" / "recipe.yaml").write_text(toy().to_yaml())
    assert cli.main(["train", "--resume", "~/run/checkpoint-000001"]) == 0
    assert calls[-1][1:] == (folder / "run", folder / "run" / "checkpoint-000001")
    for words in (["report", "~/gone"], ["compare", "a=~/gone", "--baseline", "a"], ["eval", "~/gone"]):
        assert str(folder / "gone") in refusal(capsys, *words)
    with pytest.raises(SystemExit):
        cli.main(["report", "~nobody-of-this-name/run"])
    assert "Traceback" not in capsys.readouterr().err


def test_recipes_are_listed_by_model_and_evidence(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("    ")]
    assert sorted(shown) == sorted(entry.name for entry in list_recipes())
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings[0].startswith("embedded:")
    assert any(line.startswith("stabilityai/stable-diffusion-3.5-medium (") for line in headings)
    assert cli.main(["list", "STAR", "shapes", "--evidence", "curve", "--flat"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert "star" in line
        assert line.split()[1] == "curve"


@pytest.mark.parametrize("command", sorted(arguments.EXAMPLES))
def test_every_command_has_examples_that_it_understands(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    for example in arguments.EXAMPLES[command]:
        assert example in shown
        words = shlex.split(example, comments=True)[1:]
        if "--help" not in words:
            assert cli.parser().parse_args(words).command is not None


def test_no_command_is_without_examples():
    (commands,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert set(commands.choices) == set(arguments.EXAMPLES)


def test_samples_by_themselves(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["sample", "toy.yaml", "--prompt", "bright corner", "--prompt", "dark corner", "--count", "2"]
    assert cli.main([*words, "--out", "out/grid.png", "--separate"]) == 0
    assert capsys.readouterr().out.split() == ["out/grid.png", "out/grid"]
    assert sorted(path.name for path in Path("out/grid").iterdir()) == [
        "01-01.png",
        "01-02.png",
        "02-01.png",
        "02-02.png",
    ]
    assert Image.open("out/grid/01-01.png").size == (SIDE, SIDE)


def test_pairs_that_are_all_there_say_so(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["pairs", "toy.yaml", "out", "--images", "2", "--steps", "2", "--prompts"]
    for prompts in ("4", "4", "3"):
        assert cli.main([*words, prompts]) == 0
    shown = capsys.readouterr().out
    assert "going on with prompt" not in shown
    assert "out: all 4 prompts are drawn already, with 4 pairs" in shown
    assert "out: all 3 prompts are drawn already, with 4 pairs" in shown


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "rlt2i: interrupted.\n"),
        (MemoryError(), 2, "rlt2i: Out of memory. Compute less at once: --set train.micro_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "rlt2i: CUDA out of memory. Compute less at once"),
    ],
    ids=["interrupt", "host memory", "device memory"],
)
def test_what_ends_a_command_from_outside_is_one_message(
    error: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def ends(_: object) -> int:
        raise error

    monkeypatch.delenv(cli.DEBUG, raising=False)
    monkeypatch.setattr(cli, "_obey", ends)
    assert cli.main(["list"]) == status
    assert capsys.readouterr().err.startswith(message)
