"""The main path on the shipped pipeline: train, export, look, report."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch

from rlt2i.evaluation.inspection import evaluate_run, load_policy, map_of, maps, sample, why_no_map
from rlt2i.recipes import Recipe, load_recipe
from rlt2i.report import write_report
from rlt2i.runs.checkpoint import latest_checkpoint
from rlt2i.runs.metrics import read_metrics
from rlt2i.tasks.base import TaskPrompt
from rlt2i.tasks.shapes.task import ShapesTask
from rlt2i.training.start import train
from rlt2i.types import Prompts

SMALL = (
    "train.iterations=1",
    "train.prompts_per_iteration=3",
    "train.group_size=4",
    "train.eval_prompts=12",
    "train.eval_every=1",
    "train.trackers=[]",
)
RECIPES = ("star-shapes", "uniform-shapes", "dense-shapes", "dpo-shapes", "star-nft-shapes", "oracle-shapes")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Recipe, Path]:
    """One small update of the demo's recipe."""
    recipe = load_recipe("star-nft-shapes", SMALL)
    folder = tmp_path_factory.mktemp("embedded") / "run"
    train(recipe, folder)
    return recipe, folder


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_mission_takes_an_update(tmp_path, name):
    train(load_recipe(name, (*SMALL, "train.eval_prompts=0")), tmp_path / "run")
    (first,) = read_metrics(tmp_path / "run")
    assert first["grad_norm"] > 0
    if "ratio/abs_minus_one_max" in first:
        assert first["ratio/abs_minus_one_max"] == 0.0


@pytest.mark.slow
def test_a_recipe_with_maps_trains_in_bfloat16(tmp_path):
    """The decoder of bfloat16 is channels-last: its images go into files of images and of maps."""
    least = ("prompts_per_iteration=1", "group_size=2", "eval_prompts=6", "eval_steps=1")
    settings = (*SMALL, *(f"train.{field}" for field in least), "sampler.num_steps=3", "policy.dtype=bfloat16")
    train(load_recipe("star-shapes", settings), tmp_path / "run")
    assert {p.parent.name for p in (tmp_path / "run").rglob("*-000001.safetensors")} == {"images", "maps"}


def test_export_is_a_pipeline_that_stock_diffusers_loads_and_draws_the_same(run):
    from diffusers import StableDiffusion3Pipeline

    recipe, folder = run
    exported = latest_checkpoint(folder) / "export"
    (pipeline_dir,) = [p.parent for p in exported.rglob("model_index.json")]
    stock = StableDiffusion3Pipeline.from_pretrained(pipeline_dir, text_encoder_3=None, tokenizer_3=None)
    policy = load_policy(recipe, run_dir=folder)
    prompts = Prompts.of(["a red circle"])
    conditioning = policy.encode(prompts)
    latents, sigma = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    ours = policy.velocity(latents, sigma, conditioning)
    embeds, _, pooled, _ = stock.encode_prompt(
        "a red circle", None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    stock.transformer.float()
    theirs = stock.transformer(
        latents, encoder_hidden_states=embeds.float(), pooled_projections=pooled.float(), timestep=1000 * sigma
    ).sample
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)  # the export is float16


def test_trained_weights_differ_from_the_base_and_can_be_looked_at(run, tmp_path):
    recipe, folder = run
    trained = load_policy(recipe, run_dir=folder).trainable_parameters()
    base = load_policy(recipe, weights="base").trainable_parameters()
    assert any(not torch.equal(trained[k], base[k]) for k in base)
    picture = sample(recipe, ["a red circle", "two squares"], run_dir=folder, count=2)
    assert picture.width > 100
    strip = maps(recipe, "a red circle and a blue square", run_dir=folder)
    assert strip.width > strip.height
    with pytest.raises(ValueError, match="every place the same weight"):
        maps(load_recipe("uniform-shapes"), "a red circle")


def test_eval_of_a_run_shows_the_base_and_the_paired_gain(run):
    recipe, folder = run
    found = evaluate_run(recipe, run_dir=folder, num_prompts=12)
    logged = read_metrics(folder, "eval")
    assert found["base/strict"] == pytest.approx(logged[0]["eval/strict"])
    assert found["eval/strict"] == pytest.approx(logged[-1]["eval/strict"])
    assert found["eval/strict_gain"] == pytest.approx(found["eval/strict"] - found["base/strict"])


def test_report_of_a_real_run_has_curve_grids_and_maps(run):
    _, folder = run
    page = write_report(folder).read_text()
    assert "star-nft-shapes" in page
    assert page.count("data:image/") > 3
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@attrs.frozen(kw_only=True)
class Wordless(ShapesTask):
    """Training prompts that consist of function words."""

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        return [
            attrs.evolve(p, text="and of the", core=())
            for p in super().train_prompts(seed=seed, start=start, count=count)
        ]


def test_prompts_without_core_words_fall_back_to_uniform_credit_and_say_so_once(tmp_path, capsys):
    recipe = load_recipe("star-shapes", (*SMALL, "train.eval_prompts=0", "train.iterations=2"))
    train(attrs.evolve(recipe, task=Wordless()), tmp_path / "run")
    assert capsys.readouterr().out.count("no core word") == 1
    for update in read_metrics(tmp_path / "run"):
        assert update["map/effective_support"] == pytest.approx(1.0)


def test_maps_do_not_ask_for_what_only_the_advantage_needs():
    """Pairs come from a sampler of their own, regions from the reward: a free prompt has neither."""
    star = load_recipe("star-shapes")
    policy, text = load_policy(star), "a red circle"
    expected = map_of(star, policy, text)
    assert expected is not None
    for name in ("offline-dpo-shapes", "box-flow-cells"):
        other = load_recipe(name)
        assert why_no_map(other) == ""
        assert map_of(other, policy, text) is None
        both = attrs.evolve(star, credit=attrs.evolve(other.credit, allocations=star.credit.allocations))
        assert torch.equal(map_of(both, policy, text).weights, expected.weights)
