"""The report of an evaluation: the same tables on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from rlt2i.evaluation.statistics import Interval
from rlt2i.evaluation.suites.results import SCORE, Judged, Measure
from rlt2i.evaluation.suites.suite import PIXELS

FEW = 10
"""Prompts below which a percentile bootstrap visibly understates the uncertainty."""

Rows = list[list[str]]


@attrs.frozen(kw_only=True)
class Report:
    """What an evaluation came to.

    Attributes:
        title: suite and weights.
        headline: name of the number that the suite is known by.
        overall: "images" or "categories".
        prompts, images_per_prompt: how many.
        rewards: name -> what it said.
        diversity: measure -> mean over prompts; empty with one image per prompt.
        features: what diversity was measured in.
        health: measure -> mean over images.
        against: folder of the evaluation that `before` and `gain` refer to, or "".
        notes: what else differs from that evaluation.
        fixed: whether the prompts are all there are, so that intervals are over their images; else over prompts.
    """

    title: str
    headline: str
    overall: str
    prompts: int
    images_per_prompt: int
    rewards: Mapping[str, Judged]
    diversity: Mapping[str, Measure]
    features: str
    health: Mapping[str, Measure]
    against: str = ""
    notes: Sequence[str] = ()
    fixed: bool = False

    @property
    def headline_measure(self) -> Measure | None:
        """The number that the suite is known by; None where its reward has not been asked."""
        reward, _, part = self.headline.partition("/")
        said = self.rewards.get(reward)
        return None if said is None else said.measures.get(part or SCORE)

    def sentence(self) -> str:
        """The result in one line."""
        measure = self.headline_measure
        if measure is None or measure.mean is None:
            return f"{self.headline}: no valid score"
        text = f"{self.headline} {_bounds(measure.mean)}"
        if measure.gain is not None and measure.before is not None:
            gain = measure.gain
            text += f"; before {measure.before:.4g}, gain {gain.mean:+.4g} [{gain.low:+.4g}, {gain.high:+.4g}]"
        return text

    def markdown(self) -> str:
        """The report as a Markdown page."""
        return self._written(_markdown_table, heading="## ")

    def text(self) -> str:
        """The report for the terminal."""
        return self._written(_text_table, heading="")

    def _written(self, table: Any, *, heading: str) -> str:
        over = "mean of the categories' means" if self.overall == "categories" else "mean over images"
        among = "over images of these prompts, which are all there are" if self.fixed else "over prompts"
        kind = "95 % intervals" if self.fixed else "95 % bootstrap intervals"
        parts = [
            f"{'# ' if heading else ''}{self.title}",
            self.sentence(),
            f"{self.prompts} prompts x {self.images_per_prompt} images; {over}; {kind} {among}."
            + (f" Paired with {self.against}." if self.against else ""),
            table(self._scores()),
        ]
        if categories := self._categories():
            parts += [f"{heading}By category", table(categories)]
        if self.diversity:
            weightless = "averaged pixels (no network)" if self.features == PIXELS else self.features
            parts += [
                f"{heading}Diversity of the images of a prompt, in {weightless}",
                table(self._others(self.diversity)),
            ]
        parts += [f"{heading}Images, without any reward", table(self._others(self.health))]
        if remarks := [*self._invalid(), *self._few(), *(f"Besides the weights: {note}." for note in self.notes)]:
            parts += [f"{heading}Notes", "\n".join(f"- {remark}" for remark in remarks)]
        return "\n\n".join(parts) + "\n"

    def _head(self, first: str) -> list[str]:
        return [first, "mean", "95 % interval", *(["before", "gain", "95 % interval"] if self.against else [])]

    def _scores(self) -> Rows:
        rows = [self._head("reward")]
        for reward, said in self.rewards.items():
            for part, measure in said.measures.items():
                name = reward if part == SCORE else f"{reward}/{part}"
                rows.append([name, *self._cells(measure)])
                if measure.unseen is not None:
                    rows.append([f"{name}, prompts never trained on", *self._cells(Measure(mean=measure.unseen))])
                if measure.any_of is not None:
                    any_of = Measure(mean=measure.any_of)
                    rows.append([f"{name}, any of {self.images_per_prompt}", *self._cells(any_of)])
        return rows

    def _categories(self) -> Rows:
        measures = {reward: said.measures[SCORE] for reward, said in self.rewards.items()}
        if "/" in self.headline and self.headline_measure is not None:
            measures = {self.headline: self.headline_measure, **measures}
        categories = dict.fromkeys(name for measure in measures.values() for name in measure.categories)
        if not categories:
            return []
        rows = [["category", *measures]]
        for name in categories:
            scores = [measure.categories.get(name) for measure in measures.values()]
            rows.append([name, *("-" if interval is None else _bounds(interval) for interval in scores)])
        return rows

    def _others(self, measures: Mapping[str, Measure]) -> Rows:
        rows = [[*self._head("measure"), *(["ratio"] if self.against else [])]]
        for name, measure in measures.items():
            ratio = []
            if self.against:
                known = measure.mean is not None and measure.before
                ratio = [f"{measure.mean.mean / measure.before:.3f}" if known else "-"]  # type: ignore[union-attr, operator]
            rows.append([name.replace("_", " "), *self._cells(measure), *ratio])
        return rows

    def _cells(self, measure: Measure) -> list[str]:
        mean = measure.mean
        cells = ["-", "-"] if mean is None else [f"{mean.mean:.4f}", _range(mean, "{:.4f}")]
        if self.against:
            gain = measure.gain
            cells.append("-" if measure.before is None else f"{measure.before:.4f}")
            cells += ["-", "-"] if gain is None else [f"{gain.mean:+.4f}", _range(gain, "{:+.4f}")]
        return cells

    def _invalid(self) -> list[str]:
        total = self.prompts * self.images_per_prompt
        return [
            f"{reward}: {said.invalid} of {total} images could not be judged and are in no mean: "
            + "; ".join(f"{count} x {reason}" for reason, count in list(said.reasons.items())[:3])
            + f". Mend it and score again with --rescore {reward}."
            for reward, said in self.rewards.items()
            if said.invalid
        ]

    def _few(self) -> list[str]:
        measure = self.headline_measure
        if measure is None or measure.mean is None or self.fixed:
            return []
        counts = [interval.clusters for interval in measure.categories.values()] or [measure.mean.clusters]
        few = sum(count < FEW for count in counts)
        if not few:
            return []
        where = f"{few} of {len(counts)} categories have" if measure.categories else "There are"
        return [f"{where} fewer than {FEW} prompts: a bootstrap over so few gives intervals that are too narrow."]

    def mapping(self) -> dict[str, Any]:
        """The report as plain data; nan is null."""
        return {
            "title": self.title,
            "headline": self.headline,
            "sentence": self.sentence(),
            "overall": self.overall,
            "prompts": self.prompts,
            "images_per_prompt": self.images_per_prompt,
            "against": self.against or None,
            "notes": list(self.notes),
            "rewards": {
                reward: {
                    "invalid": said.invalid,
                    "reasons": dict(said.reasons),
                    "measures": {part: _plain(measure) for part, measure in said.measures.items()},
                }
                for reward, said in self.rewards.items()
            },
            "diversity": {"features": self.features, **{n: _plain(m) for n, m in self.diversity.items()}},
            "health": {name: _plain(measure) for name, measure in self.health.items()},
        }


def _plain(value: Any) -> Any:
    if attrs.has(type(value)):
        return {field.name: _plain(getattr(value, field.name)) for field in attrs.fields(type(value))}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bounds(interval: Interval) -> str:
    return f"{interval.mean:.4g} {_range(interval, '{:.4g}')}"


def _range(interval: Interval, form: str) -> str:
    if math.isnan(interval.low):
        return "[one prompt]"
    return f"[{form.format(interval.low)}, {form.format(interval.high)}]"


def _text_table(rows: Rows) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _markdown_table(rows: Rows) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
