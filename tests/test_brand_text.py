"""The example of labels of a brand: its reward by hand, its order of labels, its recipes."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

from rlt2i import cli
from rlt2i.interfaces import Reward, RewardBatch
from rlt2i.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "brand_text"
PALETTE = runpy.run_path(str(FOLDER / "palette.py"))
Palette, lab = PALETTE["Palette"], PALETTE["lab"]


def scores_of(reward: Reward, *colours: tuple[int, int, int]) -> tuple[list[float], dict[str, list[float]]]:
    """Of an image in stripes of these colours."""
    stripes = torch.tensor(colours, dtype=torch.uint8).T[:, :, None].expand(3, -1, 8)
    output = reward.score(RewardBatch(images=stripes[None], prompts=[""], metadata=[{}]), frozenset({"maps"}))
    assert output.maps is not None
    return output.scores.tolist(), {name: values.tolist() for name, values in output.components.items()}


def test_cielab_of_known_colours():
    # White is (100, 0, 0) by definition; the primaries of sRGB as published tables have them.
    found = lab(torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]]))
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    torch.testing.assert_close(found[:5], torch.tensor(expected, dtype=torch.float32), atol=0.02, rtol=0)
    torch.testing.assert_close(found[5], torch.tensor([53.39, 0.0, 0.0]), atol=0.02, rtol=0)


def test_the_formula_by_hand():
    # Black and white, half each: both are on the palette and balanced. Grey of L = 53.39 is 46.61 from white.
    both = Palette(colours=["#000000", "#FFFFFF"], reach=100.0)
    assert scores_of(both, (0, 0, 0), (255, 255, 255))[0] == pytest.approx([1.0])
    # All white: fit 1, balance 1 - (|1 - .5| + |0 - .5|) / 2 = .5, score 1 x (.5 + .5 x .5).
    score, parts = scores_of(both, (255, 255, 255), (255, 255, 255))
    assert (score, parts["fit"], parts["balance"]) == ([pytest.approx(0.75)], [pytest.approx(1)], [pytest.approx(0.5)])
    white = Palette(colours=["#FFFFFF"], reach=100.0, emphasis=0)
    assert scores_of(white, (128, 128, 128), (255, 255, 255))[0] == pytest.approx([(1 + 0.5359) / 2], abs=2e-3)
    # With reach 20, grey is out of reach.
    near = Palette(colours=["#FFFFFF"], reach=20.0, emphasis=0)
    assert scores_of(near, (128, 128, 128), (255, 255, 255))[0] == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colours": ["green"]}, "not of the form #1F4D3A"),
        ({"colours": []}, "colours"),
        ({"colours": ["#FFFFFF"], "shares": [0.5]}, "with sum 1"),
        ({"colours": ["#FFFFFF"], "shares": [0.5, 0.5]}, "expected 1 shares"),
        ({"colours": ["#FFFFFF"], "reach": 0}, "reach"),
    ],
)
def test_palettes_that_cannot_be_meant_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Palette(**fields)


def test_the_labels_are_told_apart_by_the_reward_that_should():
    labels = runpy.run_path(str(FOLDER / "labels.py"))
    judge = labels["rewards"]()["palette"]
    found = {label: values["palette"] for label, values in labels["scores"]({"palette": judge}).items()}
    assert found["right"] == pytest.approx(found["misspelt"], abs=0.02)  # it does not read
    assert found["right"] > found["one flat colour"] > found["other colours"]
    assert found["other colours"] == pytest.approx(found["both wrong"], abs=0.02)
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for label, score in found.items():
        (stated,) = re.findall(rf"^\| {label} \| [-.\d]+ \| ([.\d]+) \|", page, flags=re.MULTILINE)
        assert float(stated) == pytest.approx(score, abs=0.006), label


def test_every_prompt_quotes_its_text_and_starts_its_maps_there(monkeypatch: pytest.MonkeyPatch):
    for name in ("prompts", "heldout"):
        for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert f'"{row["text"]}"' in row["prompt"]
            assert row["core"] == [row["text"]]
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("examples/brand_text/star-brand-sd35.yaml")
    assert {"text", "core"} <= recipe.task.provides
    assert recipe.algorithm().captures
    held_out = {prompt.metadata["text"] for prompt in recipe.task.eval_prompts(10)}
    trained = {prompt.metadata["text"] for prompt in recipe.task.train_prompts(seed=0, start=0, count=50)}
    assert not held_out & trained


def test_the_commands_of_the_page_parse():
    from rlt2i.cli import parser

    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in page.splitlines() if line.startswith("    rlt2i ")]
    assert len(commands) >= 4
    for command in commands:
        parser().parse_args(command[1:])


def test_the_page_says_what_the_committed_run_measured():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    with (FOLDER / "palette-shapes.csv").open(encoding="utf-8", newline="") as file:
        base, last = csv.DictReader(file)
    train = load_recipe(FOLDER / "palette-shapes.yaml").train
    assert (int(base["iteration"]), int(last["iteration"])) == (0, train.iterations)
    assert int(last["images"]) == train.eval_prompts
    labels = {"reward": "reward: ", "palette": "palette ", "shapes": "shapes, ", "strict": "all that "}
    for column, label in labels.items():
        ((before, after),) = re.findall(rf"^\| {label}[^|]*\| ([.\d]+) \| ([.\d]+) \|$", page, flags=re.MULTILINE)
        assert (float(before), float(after)) == pytest.approx((float(base[column]), float(last[column])), abs=6e-4)
    gain = [float(last[f"reward_gain{end}"]) for end in ("", "_low", "_high")]
    assert f"+{gain[0]:.3f}, [+{gain[1]:.3f}, +{gain[2]:.3f}]" in page
    assert sum((FOLDER / f"{name}.png").stat().st_size for name in ("before", "after")) < 200_000


@pytest.mark.slow
def test_the_laptop_half_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    small = {"iterations": 1, "prompts_per_iteration": 2, "group_size": 4, "rollout_batch_size": 8, "eval_prompts": 6}
    words = [word for name, value in small.items() for word in ("--set", f"train.{name}={value}")]
    assert cli.main(["train", str(FOLDER / "palette-shapes.yaml"), "--set", "train.eval_steps=2", *words]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (
        cli.main(["sample", str(run), "--prompt", "a red circle", "--count", "1", "--steps", "2", "--out", "after.png"])
        == 0
    )
    assert (tmp_path / "after.png").is_file()
