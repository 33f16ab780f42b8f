"""The pictures of docs/credit.md are drawn from real credit."""

from __future__ import annotations

import re

import torch

from benchmarks.credit_figures import PAGE, SPACE, TIME, _bars, paged
from rlt2i.recipes import PARTS


def test_the_page_tabulates_every_allocation_of_the_script():
    text = PAGE.read_text(encoding="utf-8")
    for name, allocation in (SPACE | TIME).items():
        assert re.search(rf"^\| `{re.escape(name)}` \| {allocation.causality} \|", text, flags=re.MULTILINE), name


def test_the_page_mentions_every_allocation():
    text = PAGE.read_text(encoding="utf-8")
    missing = [name for name in PARTS["Allocation"] if name not in text]
    assert not missing, missing


def test_the_table_is_replaced_and_the_rest_stays():
    before = "a\n<!-- table: python -m benchmarks.credit_figures -->\nold\n<!-- end of table -->\nb\n"
    after = paged(before, ["| `X` | state | steps | 1 | 1 | 1 |"])
    assert after.startswith("a\n<!-- table")
    assert after.endswith("<!-- end of table -->\nb\n")
    assert "old" not in after
    assert "| `X` | state" in after
    assert paged(after, ["| `X` | state | steps | 1 | 1 | 1 |"]) == after


def test_a_bar_is_as_tall_as_its_weight_and_a_masked_step_is_a_frame():
    drawn = _bars([("w", [2.0, 1.0, None])], torch.linspace(1, 0.2, 3).tolist())
    path = r'<path d="M \S+ ([\d.]+) L \S+ \S+ L \S+ ([\d.]+)[^"]*" clip-path="[^"]*" style="fill: #(?!ffffff)'
    heights = [float(foot) - float(top) for foot, top in re.findall(path, drawn)]
    assert len(heights) == 2
    assert abs(heights[0] - 2 * heights[1]) < 0.11
    assert drawn.count("stroke-dasharray") == 1
