"""`rlt2i check RECIPE`: what it finds before a long run does."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from rlt2i.cli import main
from rlt2i.conformance.recipe import RECIPE_LAWS, check_recipe
from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.rewards.jpeg import JPEGCompressibility
from tests.helpers import toy_recipe
from tests.helpers.toy import QuadrantBrightness


def mistakes(recipe: Any, **options: Any) -> dict[str, str]:
    return {finding.law: finding.mistake for finding in check_recipe(recipe, **options) if finding.mistake}


@attrs.frozen(kw_only=True)
class Constant(QuadrantBrightness):
    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        scores = torch.full((len(batch.prompts),), 0.5)
        return RewardOutput(scores=scores, valid=torch.ones(len(batch.prompts), dtype=torch.bool))


@attrs.frozen(kw_only=True)
class Blind(QuadrantBrightness):
    """Judges one image of four."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        return attrs.evolve(output, valid=torch.arange(len(batch.prompts)) % 4 == 0)


def test_a_sound_recipe_keeps_every_law_and_its_weights():
    recipe = toy_recipe.clipped()
    findings = check_recipe(recipe)
    assert [finding.law for finding in findings] == list(RECIPE_LAWS)
    assert [finding.mistake for finding in findings] == [None] * len(RECIPE_LAWS)
    notes = {finding.law: finding.note for finding in findings}
    assert notes["settings_work_out"] == "16 images per iteration, 2 optimiser steps"
    assert "in 2 of 2 groups" in notes["groups_have_spread"]
    assert "off one by 0.0e+00" in notes["first_ratio_is_one"]


def test_a_reward_without_spread_teaches_nothing():
    found = mistakes(attrs.evolve(toy_recipe.clipped(), reward=Constant()))
    assert set(found) == {"groups_have_spread", "first_ratio_is_one"}
    assert "rewards are 0.5 throughout" in found["groups_have_spread"]
    assert "the gradient is zero" in found["first_ratio_is_one"]


def test_a_reward_that_judges_too_few_would_stop_the_run():
    found = mistakes(attrs.evolve(toy_recipe.clipped(), reward=Blind()))
    assert "75% of the rewards are invalid" in found["groups_have_spread"]
    assert "max_invalid_share=25%" in found["groups_have_spread"]


def test_a_reward_of_the_wrong_sign_is_found_out_on_bundled_pictures(monkeypatch):
    recipe = attrs.evolve(toy_recipe.clipped(), reward=JPEGCompressibility())
    assert not mistakes(recipe)
    right = JPEGCompressibility.score

    def wrong(self, batch, want=frozenset()):
        output = right(self, batch, want)
        return attrs.evolve(output, scores=-output.scores)

    monkeypatch.setattr(JPEGCompressibility, "score", wrong)
    assert "Training would learn the wrong thing" in mistakes(recipe)["reward_tells_good_from_bad"]


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_rounding_beyond_half_of_the_clip_range_is_refused(noise, monkeypatch):
    """A policy whose velocity differs from pass to pass, by as much as another kernel's rounding would make it."""
    calls, velocity = iter(range(10**6)), toy_recipe.ToyPolicy.velocity

    def unsteady(self, latents, sigma, conditioning, **options):
        return velocity(self, latents, sigma, conditioning, **options) * (1 + noise * (next(calls) % 5 - 2))

    monkeypatch.setattr(toy_recipe.ToyPolicy, "velocity", unsteady)
    found = mistakes(toy_recipe.clipped(optimizer_steps_per_iteration=2))
    if not noise:
        assert not found
    else:
        assert "rounding alone is clipped" in found["first_ratio_is_one"]
        assert "half of clip_range=0.001" in found["first_ratio_is_one"]


def test_settings_that_do_not_work_out_end_the_examination():
    findings = check_recipe(toy_recipe.clipped(), world_size=3)
    assert [finding.law for finding in findings] == ["settings_work_out"]
    assert "3" in (findings[0].mistake or "")


def test_laws_can_be_left_out_and_an_objective_need_not_have_a_ratio():
    recipe = attrs.evolve(toy_recipe.clipped(), objective=DiffusionNFT())
    findings = check_recipe(recipe, leave_out=["evaluation_is_judged"])
    assert [finding.law for finding in findings] == list(RECIPE_LAWS)[:-1]
    assert {finding.law: finding.note for finding in findings}["first_ratio_is_one"].endswith("clips no ratio")


def test_the_command(capsys):
    assert main(["check", "tests.helpers.toy_recipe:clipped"]) == 0
    assert f"all {len(RECIPE_LAWS)} laws are kept" in capsys.readouterr().out
    assert main(["check", "tests.helpers.toy_recipe:clipped", "--processes", "3"]) == 1
    assert "REFUSED  settings_work_out" in capsys.readouterr().out
    for wrong, message in [
        (["policy"], "check policy: say `check RECIPE`"),
        (["star-shapes", "star-cells"], "say `check RECIPE`"),
        (["star-shapes", "--size", "32"], "--set train.image_size"),
        (["star-shape"], "star-shapes"),
    ]:
        assert main(["check", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_on_random_weights_of_a_tiny_pipeline(capsys):
    assert main(["check", "nft-flux2-klein-4b-pickscore", "--tiny"]) == 0
    printed = capsys.readouterr().out
    assert "replaced  policy.path" in printed
    assert "largest difference of a pixel 0.0e+00" in printed
    assert "keys taken, and drew" in printed
