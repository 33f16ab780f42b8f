"""The sections of the report that are made of numbers and text."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rlt2i.report.axes import seconds, signed, two
from rlt2i.report.curves import Series, line_chart
from rlt2i.report.html import Markup, h, join, missing, section, table
from rlt2i.report.rundir import EvalImages, Row, Run, column
from rlt2i.report.summary import Headline, categories, metric_name, outcomes, parts

_PLAIN = {
    "reward": "Reward on training prompts",
    "clip": "Share of ratios clipped",
    "ratio": "Largest |ratio − 1|, first update of a batch",
    "grad_norm": "Gradient norm",
    "kl": "KL divergence to the base",
    "map": "Allocation maps",
    "objects": "Objects per image",
    "loss": "Loss",
}


def top(run: Run, head: Headline) -> Markup:
    """Title, result, verdict, warnings, the most important numbers."""
    chips = join(h("li", h("span", role), name) for role, name in parts(run.recipe))
    last_step = max((row["step"] for row in (*run.train, *run.evals)), default=0)
    bounds = head.gain.bounds
    firm = bounds.replace(" ", "\u00a0")  # an interval does not break across lines
    tiles: list[tuple[str, str]] = []
    if math.isfinite(head.before) and head.last > head.first:
        tiles.append((f"{two(head.before)} → {two(head.after)}", f"held-out {metric_name(head.metric)}"))
        if math.isfinite(head.gain.value):
            known = math.isfinite(head.gain.low)
            between = f"paired gain, 95 % interval {firm}" if known else "gain, no interval"
            tiles.append((signed(head.gain.value), between))
    tiles.append((f"{int(last_step)}", "updates"))
    spent = sum(_total(row) for row in run.train)
    if spent:
        tiles.append((seconds(spent), "training time, without evaluations"))
    body = [
        h("p", "Report of an rlt2i run", cls="eyebrow"),
        h("h1", run.title),
        h("ul", chips, cls="parts") if chips else Markup(""),
        h("p", head.sentence.replace(bounds, firm), cls="result", id="result"),
        h("p", head.verdict, cls="quiet"),
        *(h("p", text, cls="warning") for text in head.warnings),
        h(
            "div",
            *(h("div", h("div", v, cls="value"), h("div", k, cls="label"), cls="tile") for v, k in tiles),
            cls="tiles",
        ),
    ]
    return h("header", *body)


def curve(run: Run, head: Headline) -> Markup:
    """Held-out scores over the updates, and the training reward."""
    if not run.evals and not run.train:
        return section("curve", "Learning curve", missing("This run has no metrics.jsonl.", "rlt2i train RECIPE"))
    body = []
    if head.metric:
        series = [_eval_series(run.evals, head.metric)]
        if head.metric == "strict" and any("eval/partial" in row for row in run.evals):
            series.append(_eval_series(run.evals, "partial"))
        shares = all(0 <= y <= 1 for s in series for y in s.y)
        chart = line_chart(
            series,
            y_label=f"held-out {metric_name(head.metric)}" if len(series) == 1 else "held-out score",
            reference=(head.before, f"at update {head.first}: {two(head.before)}"),
            from_zero=shares,
            width=980,
            height=360,
        )
        note = "Prompts that training never saw, the same noise at every evaluation."
        if series[0].low:
            note += (
                " The band is the 95 % interval of each evaluation on its own; the paired interval of the gain "
                "is narrower."
            )
        body += [_card(chart), h("p", note, cls="quiet small")]
    else:
        body.append(missing("No held-out evaluation was logged.", f"rlt2i eval {shown_path(run)}"))
    x, y = column(run.train, "reward/mean")
    if x:
        chart = line_chart(
            [Series(label="mean of a batch", x=x, y=y, faint=len(x) > 20), *_smoothed(x, y)],
            y_label="reward on training prompts",
            width=980,
            height=260,
        )
        text = "Thin: each batch. Bold: running mean." if len(x) > 20 else ""
        body += [_card(chart), h("p", text, cls="quiet small")]
    return section("curve", "Learning curve", *body)


def by_category(run: Run, pair: tuple[EvalImages, EvalImages] | None) -> Markup:
    """Scores per category, first and last evaluation."""
    names = categories(run.evals)
    if not names:
        text = "No metric eval/<category> was logged."
        return section("categories", "By category", missing(text, f"rlt2i eval {shown_path(run)}"))
    rows = []
    for name in names:
        _, values = column(run.evals, f"eval/{name}")
        before, after = values[0], values[-1]
        row: list[str] = [name, two(before), two(after), signed(after - before), _dumbbell(before, after)]
        if pair is not None:
            members = [i for i, c in enumerate(pair[1].categories) if c == name and i < len(pair[0])]
            counts = outcomes(*pair, members)
            row[1:1] = [str(len(members))] if members else ["–"]
            row += [f"{counts.fixed}", f"{counts.broken}"] if counts.total else ["–", "–"]
        rows.append(row)
    head = ["category", "before", "after", "change", "0 to 1: before ○, after ●"]
    numeric = [1, 2, 3]
    if pair is not None:
        head[1:1] = ["images"]
        head += ["fixed", "broken"]
        numeric = [1, 2, 3, 4, 6, 7]
    note = (
        "First and last evaluation. A category holds few images, so small changes within one are noise: "
        "with n images the standard error of a share is about 0.5 / √n."
    )
    return section("categories", "By category", h("p", note), table(head, rows, numeric=numeric))


def _dumbbell(before: float, after: float) -> Markup:
    if not (0 <= before <= 1 and 0 <= after <= 1):
        return Markup("")
    a, b = 8 + 184 * before, 8 + 184 * after
    return Markup(
        '<svg class="chart" viewBox="0 0 200 16" width="200" height="16" style="width:200px" role="img" '
        f'aria-label="from {before:.2f} to {after:.2f}">'
        '<line class="grid" x1="8" x2="192" y1="8" y2="8" stroke="#e3e3e8" stroke-width="2"/>'
        f'<line class="s0" x1="{a:.1f}" x2="{b:.1f}" y1="8" y2="8" stroke="#0072B2" stroke-width="3"/>'
        f'<circle class="s0" cx="{a:.1f}" cy="8" r="4.5" fill="var(--paper)" stroke="#0072B2" '
        'stroke-width="2"/>'
        f'<circle class="f0" cx="{b:.1f}" cy="8" r="5.5" fill="#0072B2"/></svg>'
    )


def training(run: Run) -> Markup:
    """All that was logged at each update, as small multiples; metrics of one prefix and size share a chart."""
    if not run.train:
        return section("training", "Training", missing("No training update was logged.", "rlt2i train RECIPE"))
    groups: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in run.train for key in row):
        prefix = key.split("/")[0]
        if key != "step" and prefix != "seconds":
            groups.setdefault(prefix, []).append(key)
    charts = []
    for prefix, keys in groups.items():
        for bundle in _same_scale(run.train, keys):
            lines = [
                Series(label=k.removeprefix(f"{prefix}/"), x=x, y=y) for k in bundle for x, y in [column(run.train, k)]
            ]
            name = _PLAIN.get(prefix, prefix.replace("_", " "))
            if len(bundle) == 1 and "/" in bundle[0] and prefix not in ("ratio", "kl"):
                name = f"{name}: {lines[0].label.replace('_', ' ')}"
            charts.append(h("div", Markup(line_chart(lines, title=name, width=340, height=220)), cls="card"))
    return section("training", "Training", h("div", *charts, cls="charts"))


def _same_scale(rows: Sequence[Row], keys: Sequence[str]) -> list[list[str]]:
    """Keys that can share an axis: their largest values lie within a factor of 4."""
    bundles: list[tuple[float, list[str]]] = []
    for key in keys:
        size = max((abs(v) for v in column(rows, key)[1] if math.isfinite(v)), default=0.0)
        for i, (other, members) in enumerate(bundles):
            if len(members) < 4 and max(size, other) <= 4 * min(size, other):
                bundles[i] = (max(size, other), [*members, key])
                break
        else:
            bundles.append((size, [key]))
    return [members for _, members in bundles]


def timing(run: Run) -> Markup:
    """Where the time went."""
    keys = list(dict.fromkeys(k for row in run.train for k in row if k.startswith("seconds/") and k != "seconds/total"))
    if not keys:
        return section("timing", "Time", missing("No seconds/<phase> was logged.", "rlt2i train RECIPE"))
    totals = {key.removeprefix("seconds/"): [v for v in column(run.train, key)[1] if math.isfinite(v)] for key in keys}
    whole = sum(map(sum, totals.values())) or 1.0
    bar = join(
        h("span", cls=f"fill{i % 6}", style=f"flex: {sum(v) / whole:.4f}") for i, v in enumerate(totals.values())
    )
    rows = [
        [
            join((h("i", cls=f"fill{i % 6}"), name)),
            seconds(sum(values)),
            f"{100 * sum(values) / whole:.0f} %",
            seconds(sum(values) / max(1, len(values))),
            seconds(sorted(values)[len(values) // 2]) if values else "–",
        ]
        for i, (name, values) in enumerate(totals.items())
    ]
    each = seconds(whole / len(run.train))
    text = f"{seconds(whole)} in {len(run.train)} updates, {each} each. Evaluations are not counted."
    grid = table(["phase", "total", "share", "mean per update", "median"], rows, numeric=[1, 2, 3, 4])
    return section("timing", "Time", h("p", text), h("div", bar, cls="stack"), h("div", grid, cls="key-table"))


def recipe(run: Run) -> Markup:
    """The resolved recipe, versions, and the commands that do it again."""
    where = shown_path(run)
    if run.recipe_text:
        text = h("pre", h("code", run.recipe_text))
    else:
        text = missing("This run has no recipe.yaml.", "rlt2i train RECIPE")
    blocks = [section("recipe", "Resolved recipe", text)]
    if run.versions:
        rows = [[h("code", k), v] for k, v in _flat(run.versions) if k != "command"]
        blocks.append(section("versions", "Versions", table(["what", "which"], rows)))
    else:
        blocks.append(section("versions", "Versions", missing("This run has no versions.json.", "rlt2i train RECIPE")))
    lines = [f"rlt2i train {where}/recipe.yaml", f"rlt2i report {where}"]
    command = run.versions.get("command")
    if isinstance(command, list):
        command = shlex.join(str(word) for word in command)
    note = []
    if isinstance(command, str) and command:
        note.append(h("p", "This run was started with ", h("code", command), "."))
    if run.checkpoints:
        many = "checkpoint" if len(run.checkpoints) == 1 else "checkpoints"
        last = run.checkpoints[-1]
        note.append(h("p", f"{len(run.checkpoints)} {many} on disk, the last is ", h("code", last), "."))
    if run.recipe_text:
        again = [h("p", "The resolved recipe can be run again:"), h("pre", h("code", "\n".join(lines)))]
    else:
        again = [h("p", "Without recipe.yaml this run cannot be repeated exactly.", cls="missing")]
    blocks.append(section("reproduce", "How to reproduce", *note, *again))
    return join(blocks)


def shown_path(run: Run) -> str:
    """The run directory as a reader may type it: as given, but never where it lay on the writer's machine."""
    return shlex.quote(run.path.name if run.path.is_absolute() else run.path.as_posix())


def _eval_series(rows: Sequence[Row], metric: str) -> Series:
    x, y = column(rows, f"eval/{metric}")
    low, high = column(rows, f"eval/{metric}_low")[1], column(rows, f"eval/{metric}_high")[1]
    complete = len(low) == len(high) == len(y)
    return Series(label=metric_name(metric), x=x, y=y, low=low if complete else (), high=high if complete else ())


def _smoothed(x: Sequence[float], y: Sequence[float]) -> list[Series]:
    """Centred running mean, for runs long enough to need one."""
    if len(x) <= 20:
        return []
    reach = max(2, len(x) // 40)
    means = []
    for i in range(len(y)):
        window = [v for v in y[max(0, i - reach) : i + reach + 1] if math.isfinite(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return [Series(label="running mean", x=x, y=means, colour=0)]


def _total(row: Row) -> float:
    spent = [v for k, v in row.items() if k.startswith("seconds/") and k != "seconds/total" and math.isfinite(v)]
    return sum(spent)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _card(svg: str) -> Markup:
    return h("div", Markup(svg), cls="card wide scroll-x")
