"""What the pages of docs/algorithms take from elsewhere: recipes, curves, and each other.

    python -m benchmarks.algorithm_pages      # rewrites whatever is out of date, and says what that was

* The YAML under **Composition** is that of the first recipe named there, word for word; which parts of it are shown is
  for the page to say.
* The first paragraph of **Results** is what benchmarks/curves says about the recipes named under **Composition**.
  Whatever else stands in that section is left alone.
* README.md of the folder has a table of all pages, and a figure of all curves.

A test holds all of it to the files.
"""

from __future__ import annotations

import csv
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from rlt2i.recipes import PARTS, RecipeEntry, list_recipes, load_recipe
from rlt2i.report import charts

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "algorithms"
CURVES = ROOT / "benchmarks" / "curves"
INDEX = FOLDER / "README.md"
FIGURE = ROOT / "docs" / "assets" / "gains.svg"
SECTIONS = ("Composition", "Parameters", "Logged", "Results", "Differences from the paper", "References")
KINDS = ("Advantage", "Allocation", "Mask", "Objective", "Sampler", "TransitionKernel")
WIDTH = 128

BEFORE_ALL_ROLLOUTS = {(recipe, 0) for recipe in ("awm-shapes", "crd-shapes", "dpm2-shapes", "star-nft-shapes")}
"""(recipe, seed) of curves of losses that pull on every rollout, from when those without advantage were left out.
A curve that is made again leaves this set."""

WHY_NOT = {
    "influence-shapes": "An update measures every rollout with 408 network calls on top of its own 10.",
    "offline-dpo-shapes": "It reads a file of pairs, which `rlt2i pairs dpo-shapes pairs/shapes` makes first.",
    "vipo-cells": "`vipo-cells` needs the weights of DINOv2 from the hub, which the other recipes do without.",
    "feature-saliency-shapes": "It needs the weights of DINOv2 from the hub, which the other recipes do without.",
}
"""Recipe -> why it has no curve, where there is more to say than that nobody has run it."""


# -------------------------------------------------------------------------------------------------------------- pages


@attrs.frozen(kw_only=True)
class Page:
    """One page, taken apart.

    Attributes:
        title: its heading.
        idea: the paragraph under it.
        equations: the indented blocks before the first section.
        sections: name -> text, in the order of the page; the name is not part of the text.
        recipes: named under **Composition**, as `name.yaml`.
        parts: short name -> link, named under **Composition** as [`Name`](link).
    """

    path: Path
    title: str
    idea: str
    equations: tuple[str, ...]
    sections: dict[str, str]
    recipes: tuple[str, ...]
    parts: dict[str, str]

    @property
    def embedded(self) -> list[str]:
        """Recipes of the embedded tasks."""
        return [name for name in self.recipes if name.endswith(("-shapes", "-cells"))]


def read_page(path: Path, text: str | None = None) -> Page:
    """Take a page apart."""
    text = path.read_text(encoding="utf-8") if text is None else text
    pieces = re.split(r"^\*\*([A-Z][^*\n]*)\*\*[: ]*", text, flags=re.MULTILINE)
    head, names, bodies = pieces[0], pieces[1::2], pieces[2::2]
    blocks = re.split(r"\n\n+", head.strip("\n"))
    sections = dict(zip(names, bodies, strict=True))
    composition = sections.get("Composition", "")
    return Page(
        path=path,
        title=blocks[0].removeprefix("# "),
        idea=blocks[1] if len(blocks) > 1 else "",
        equations=tuple(block for block in blocks[2:] if block.startswith("    ")),
        sections=sections,
        recipes=tuple(re.findall(r"`([\w.-]+)\.yaml`", composition)),
        parts=dict(re.findall(r"\[`(\w+)`\]\(([^)]+\.py)\)", composition)),
    )


def read_pages() -> list[Page]:
    """All pages but the index, by file name."""
    return [read_page(path) for path in sorted(FOLDER.glob("*.md")) if path != INDEX]


def kinds(page: Page) -> list[str]:
    """What kinds of part a page is about."""
    found = [kind for kind in KINDS if set(PARTS.get(kind, {})) & set(page.parts)]
    return ["kernel" if kind == "TransitionKernel" else kind.lower() for kind in found]


# -------------------------------------------------------------------------------------------------------- composition


def recipe_section(text: str, key: str) -> str:
    """The lines of one top-level field of a recipe file."""
    found = re.search(rf"^{key}:.*\n(?:[ ].*\n)*", text, flags=re.MULTILINE)
    if not found:
        raise ValueError(f"the recipe has no {key!r} of its own; name a recipe that says it, or show another field.")
    return found[0]


def composed(text: str, page: Page, entries: dict[str, RecipeEntry]) -> str:
    """The page with the YAML block of its recipe."""
    block = re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    if block is None or not page.recipes:
        return text
    recipe = entries[page.recipes[0]].path.read_text(encoding="utf-8")
    keys = re.findall(r"^(\w+):", block[1], flags=re.MULTILINE)
    return text[: block.start(1)] + "".join(recipe_section(recipe, key) for key in keys) + text[block.end(1) :]


# ------------------------------------------------------------------------------------------------------------ results


@attrs.frozen(kw_only=True)
class Curve:
    """What a committed curve came to.

    Attributes:
        measure: what is compared: "strict accuracy", or "reward" where the trained reward has no strict form.
        base, end: of all evaluation prompts, before the first update and after the last.
        gain, low, high: paired gain and its 95 % interval.
        aside: what else there is to say: objects per image, or what a judge that was never trained on says.
        fresh: whether the recipe is still the one that was run.
    """

    recipe: str
    seed: int
    iterations: int
    measure: str
    base: float
    end: float
    gain: float
    low: float
    high: float
    aside: str
    fresh: bool

    @property
    def standard_error(self) -> float:
        """From the width of a 95 % interval."""
        return (self.high - self.low) / (2 * 1.96)

    @property
    def verdict(self) -> str:
        """Against twice the standard error."""
        error = f"twice its standard error (2 x {_share(self.standard_error)})"
        if self.gain > 2 * self.standard_error:
            return f"above the base beyond {error}"
        if self.gain < -2 * self.standard_error:
            return f"**below** the base beyond {error}"
        return f"**not distinguishable from the base** within {error}"


def read_curves(recipe: str) -> list[Curve]:
    """The curves of a recipe, by seed."""
    curves = []
    for path in sorted(CURVES.glob(f"{recipe}-s*.csv")):
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        first, last = rows[0], rows[-1]
        strict = bool(last.get("eval/strict_gain"))
        key = "eval/strict" if strict else "eval/reward"
        curves.append(
            Curve(
                recipe=recipe,
                seed=int(last["seed"]),
                iterations=int(last["iteration"]),
                measure="strict accuracy" if strict else "reward",
                base=float(first[key]),
                end=float(last[key]),
                gain=float(last[f"{key}_gain"]),
                low=float(last[f"{key}_gain_low"]),
                high=float(last[f"{key}_gain_high"]),
                aside=_aside(last),
                fresh=load_recipe(recipe, [f"train.seed={last['seed']}"]).hash.startswith(last["hash"]),
            )
        )
    return curves


def _aside(last: Mapping[str, str]) -> str:
    judge = "eval/heldout/shapes"
    if last.get(f"{judge}_gain"):
        gain, low, high = (_gain(float(last[f"{judge}_{name}"])) for name in ("gain", "gain_low", "gain_high"))
        return f"; the exact verifier, which was not trained on, moved by {gain} [{low}, {high}]"
    if last.get("eval/objects"):
        objects, asked = float(last["eval/objects"]), float(last["eval/objects_asked"])
        return f"; {objects:.2f} objects per image where {asked:.2f} are asked for"
    return ""


def sentences(recipe: str) -> list[str]:
    """What there is to say about a recipe: one sentence a seed."""
    train = load_recipe(recipe).train
    said = []
    for curve in read_curves(recipe):
        override = f" --set train.seed={curve.seed}" if curve.seed != train.seed else ""
        of_all = f" of {train.iterations}" if curve.iterations < train.iterations else ""
        said.append(
            f"`{recipe}`, seed {curve.seed}: {curve.measure} {_share(curve.base)} at the base and "
            f"{_share(curve.end)} after {curve.iterations}{of_all} iterations, a paired gain of {_gain(curve.gain)} "
            f"[{_gain(curve.low)}, {_gain(curve.high)}] on {train.eval_prompts} evaluation images, {curve.verdict}"
            f"{curve.aside} (`rlt2i train {recipe}{override}`, then `python -m benchmarks.curve`)."
        )
        if not curve.fresh:
            said.append("The recipe has changed since.")
        if (recipe, curve.seed) in BEFORE_ALL_ROLLOUTS:
            said.append("That curve was made before rollouts without advantage took part in this loss.")
    return said


def results(page: Page) -> str:
    """The first paragraph of **Results**."""
    said = [sentence for recipe in page.embedded for sentence in sentences(recipe)]
    without = [recipe for recipe in page.embedded if not read_curves(recipe)]
    if without:
        names = _listed([f"`{name}`" for name in without])
        said.append(f"No full run of {names} is recorded.")
        said += [WHY_NOT[name] for name in without if name in WHY_NOT]
        said.append(f"`rlt2i train {without[0]} --run-dir runs/{without[0]}` is such a run.")
    if any("sd35" in name for name in page.recipes):
        said.append("Nobody has run the SD3.5 recipes: they need the weights and a GPU.")
    elif len(page.recipes) > len(page.embedded):
        said.append("Nobody has run the recipe of the full model: it needs the weights and a GPU.")
    return _wrapped("**Results**: " + " ".join(said))


def resulted(text: str, page: Page) -> str:
    """The page with what the curves say."""
    found = re.search(r"^\*\*Results\*\*.*?(?=\n\n|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return text if found is None else text[: found.start()] + results(page) + text[found.end() :]


# -------------------------------------------------------------------------------------------------------------- index


def table(pages: Sequence[Page], entries: dict[str, RecipeEntry]) -> str:
    """One row a page."""
    columns = ("method", "kind", "paper", "recipes of the embedded tasks", "full models", "page")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for page in sorted(pages, key=lambda page: page.title.lower()):
        large = [name for name in page.recipes if name not in page.embedded]
        cells = (
            page.title,
            ", ".join(kinds(page)),
            paper(page),
            "<br>".join(f"`{name}`: {entries[name].evidence}" for name in page.embedded),
            "<br>".join(f"`{name}`: {entries[name].evidence}" for name in large) or "none",
            f"[{page.path.name}]({page.path.name})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paper(page: Page) -> str:
    """A link to the paper that a page names first, or its name."""
    first = page.sections.get("References", "").split(";")[0].strip().rstrip(".")
    number = re.search(r"\b\d{4}\.\d{5}\b", first)
    if page.sections.get("Differences from the paper", "").startswith("our own") or first.startswith("none"):
        return "ours"
    return f"[{number[0]}](https://arxiv.org/abs/{number[0]})" if number else first.split(",")[0]


def indexed(text: str, pages: Sequence[Page], entries: dict[str, RecipeEntry]) -> str:
    """The index with its table."""
    start, end = "<!-- table: python -m benchmarks.algorithm_pages -->\n", "<!-- end of table -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{table(pages, entries)}\n\n{end}{rest.split(end)[1]}"


# ------------------------------------------------------------------------------------------------------------- figure


def figure(curves: Sequence[Curve]) -> str:
    """Paired gain of every curve with its interval, largest first, as a standing-alone SVG."""
    ordered = sorted(curves, key=lambda curve: (-curve.gain, curve.recipe, curve.seed))
    top, row = 52, 20
    height = top + row * len(ordered) + 44
    with charts.figure(760, height) as canvas:
        title = "Gain over the base on the evaluation prompts, one run each, 95 % interval over prompts"
        charts.text(canvas, 8, 20, title, fontsize=14)
        charts.text(canvas, 8, 38, "Numbers of iterations differ between recipes: see the pages.", color=charts.QUIET)
        plot = charts.axes(canvas, 260, top - 6, 40, 34)
        for place, curve in enumerate(ordered):
            told = curve.gain > 2 * curve.standard_error
            colour = charts.SERIES[0] if told else "#8a8a92"
            name = curve.recipe.removesuffix("-shapes") + (f" (seed {curve.seed})" if curve.seed else "")
            plot.hlines(place, curve.low, curve.high, color=colour, linewidth=2)
            fill = colour if told else "white"
            tip = f"tip:{name}: {_gain(curve.gain)} [{_gain(curve.low)}, {_gain(curve.high)}]"
            plot.plot(curve.gain, place, "o", color=colour, markerfacecolor=fill, markersize=8, gid=tip)
            label = (f"{name}, {curve.iterations} iterations", (0, place))
            plot.annotate(
                *label, xycoords=plot.get_yaxis_transform(), xytext=(-10, 0), textcoords="offset points", ha="right",
                va="center",
            )  # fmt: skip
        plot.set_yticks([])
        plot.set_ylim(len(ordered) - 0.3, -0.7)
        plot.axvline(0, color=charts.QUIET, linewidth=1)
        plot.grid(axis="x")
        best = f"the largest is {ordered[0].recipe} with {_gain(ordered[0].gain)}."
        label = f"Gain of {len(ordered)} runs on the evaluation prompts; {best}"
        return charts.svg(canvas, label, standalone=True) + "\n"


# ----------------------------------------------------------------------------------------------------------- together


def rewritten() -> dict[Path, str]:
    """Every file that this module has a say in, as it should be."""
    entries = {entry.name: entry for entry in list_recipes()}
    pages = read_pages()
    files = {}
    for page in pages:
        text = page.path.read_text(encoding="utf-8")
        files[page.path] = resulted(composed(text, page, entries), page)
    files[INDEX] = indexed(INDEX.read_text(encoding="utf-8"), pages, entries)
    curves = [curve for page in pages for name in page.embedded for curve in read_curves(name)]
    curves = [curve for curve in curves if curve.measure == "strict accuracy"]  # one scale
    files[FIGURE] = figure(curves)
    return files


def _share(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if value < 1 else f"{value:.3f}"


def _gain(value: float) -> str:
    return "nan" if math.isnan(value) else f"{value:+.3f}".replace("0.", ".", 1)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _wrapped(paragraph: str) -> str:
    """Lines of the folder's width; code is not broken."""
    code = re.sub(r"`[^`]*`", lambda found: found[0].replace(" ", "\0"), paragraph)
    return textwrap.fill(code, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def main() -> None:
    """Write what is out of date."""
    for path, text in rewritten().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
