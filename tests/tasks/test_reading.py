"""What is said about prompts before a run: cuts at token limits, and core phrases that no prompt says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest

from rlt2i.policies.guidance import Guided
from rlt2i.tasks.base import TaskPrompt
from rlt2i.tasks.geneval.task import GenEvalTask
from rlt2i.tasks.ocr.task import OCRTask
from rlt2i.tasks.reading import report_on
from rlt2i.tasks.shapes.task import ShapesTask
from rlt2i.training.start import train
from tests.helpers.toy import ToyPolicy, ToySpec, ToyTask
from tests.helpers.toy_recipe import clipped


def words(limits: dict[str, int]):
    """Text streams with one token a word, the first of them special."""

    def text_streams(self: object, text: str) -> dict[str, tuple[int, Sequence[tuple[int, int]]]]:
        found = [(0, 0), *(match.span() for match in re.finditer(r"\S+", text))]
        return {name: (0, found[:limit]) for name, limit in limits.items()}

    return text_streams


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> ToyPolicy:
    monkeypatch.setattr(ToyPolicy, "text_streams", words({"short": 4, "long": 16}))
    return ToySpec().load("cpu")


def test_prompts_that_are_cut_are_counted_and_what_they_lose_is_named(policy: ToyPolicy):
    prompts = [
        TaskPrompt(text="a red cat"),  # three words fit
        TaskPrompt(text="a red cat \u200b"),  # and nothing visible is cut here
        TaskPrompt(text="a red cat beside dogs", core=("red cat", "dog")),
        TaskPrompt(text='a sign that says "OPEN" for the cat'),
        TaskPrompt(text='a sign that says "OPEN" for the cat'),
    ]
    report = report_on(policy, prompts)
    assert (report.prompts, report.limits) == (4, {"short": 4})
    assert [(cut.text[: cut.kept], cut.lost) for cut in report.cut["short"]] == [
        ("a red cat", ("dog",)),
        ("a sign that", ("OPEN",)),
    ]
    first, second = report.lines()
    assert first.startswith("prompts longer than the 4 tokens that the text encoder 'short' reads")
    assert first.endswith("2 of 4")
    assert ": 'dog' of 'a red cat beside dogs'; 'OPEN' of 'a sign" in second


def test_a_phrase_that_is_said_again_before_the_cut_is_not_lost(policy: ToyPolicy):
    report = report_on(policy, [TaskPrompt(text="a cat on a cat", core=("cat",))])
    assert [cut.lost for cut in report.cut["short"]] == [()]
    assert len(report.lines()) == 1


def test_core_phrases_that_no_prompt_says_are_named_once(policy: ToyPolicy):
    prompts = [TaskPrompt(text="a cat", core=("kat", "cat"))] * 3 + [
        TaskPrompt(text="a caf\u00e9", core=("cafe\u0301",))
    ]
    report = report_on(policy, prompts)
    assert report.unsaid == (("kat", "a cat"),)
    assert report.lines() == [
        "core phrases that their prompts do not say, so that no map starts from them: 'kat' in 'a cat'"
    ]


def test_a_long_list_is_cut_short(policy: ToyPolicy):
    (line,) = report_on(policy, [TaskPrompt(text=f"a cat {i}", core=("kat",)) for i in range(40)]).lines()
    assert ": 40, such as 'kat' in 'a cat 0'; " in line
    assert line.count("'kat'") == 5


def test_guidance_reads_what_its_policy_reads(policy: ToyPolicy):
    text = "a red cat beside dogs"
    assert Guided(policy=policy, scale=2.0).text_streams(text) == policy.text_streams(text)


@pytest.mark.parametrize("task", [ShapesTask(), GenEvalTask(), OCRTask()])
def test_shipped_tasks_say_their_core_phrases(policy: ToyPolicy, task):
    prompts = task.train_prompts(seed=0, start=0, count=200) + task.eval_prompts(60)
    assert report_on(policy, prompts).unsaid == ()


def test_a_run_says_it_before_the_first_iteration(
    policy: ToyPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    @attrs.frozen(kw_only=True)
    class Long(ToyTask):
        def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
            return [
                TaskPrompt(text=f"a bright corner of {i % 3}", core=("croner",)) for i in range(start, start + count)
            ]

    train(attrs.evolve(clipped(iterations=1, eval_prompts=0), task=Long()), tmp_path / "run")
    said = capsys.readouterr().out
    assert (
        "longer than the 4 tokens that the text encoder 'short' reads, so that their ends are cut off: 3 of 3" in said
    )
    assert said.index("'croner' in 'a bright corner of 0'") < said.index("iteration")
