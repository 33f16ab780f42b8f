"""Pair files: what is read, what is refused and why, and which prompts are held out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import numpy as np
import pytest
from PIL import Image

from rlt2i.rewards.geneval import GenEvalReward
from rlt2i.runs.identity import changes, inputs_of
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.recorded import Recorded
from rlt2i.tasks.base import check_metadata
from rlt2i.tasks.pairs import PairFileTask, read_pairs
from rlt2i.tasks.promptfile import PromptFileTask
from rlt2i.tasks.shapes.task import ShapesTask
from tests.helpers.toy import SIDE, ToyTask
from tests.helpers.toy_pairs import write_pairs
from tests.helpers.toy_recipe import clipped


def picture(file: Path, size: tuple[int, int] = (SIDE, SIDE), grey: int = 0) -> None:
    Image.fromarray(np.full((size[1], size[0], 3), grey, dtype=np.uint8)).save(file)


def row(**fields: object) -> str:
    return json.dumps({"prompt": "a cow", "winner": "a.png", "loser": "b.png"} | fields)


def file(folder: Path, *rows: str) -> Path:
    for grey, name in enumerate(("a.png", "b.png", "c.png")):
        picture(folder / name, grey=grey)
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_rows_carry_metadata_core_phrases_and_absolute_paths(tmp_path: Path):
    path = file(tmp_path, row(core=["cow"], category="animals", note=3), "")
    (pair,) = read_pairs(path).pairs
    assert (pair.text, pair.core, pair.category) == ("a cow", ("cow",), "animals")
    assert pair.metadata["note"] == 3
    assert pair.metadata["winner"] == str(tmp_path / "a.png")
    assert pair.metadata["loser"] == str(tmp_path / "b.png")


def test_every_tenth_prompt_is_held_out_with_all_its_pairs(tmp_path: Path):
    rows = [row(prompt=f"prompt {i}") for i in range(20)]
    again = [row(prompt=f"prompt {i}", winner="b.png", loser="c.png") for i in (3, 9)]
    task = PairFileTask(pairs=str(file(tmp_path, *rows, *again)))
    assert [p.text for p in task.eval_prompts(2)] == ["prompt 9", "prompt 19"]
    assert task.eval_prompts(2)[0].metadata["winner"].endswith("a.png")
    stream = [p.text for p in task.train_prompts(seed=0, start=0, count=19)]
    assert sorted(stream) == sorted([f"prompt {i}" for i in range(20) if i not in (9, 19)] + ["prompt 3"])
    assert task.provides == {"prompt", "winner", "loser"}


def test_another_task_can_evaluate(tmp_path: Path):
    task = PairFileTask(pairs=str(file(tmp_path, row())), evaluation=ToyTask())
    assert task.eval_prompts(3) == ToyTask().eval_prompts(3)
    assert [p.text for p in task.train_prompts(seed=0, start=0, count=3)] == ["a cow"] * 3
    check_metadata(task, Recorded(), ODE())
    with pytest.raises(ValueError, match="GenEvalReward needs the metadata"):
        check_metadata(task, GenEvalReward())


def test_a_task_without_pairs_is_refused_before_training(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(f"prompt {i}\n" for i in range(10)))
    with pytest.raises(ValueError, match=r"Recorded needs the metadata \['loser', 'winner'\].*Use the sampler with"):
        check_metadata(PromptFileTask(train=str(tmp_path / "a.txt")), Recorded())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{oops"], "line 1: not JSON"),
        (["[1]"], "line 1: expected an object"),
        (['{"prompt": "cow", "winner": "a.png"}'], 'line 1: expected a text under "loser", got None'),
        ([row(prompt=" ")], 'expected a text under "prompt"'),
        ([row(core="cow")], '"core" must be a list'),
        ([row(), row(winner="gone.png")], "line 2: the winner 'gone.png' is not there; paths start at"),
        ([row(loser="pairs.jsonl")], "the loser 'pairs.jsonl' is no image that can be read"),
        ([row(loser="wide.png")], "line 1: the loser 'wide.png' has 16 x 8 pixels, the images before it have 8 x 8"),
        ([row(loser="a.png")], "winner and loser are the same image"),
        ([row(), row(loser="c.png"), row()], "line 3: this pair is already on line 1"),
        ([row(), row(winner="./a.png")], "line 2: this pair is already on line 1"),
        ([row(), row(winner="copy.png")], "line 2: this pair is already on line 1"),
        ([row(winner="copy.png", loser="a.png")], "winner and loser are alike in every pixel"),
        ([row(), row(winner="b.png", loser="a.png")], "line 2: line 1 prefers the same two images the other way round"),
        ([row(), row(prompt="A  Cow", winner="b.png", loser="copy.png")], "line 2: line 1 prefers the same two"),
        ([row(note="\ud83d")], "line 1: '\\ud83d' holds half of a character"),
        ([""], "holds no pair"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(tmp_path: Path, rows: list[str], message: str):
    picture(tmp_path / "wide.png", (16, 8))
    picture(tmp_path / "copy.png")
    path = file(tmp_path, *rows)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_pairs(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="`rlt2i pairs RECIPE FOLDER` makes one"):
        PairFileTask(pairs=str(tmp_path / "gone.jsonl")).train_prompts(seed=0, start=0, count=1)
    with pytest.raises(ValueError, match=r"expected a \.jsonl file"):
        PairFileTask(pairs="pairs.csv")
    with pytest.raises(ValueError, match="too few to hold out"):
        PairFileTask(pairs=str(file(tmp_path, row()))).eval_prompts(1)


def test_a_changed_file_is_read_again(tmp_path: Path):
    task = PairFileTask(pairs=str(write_pairs(tmp_path, count=10)))
    assert task.eval_prompts(1)[0].text == "bright corner 9"
    file(tmp_path, *(row(prompt=f"other {i}") for i in range(10)))
    assert task.eval_prompts(1)[0].text == "other 9"


def test_one_size_for_the_task_and_the_training(tmp_path: Path):
    task = PairFileTask(pairs=str(file(tmp_path, row())), evaluation=ToyTask())
    task.check_image_size(SIDE)
    with pytest.raises(ValueError, match=r"train\.image_size=16: the images of .* have 8 x 8 pixels"):
        task.check_image_size(16)
    with pytest.raises(ValueError, match=r"Set train\.image_size=32"):
        PairFileTask(pairs=task.pairs, evaluation=ShapesTask()).check_image_size(SIDE)


def test_lines_and_paths_as_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = file(
        tmp_path, row(prompt="a\u2028cow\x85", winner="~/a.png"), row(prompt="a dog", loser=str(tmp_path / "c.png"))
    )
    text = path.read_text(encoding="utf-8").replace("\\u2028", "\u2028").replace("\\u0085", "\x85")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    path.rename(tmp_path / "PAIRS.JSONL")
    task = PairFileTask(pairs="~/PAIRS.JSONL", evaluation=ToyTask())
    pairs = sorted(task.train_prompts(seed=0, start=0, count=2), key=lambda pair: pair.text)
    assert [pair.text for pair in pairs] == ["a dog", "a\u2028cow"]
    assert [pair.metadata["winner"] for pair in pairs] == [str(tmp_path / "a.png")] * 2


def test_a_prompt_typed_otherwise_is_held_out_with_the_rest(tmp_path: Path):
    rows = [row(prompt=f"caf\u00e9 {i}") for i in range(10)]
    again = row(prompt="\ufeffCafe\u0301\u00a09", winner="b.png", loser="c.png")
    task = PairFileTask(pairs=str(file(tmp_path, *rows, again)))
    assert [p.text for p in task.eval_prompts(1)] == ["caf\u00e9 9"]
    assert sorted(p.text for p in task.train_prompts(seed=0, start=0, count=9)) == [f"caf\u00e9 {i}" for i in range(9)]


def test_the_images_of_pairs_belong_to_a_run(tmp_path: Path):
    path = file(tmp_path, *(row(prompt=f"prompt {i}") for i in range(10)), row(prompt="prompt 0", winner="c.png"))
    inner = PairFileTask(pairs=str(path))
    assert inner.further_files() == [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    recipe = attrs.evolve(clipped(), task=PairFileTask(pairs=str(path), evaluation=inner))
    before = inputs_of(recipe)
    assert changes(before, inputs_of(recipe)) == []
    picture(tmp_path / "c.png", grey=9)
    told = changes(before, inputs_of(recipe))
    assert [line.split(":")[0] for line in told] == [
        "task (files named in its data)",
        "task.evaluation (files named in its data)",
    ]
    assert f"{tmp_path} has other content" in told[0]
    # Moved as a whole, it is the same data.
    picture(tmp_path / "c.png", grey=2)
    (moved := tmp_path / "elsewhere").mkdir()
    for name in ("a.png", "b.png", "c.png", "pairs.jsonl"):
        (tmp_path / name).rename(moved / name)
    there = PairFileTask(pairs=str(moved / "pairs.jsonl"))
    assert changes(before, inputs_of(attrs.evolve(recipe, task=attrs.evolve(there, evaluation=there)))) == []
