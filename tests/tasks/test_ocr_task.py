from __future__ import annotations

import hashlib

import pytest

from rlt2i.config import build, to_mapping
from rlt2i.recipes.parts import PARTS
from rlt2i.rewards.ocr import OCRReward
from rlt2i.rewards.text import quoted_text
from rlt2i.tasks.base import Task, check_metadata
from rlt2i.tasks.ocr import published
from rlt2i.tasks.ocr.prompts import CATEGORIES, is_held_out, read_prompts
from rlt2i.tasks.ocr.published import PUBLISHED, PublishedFile, digest_of, fetch_published
from rlt2i.tasks.ocr.task import OCRFileTask, OCRTask
from rlt2i.tasks.ocr.vocabulary import ADJECTIVES, FIXED, NOUNS, SCENES, VERBS


def test_every_prompt_quotes_its_text_and_only_that():
    task = OCRTask()
    for prompt in task.train_prompts(seed=0, start=0, count=400) + task.eval_prompts(200):
        assert prompt.text.count('"') == 2
        assert quoted_text(prompt.text) == prompt.metadata["text"]
        assert prompt.core == (prompt.metadata["text"],)
        assert prompt.metadata["text"].isascii()
        assert "{" not in prompt.text


def test_training_and_evaluation_share_no_text():
    trained = {p.metadata["text"].lower() for p in OCRTask().train_prompts(seed=3, start=0, count=2000)}
    held_out = {p.metadata["text"].lower() for p in OCRTask().eval_prompts(400)}
    assert not trained & held_out
    assert not any(is_held_out(text) for text in trained)
    assert len(trained) > 1000


def test_prompts_depend_on_seed_and_position_alone():
    task = OCRTask()
    whole = task.train_prompts(seed=1, start=0, count=40)
    assert task.train_prompts(seed=1, start=17, count=9) == whole[17:26]
    assert task.train_prompts(seed=2, start=0, count=40) != whole
    assert task.eval_prompts(40) == task.eval_prompts(80)[:40]


def test_evaluation_is_balanced_and_without_repeats():
    prompts = OCRTask().eval_prompts(1000)
    assert len({p.text for p in prompts}) == 1000
    assert all(sum(p.category == category for p in prompts) == 250 for category in CATEGORIES)
    with pytest.raises(ValueError, match="4096 held-out"):
        OCRTask().eval_prompts(5000)


def test_the_vocabulary_is_what_its_docstring_says():
    for words, count in ((NOUNS, 84), (ADJECTIVES, 60), (VERBS, 36), (SCENES, 72)):
        assert len(words) == len(set(words)) == count
    assert all(scene.count("{text}") == 1 and scene.count('"') == 2 for scene in SCENES)
    assert all(word.isalpha() for word in NOUNS + ADJECTIVES + VERBS)
    assert all('"' not in phrase for phrase in FIXED)


def test_the_task_fits_its_reward_and_a_recipe():
    check_metadata(OCRTask(), OCRReward())
    task = build(Task, {"type": "OCRTask"}, parts=PARTS)
    assert build(Task, to_mapping(task, parts=PARTS), parts=PARTS) == task


# -------------------------------------------------------------------------------------------------------------- files


def test_prompts_from_files(tmp_path):
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text('a sign "ONE"\n\na cup "TWO" and "X"\na sign "TEST"\n', encoding="utf-8")
    test.write_text('a sign "TEST"\na box "É"\n', encoding="utf-8")
    task = OCRFileTask(train=str(train), test=str(test))
    drawn = task.train_prompts(seed=0, start=0, count=50)
    assert {p.metadata["text"] for p in drawn} == {"ONE", "TWO"}  # TEST is held out
    assert [p.metadata["text"] for p in task.eval_prompts(2)] == ["TEST", "É"]
    with pytest.raises(ValueError, match="has 2 prompts"):
        task.eval_prompts(3)


@pytest.mark.parametrize("line", ["no quotes here", 'one " only', 'empty "" quotes', "single 'quotes'"])
def test_a_prompt_without_a_text_is_refused_when_it_is_read(line):
    with pytest.raises(ValueError, match=r"mine\.txt, line 2"):
        read_prompts(['fine "X"', line], name="mine.txt")


def test_files_of_every_editor_are_read_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "TRAIN.TXT").write_bytes(
        '\ufeffa sign "ONE"\r\na\u2028cup \u201cTWO\u201d\r\n\ufeffa box \\"3\\"'.encode()
    )
    (tmp_path / "test.txt").write_text('A  sign\u200b "ONE"\n', encoding="utf-8")
    task = OCRFileTask(train="~/TRAIN.TXT", test="~/test.txt")
    drawn = task.train_prompts(seed=0, start=0, count=50)
    assert {p.metadata["text"] for p in drawn} == {"TWO", "3"}  # ONE is held out, whatever stands around it
    assert not any("\ufeff" in p.text for p in drawn)


def test_a_changed_file_is_read_again(tmp_path):
    (tmp_path / "a.txt").write_text('a sign "ONE"\n')
    task = OCRFileTask(train="x.txt", test=str(tmp_path / "a.txt"))
    assert task.eval_prompts(1)[0].metadata["text"] == "ONE"
    (tmp_path / "a.txt").write_text('a sign "OTHER"\n')
    assert task.eval_prompts(1)[0].metadata["text"] == "OTHER"


def test_a_file_that_is_not_there_is_said_so():
    with pytest.raises(ValueError, match=r"no such file.*flow-grpo/ocr/test"):
        OCRFileTask(train="x.txt", test="nowhere.txt").eval_prompts(1)


def test_published_sets_are_checked_by_their_hash(tmp_path, monkeypatch):
    content = b'a sign "ONE"\n'
    source = tmp_path / "source.txt"
    source.write_bytes(content)
    monkeypatch.setenv("RLT2I_CACHE", str(tmp_path / "cache"))

    def publish(digest: str) -> None:
        entry = PublishedFile(url=source.as_uri(), digest=digest, size_limit=1000, licence="ours")
        monkeypatch.setattr(published, "PUBLISHED", {"ours": entry})

    publish(f"sha256:{hashlib.sha256(content).hexdigest()}")
    path = fetch_published("ours")
    assert path.read_bytes() == content
    source.unlink()
    assert fetch_published("ours") == path  # from the cache, without the source
    path.write_bytes(b"tampered")
    with pytest.raises(ValueError, match="cannot fetch"):
        fetch_published("ours")
    source.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the published file"):
        fetch_published("ours")
    with pytest.raises(ValueError, match="no published prompt set"):
        fetch_published("theirs")


def test_git_and_sha256_digests():
    # git hash-object of a file that holds "hello\n".
    assert digest_of(b"hello\n", "git") == "git:ce013625030ba8dba906f756967f9e9ca394464a"
    assert digest_of(b"", "sha256").endswith("b855")
    assert all(entry.digest.startswith(("sha256:", "git:")) for entry in PUBLISHED.values())
    assert all("/raw.githubusercontent.com/" in entry.url and "/ac4c86e8" in entry.url for entry in PUBLISHED.values())
