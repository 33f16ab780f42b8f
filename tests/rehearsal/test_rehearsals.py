"""Every shipped recipe runs with its own settings: trained, killed, resumed, reported, exported, loaded elsewhere."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from rlt2i.recipes import list_recipes, load_recipe
from rlt2i.rehearsal import acts, bfloat16
from rlt2i.rehearsal.acts import rehearse
from rlt2i.rehearsal.replacing import with_whole_paths
from rlt2i.tasks.promptfile import PromptFileTask

NAMES = [entry.name for entry in list_recipes()]
ALWAYS = ("star-sd35-ocr", "dpo-sd35-geneval", "star-cells")
"""Rehearsed by every `make test`; of the others three or four, others every day."""
COMPILED = ("star-sd35-geneval",)


def passes(name: str, folder: Path, *, compile_blocks: bool = False) -> None:
    done = rehearse(load_recipe(name), folder, compile_blocks=compile_blocks)
    assert done.passed, done.table()
    assert [act.name for act in done.acts] == ["prepare", "plan", "kill", "resume", "report", "export"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow(days=64))
        for name in NAMES
        if name not in COMPILED
    ],
)
def test_a_shipped_recipe_passes_its_rehearsal(name: str, tmp_path: Path):
    passes(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_recipe_passes_its_rehearsal(name: str, tmp_path: Path):
    passes(name, tmp_path, compile_blocks=True)


@pytest.mark.parametrize("native", [True, False])
def test_widened_products_are_said_to_be_replaced(native, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(bfloat16, "cpu_multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(acts, "describe_run", None)  # nothing after the preparation is of interest
    for name, expected in (("star-sd35-ocr", not native), ("star-cells", False)):
        done = rehearse(load_recipe(name), tmp_path / name, compile_blocks=False)
        assert (acts.WIDENED in done.replaced) == expected


@attrs.frozen
class Outer:
    """A part with a task inside."""

    task: PromptFileTask


def test_prompt_files_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("a cow\na dog\n")
    (tmp_path / "held.txt").write_text("a pig\n")
    task = PromptFileTask(train="mine.txt", evaluation=str(tmp_path / "held.txt"))
    outer = Outer(task=task)
    whole = [with_whole_paths(task), with_whole_paths(outer).task]
    monkeypatch.chdir("/")
    for found in whole:
        assert found == PromptFileTask(train=str(tmp_path / "mine.txt"), evaluation=str(tmp_path / "held.txt"))
        assert [prompt.text for prompt in found.eval_prompts(1)] == ["a pig"]
    # What names no file stays, and so does a part without paths.
    gone = PromptFileTask(train="gone.txt")
    assert with_whole_paths(gone) is gone
