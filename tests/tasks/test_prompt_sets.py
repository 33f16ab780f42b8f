"""Fetching by address and hash, without a network: files stand in for the servers."""

from __future__ import annotations

import hashlib
import http.client
from pathlib import Path

import pytest

from rlt2i.tasks import pickscore, prompt_sets
from rlt2i.tasks.ocr.published import fetch_published
from rlt2i.tasks.pickscore import PickScoreTask
from rlt2i.tasks.prompt_sets import PROMPT_SETS, PromptSet, fetch, parse_prompts


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RLT2I_PROMPTS", str(tmp_path / "home"))
    monkeypatch.setenv("RLT2I_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


def publish(path: Path, content: str) -> tuple[str, str]:
    path.write_bytes(content.encode())
    return path.as_uri(), hashlib.sha256(content.encode()).hexdigest()


def test_a_file_is_fetched_once_and_verified_every_time(tmp_path: Path, home: Path):
    url, digest = publish(tmp_path / "a.txt", "cow\ndog\n")
    kept = fetch(url, digest)
    assert kept.read_text() == "cow\ndog\n"
    (tmp_path / "a.txt").unlink()
    assert fetch(url, digest) == kept  # no second download
    publish(tmp_path / "a.txt", "cow\ndog\n")
    kept.write_text("tampered")
    assert fetch(url, digest).read_text() == "cow\ndog\n"


def test_wrong_content_is_refused_and_not_kept(tmp_path: Path, home: Path):
    url, _ = publish(tmp_path / "a.txt", "cow\n")
    with pytest.raises(ValueError, match=r"expected 0{64}.*not used"):
        fetch(url, "0" * 64)
    assert not home.exists()


@pytest.mark.parametrize(
    ("url", "digest", "message"),
    [
        ("http://example.org/a.txt", "0" * 64, "only https"),
        ("https://example.org/a.txt", "abc", "64 lower-case"),
        ("https://example.org/a.txt", "X" * 64, "64 lower-case"),
    ],
)
def test_unsafe_requests_are_refused_before_any_connection(url, digest, message):
    with pytest.raises(ValueError, match=message):
        fetch(url, digest)


def test_a_flood_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompt_sets, "LARGEST", 4)
    url, digest = publish(tmp_path / "a.txt", "12345")
    with pytest.raises(ValueError, match="more than"):
        fetch(url, digest)


def test_repeated_lines_count_once_and_tables_keep_their_categories(tmp_path: Path):
    (tmp_path / "a.txt").write_text("cow\ncow\n\ndog \n", encoding="utf-8")
    assert [p.text for p in parse_prompts(tmp_path / "a.txt")] == ["cow", "dog"]
    table = 'Prompt\tCategory\tChallenge\tNote\na "cow\tAnimals\tBasic\t\n'
    (tmp_path / "a.tsv").write_text(table, encoding="utf-8")
    (prompt,) = parse_prompts(tmp_path / "a.tsv")
    assert (prompt.text, prompt.category) == ('a "cow', "Animals")


def test_the_published_sets_are_pinned_to_a_commit_and_a_hash():
    for name, published in PROMPT_SETS.items():
        assert published.url.startswith("https://"), name
        assert len(published.sha256) == 64, name
        assert any(len(part) == 40 for part in published.url.split("/")), f"{name}: no commit in the address"
        assert published.licence, name


def test_pickscore_never_trains_on_a_held_out_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sets = {}
    for name, content in (("train", "a\nb\nc\nd\n"), ("test", "d\ne\n")):
        url, digest = publish(tmp_path / f"{name}.txt", content)
        sets[f"pickscore_sfw_{name}"] = PromptSet(url=url, sha256=digest, count=4, licence="MIT")
    monkeypatch.setattr(pickscore, "PROMPT_SETS", sets)
    pickscore._split.cache_clear()
    task = PickScoreTask()
    assert sorted(p.text for p in task.train_prompts(seed=0, start=0, count=3)) == ["a", "b", "c"]
    assert [p.text for p in task.eval_prompts(2)] == ["d", "e"]
    pickscore._split.cache_clear()


def test_without_a_network_there_is_a_way_out(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    gone = PromptSet(url=(tmp_path / "gone.txt").as_uri(), sha256="0" * 64, count=4, licence="MIT")
    monkeypatch.setattr(pickscore, "PROMPT_SETS", dict.fromkeys(("pickscore_sfw_train", "pickscore_sfw_test"), gone))
    pickscore._split.cache_clear()
    with pytest.raises(
        ValueError, match=r"cannot fetch .*Without a network, put the file at .*0-gone\.txt, or use"
    ) as it:
        PickScoreTask().eval_prompts(1)
    assert str(home) in str(it.value)


@pytest.mark.parametrize(
    "failure", [TimeoutError("timed out"), http.client.IncompleteRead(b"co"), OSError(101, "down")]
)
def test_every_failure_of_a_download_is_said_in_one_line(failure: Exception, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> object:
        raise failure

    monkeypatch.setattr("urllib.request.urlopen", broken)
    for ask in (lambda: fetch("https://example.org/a.txt", "0" * 64), lambda: fetch_published("flow-grpo/ocr/test")):
        with pytest.raises(ValueError, match=r"cannot fetch https://.*put the file at"):
            ask()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, home: Path):
    url, digest = publish(tmp_path / "a.txt", "cow\n")
    home.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cannot keep a fetched file there .*RLT2I_PROMPTS"):
        fetch(url, digest)


@pytest.mark.hub
@pytest.mark.parametrize("name", PROMPT_SETS)
def test_the_published_files_are_what_we_say(name: str):
    assert len(PROMPT_SETS[name].prompts()) == PROMPT_SETS[name].count
