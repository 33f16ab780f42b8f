"""Charts: numbers land where they should, and the file is an SVG that stands alone."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from rlt2i.report.axes import integer_ticks, nice_ticks, padded, seconds, short, signed, tick_labels, two
from rlt2i.report.curves import Frame, Series, line_chart, thin

SVG = "{http://www.w3.org/2000/svg}"


def test_ticks_by_hand():
    assert nice_ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(0.47, 0.66, 4) == [0.5, 0.55, 0.6, 0.65]
    assert nice_ticks(-3, 3, 3) == [-2, 0, 2]
    assert integer_ticks(1, 3, 6) == [1, 2, 3]  # half updates do not exist
    assert nice_ticks(2, 2) == [2]


def test_every_tick_lies_within_the_range():
    for low, high in ((0, 1e-7), (-0.3, 0.9), (17, 23.6), (0, 480), (1e5, 2e6)):
        ticks = nice_ticks(low, high)
        assert 2 <= len(ticks) <= 12
        assert all(low - 1e-9 * abs(high) <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_numbers_as_people_write_them():
    assert tick_labels([0.5, 0.55, 0.6]) == ["0.50", "0.55", "0.60"]
    assert tick_labels([0.0, 2e-7, 4e-7]) == ["0", "2e−7", "4e−7"]
    assert [short(v) for v in (0.47, 12.34, 4.12e-7, 0.0, -3.0)] == ["0.47", "12.3", "4.12e−7", "0", "−3"]
    assert [two(v) for v in (0.3, 0.481, 23.6)] == ["0.30", "0.48", "23.6"]
    assert [signed(v) for v in (0.19, -0.031, 0.001)] == ["+0.19", "−0.03", "0.00"]
    assert [seconds(v) for v in (0.42, 12, 185, 7800)] == ["0.4 s", "12 s", "3 min 05 s", "2 h 10 min"]


def test_a_constant_gets_a_range_around_it():
    assert padded([2.0, 2.0], from_zero=False) == (1.8, 2.2)
    assert padded([0.0], from_zero=False) == (0.0, 1.0)


def test_points_are_mapped_linearly():
    frame = Frame(left=10, top=20, width=100, height=50, x_range=(0, 10), y_range=(0, 1))
    assert (frame.x(0), frame.x(5), frame.x(10)) == (10, 60, 110)
    assert (frame.y(0), frame.y(0.5), frame.y(1)) == (70, 45, 20)
    assert frame.y(7) == 20  # drawn at the edge, never outside


def test_chart_is_xml_with_band_legend_and_reference():
    x = [0, 9, 18]
    svg = line_chart(
        [
            Series(label="strict <b>", x=x, y=[0.4, 0.5, 0.6], low=[0.3, 0.4, 0.5], high=[0.5, 0.6, 0.7]),
            Series(label="partial", x=x, y=[0.6, 0.7, 0.8]),
        ],
        title="held out & scored",
        reference=(0.4, "base"),
        standalone=True,
    )
    root = ET.fromstring(svg)
    texts = [node.text for node in root.iter(f"{SVG}text")]
    assert {"strict <b>", "partial", "base", "held out & scored", "update"} <= set(texts)
    assert len(root.findall(f".//{SVG}polygon")) == 1
    assert len(root.findall(f".//{SVG}polyline")) == 2
    assert root.attrib["aria-label"].startswith("held out & scored. strict <b>: 0.4 at 0, 0.6 at 18")
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


def test_series_differ_without_colour():
    svg = line_chart([Series(label=str(i), x=[0, 1], y=[i, i + 1]) for i in range(4)])
    lines = re.findall(r"<polyline[^>]*>", svg)
    dashes = [re.search(r'stroke-dasharray="([^"]*)"', line) for line in lines]
    assert len({match.group(1) if match else "" for match in dashes}) == 4


def test_a_gap_breaks_the_line():
    svg = line_chart([Series(label="a", x=range(5), y=[1, 2, math.nan, 2, 1])])
    assert svg.count("<polyline") == 2
    assert "nan" not in svg


def test_nothing_to_draw_says_so():
    assert "loss: no data" in line_chart([Series(label="a", x=[0], y=[math.nan])], y_label="loss")
    assert "no data" in line_chart([])


def test_one_point_is_a_marker_with_its_interval():
    svg = line_chart([Series(label="a", x=[3], y=[0.5], low=[0.4], high=[0.6])])
    assert "a: 0.5 [0.4, 0.6] at 3" in svg


def test_thinning_keeps_spikes_and_ends():
    y = [0.0] * 10_000
    y[1234], y[7777] = 5.0, -5.0
    kept = thin(Series(label="a", x=range(10_000), y=y))
    assert len(kept.x) <= 402
    assert (max(kept.y), min(kept.y)) == (5.0, -5.0)
    assert (kept.x[0], kept.x[-1]) == (0, 9_999)


def test_a_band_needs_both_bounds():
    with pytest.raises(ValueError, match="both bounds"):
        Series(label="a", x=[0], y=[1], low=[0])
    with pytest.raises(ValueError, match="2 x for 1 y"):
        Series(label="a", x=[0, 1], y=[1])
