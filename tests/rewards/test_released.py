"""The self-check of released weights, from the download to the verdict, on a release that is made up here."""

from __future__ import annotations

import hashlib
import itertools
import json

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlt2i.cli import main as cli
from rlt2i.recipes.parts import PARTS
from rlt2i.rewards import released, releases
from rlt2i.rewards.aesthetic import load_head
from rlt2i.rewards.selftest import main
from tests.helpers.tiny_models import save_clip, save_detector

NAME = "aesthetic_sac_logos_ava1_l14"


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A "released" checkpoint of LAION's layout behind a URL, its hash on record, and an empty weights folder."""
    sizes = [16, 8, 4, 3, 2, 1]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        state[f"layers.{2 * number}.weight"] = torch.randn(fan_out, fan_in, generator=generator)
        state[f"layers.{2 * number}.bias"] = torch.randn(fan_out, generator=generator)
    checkpoint = tmp_path / "published.pth"
    torch.save(state, checkpoint)
    entry = attrs.evolve(
        releases.RELEASES[NAME],
        url=checkpoint.as_uri(),
        sha256=hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
    )
    monkeypatch.setitem(releases.RELEASES, NAME, entry)
    monkeypatch.setenv("RLT2I_WEIGHTS", str(tmp_path / "weights"))
    load_head.cache_clear()
    return checkpoint


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip")))


def test_from_the_download_to_the_verdict(tmp_path, release, clip, capsys):
    test = lambda *more: main(["Aesthetic", "--set", f"path={clip}", "--released", *more], parts=PARTS)
    with pytest.raises(FileNotFoundError, match=f"rlt2i reward convert {NAME}"):
        test()
    assert cli(["reward", "convert", NAME]) == 0
    folder = tmp_path / "weights" / NAME
    source = json.loads((folder / "source.json").read_text())
    assert source["sha256"] == hashlib.sha256(release.read_bytes()).hexdigest()

    # Nothing is recorded: a table, and no claim.
    assert test() == 0
    out = capsys.readouterr().out
    assert "confirm nothing" in out
    assert "drawing/a blue square" in out
    assert "head/head.safetensors" in out

    record = tmp_path / "expected.json"
    assert test("--record", str(record)) == 0
    assert test("--expect", str(record)) == 0
    assert "as recorded on 20" in capsys.readouterr().out
    stored = json.loads(record.read_text())
    assert stored["tolerance"] == 0.02
    assert len(stored["scores"]) == 11
    assert {"path/model.safetensors", "head/head.safetensors", "head/source.json"} == set(stored["files"])

    # A score within the tolerance is right, one beyond it is drift.
    for change, code in ((0.015, 0), (-0.015, 0), (0.5, 1)):
        moved = {**stored, "scores": stored["scores"] | {"text/good": stored["scores"]["text/good"] + change}}
        (tmp_path / "moved.json").write_text(json.dumps(moved))
        assert test("--expect", str(tmp_path / "moved.json")) == code
    assert "WRONG: text/good scores" in capsys.readouterr().out

    # Other weights are noticed by their hash, whatever they score.
    head = load_file(folder / "head.safetensors")
    save_file({"weight": head["weight"], "bias": head["bias"] + 1e-6}, folder / "head.safetensors")
    load_head.cache_clear()
    assert test("--expect", str(record)) == 1
    out = capsys.readouterr().out
    assert "WRONG: head/head.safetensors has SHA-256" in out
    assert "scores" not in out.split("WRONG", 1)[1]


def test_a_download_with_another_hash_is_not_used(tmp_path, release, capsys):
    release.write_bytes(release.read_bytes() + b"x")
    assert cli(["reward", "convert", NAME]) == 2
    assert "not used" in capsys.readouterr().err
    assert not (tmp_path / "weights" / NAME).exists()


def test_pictures_that_are_drawn_differently_are_noticed(tmp_path, release, clip, capsys, monkeypatch):
    assert cli(["reward", "convert", NAME]) == 0
    words = ["Aesthetic", "--set", f"path={clip}", "--released"]
    record = tmp_path / "expected.json"
    assert main([*words, "--record", str(record)], parts=PARTS) == 0
    drawn = released.text_case()
    changed = attrs.evolve(drawn, good=drawn.good.roll(1, dims=2))
    monkeypatch.setattr(released, "text_case", lambda: changed)
    assert main([*words, "--expect", str(record)], parts=PARTS) == 1
    assert "WRONG: the picture text/good is not the one that was recorded" in capsys.readouterr().out


def test_a_reward_that_fails_is_wrong_and_is_not_recorded(tmp_path, release, clip, capsys):
    assert cli(["reward", "convert", NAME]) == 0
    head = tmp_path / "weights" / NAME / "head.safetensors"
    weights = load_file(head)
    save_file({**weights, "bias": torch.tensor(torch.nan)}, head)
    record = tmp_path / "expected.json"
    words = ["Aesthetic", "--set", f"path={clip}", "--released", "--record", str(record)]
    assert main(words, parts=PARTS) == 1
    assert "was not scored" in capsys.readouterr().out
    assert not record.exists()


def test_the_detector_is_checked_on_the_scene_it_is_for(tmp_path, clip, capsys):
    detector = str(save_detector(tmp_path / "detector"))
    words = ["GenEvalReward", "--set", f"detector={detector}", "--set", f"colour_model={clip}", "--released"]
    assert main([*words, "--record", str(tmp_path / "expected.json")], parts=PARTS) == 0
    stored = json.loads((tmp_path / "expected.json").read_text())
    assert set(stored["scores"]) == {"objects/good", "objects/no sign"}
    assert {"detector/model.safetensors", "colour_model/model.safetensors"} <= set(stored["files"])
    capsys.readouterr()


def test_other_settings_and_other_files_are_refused(tmp_path, release, clip, capsys):
    assert cli(["reward", "convert", NAME]) == 0
    record = tmp_path / "expected.json"
    assert main(["CLIPScore", "--set", f"path={clip}", "--released", "--record", str(record)], parts=PARTS) == 0
    with pytest.raises(ValueError, match="recorded with the settings"):
        main(
            ["CLIPScore", "--set", f"path={clip}", "--set", "scale=hessel", "--released", "--expect", str(record)],
            parts=PARTS,
        )
    record.write_text("[1]")
    with pytest.raises(ValueError, match="not an expectation file"):
        main(["CLIPScore", "--set", f"path={clip}", "--released", "--expect", str(record)], parts=PARTS)
    with pytest.raises(ValueError, match="has no released weights"):
        main(["JPEGCompressibility", "--released"], parts=PARTS)
    capsys.readouterr()
