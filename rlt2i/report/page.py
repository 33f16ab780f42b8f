"""`write_report`: a run directory in, one HTML file out that can be mailed, archived and printed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlt2i.report import sections
from rlt2i.report.atlas import atlas
from rlt2i.report.gallery import gallery
from rlt2i.report.html import Markup, h, join, page
from rlt2i.report.rundir import (
    EvalImages,
    MapSample,
    Run,
    UnreadableFileError,
    open_images,
    open_maps,
    read_run,
)
from rlt2i.report.summary import headline, same_prompts

_CONTENTS = (
    ("curve", "Learning curve"),
    ("images", "Before and after"),
    ("maps", "Allocation maps"),
    ("categories", "By category"),
    ("training", "Training"),
    ("timing", "Time"),
    ("recipe", "Recipe"),
    ("versions", "Versions"),
    ("reproduce", "Reproduce"),
)


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run; what the run did not record becomes a note that says how to get it.

    Args:
        run_dir: a directory that `rlt2i train` made, complete or not.
        out: the file to write; by default `report.html` in `run_dir`.

    Returns:
        The file written.

    Raises:
        ValueError: `run_dir` is not a directory.
    """
    run = read_run(run_dir)
    out = run.path / "report.html" if out is None else Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f".{out.name}.{os.getpid()}")
    staged.write_text(render(run), encoding="utf-8")
    staged.replace(out)
    return out


def render(run: Run) -> str:
    """The report as text."""
    pair, image_problem = _image_pair(run)
    samples, map_problem = _map_samples(run)
    head = headline(run, pair if pair is not None and same_prompts(*pair) else None)
    name = sections.shown_path(run)
    links = join(h("a", title, href=f"#{anchor}") for anchor, title in _CONTENTS)
    body: list[Markup] = [
        sections.top(run, head),
        h("nav", links, **{"aria-label": "Contents"}),
        sections.curve(run, head),
        gallery(pair, image_problem, name),
        atlas(samples, map_problem, name),
        sections.by_category(run, pair),
        sections.training(run),
        sections.timing(run),
        sections.recipe(run),
        h(
            "footer",
            "Written by ",
            h("code", f"rlt2i report {name}"),
            ". This page loads nothing from elsewhere.",
        ),
    ]
    return page(f"{run.title}: rlt2i report", join(body))


def _image_pair(run: Run) -> tuple[tuple[EvalImages, EvalImages] | None, str]:
    """The first and the last evaluation's images, or why there are not two."""
    opened: list[EvalImages] = []
    problems: list[str] = []
    for step, path in run.images.items():
        try:
            opened.append(open_images(path, step))
        except UnreadableFileError as error:
            problems.append(str(error))
    if len(opened) >= 2:
        return (opened[0], opened[-1]), " ".join(problems)
    if opened:
        found = f"Only the evaluation at update {opened[0].step} has saved its images; a comparison needs two."
        return None, " ".join([found, *problems])
    return None, " ".join(problems) or "This run has no images/eval-<step>.safetensors."


def _map_samples(run: Run) -> tuple[Mapping[int, Sequence[MapSample]], str]:
    """First and last readable map files."""
    found: dict[int, Sequence[MapSample]] = {}
    problems: list[str] = []
    for steps in (list(run.maps), list(run.maps)[::-1]):
        for step in steps:
            if step in found:
                break
            try:
                samples = open_maps(run.maps[step])
            except UnreadableFileError as error:
                problems.append(str(error))
                continue
            if samples:
                found[step] = samples
                break
    text = " ".join(dict.fromkeys(problems))
    return found, text if found or text else "This run has no maps/step-<step>.safetensors."
