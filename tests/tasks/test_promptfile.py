"""Prompts from files: what is read, what is refused and why, and the stream that comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlt2i.rewards.combinators import Function
from rlt2i.rewards.geneval import GenEvalReward
from rlt2i.tasks.base import TaskPrompt, check_metadata
from rlt2i.tasks.promptfile import PromptFileTask, read_prompts
from tests.helpers.toy import QuadrantBrightness


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_text_file_is_one_prompt_per_line(tmp_path: Path):
    file = write(tmp_path / "a.txt", "\ufeffa cow", "", "  a dog ", "an ökö")
    assert [p.text for p in read_prompts(Path(file))] == ["a cow", "a dog", "an ökö"]


def test_rows_carry_metadata_core_phrases_and_a_category(tmp_path: Path):
    row = {"prompt": "a red cow", "core": ["red cow"], "tag": "colors", "include": [{"class": "cow", "count": 1}]}
    train = write(tmp_path / "a.jsonl", json.dumps(row))
    evaluation = write(tmp_path / "b.jsonl", json.dumps({**row, "prompt": "a blue cow", "note": 1}))
    task = PromptFileTask(train=train, evaluation=evaluation)
    (prompt,) = task.train_prompts(seed=0, start=0, count=1)
    assert (prompt.text, prompt.core, prompt.category, prompt.metadata) == ("a red cow", ("red cow",), "colors", row)
    assert task.provides == {"prompt", "core", "tag", "include"}
    check_metadata(task, GenEvalReward())


def test_a_reward_whose_data_is_missing_is_refused_before_training(tmp_path: Path):
    task = PromptFileTask(train=write(tmp_path / "a.txt", *(f"prompt {i}" for i in range(20))))
    with pytest.raises(ValueError, match="add the keys to your prompt file"):
        check_metadata(task, GenEvalReward())


def test_every_pass_shows_each_prompt_once(tmp_path: Path):
    task = PromptFileTask(train=write(tmp_path / "a.txt", *(f"prompt {i}" for i in range(20))))
    held_out = {p.text for p in task.eval_prompts(2)}
    assert held_out == {"prompt 9", "prompt 19"}
    stream = [p.text for p in task.train_prompts(seed=3, start=0, count=54)]
    passes = [stream[i : i + 18] for i in (0, 18, 36)]
    assert all(len(set(texts)) == 18 and not set(texts) & held_out for texts in passes)
    assert passes[0] != passes[1]
    assert stream[10:50] == [p.text for p in task.train_prompts(seed=3, start=10, count=40)]
    assert stream != [p.text for p in task.train_prompts(seed=4, start=0, count=54)]


def test_evaluation_takes_categories_in_turn_and_repeats_whole_sets(tmp_path: Path):
    rows = [
        json.dumps({"prompt": f"{kind} {i}", "category": kind}) for kind in "ab" for i in range(2 if kind == "a" else 4)
    ]
    task = PromptFileTask(train=write(tmp_path / "t.txt", "x"), evaluation=write(tmp_path / "e.jsonl", *rows))
    assert [p.text for p in task.eval_prompts(5)] == ["a 0", "b 0", "a 1", "b 1", "b 2"]
    assert [p.text for p in task.eval_prompts(12)] == [p.text for p in task.eval_prompts(6)] * 2
    with pytest.raises(ValueError, match="6 held-out prompts"):
        task.eval_prompts(7)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "a.jsonl",
            ['{"prompt": "cow"}', '{"prompt": "cow", "n": 1}'],
            "line 2: 'cow' is already on line 1, with other",
        ),
        ("a.jsonl", ['{"prompt": "\\u200b "}'], r'line 1: expected an object with a text under "prompt"'),
        ("a.jsonl", ['{"prompt": "cow", "core": ["\\ud83d"]}'], r"line 1: '\\ud83d' holds half of a character"),
        ("a.jsonl", ['{"\\udc00": 1, "prompt": "cow"}'], r"line 1: .* holds half of a character"),
        ("a.jsonl", ["[" * 100_000], "line 1: not JSON that can be used"),
        ("a.txt", ["", "  "], "holds no prompt"),
        ("a.jsonl", ['{"prompt": "cow"}', "{oops"], r"line 2: not JSON"),
        ("a.jsonl", ['{"text": "cow"}'], r'line 1: expected an object with a text under "prompt"'),
        ("a.jsonl", ['{"prompt": "cow", "core": "cow"}'], '"core" must be a list'),
        ("a.csv", ["cow"], "expected .txt"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(tmp_path: Path, name, lines, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(Path(write(tmp_path / name, *lines)))


def test_a_prompt_in_both_files_is_refused(tmp_path: Path):
    task = PromptFileTask(train=write(tmp_path / "a.txt", "x", "y"), evaluation=write(tmp_path / "b.txt", "y"))
    with pytest.raises(ValueError, match=r"'y'\. Held-out prompts must not be trained on"):
        task.train_prompts(seed=0, start=0, count=1)


def test_a_file_too_small_to_hold_out_from_or_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match="too few to hold out"):
        PromptFileTask(train=write(tmp_path / "a.txt", "x")).eval_prompts(1)
    with pytest.raises(FileNotFoundError, match="no such prompt file"):
        PromptFileTask(train=str(tmp_path / "gone.txt")).eval_prompts(1)
    with pytest.raises(ValueError, match=r"expected \.txt"):
        PromptFileTask(train="prompts.csv")


def test_a_changed_file_is_read_again(tmp_path: Path):
    path = tmp_path / "a.txt"
    task = PromptFileTask(train=write(path, *(f"prompt {i}" for i in range(10))))
    assert [p.text for p in task.eval_prompts(1)] == ["prompt 9"]
    write(path, *(f"other {i}" for i in range(12)))
    assert [p.text for p in task.eval_prompts(1)] == ["other 9"]


def test_a_repeated_prompt_is_trained_on_as_often_and_held_out_as_a_whole(tmp_path: Path):
    """GenEval's published metadata repeat prompts: how often is the mix of categories."""
    rows = [json.dumps({"prompt": f"prompt {i}", "tag": "colors"}) for i in range(10)]
    task = PromptFileTask(train=write(tmp_path / "a.jsonl", *rows, *rows, rows[0]))
    assert [p.text for p in task.eval_prompts(1)] == ["prompt 9"]
    counts = [p.text for p in task.train_prompts(seed=0, start=0, count=19)]
    assert (counts.count("prompt 0"), counts.count("prompt 1"), counts.count("prompt 9")) == (3, 2, 0)
    evaluated = PromptFileTask(train=task.train, evaluation=write(tmp_path / "b.txt", "x", "y", "x"))
    assert [p.text for p in evaluated.eval_prompts(2)] == ["x", "y"]


def test_only_line_feeds_end_a_line(tmp_path: Path):
    lines = ["a\u2028b", "c\u2029d", "e\x85f", "g\x0bh", "i\x0cj", "k\x1cl", "m\rn"]
    for end in ("\n", "\r\n"):
        (tmp_path / "a.txt").write_bytes(end.join(lines).encode())
        assert [p.text for p in read_prompts(tmp_path / "a.txt")] == lines
        rows = [json.dumps({"prompt": line}, ensure_ascii=False) for line in lines]
        (tmp_path / "a.jsonl").write_bytes(end.join(rows).encode())
        assert [p.text for p in read_prompts(tmp_path / "a.jsonl")] == lines


def test_no_prompt_leaks_into_the_held_out_ones_in_another_spelling(tmp_path: Path):
    train = write(tmp_path / "a.txt", "a caf\u00e9", "a dog", "a cow\u2019s bell")
    for other in ("\ufeffa caf\u00e9", "a cafe\u0301", "A\u00a0caf\u00e9", "a  caf\u00e9\u200b", "a cow's bell"):
        task = PromptFileTask(train=train, evaluation=write(tmp_path / "b.txt", "x", other))
        with pytest.raises(ValueError, match="1 prompts are in"):
            task.train_prompts(seed=0, start=0, count=1)


def test_home_folders_and_capital_suffixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "A.TXT", "x")
    write(tmp_path / "B.JsonL", '{"prompt": "y"}')
    task = PromptFileTask(train="~/A.TXT", evaluation="~/B.JsonL")
    assert [p.text for p in task.train_prompts(seed=0, start=0, count=1)] == ["x"]
    assert [p.text for p in task.eval_prompts(1)] == ["y"]


def test_keys_that_would_silently_not_be_checked_are_refused(tmp_path: Path):
    task = PromptFileTask(train=write(tmp_path / "a.jsonl", *(json.dumps({"prompt": f"{i}"}) for i in range(10))))
    for keys in ("text", ["text"], {1}):
        bad = type("Mine", (QuadrantBrightness,), {"metadata_keys": keys})()
        with pytest.raises(ValueError, match=r"Mine\.metadata_keys=.*expected a set of names"):
            check_metadata(task, bad)
    with pytest.raises(ValueError, match=r"Old\.requires: it is called metadata_keys now"):
        check_metadata(task, type("Old", (QuadrantBrightness,), {"requires": frozenset({"text"})})())
    with pytest.raises(ValueError, match=r"Function\(metadata_keys='text'\): expected a list of names"):
        Function(function="tests.tasks.test_promptfile:write", metadata_keys="text")  # type: ignore[arg-type]


def test_half_a_character_reaches_no_run_from_any_task():
    for fields in (
        {"text": "a \ud83d"},
        {"text": "a", "core": ("\udc00",)},
        {"text": "a", "metadata": {"k": ["\ud83d"]}},
    ):
        with pytest.raises(ValueError, match=r"prompt: .* holds half of a character"):
            TaskPrompt(**fields)  # type: ignore[arg-type]
