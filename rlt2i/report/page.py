"""`write_report`: a run directory in, one HTML file out that can be mailed, archived and printed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.colors import to_hex

from rlt2i.inputs.display import visible
from rlt2i.report import sections
from rlt2i.report.atlas import atlas
from rlt2i.report.charts import SERIES, SERIES_DARK
from rlt2i.report.gallery import gallery
from rlt2i.report.pictures import FAILURE, NEUTRAL, SUCCESS
from rlt2i.report.rundir import EvalImages, MapSample, Run, UnreadableFileError, open_images, open_maps, read_run
from rlt2i.report.summary import headline, parts, same_prompts

_COLOURS = {
    "series": SERIES,
    "dark": SERIES_DARK,
    "success": SUCCESS,
    "failure": FAILURE,
    "neutral": NEUTRAL,
    "ramp": [to_hex(matplotlib.colormaps["viridis"](i / 9)) for i in range(10)],
}


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
    """The report as text; the words are in templates/, the numbers and what is concluded from them come from here."""
    pair, image_problem = _image_pair(run)
    samples, map_problem = _map_samples(run)
    head = headline(run, pair if pair is not None and same_prompts(*pair) else None)
    return (
        environment()
        .get_template("report.html")
        .render(
            run=run,
            name=sections.shown_path(run),
            head=head,
            parts=parts(run.recipe),
            curve=sections.curve(run, head),
            categories=sections.by_category(run, pair),
            gallery=gallery(pair, image_problem),
            maps=atlas(samples, map_problem),
            training=sections.training(run, head),
            timing=sections.timing(run),
            **sections.top(run, head),
            **sections.ending(run),
        )
    )


def environment(*loaders: PackageLoader) -> Environment:
    """Where the templates of a page are found: in the loaders given, then among the report's own, with its style."""
    made = Environment(
        loader=ChoiceLoader([*loaders, PackageLoader("rlt2i.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["colours"] = _COLOURS
    return made


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
        reason = f"Only the evaluation at iteration {opened[0].step} has saved its images; a comparison needs two."
        return None, " ".join([reason, *problems])
    return None, " ".join(problems) or "This run has no images/eval-<step>.safetensors."


def _map_samples(run: Run) -> tuple[Mapping[int, Sequence[MapSample]], str]:
    """First and last readable map files."""
    by_step: dict[int, Sequence[MapSample]] = {}
    problems: list[str] = []
    for steps in (list(run.maps), list(run.maps)[::-1]):
        for step in steps:
            if step in by_step:
                break
            try:
                samples = open_maps(run.maps[step])
            except UnreadableFileError as error:
                problems.append(str(error))
                continue
            if samples:
                by_step[step] = samples
                break
    text = " ".join(dict.fromkeys(problems))
    return by_step, text if by_step or text else "This run has no maps/step-<step>.safetensors."
