"""The numbers and figures of docs/benchmark.md, from the tables in benchmarks/results/bench.

    python -m benchmarks.benchmark_page      # rewrites what is out of date; a test holds the page to the tables

Blocks between `<!-- from: NAME -->` and `<!-- end -->` are written here; the prose around them is not touched.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlt2i.bench.analysis import (
    MEASURES,
    Comparison,
    Results,
    compare,
    power_table,
    read_results,
    remarks,
    sentence,
    trend_lines,
)
from rlt2i.bench.folder import PLAN, read_table
from rlt2i.bench.lab import expected_ratio_of_steps
from rlt2i.bench.page import ARM_COLUMNS, arm_rows, comparison_texts
from rlt2i.bench.plan import load_plan, shipped_plans

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmark.md"
TABLES = ROOT / "benchmarks" / "results" / "bench"
FIGURES = ROOT / "docs" / "assets" / "benchmark"

MAIN = {"cells-clipped": "clipped surrogate", "cells-nft": "DiffusionNFT"}
"""Plans that have a section of their own."""
QUESTIONS = (("star", "uniform"), ("oracle", "uniform"), ("star", "shuffled"), ("oracle", "star"))
"""Does the map help, does knowing the place help, is it the map, and is there anything left?"""
SHORT = {"final": "the last iteration", "area": "all, on average"}
"""Measures of the other plans that are shown: the score in the end, and the area under its curve."""
FEW_POINTS = 3
"""Evaluations of a run that a table says as well as a curve does."""
BLOCK = re.compile(r"(<!-- from: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def plan_block(name: str) -> list[str]:
    """Figure, tables and verdicts of one plan; says so where it has not been run."""
    folder = TABLES / name
    if not (folder / PLAN).is_file():
        return ["Not run yet."]
    plan = load_plan(folder / PLAN)
    results = read_results(folder, plan)
    comparisons = compare(results)
    lines = [f"![held-out curves](assets/benchmark/{name}.svg)", ""]
    lines += [f"![paired differences with intervals](assets/benchmark/{name}-differences.svg)", ""]
    lines += table(("arm", *ARM_COLUMNS), arm_rows(results))
    lines += ["", *(f"* {line}" for line in sentence(results, comparisons).splitlines()), ""]
    lines += _comparisons(results, [c for c in comparisons if c.measure in MEASURES], "measure")
    rest = [c for c in comparisons if c.measure not in MEASURES and c.other == plan.reference]
    if rest:
        lines += ["", "What else changed, against the reference, after the last iteration:", ""]
        lines += _comparisons(results, rest, "held-out measure")
    return [*lines, "", "```text", *power_table(results).splitlines(), "```"]


def _comparisons(results: Results, comparisons: Sequence[Comparison], what: str) -> list[str]:
    header = (what, "comparison", "difference", "over seeds", "over prompts", "p (Holm)", "verdict")
    return table(header, comparison_texts(results.plan, comparisons))


def summary_block() -> list[str]:
    """The comparisons that the page is about, an objective a line, with their verdicts."""
    rows: list[tuple[object, ...]] = []
    for name, objective in MAIN.items():
        if (published := _published(name)) is None:
            continue
        for c in compare(published):
            if c.measure == "final" and (c.arm, c.other) in QUESTIONS:
                texts = comparison_texts(published.plan, [c])[0]
                rows.append((objective, *texts[1:5], c.judged.difference.seeds, texts[-1]))
    if not rows:
        return ["Not run yet."]
    return table(("objective", "comparison", "difference", "over seeds", "over prompts", "seeds", "verdict"), rows)


def questions_block() -> list[str]:
    """What every other plan that ships asks, and what came of it so far."""
    lines: list[str] = []
    for name, path in shipped_plans().items():
        if name in MAIN or name == "cells-demo":
            continue
        lines += ["", f"### `{name}`", "", " ".join(load_plan(path).question.split()), ""]
        if (published := _published(name)) is None:
            lines += ["*Not run yet.*"]
            continue
        comparisons = [c for c in compare(published) if c.measure in SHORT]
        header = ("after", "comparison", "difference", "over seeds", "over prompts", "p (Holm)", "seeds", "verdict")
        rows = []
        for c, (_, *texts, verdict) in zip(comparisons, comparison_texts(published.plan, comparisons), strict=True):
            rows.append((SHORT[c.measure], *texts, c.judged.difference.seeds, verdict))
        arms = arm_rows(published)
        scores = "; ".join(f"{label} {after}" for label, _, _, after, *_ in arms)
        metric = published.plan.metric
        lines += [f"`{metric}` on held-out prompts, from {arms[0][2]}, after iteration {published.last}: {scores}.", ""]
        if len(published.samples) > FEW_POINTS:
            lines += [f"![held-out curves](assets/benchmark/{name}.svg)", ""]
        lines += [f"![paired differences with intervals](assets/benchmark/{name}-differences.svg)", ""]
        lines += [
            *table(header, rows),
            *(f"\n{line}" for line in (*trend_lines(published), *remarks(published, comparisons))),
        ]
    return lines[1:]


def across_block() -> list[str]:
    """STAR and the oracle against uniform credit, a plan a line: how the gain depends on what a plan changes."""
    rows = []
    for name in shipped_plans():
        if (published := _published(name)) is None:
            continue
        found = {(c.measure, c.arm): c for c in compare(published) if c.other == "uniform"}
        asked = (("final", "star"), ("area", "star"), ("final", "oracle"))
        seeds = max(c.judged.difference.seeds for c in found.values())
        rows.append(
            (f"`{name}`", f"`{published.plan.metric}`", seeds, *(_in_a_cell(found.get(which)) for which in asked))
        )
    header = ("plan", "score", "seeds", "STAR, last iteration", "STAR, average of training", "oracle, last iteration")
    return table(header, rows) if rows else ["Not run yet."]


def _in_a_cell(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    d = comparison.judged.difference
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] {comparison.judged.verdict}"


def _published(name: str) -> Results | None:
    folder = TABLES / name
    return read_results(folder, load_plan(folder / PLAN)) if (folder / PLAN).is_file() else None


def lab_block() -> list[str]:
    """Theory against measurement."""
    if not (TABLES / "lab" / "lab.csv").is_file():
        return ["Not run yet."]
    rows = [
        (r["objective"], f"{r['tokens']}/16", r["mix"], r["credit"], f"{float(r['theory']):.2f}",
         f"{float(r['gain']):.2f} ± {float(r['gain_error']):.2f}")
        for r in read_table(TABLES / "lab" / "lab.csv")
        if r["credit"] != "uniform"
    ]  # fmt: skip
    header = ("objective", "area", "mix", "credit", "theory", "measured ± SE")
    return ["![gains against theory](assets/benchmark/lab.svg)", "", *table(header, rows)]


def lab_training_block() -> list[str]:
    """What the gains come to in training."""
    if not (TABLES / "lab" / "lab_training.csv").is_file():
        return ["Not run yet."]
    rows = read_table(TABLES / "lab" / "lab_training.csv")
    lines: list[tuple[object, ...]] = []
    ratios: list[str] = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        means: dict[str, float] = {}
        for credit in dict.fromkeys(row["credit"] for row in rows):
            values = [float(r["gained"]) for r in rows if (r["tokens"], r["credit"]) == (tokens, credit)]
            mean = sum(values) / len(values)
            error = (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5
            means[credit] = mean
            lines.append((f"{tokens}/16", credit, len(values), f"{mean:.4f} ± {error:.4f}"))
        ratios.append(
            f"* Area {tokens}/16: the oracle gains {means['oracle'] / means['uniform']:.2f} times as much as uniform "
            f"credit; the measured signal-to-noise of their first batches says {_expected_ratio(tokens):.2f}."
        )
    return [*table(("area", "credit", "seeds", "reward gained ± SE"), lines), "", *ratios]


def _expected_ratio(tokens: str) -> float:
    """Of the gains of two unit-length steps, oracle over uniform, from the SNRs in lab.csv."""
    rows = read_table(TABLES / "lab" / "lab.csv")
    first = rows[0]["objective"]
    snr = {
        r["credit"]: float(r["snr"])
        for r in rows
        if (r["objective"], r["tokens"], float(r["mix"])) == (first, tokens, 1.0)
    }
    return expected_ratio_of_steps(snr["oracle"], snr["uniform"])


def probe_block(name: str) -> Callable[[], list[str]]:
    """The table of a probe."""

    def block() -> list[str]:
        file = TABLES / "probe" / f"{name}.csv"
        if not file.is_file():
            return ["Not run yet."]
        rows = read_table(file)
        lines: list[str] = []
        for weights in dict.fromkeys(row["weights"] for row in rows):
            own = [row for row in rows if row["weights"] == weights]
            measures = list(dict.fromkeys(row["measure"] for row in own))
            credits = list(dict.fromkeys(row["credit"] for row in own))
            found = {(r["measure"], r["credit"]): _value(r) for r in own}
            batches = {r["measure"]: r["batches"] for r in own}
            cells = [(m, batches[m], *(found.get((m, c), "") for c in credits)) for m in measures]
            after = "the base" if weights == "base" else f"after iteration {int(weights.split('-')[-1])}"
            lines += ["", *table((f"{after}, ± SE", "batches", *credits), cells)]
        return lines[1:]

    return block


def _value(row: Mapping[str, str]) -> str:
    value, error = float(row["value"]), float(row["error"])
    if "over uniform" in row["measure"] and error > abs(value):
        return "not determined"  # a ratio whose denominator is within its error of 0
    return f"{value:.4f} ± {error:.4f}"


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "cells-clipped": lambda: plan_block("cells-clipped"),
    "cells-nft": lambda: plan_block("cells-nft"),
    "summary": summary_block,
    "across": across_block,
    "questions": questions_block,
    "lab": lab_block,
    "lab-training": lab_training_block,
    "probe-cells-clipped": probe_block("cells-clipped"),
    "probe-cells-nft": probe_block("cells-nft"),
    "probe-shapes-clipped": probe_block("shapes-clipped"),
}


def page(text: str) -> str:
    """The page with every block written anew.

    Raises:
        ValueError: for a block that nothing here writes.
    """

    def written(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"docs/benchmark.md: nothing writes the block {match[2]!r}. Known: {', '.join(BLOCKS)}.")
        return match[1] + "\n".join(BLOCKS[match[2]]()) + "\n" + match[3]

    return BLOCK.sub(written, text)


def main() -> None:
    """Rewrite the page and copy the figures."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    figures = {name: "lab.svg" if name == "lab" else "curves.svg" for name in (*MAIN, "lab")}
    figures |= {n: "curves.svg" for n in shipped_plans() if (r := _published(n)) and len(r.samples) > FEW_POINTS}
    figures |= {f"{file.parent.name}-differences": "differences.svg" for file in TABLES.glob("*/differences.svg")}
    for name, file in figures.items():
        shutil.copyfile(TABLES / name.removesuffix("-differences") / file, FIGURES / f"{name}.svg")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
