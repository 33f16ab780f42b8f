"""Soft-TIFA against a local server whose probabilities are known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rlt2i.config import build, to_mapping
from rlt2i.interfaces import Reward, RewardBatch
from rlt2i.recipes.parts import PARTS
from rlt2i.rewards.geneval2 import GenEval2Reward, geneval2_questions, rivals, spellings
from rlt2i.rewards.judge import Endpoint
from rlt2i.rewards.selftest import case_for, judge_case
from rlt2i.rewards.validity import score_safely
from rlt2i.tasks.base import check_metadata
from rlt2i.tasks.geneval.task import GenEvalTask
from tests.helpers.fake_judge import FakeJudge, said, weighed

pytest.importorskip("httpx")

COWS = [["Are there any cows in the image?", "Yes"], ["How many cows are in the image?", "three"]]
CHANCES = {"Are there any cows": {"Yes": 0.9, "No": 0.1}, "How many cows": {"three": 0.1, " 3": 0.3, "four": 0.5}}


@pytest.fixture
def judge() -> Iterator[FakeJudge]:
    fake = FakeJudge()
    fake.answer = lambda request: (200, weighed(**chances_of(asked_of(request))))
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def asked_of(request: dict[str, Any]) -> str:
    return request["messages"][0]["content"][1]["text"]


def chances_of(question: str) -> dict[str, float]:
    return next(chances for start, chances in CHANCES.items() if question.startswith(start))


def batch_of(*metadata: dict[str, Any]) -> RewardBatch:
    images = torch.full((len(metadata), 3, 8, 8), 128, dtype=torch.uint8)
    return RewardBatch(images=images, prompts=["cows"] * len(metadata), metadata=list(metadata))


def test_the_two_means_by_hand(judge: FakeJudge):
    # Yes has 0.9; three is said as "three" or as "3": 0.1 + 0.3 = 0.4.
    reward = GenEval2Reward(endpoint=judge.endpoint())
    output = score_safely(reward, batch_of({"vqa_list": COWS, "skills": ["object", "count"]}))
    assert output.valid.all(), output.info
    assert output.scores.tolist() == pytest.approx([math.sqrt(0.9 * 0.4)])  # 0.6
    assert output.components["arithmetic"].tolist() == pytest.approx([0.65])
    assert output.components["object"].tolist() == pytest.approx([0.9])
    assert output.components["count"].tolist() == pytest.approx([0.4])
    gentle = GenEval2Reward(endpoint=judge.endpoint(), mean="arithmetic")
    assert score_safely(gentle, batch_of({"vqa_list": COWS})).scores.tolist() == pytest.approx([0.65])
    assert {asked_of(request) for request in judge.requests} == {f"{q} Answer in one word." for q, _ in COWS}
    assert (judge.requests[0]["max_tokens"], judge.requests[0]["temperature"]) == (1, 0)


def test_a_right_answer_that_is_not_considered_is_zero(judge: FakeJudge):
    question = [["How many cows are in the image?", "seven"]]
    output = score_safely(GenEval2Reward(endpoint=judge.endpoint()), batch_of({"vqa_list": COWS[:1] + question}))
    assert output.valid.all()
    assert output.scores.tolist() == [0.0]
    assert output.components["arithmetic"].tolist() == pytest.approx([0.45])


def test_images_keep_their_own_questions(judge: FakeJudge):
    rows = [{"vqa_list": COWS[:1]}, {"vqa_list": COWS[1:]}, {"vqa_list": COWS}]
    output = score_safely(GenEval2Reward(endpoint=judge.endpoint(concurrency=3)), batch_of(*rows))
    assert output.scores.tolist() == pytest.approx([0.9, 0.4, 0.6])


@pytest.mark.parametrize(
    "answer", [weighed(The=0.9, A=0.1), weighed(Yes=0.004, The=0.9), said("Yes"), {"choices": []}, []]
)
def test_one_question_that_is_not_answered_makes_the_image_invalid(judge: FakeJudge, answer: Any):
    fine = judge.answer
    judge.answer = lambda request: (200, answer) if asked_of(request).startswith("Are there") else fine(request)
    output = score_safely(
        GenEval2Reward(endpoint=judge.endpoint()), batch_of({"vqa_list": COWS}, {"vqa_list": COWS[1:]})
    )
    assert output.valid.tolist() == [False, True]
    assert output.scores.isnan().tolist() == [True, False]
    assert output.info[0]["error"].startswith("1 of 2 questions: ")


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (None, "vqa_list is None"),
        ([], r"vqa_list is \[\]"),
        ("Are there cows?", "vqa_list is 'Are"),
        ([["only a question"]], "expected \\[question, answer\\]"),
        ([["How many?", 3]], "expected \\[question, answer\\]"),
        ([["What is it?", "a red cow"]], "no single word"),
        ([["What is it?", ""]], "expected \\[question, answer\\]"),
    ],
)
def test_questions_that_cannot_be_asked_are_invalid_and_cost_nothing(judge: FakeJudge, questions: Any, message: str):
    output = score_safely(GenEval2Reward(endpoint=judge.endpoint()), batch_of({"vqa_list": questions}))
    assert not output.valid.any()
    assert not judge.requests
    with pytest.raises(ValueError, match=message):
        geneval2_questions({"vqa_list": questions})


def test_spellings_and_rivals():
    assert spellings("Four") == spellings(" 4 ") == {"four", "4"}
    assert spellings("Yes.") == {"yes"}
    assert spellings("fourteen") == {"fourteen"}
    assert rivals("Yes") == rivals("no") == {"yes", "no"}
    assert {"one", "1", "ten", "10"} <= rivals("four")
    assert rivals("blue") is None


def test_it_is_a_part_and_has_a_case_of_its_own(judge: FakeJudge):
    mapping = {"type": "GenEval2Reward", "mean": "arithmetic", "endpoint": {"model": "m", "url": judge.endpoint().url}}
    reward = build(Reward, mapping, parts=PARTS)
    assert build(Reward, to_mapping(reward, parts=PARTS), parts=PARTS) == reward
    reds: dict[str, float] = {}

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        # A judge that sees colour: the three pictures of the case are told apart by their bytes.
        picture = request["messages"][0]["content"][0]["image_url"]["url"]
        if picture not in reds:
            reds[picture] = (0.9, 0.3, 0.2)[len(reds)]
        right = reds[picture]
        word = "one" if "How many" in asked_of(request) else "Yes"
        return 200, weighed(**{word: right, ("two" if word == "one" else "No"): 1 - right})

    judge.answer = answer
    endpoint = judge.endpoint(concurrency=1)
    verdict = judge_case(GenEval2Reward(endpoint=endpoint), case_for(GenEval2Reward(endpoint=endpoint)))
    assert verdict.problems == ()
    assert verdict.scores == pytest.approx((0.9, 0.3, 0.2))


# -------------------------------------------------------------------------------------------------------------- task


def test_geneval_prompts_with_questions():
    task = GenEvalTask(questions=True)
    check_metadata(task, GenEval2Reward(endpoint=Endpoint(model="m")))
    with pytest.raises(ValueError, match="vqa_list"):
        check_metadata(GenEvalTask(), GenEval2Reward(endpoint=Endpoint(model="m")))
    prompts = task.eval_prompts(553)
    plain = GenEvalTask().eval_prompts(553)
    assert [p.text for p in prompts] == [p.text for p in plain]
    assert not any("vqa_list" in p.metadata for p in plain)
    for prompt in prompts:
        pairs = geneval2_questions(prompt.metadata)
        assert len(prompt.metadata["skills"]) == len(pairs) >= 2


def test_the_questions_of_a_prompt_by_hand():
    from rlt2i.tasks.geneval.prompts import colours, counting, position
    from rlt2i.tasks.geneval.questions import with_questions

    assert with_questions(counting("bus", 3).metadata)["vqa_list"] == [
        ["Are there any buses in the image?", "Yes"],
        ["How many buses are in the image?", "three"],
    ]
    assert with_questions(colours("scissors", "red").metadata)["vqa_list"][-1] == ["Are the scissors red?", "Yes"]
    asked = with_questions(position("knife", "left of", "computer mouse").metadata)
    assert asked["vqa_list"] == [
        ["Are there any computer mice in the image?", "Yes"],
        ["How many computer mice are in the image?", "one"],
        ["Are there any knives in the image?", "Yes"],
        ["How many knives are in the image?", "one"],
        ["Is the knife left of the computer mouse?", "Yes"],
    ]
    assert asked["skills"] == ["object", "count", "object", "count", "position"]
