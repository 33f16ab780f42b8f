"""Whatever a reward does, it never looks like a bad image."""

from __future__ import annotations

import math
import re

import pytest
import torch

from rlt2i.interfaces import RewardOutput
from rlt2i.rewards.validity import score_safely
from tests.helpers.fake_rewards import Broken, Needy, batch_of, output_of, raises


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda batch: output_of([math.nan, 0.5]), "the score is nan"),
        (lambda batch: output_of([math.inf, 0.5]), "the score is inf"),
        (lambda batch: output_of([-math.inf, 0.5]), "the score is -inf"),
        (lambda batch: output_of([1.2, 0.5]), r"1.2 is outside the documented range \[0, 1\]"),
        (lambda batch: output_of([-0.1, 0.5]), "outside"),
        (lambda batch: output_of([0.1, 0.5], maps=torch.tensor([[[-1.0]], [[1.0]]])), "map is negative"),
        (lambda batch: output_of([0.1, 0.5], maps=torch.tensor([[[math.nan]], [[1.0]]])), "not finite"),
    ],
)
def test_a_bad_sample_is_invalid_and_its_neighbour_is_not(act, reason):
    output = score_safely(Broken(act=act), batch_of(1, 2))
    assert output.valid.tolist() == [False, True]
    assert math.isnan(output.scores[0])
    assert output.scores[1] == 0.5
    assert re.search(reason, output.info[0]["error"])


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda batch: output_of([0.5]), "1 scores for 2 images"),
        (lambda batch: output_of([0.5, 0.5], components={"x": torch.zeros(2)}, info=[{}]), "1 info for 2 images"),
        (lambda batch: output_of([0.5, 0.5, 0.5]), "3 scores for 2 images"),
        (lambda batch: [0.5, 0.5], "returned list"),
        (lambda batch: RewardOutput(scores=torch.zeros(2), valid=torch.ones(2)), "torch.bool"),
        (raises(RuntimeError("CUDA out of memory")), "CUDA out of memory"),
        (raises(KeyError("text")), "KeyError"),
    ],
)
def test_an_untrustworthy_output_is_invalid_as_a_whole(act, reason, caplog):
    output = score_safely(Broken(act=act), batch_of(1, 2))
    assert not output.valid.any()
    assert output.scores.isnan().all()
    assert all(reason in row["error"] for row in output.info)
    assert "Broken" in caplog.text


def test_rounding_at_the_edge_of_the_range_is_no_failure():
    assert score_safely(Broken(act=lambda batch: output_of([1.00001, -0.00001])), batch_of(1, 2)).valid.all()


def test_samples_without_their_metadata_are_invalid_and_the_others_are_scored():
    output = score_safely(Needy(), batch_of(1, 2, 3, metadata=[{"value": 1}, {}, {"value": 3}]))
    assert output.valid.tolist() == [True, False, True]
    assert output.scores[[0, 2]].tolist() == [1.0, 3.0]
    assert "missing metadata" in output.info[1]["error"]
    assert not score_safely(Needy(), batch_of(1)).valid.any()


def test_what_ends_the_process_and_missing_packages_pass_through():
    with pytest.raises(KeyboardInterrupt):
        score_safely(Broken(act=raises(KeyboardInterrupt())), batch_of(1))  # type: ignore[arg-type]
    with pytest.raises(ImportError):
        score_safely(Broken(act=raises(ImportError("rapidocr"))), batch_of(1))


def test_components_that_are_not_finite_become_nan():
    output = score_safely(
        Broken(act=lambda b: output_of([0.5], components={"x": torch.tensor([math.inf])})), batch_of(1)
    )
    assert output.valid.all()
    assert output.components["x"].isnan().all()
