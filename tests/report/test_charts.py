"""Charts: numbers land where they should, and the file is an SVG that stands alone."""

import math
import random
import re
import xml.etree.ElementTree as ET

import pytest

from rlt2i.report.charts import SERIES, Series, line_chart
from rlt2i.report.numbers import count, seconds, short, signed, two

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ET.fromstring(svg).iter(f"{SVG}text")]


def lines(svg: str, colour: str = SERIES[0]) -> list[list[tuple[float, float]]]:
    """The points of every line of a standing-alone chart that has this colour and is not a marker."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; [^"]*stroke: {colour.lower()}', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)] for path in paths]


def test_numbers_as_people_write_them():
    assert [short(v) for v in (0.47, 12.34, 4.12e-7, 0.0, -3.0)] == ["0.47", "12.3", "4.12e−7", "0", "−3"]
    assert [two(v) for v in (0.3, 0.481, 23.6)] == ["0.30", "0.48", "23.6"]
    assert [signed(v) for v in (0.19, -0.031, 0.001)] == ["+0.19", "−0.03", "0.00"]
    assert [seconds(v) for v in (0.42, 12, 185, 7800)] == ["0.4 s", "12 s", "3 min 05 s", "2 h 10 min"]
    assert [count(n, "image") for n in (0, 1, 2.0)] == ["0 images", "1 image", "2 images"]


def test_points_are_mapped_linearly():
    svg = line_chart([Series(label="a", x=[0, 1, 4], y=[0.0, 0.5, 1.0])], y_range=(0.0, 1.0), standalone=True)
    (((x0, y0), (x1, y1), (x2, y2)),) = lines(svg)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 4, abs=1e-4)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(1 / 2, abs=1e-4)
    assert y2 < y0  # up is more
    assert 0 < x0 < x2 < 720


def test_chart_is_xml_with_band_legend_and_reference():
    x = [0, 9, 18]
    svg = line_chart(
        [
            Series(label="strict <b>", x=x, y=[0.4, 0.5, 0.6], low=[0.3, 0.4, 0.5], high=[0.5, 0.6, 0.7]),
            Series(label="partial $x^2$", x=x, y=[0.6, 0.7, 0.8]),
        ],
        title="held out & scored",
        reference=(0.4, "base"),
        standalone=True,
    )
    assert {"strict <b>", "partial $x^2$", "base", "held out & scored", "iteration"} <= set(texts(svg))
    assert svg.count("fill-opacity: 0.16") == 1
    assert ET.fromstring(svg).attrib["aria-label"].startswith("held out & scored. strict <b>: 0.4 at 0, 0.6 at 18")
    assert "<title>strict &lt;b&gt;: 0.5 [0.4, 0.6] at 9</title>" in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")


def test_series_differ_without_colour():
    four = [Series(label=str(i), x=[0, 1], y=[i, i + 1]) for i in range(4)]
    svg = line_chart(four, standalone=True)
    dashes = [re.search(rf"stroke-dasharray: ([\d., ]+)[^\"]*stroke: {c.lower()}", svg) for c in SERIES[:4]]
    assert len({match.group(1) if match else "" for match in dashes}) == 4


@pytest.mark.parametrize("values", [[0.9999, 1.0001, 1.0], [1e-8, 3e-8, 2e-8], [1, 2, 3], [250_000, 260_000, 240_000]])
def test_no_tick_is_said_twice(values):
    svg = line_chart([Series(label="a", x=[1, 2, 3], y=values)], x_label="")
    ticks = texts(svg)
    assert len(ticks) == len(set(ticks)) + sum(ticks.count(t) > 1 for t in ("1", "2", "3"))  # x and y may share these
    assert len(ticks) >= 5


def test_there_is_no_half_iteration():
    assert [t for t in texts(line_chart([Series(label="a", x=[1, 2, 3], y=[7, 8, 9])])) if t in ("1.5", "2.5")] == []
    assert "3" in texts(line_chart([Series(label="a", x=[3], y=[0.5])]))


def test_a_gap_breaks_the_line():
    svg = line_chart([Series(label="a", x=range(5), y=[1, 2, math.nan, 2, 1])], standalone=True)
    assert re.search(r'<path d="M[^"]*M[^"]*" ', svg)
    assert "nan" not in svg


def test_nothing_to_draw_says_so():
    assert "loss: no data" in texts(line_chart([Series(label="a", x=[0], y=[math.nan])], y_label="loss"))
    assert "no data" in line_chart([])


def test_one_point_is_a_marker_with_its_interval():
    svg = line_chart([Series(label="a", x=[3], y=[0.5], low=[0.4], high=[0.6])])
    assert "a: 0.5 [0.4, 0.6] at 3" in svg


def test_a_long_run_stays_small_and_keeps_its_spikes():
    draw = random.Random(0)
    y = [draw.random() for _ in range(20_000)]
    y[1234], y[7777] = 5.0, -5.0
    svg = line_chart([Series(label="a", x=range(20_000), y=y)], y_range=(-5, 5), standalone=True)
    (points,) = lines(svg)
    assert len(svg) < 250_000
    heights = [height for _, height in points]
    flat = line_chart([Series(label="a", x=[0, 1], y=[5.0, -5.0])], y_range=(-5, 5), standalone=True)
    ((top, bottom),) = [[height for _, height in line] for line in lines(flat)]
    assert min(heights) == pytest.approx(top, abs=1)
    assert max(heights) == pytest.approx(bottom, abs=1)


def test_charts_of_a_page_share_no_name_and_take_its_colours():
    band = {"low": [0.3, 0.4], "high": [0.5, 0.6]}
    made = [line_chart([Series(label="a", x=[0, 1], y=[0.4, 0.5], **band)], title=title) for title in "ab"]
    names = [name for svg in made for name in re.findall(r' id="([^"]*)"', svg)]
    assert names
    assert len(names) == len(set(names))
    assert all(f"var(--s0, {SERIES[0]})" in svg for svg in made)
    assert made[0] == line_chart([Series(label="a", x=[0, 1], y=[0.4, 0.5], **band)], title="a")


def test_a_band_needs_both_bounds():
    with pytest.raises(ValueError, match="both bounds"):
        Series(label="a", x=[0], y=[1], low=[0])
    with pytest.raises(ValueError, match="2 x for 1 y"):
        Series(label="a", x=[0, 1], y=[1])
