"""OCR for real: RapidOCR's own models on pictures that are drawn here."""

from __future__ import annotations

import pytest
import torch

from rlt2i.interfaces import RewardBatch
from rlt2i.rewards.ocr import OCRReward
from rlt2i.rewards.ocr_engine import Engines
from rlt2i.rewards.validity import score_safely
from rlt2i.tasks.ocr.task import OCRTask
from tests.helpers.rendering import fonts, outline, written

pytest.importorskip("rapidocr")
pytest.importorskip("onnxruntime")

AILERON = outline(None)


def batch_of(texts: list[str], images: list[torch.Tensor], **fields) -> RewardBatch:
    fields = {"metadata": [{"text": text} for text in texts]} | fields
    return RewardBatch(images=torch.stack(images), prompts=[f'a sign that says "{t}"' for t in texts], **fields)


@pytest.mark.slow
def test_rendered_texts_are_read():
    """64 pictures, 5 to 9 fonts, 30 to 64 pixels, three backgrounds, rotations up to 12 degrees."""
    faces = fonts()
    texts = [prompt.metadata["text"] for prompt in OCRTask().eval_prompts(64)]
    images = [
        written(
            text,
            faces[i % len(faces)],
            size=(64, 48, 36, 30)[i % 4],
            angle=(0.0, 8.0, -12.0, 0.0, 4.0)[i % 5],
            kind=("flat", "blobs", "noise")[i % 3],
            seed=i,
        )
        for i, text in enumerate(texts)
    ]
    output = OCRReward(workers=2).score(batch_of(texts, images))
    misread = [
        (text, row["read"], round(float(score), 3))
        for text, row, score in zip(texts, output.info, output.scores, strict=True)
        if score < 1
    ]
    exact = float(output.components["exact"].mean())
    print(f"mean {float(output.scores.mean()):.4f}, exact {exact:.1%}, misread {misread}")
    assert output.valid.all()
    assert float(output.scores.mean()) >= 0.99, misread
    assert exact >= 0.95, misread


@pytest.fixture(scope="module")
def reward() -> OCRReward:
    return OCRReward(workers=1)


def test_right_wrong_and_empty_pictures(reward):
    texts = ["Grand Opening", "Grand Opening", "Grand Opening"]
    images = [written("Grand Opening", AILERON), written("Closed", AILERON), torch.full((3, 512, 512), 200).byte()]
    output = reward.score(batch_of(texts, images))
    assert output.valid.all()
    assert output.scores[0] == 1.0
    assert output.scores[1] < 0.4
    assert output.scores[2] == 0.0
    assert output.components["exact"].tolist() == [1.0, 0.0, 0.0]
    assert output.components["edit"][[0, 2]].tolist() == [0.0, 12.0]
    assert output.components["lines"][[0, 2]].tolist() == [1.0, 0.0]
    assert output.components["confidence"][0] > 0.8
    assert output.components["confidence"][2].isnan()
    assert output.info[1]["read"].lower().startswith("clo")


def test_surplus_text_is_seen_by_extra_and_exact(reward):
    output = reward.score(batch_of(["Open"], [written("Open Tomorrow", AILERON)]))
    assert output.scores[0] == 1.0
    assert output.components["exact"][0] == 0.0
    assert output.components["extra"][0] == pytest.approx(8 / 12)


def test_characters_know_their_place_and_sign(reward):
    # HELLO upright on a plain ground, judged as HELLO, as JELLO, and as HELL.
    image = written("HELLO", AILERON, size=64)
    want = frozenset({"maps", "regions"})
    output = reward.score(batch_of(["HELLO", "JELLO", "HELL"], [image] * 3), want)
    assert [[region.label for region in row] for row in output.regions] == [list("HELLO")] * 3
    credits = [[region.credit for region in row] for row in output.regions]
    assert credits[0] == [1.0] * 5
    assert credits[1] == [-1.0, 1.0, 1.0, 1.0, 1.0]
    assert credits[2] == [1.0, 1.0, 1.0, 1.0, 0.0]
    boxes = [region.box for region in output.regions[0]]
    assert boxes == sorted(boxes)
    ink = (image.float().mean(0) < 110).nonzero().float() / 512
    assert boxes[0][0] == pytest.approx(float(ink[:, 1].min()), abs=0.03)
    assert boxes[-1][2] == pytest.approx(float(ink[:, 1].max()), abs=0.03)
    assert output.maps.shape == (3, 64, 64)
    assert float(output.maps.min()) == 0.0
    assert float(output.maps.max()) == pytest.approx(1.0)
    assert output.maps[0].sum() > output.maps[2].sum() > 0


def test_rotated_characters_keep_their_order(reward):
    image = written("Garden 42", AILERON, size=56, angle=10.0)
    output = reward.score(batch_of(["Garden 42"], [image]), frozenset({"regions"}))
    assert "".join(region.label for region in output.regions[0]) == "Garden42"
    centres = [(region.box[0] + region.box[2]) / 2 for region in output.regions[0]]
    assert centres == sorted(centres)


def test_wanting_places_changes_no_score_and_leaves_no_trace(reward):
    batch = batch_of(["Window"], [written("Window", AILERON)])
    before, with_places, after = reward.score(batch), reward.score(batch, frozenset({"maps"})), reward.score(batch)
    assert before.scores.tolist() == with_places.scores.tolist() == after.scores.tolist()
    assert after.maps is None
    assert after.regions is None


def test_two_workers_read_what_one_reads(reward):
    texts = ["Anchor", "Silver Comet", "Room 17", "Velvet"]
    batch = batch_of(texts, [written(text, AILERON, seed=i) for i, text in enumerate(texts)])
    one, two = reward.score(batch), OCRReward(workers=2).score(batch)
    assert one.scores.tolist() == two.scores.tolist()
    assert [row["read"] for row in one.info] == [row["read"] for row in two.info]


def test_the_target_comes_from_metadata_else_from_quotes(reward):
    image = written("OPEN", AILERON, size=64)
    batch = RewardBatch(
        images=torch.stack([image] * 7),
        prompts=[
            'a sign "OPEN"',
            'a sign "CLOSED"',
            'a "OPEN"',
            r"a \"OPEN\"",
            'an 18" "OPEN"',
            "a sign",
            'a sign "  "',
        ],
        metadata=[{}, {"text": "open"}, {"text": ""}, {"text": " \u200b"}, {}, {}, {"text": "\u00a0"}],
    )
    output = score_safely(reward, batch)
    assert output.valid.tolist() == [True] * 5 + [False] * 2
    assert output.scores[:5].tolist() == [1.0] * 5
    assert output.scores[5:].isnan().all()
    assert "double quotes" in output.info[5]["error"]


def test_a_perfect_picture_of_a_typographic_target(reward):
    targets = ["Joe\u2019s Bar", "GRAND\u00a0OPENING", "O\u200bPEN", "\uff23\uff21\uff26\uff25"]
    images = [written(text, AILERON, size=64) for text in ("Joe's Bar", "GRAND OPENING", "OPEN", "CAFE")]
    assert reward.score(batch_of(targets, images)).scores.tolist() == [1.0] * 4
    published = OCRReward(workers=1, rule="published").score(batch_of(targets, images)).scores
    assert (published < 1).all()


def test_an_engine_that_fails_is_no_unreadable_picture(monkeypatch):
    def fail(self, image, *, characters):
        raise RuntimeError("ONNX session lost")

    monkeypatch.setattr(Engines, "read", fail)
    output = score_safely(OCRReward(workers=1), batch_of(["OPEN"], [torch.zeros(3, 64, 64).byte()]))
    assert not output.valid.any()
    assert "ONNX session lost" in output.info[0]["error"]


def test_small_and_odd_sizes(reward):
    for height, width in ((32, 32), (40, 100), (200, 90)):
        image = torch.full((3, height, width), 128).byte()
        output = reward.score(batch_of(["A"], [image]), frozenset({"maps", "regions"}))
        assert output.valid.all()
        assert output.maps.shape == (1, -(-height // 8), -(-width // 8))


def test_the_fingerprint_names_the_models(reward):
    found = reward.fingerprint()
    assert found["settings"] == {"match": "full", "rule": "normalised"}
    assert len(found["models"]) == 2
    assert all(len(digest) == 64 for digest in found["models"].values())
