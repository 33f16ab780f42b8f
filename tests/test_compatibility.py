"""Every credit x objective x sampler makes one real update, or is refused at construction with what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from benchmarks.compatibility_matrix import PAGE, Cell, compatibility, credits, objectives, page, samplers
from rlt2i.captures import EDGES, PREFERENCE
from rlt2i.recipes import PARTS

pytestmark = pytest.mark.slow(days=8, together=True)  # one fixture counts all combinations


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return compatibility()


def combinations() -> Iterator[tuple[str, str, str]]:
    yield from ((c, o, s) for s in samplers() for c in credits() for o in objectives())


def test_no_combination_is_skipped(cells: list[Cell]):
    assert [(c.credit, c.objective, c.sampler) for c in cells] == list(combinations())


@pytest.mark.parametrize("objective", PARTS["Objective"])
def test_every_combination_updates_or_says_what_to_change(cells: list[Cell], objective: str):
    for cell in (c for c in cells if c.objective == objective):
        if not cell.refusal:
            assert cell.works, f"{cell}: no finite gradient"
            continue
        assert re.search(r"\b(Use|Choose|Change|Name)\b", cell.refusal), cell
        assert any(part in cell.refusal for part in (cell.objective, *cell.credit.split(" x "))), cell


def test_refusals_come_before_any_weight_is_read(cells: list[Cell]):
    assert not [cell for cell in cells if cell.late]


def test_only_likelihoods_and_credit_for_noise_or_branches_need_them(cells: list[Cell]):
    # Whatever the credit, an objective that needs no log-probability takes every sampler that the credit takes.
    for cell in cells:
        needs = credits()[cell.credit].needs
        if not (objectives()[cell.objective].needs.noise or needs.noise or needs.captures & {EDGES, PREFERENCE}):
            assert not cell.refusal, cell


def test_credit_for_branches_is_refused_by_name_under_every_other_sampler(cells: list[Cell]):
    tree = [cell for cell in cells if cell.credit == "TreeAdvantage"]
    refused = {cell.sampler for cell in tree if EDGES in cell.refusal}
    assert {cell.sampler for cell in tree if cell.works} == {"BranchSDE", "TreeSDE"} == set(samplers()) - refused
    assert all("Use a sampler whose rollouts branch" in cell.refusal for cell in tree if EDGES in cell.refusal)


def test_every_part_is_in_the_matrix():
    named = " ".join([*credits(), *objectives(), *samplers()])
    for kind in ("Advantage", "Allocation", "Mask", "Objective", "Sampler", "TransitionKernel"):
        for name in PARTS.get(kind, {}):
            assert re.search(rf"\b{name}\b", named), f"{kind} {name} is missing from the matrix"


def test_the_page_is_what_the_code_does(cells: list[Cell]):
    assert PAGE.read_text() == page(cells), "run python -m benchmarks.compatibility_matrix"
