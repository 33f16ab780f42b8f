"""Text of others cannot change the order of what is around it, nor run in a spreadsheet."""

from __future__ import annotations

import io
import sys

import pytest

from rlt2i.cli import main
from rlt2i.inputs.display import VisibleStream, cell, visible

CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_controls_are_spelt_out():
    assert visible("a\u202eb\u2066c") == "a\\u202eb\\u2066c"
    assert len(visible(CONTROLS)) == 6 * len(CONTROLS)
    # Joiners are part of words and of emoji; letters of scripts that run to the left are shown as they are.
    assert visible("\u200d \u0645\u0631\u062d\u0628\u0627") == "\u200d \u0645\u0631\u062d\u0628\u0627"
    assert visible(3.5) == 3.5


def test_a_formula_becomes_text_and_a_number_stays_a_number():
    assert [cell(v) for v in ("=1+1", "+x", "-0.5", "@x", " =1", "star", "", -0.5, None)] == [
        "'=1+1", "'+x", "'-0.5", "'@x", "' =1", "star", "", -0.5, None
    ]  # fmt: skip


def test_a_stream_is_the_stream_but_for_its_text():
    under = io.StringIO()
    stream = VisibleStream(under)
    assert stream.write("x\u202ey") == 3
    assert under.getvalue() == "x\\u202ey"
    assert stream.isatty() is False
    stream.flush()


def test_the_command_line_prints_no_control(capsys: pytest.CaptureFixture[str]):
    before = (sys.stdout, sys.stderr)
    assert main(["train", "star\u202eshapes"]) == 2
    printed = "".join(capsys.readouterr())
    assert "\\u202e" in printed
    assert "\u202e" not in printed
    assert (sys.stdout, sys.stderr) == before
