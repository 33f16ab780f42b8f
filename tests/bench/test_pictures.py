"""What a benchmark's page shows of runs that were kept: outlines and shares by hand, then a folder made by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import attrs
import pytest
import torch

from rlt2i.bench.analysis import Results, compare, sentence
from rlt2i.bench.figures import curve_chart, difference_chart
from rlt2i.bench.folder import DONE, BenchFolder
from rlt2i.bench.page import render_page
from rlt2i.bench.pictures import kept_pictures, outlined, share_inside
from rlt2i.bench.plan import Arm, Plan
from rlt2i.evaluation.heldout import Evaluation
from rlt2i.runs.artifacts import evaluation_file, maps_file, write_maps
from tests.helpers.toy_recipe import clipped

TOY = "tests.helpers.toy_recipe:clipped"
PLAN = Plan(
    name="toy",
    question="Is one <better>?",
    arms={"star": Arm(recipe=TOY, label="STAR"), "uniform": Arm(recipe=TOY)},
    reference="uniform",
    seeds=1,
    margin=0.01,
    keep_runs=True,
)


def test_an_outline_lies_on_both_sides_of_the_border():
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[:2, :2] = True
    made = outlined(torch.full((3, 4, 4), 90, dtype=torch.uint8), inside)
    assert made.shape == (3, 12, 12)
    # The region is pixels 0..5 of 12; its last row and column are black, the next ones white.
    assert made[0, 2].tolist() == [90] * 5 + [0, 255] + [90] * 5
    assert made[0, 6].tolist() == [255] * 7 + [90] * 5
    # Where everything is judged there is nothing to surround.
    assert outlined(
        torch.full((3, 4, 4), 90, dtype=torch.uint8), torch.ones(4, 4, dtype=torch.bool)
    ).unique().tolist() == [90]


def test_share_inside_by_hand():
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:4, :4] = True
    assert share_inside(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), inside) == pytest.approx(0.75)
    assert share_inside(torch.ones(4, 4), inside) == pytest.approx(0.25)


def evaluation(right: list[float]) -> Evaluation:
    task = clipped().task
    count = len(right)
    return Evaluation(
        prompts=task.eval_prompts(count),
        images=torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        scores=torch.tensor(right),
        valid=torch.ones(count, dtype=torch.bool),
        components={"strict": torch.tensor(right)},
    )


@pytest.fixture
def folder(tmp_path: Path) -> BenchFolder:
    """Two finished arms whose runs were kept; the first one has maps."""
    made = BenchFolder(path=tmp_path)
    made.prepare(PLAN, PLAN.recipes())
    evaluation([0.0, 0.0, 1.0, 0.0, 1.0, 0.0]).write(made.base)
    last = clipped().train.iterations
    for arm, right in (("star", [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]), ("uniform", [0.0, 1.0, 1.0, 0.0, 0.0, 0.0])):
        run = made.trial(arm, 0) / "run"
        evaluation(right).write(evaluation_file(run, last))
        (made.trial(arm, 0) / DONE).write_text("{}")
    prompts = [p.text for p in clipped().task.train_prompts(seed=0, start=0, count=2)]
    weights = torch.tensor([[2.0, 2.0], [0.0, 0.0]]).expand(2, 3, 2, 2).contiguous()
    write_maps(
        maps_file(made.trial("star", 0) / "run", 1),
        weights=weights,
        clean=torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8),
        final=torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        sigmas=torch.tensor([1.0, 0.7, 0.3, 0.0]),
        prompts=prompts,
        core=[[], []],
        scores=[1.0, 0.0],
    )
    return made


def test_kept_pictures(folder: BenchFolder):
    found = kept_pictures(folder, PLAN)
    assert found is not None
    # Three texts among six held-out prompts: one board each, with the base first.
    assert [len(board["images"]) for board in found["gallery"]] == [3, 3, 3]
    assert [image["label"] for image in found["gallery"][0]["images"]] == ["base", "STAR", "uniform"]
    frames = [image["picture"]["style"].split()[-1] for image in found["gallery"][0]["images"]]
    assert frames == ["fail", "pass", "fail"]
    # Prompts 0 and 4 are right under STAR alone.
    assert found["counts"] == [
        "STAR against uniform: of the same 6 prompts and noises 2 are right in the first alone, 0 in the second alone."
    ]
    # The upper half has all the weight, so its left corner half of it; that corner is what is judged.
    assert found["maps"]["area"] == pytest.approx(0.25)
    assert found["maps"]["step_names"] == ["step 0", "step 1"]
    assert found["maps"]["shares"] == [("STAR", "50%", "50%")]


def test_runs_that_were_not_kept_have_no_pictures(folder: BenchFolder):
    shutil.rmtree(folder.trial("star", 0) / "run")
    assert kept_pictures(folder, PLAN) is None


def results(plan: Plan, final: dict[str, list[float]]) -> Results:
    """One evaluation before and one after, of the seeds given."""
    curves = {(arm, seed): {0: 0.4, 10: value} for arm, values in final.items() for seed, value in enumerate(values)}
    scores = {trial: {0: (2, curve[10]), 1: (2, curve[10])} for trial, curve in curves.items()}
    return Results(
        plan=plan,
        curves={"strict": curves},
        seconds=dict.fromkeys(curves, 1.0),
        credit_seconds={},
        cost={"star": 9, "uniform": 9},
        samples={0: 0, 10: 160},
        scores=scores,
    )


def test_the_page_of_one_seed_claims_nothing_and_shows_everything(folder: BenchFolder):
    found = results(PLAN, {"star": [0.8], "uniform": [0.7]})
    comparisons = compare(found)
    text = sentence(found, comparisons)
    assert "STAR against uniform: +0.100, [+0.100, +0.100] over prompts; 1 seed, too few to claim anything." in text
    page = render_page(found, comparisons, text, kept_pictures(folder, PLAN))
    assert "Is one &lt;better&gt;?" in page
    for wanted in ('id="images"', 'id="maps"', "too few seeds", 'name="viewport"', "prefers-color-scheme: dark"):
        assert wanted in page, wanted
    assert "http" not in page.replace("http://www.w3.org", "")
    without = render_page(found, comparisons, text, None)
    assert 'id="images"' not in without


def test_charts_name_arms_and_differences():
    plan = attrs.evolve(PLAN, seeds=3)
    found = results(plan, {"star": [0.8, 0.7, 0.9], "uniform": [0.7, 0.65, 0.75]})
    assert "STAR (3 seeds): 0.4 at 0, 0.8 at 10" in curve_chart(found)
    # Differences .1, .05 and .15.
    assert "STAR − uniform: +0.100" in difference_chart(found, compare(found))
    assert 'id="power"' in render_page(found, compare(found), "", None)
