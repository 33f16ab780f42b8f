"""Judges against a local server that speaks enough of the OpenAI protocol."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from rlt2i.config import build, to_mapping
from rlt2i.interfaces import Reward
from rlt2i.recipes.parts import PARTS
from rlt2i.rewards.judge import Endpoint, RubricJudge, YesNoJudge
from rlt2i.rewards.rubrics import RUBRICS, Rubric
from rlt2i.rewards.validity import score_safely
from tests.helpers.fake_judge import FakeJudge, said, weighed
from tests.helpers.fake_rewards import batch_of

pytest.importorskip("httpx")


@pytest.fixture
def judge() -> Iterator[FakeJudge]:
    fake = FakeJudge()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


# ------------------------------------------------------------------------------------------------------------- yes/no


def test_yes_no_by_hand(judge):
    judge.answer = lambda request: (200, weighed(**{"Yes": 0.5, " yes": 0.1, "No": 0.1, "no": 0.1, "Maybe": 0.2}))
    output = score_safely(YesNoJudge(endpoint=judge.endpoint()), batch_of(1, 2))
    # (0.5 + 0.1) / (0.6 + 0.2)
    assert output.valid.all()
    assert output.scores.tolist() == pytest.approx([0.75, 0.75])
    assert output.components["yes"].tolist() == pytest.approx([0.6, 0.6])
    assert output.components["no"].tolist() == pytest.approx([0.2, 0.2])


def test_the_request_is_deterministic_lossless_and_asks_vqascores_question(judge):
    judge.answer = lambda request: (200, weighed(Yes=0.9))
    batch = batch_of(77)
    score_safely(YesNoJudge(endpoint=judge.endpoint()), batch)
    (request,) = judge.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["model"] == "fake"
    assert (request["max_tokens"], request["temperature"], request["top_logprobs"]) == (1, 0, 20)
    image, text = request["messages"][0]["content"]
    assert text["text"] == 'Does this figure show "grey 77"? Please answer yes or no.'
    kind, _, data = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
    assert torch.equal(torch.from_numpy(pixels).permute(2, 0, 1), batch.images[0])


def test_answers_belong_to_their_own_prompts(judge):
    def answer(request):
        grey = int(request["messages"][0]["content"][1]["text"].split("grey ")[1].split('"')[0])
        time.sleep(0.01 * (20 - grey) / 20)
        return 200, weighed(Yes=grey / 20, No=1 - grey / 20)

    judge.answer = answer
    output = score_safely(YesNoJudge(endpoint=judge.endpoint(concurrency=5)), batch_of(*range(1, 20)))
    assert output.scores.tolist() == pytest.approx([grey / 20 for grey in range(1, 20)])


def test_a_prompt_with_braces_is_left_alone(judge):
    judge.answer = lambda request: (200, weighed(Yes=0.9))
    batch = batch_of(1)
    batch.prompts[0] = "a {prompt} {0} {x}"  # type: ignore[index]
    assert score_safely(YesNoJudge(endpoint=judge.endpoint()), batch).valid.all()
    assert "a {prompt} {0} {x}" in judge.requests[0]["messages"][0]["content"][1]["text"]


@pytest.mark.parametrize(
    "answer",
    [
        (200, weighed(Maybe=0.9, The=0.1)),  # neither yes nor no
        (200, weighed(Yes=0.004, Hello=0.9)),  # hardly considered
        (200, said("Yes")),  # no log-probabilities
        (200, {"choices": []}),
        (200, {"error": "overloaded"}),
        (200, []),
        (200, b"<html>not JSON</html>"),
        (200, b"\x80\x04K\x01."),
        (
            200,
            {"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": [{"token": 1}]}]}}]},
        ),
        (400, {"error": "context too long"}),
        (401, {"error": "who are you"}),
        (500, {"error": "CUDA"}),
    ],
)
def test_what_cannot_be_read_is_invalid_and_never_zero(judge, answer):
    judge.answer = lambda request: answer
    output = score_safely(YesNoJudge(endpoint=judge.endpoint()), batch_of(1))
    assert not output.valid.any()
    assert output.scores.isnan().all()
    assert "judge" in output.info[0]["error"]
    assert len(judge.requests) == 1  # none of these would be better the second time


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_judge_is_asked_again(judge, status):
    answers = [(status, {}), (200, weighed(Yes=0.9, No=0.1))]
    judge.answer = lambda request: answers.pop(0)
    output = score_safely(YesNoJudge(endpoint=judge.endpoint(patience_s=5.0)), batch_of(1))
    assert output.scores.tolist() == pytest.approx([0.9])
    assert len(judge.requests) == 2


def test_a_judge_that_stays_busy_is_given_up(judge):
    judge.answer = lambda request: (503, {})
    start = time.monotonic()
    output = score_safely(YesNoJudge(endpoint=judge.endpoint(patience_s=0.5)), batch_of(1))
    assert time.monotonic() - start < 5
    assert not output.valid.any()
    assert "gave up" in output.info[0]["error"]


def test_a_slow_judge_and_a_dead_one_are_invalid_in_time(judge):
    judge.answer = lambda request: (time.sleep(2), (200, weighed(Yes=0.9)))[1]
    start = time.monotonic()
    slow = score_safely(YesNoJudge(endpoint=judge.endpoint(timeout_s=0.3)), batch_of(1))
    dead = score_safely(YesNoJudge(endpoint=judge.endpoint(url="http://127.0.0.1:9/v1")), batch_of(1))
    assert time.monotonic() - start < 6
    assert not slow.valid.any()
    assert "0.3 s" in slow.info[0]["error"]
    assert not dead.valid.any()


def test_the_key_comes_from_the_environment_and_stays_out_of_the_recipe(judge, monkeypatch):
    reward = YesNoJudge(endpoint=judge.endpoint(key_variable="JUDGE_KEY"))
    judge.answer = lambda request: (200, weighed(Yes=0.9))
    with pytest.raises(ValueError, match="JUDGE_KEY is not set"):
        reward.score(batch_of(1))
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    assert reward.score(batch_of(1)).valid.all()
    assert judge.headers[-1]["authorization"] == "Bearer s3cret"
    assert "s3cret" not in json.dumps(to_mapping(reward)) + json.dumps(reward.fingerprint())


# ------------------------------------------------------------------------------------------------------------ rubrics


@pytest.mark.parametrize(
    ("rubric", "text", "score"),
    [
        ("unified-reward", "The image is fine.\nFinal Score: 4.2", 4.2),
        ("unified-reward", "**Final Score:** 3", 3.0),
        ("unified-reward", "final score : [5]", 5.0),
        ("unified-reward", "I first thought Final Score: 2, but no. Final Score: 4", 4.0),
        ("unified-reward-2", "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 3", 3.5),
        ("unified-reward-2", "**Alignment Score (1-5)**: 4\nCoherence Score: 4\n- Style Score (1 - 5): 1", 3.0),
        ("alignment", "All there.\nScore: 5", 5.0),
    ],
)
def test_marks_are_read(judge, rubric, text, score):
    judge.answer = lambda request: (200, said(text))
    output = score_safely(RubricJudge(endpoint=judge.endpoint(), rubric=rubric), batch_of(1))
    assert output.valid.all(), output.info
    assert output.scores.tolist() == pytest.approx([score])
    assert set(output.components) == set(RUBRICS[rubric].marks)
    assert "grey 1" in judge.requests[0]["messages"][0]["content"][1]["text"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        "I cannot rate this image.",
        "Final Score: N/A",
        "Final Score: 0",
        "Final Score: 7",
        "Final Score: -3",
        "Final Score: 45",
        "The image is so good that",
    ],
)
def test_marks_that_are_missing_or_out_of_range_are_invalid(judge, text):
    judge.answer = lambda request: (200, said(text))
    output = score_safely(RubricJudge(endpoint=judge.endpoint(), rubric="unified-reward"), batch_of(1))
    assert not output.valid.any()
    assert output.scores.isnan().all()
    assert output.info[0]["said"] == (text or "")


def test_one_missing_mark_of_three_is_invalid(judge):
    judge.answer = lambda request: (200, said("Alignment Score (1-5): 4\nStyle Score (1-5): 3"))
    assert not score_safely(RubricJudge(endpoint=judge.endpoint()), batch_of(1)).valid.any()


def test_a_rubric_of_your_own_in_a_recipe(judge):
    mapping = {
        "type": "RubricJudge",
        "endpoint": {"model": "fake", "url": judge.endpoint().url},
        "rubric": {
            "instructions": "Is {prompt} cute? Say 'Cuteness = N'.",
            "marks": {"cute": r"cuteness = (\d+)"},
            "low": 0,
            "high": 10,
        },
    }
    reward = build(Reward, mapping, parts=PARTS)
    assert reward.span == (0.0, 10.0)
    assert build(Reward, to_mapping(reward, parts=PARTS), parts=PARTS) == reward
    judge.answer = lambda request: (200, said("Cuteness = 9"))
    assert score_safely(reward, batch_of(1)).scores.tolist() == [9.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instructions": "no place for it", "marks": {"a": "(.)"}}, "match"),
        ({"instructions": "{prompt}", "marks": {}}, "without marks"),
        ({"instructions": "{prompt}", "marks": {"a": "("}}, "no regular expression"),
        ({"instructions": "{prompt}", "marks": {"a": "x"}}, "0 groups"),
    ],
)
def test_rubrics_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Rubric(**fields)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="unified-reward-2"):
        RubricJudge(endpoint=Endpoint(model="m"), rubric="nonsense")  # type: ignore[arg-type]
