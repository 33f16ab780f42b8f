"""The pages of docs/algorithms: one format, every part and recipe has one, and what they say is so."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import attrs
import pytest

from benchmarks import algorithm_pages as pages
from benchmarks.algorithm_pages import FOLDER, INDEX, KINDS, SECTIONS, Page, read_page, read_pages, rewritten
from benchmarks.compatibility_matrix import GROUP_SIZES, Judged, part
from rlt2i.config import load_object
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.interfaces import Objective
from rlt2i.recipes import PARTS, list_recipes, load_recipe
from rlt2i.samplers.sde import SDE
from rlt2i.training.observations import observations
from tests.helpers.build import collect, toy_algorithm, toy_engine, toy_learner

PAGES = read_pages()
EXTRA = {"Budget", "Cost"}
"""Sections that a page may have besides."""
SHIPPED = {name: reference for kind in KINDS for name, reference in PARTS.get(kind, {}).items()}

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.stem)


# -------------------------------------------------------------------------------------------------------------- format


@by_name
def test_a_page_has_an_idea_an_equation_and_the_sections_in_order(page: Page):
    ends = re.findall(r"[.?!](?= [A-Z]|$)", page.idea.replace("\n", " "))
    assert len(ends) == 3, f"the idea takes {len(ends)} sentences, not three: {page.idea}"
    assert len(page.equations) == 1
    assert tuple(name for name in page.sections if name not in EXTRA) == SECTIONS
    assert all(text.strip() for text in page.sections.values())
    assert re.search(r"```yaml\n\S", page.sections["Composition"])


@by_name
def test_a_page_links_to_the_source_of_its_parts_and_names_every_field(page: Page):
    assert page.parts, "Composition says nothing of the source; write [`Part`](../../rlt2i/.../part.py)"
    text = page.path.read_text(encoding="utf-8")
    for name, link in page.parts.items():
        cls = load_object(SHIPPED[name])
        assert link == f"../../{cls.__module__.replace('.', '/')}.py"
        for field in attrs.fields(cls):
            assert not field.init or f"`{field.name}`" in text, f"{page.path.name} does not explain {name}.{field.name}"


def test_every_part_has_a_page():
    missing = set(SHIPPED) - {name for page in PAGES for name in page.parts}
    assert not missing, f"link to the source of {sorted(missing)} under **Composition** of their pages"


def test_the_readme_names_every_part():
    text = (FOLDER.parents[1] / "README.md").read_text(encoding="utf-8")
    missing = [name for name in SHIPPED if f"`{name}`" not in text]
    assert not missing, f"add to the table under ## Parts: {missing}"


def test_every_recipe_has_one_page():
    owners: dict[str, list[str]] = {entry.name: [] for entry in list_recipes()}
    for page in PAGES:
        for recipe in page.recipes:
            assert recipe in owners, f"{page.path.name} names {recipe}, which does not ship"
            owners[recipe].append(page.path.name)
    elsewhere = "".join(path.read_text(encoding="utf-8") for path in FOLDER.parent.glob("*.md"))
    for recipe, found in owners.items():
        if not found and f"`{recipe}`" in elsewhere:
            continue  # the recipe of a reward or a task, which has its page in docs/
        assert len(found) == 1, f"{recipe} is named under **Composition** of {found or 'no page'}"


# ---------------------------------------------------------------------------------------------------------- logged


def _toy_batch(page: Page) -> dict[str, float]:
    """Everything that one update logs with the parts of a page, on the toy policy."""
    mine: dict[str, list[Any]] = {kind: [n for n in PARTS.get(kind, {}) if n in page.parts] for kind in KINDS}
    own = lambda kind, default: part(kind, mine[kind][0]) if mine[kind] else default
    sampler = own("Sampler", SDE(num_steps=6, window=(0, 4)))
    if mine["TransitionKernel"]:
        sampler = SDE(num_steps=6, window=(0, 4), kernel=part("TransitionKernel", mine["TransitionKernel"][0]))
    of_recipe = type(load_recipe(page.embedded[0]).objective).__name__
    objective: Objective = own("Objective", None) or part("Objective", of_recipe)
    if hasattr(objective, "kl_penalty"):
        objective = attrs.evolve(objective, kl_penalty=attrs.evolve(objective.kl_penalty, weight=0.1))
    credit = Product(
        advantage=own("Advantage", GroupRelative()),
        allocations=tuple(part("Allocation", name) for name in mine["Allocation"][:1]),
        masks=tuple(part("Mask", name) for name in mine["Mask"]),
    )
    algorithm = toy_algorithm(objective, credit=credit, sampler=sampler, reward=Judged())
    group_size = GROUP_SIZES.get(type(sampler).__name__, 4)
    batch = collect(toy_engine(algorithm), prompts=2, group_size=group_size)
    learned = toy_learner(algorithm).learn(batch.experience)
    return learned | observations([batch], lambda values: float(values.mean()))


@by_name
def test_what_a_page_says_is_logged_is_logged(page: Page):
    said = re.findall(r"`([a-z_]+/[^`]+|informative)`", page.sections["Logged"])
    if not said:
        pytest.skip("no metric is named")
    logged = _toy_batch(page)
    steps = sorted({name.split("@")[1] for name in logged if "@" in name})
    for metric in said:
        pattern = re.sub(r"<\w+>", "*", metric)
        base, _, step = pattern.partition("@")
        wanted = f"{base}@{steps[0] if step else ''}" if step else base
        assert fnmatch.filter(logged, wanted), f"{page.path.name} explains {metric}; logged: {sorted(logged)}"


# ------------------------------------------------------------------------------------------------------- generated


def test_pages_index_and_figure_say_what_recipes_and_curves_do():
    stale = [path.name for path, text in rewritten().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"run python -m benchmarks.algorithm_pages: {stale}"


def test_every_committed_curve_is_on_a_page():
    told = {recipe for page in PAGES for recipe in page.embedded}
    for path in pages.CURVES.glob("*-s*.csv"):
        recipe = re.sub(r"-s\d+$", "", path.stem)
        assert recipe in told, f"{path.name} belongs to no page"


HEAD = "recipe,hash,seed,iteration,commit,eval/strict,eval/strict_low,eval/strict_high,eval/strict_gain,"
HEAD += "eval/strict_gain_low,eval/strict_gain_high,eval/objects,eval/objects_asked,reward/mean\n"
TEXT = "# T\n\nOne. Two. Three.\n\n    e\n\n**Composition** (`crd-shapes.yaml`)\n\n```yaml\nobjective: {}\n```\n\n"
TEXT += "**Results**: old\nwords\n\nBy hand.\n\n**References**: none.\n"


def curve(folder: Path, seed: int, gain: float, low: float, high: float, update: int = 12, code: str = "") -> None:
    code = code or load_recipe("crd-shapes").hash[:12]
    first = f"crd-shapes,{code},{seed},0,c,0.4250,0.33,0.52,,,,1.63,1.75,\n"
    last = f"crd-shapes,{code},{seed},{update},c,{0.425 + gain:.4f},0.4,0.6,{gain},{low},{high},1.70,1.75,0.6\n"
    (folder / f"crd-shapes-s{seed}.csv").write_text(HEAD + first + last)


@pytest.mark.parametrize(
    ("gain", "low", "high", "verdict"),
    [
        # A 95 % interval of width .196 has a standard error of .05: twice that is .1.
        (0.11, 0.012, 0.208, "above the base beyond twice its standard error (2 x .050)"),
        (0.09, -0.008, 0.188, "**not distinguishable from the base** within twice its standard error (2 x .050)"),
        (-0.11, -0.208, -0.012, "**below** the base beyond twice its standard error (2 x .050)"),
    ],
)
def test_results_say_plainly_what_a_curve_came_to(gain, low, high, verdict, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "CURVES", tmp_path)
    curve(tmp_path, 0, gain, low, high)
    said, older = pages.sentences("crd-shapes")
    assert older == "That curve was made before rollouts without advantage took part in this loss."
    assert "`crd-shapes`, seed 0: strict accuracy .425 at the base" in said
    assert "after 12 iterations" in said
    assert f"{gain:+.3f}".replace("0.", ".") in said
    assert "on 480 evaluation images" in said
    assert "1.70 objects per image where 1.75 are asked for" in said
    assert "`rlt2i train crd-shapes`" in said
    assert verdict in said


def test_results_name_seeds_unfinished_runs_and_changed_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "CURVES", tmp_path)
    curve(tmp_path, 0, 0.1, 0.0, 0.2, update=8)
    curve(tmp_path, 3, 0.1, 0.0, 0.2, code="0123456789ab")
    first, _, second, changed = pages.sentences("crd-shapes")
    assert "after 8 of 12 iterations" in first
    assert "seed 3" in second
    assert "rlt2i train crd-shapes --set train.seed=3" in second
    assert changed == "The recipe has changed since."


def test_results_are_written_once_and_leave_the_rest_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "CURVES", tmp_path)
    once = pages.resulted(TEXT, read_page(INDEX, TEXT))
    assert "**Results**: No full run of `crd-shapes` is recorded." in once
    assert "old\nwords" not in once
    assert "\n\nBy hand.\n\n**References**: none.\n" in once
    assert pages.resulted(once, read_page(INDEX, once)) == once
    curve(tmp_path, 0, 0.1, 0.0, 0.2)
    assert "seed 0" in pages.resulted(once, read_page(INDEX, once))


def test_the_composition_is_the_recipe_word_for_word():
    text = pages.composed(TEXT, read_page(INDEX, TEXT), {entry.name: entry for entry in list_recipes()})
    assert "```yaml\nobjective:\n  type: CRD\n  beta: 1.0\n  sigmas: {count: 3}\n```" in text
