"""The pipeline of the cells world: what is shipped, and the script that trained it."""

from __future__ import annotations

import json

import attrs
import pytest
import torch

from rlt2i.tasks.cells.networks import PIPELINE_DIR, WORLD
from rlt2i.tasks.cells.pretrain import KINDS, SCHEDULE, evaluate, pretrain
from rlt2i.tasks.cells.prompts import all_prompts
from rlt2i.tasks.embedded import pretraining
from rlt2i.tasks.embedded.networks import build_tokenizer, load_pipeline
from rlt2i.tasks.shapes.networks import PIPELINE_DIR as SHAPES_PIPELINE_DIR
from tests.helpers.weight_files import weights

TINY = {
    "schedule": attrs.evolve(SCHEDULE, steps=2, batch_size=4, eval_every=1),
    "seed": 3,
    "pool_size": 8,
    "pool_steps": 1,
    "images": 1,
    "compile_blocks": False,
}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(PIPELINE_DIR)


@pytest.mark.parametrize(("grid", "named"), KINDS)
def test_every_word_is_one_token_and_the_longest_prompt_fits(grid: int, named: int):
    tokenizer = build_tokenizer(WORLD)
    for prompt in all_prompts(grid, named)[::17]:
        assert len(tokenizer(prompt.text).input_ids) == len(prompt.text.split()) + 2 <= WORLD.max_tokens


def test_both_shipped_pipelines_are_small_and_hold_no_pickle():
    files = [f for folder in (PIPELINE_DIR, SHAPES_PIPELINE_DIR) for f in folder.rglob("*") if f.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12 * 2**20
    assert {file.suffix for file in files} <= {".json", ".jsonl", ".safetensors"}


def test_shipped_base_leaves_reinforcement_learning_something_to_do(pipeline):
    # .54 and .29 on 480 images; 16 images of each kind have a standard error of .12.
    scores = evaluate(pipeline, images=16)
    assert 0.25 <= scores.strict <= 0.85
    assert scores.strict_by_kind["3 x 3, one named"] > 0


def test_its_autoencoder_is_that_of_the_shapes_world(pipeline):
    ours, theirs = pipeline.vae.state_dict(), load_pipeline(SHAPES_PIPELINE_DIR).vae.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_log_says_what_was_shipped():
    records = [json.loads(line) for line in (PIPELINE_DIR / "pretrain_log.jsonl").read_text().splitlines()]
    assert records[-1]["phase"] == "shipped"
    assert 0.35 <= records[-1]["strict"] <= 0.60


@pytest.mark.slow  # the loop is that of the shapes world, whose test of it is always run
def test_pretraining_is_reproducible_and_resumable(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain(whole, **TINY)
    original, calls = pretraining.flow_matching_loss, []

    def power_cut(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(pretraining, "flow_matching_loss", power_cut)
    with pytest.raises(KeyboardInterrupt):
        pretrain(broken, **TINY)
    monkeypatch.setattr(pretraining, "flow_matching_loss", original)
    resumed = pretrain(broken, **TINY)
    assert weights(broken) == weights(whole)
    assert not (broken / "state").exists()
    records = [json.loads(line) for line in (broken / "pretrain_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["phase"] == "evaluation"] == [1, 2]
    assert records[-1]["strict"] == pytest.approx(resumed.strict, abs=1e-4)
