"""What the terminal shows."""

from __future__ import annotations

import io
import re

import pytest
import torch

from rlt2i.runs.terminal import Progress, summary_line

WIDTH = 160

METRICS = {
    "reward/mean": 0.51342,
    "reward/spread": torch.tensor(0.301),
    "clip/low": 0.012,
    "clip/high": 0.125,
    "ratio/abs_minus_one_max": 1.5e-5,
    "grad_norm": 0.8,
    "kl/base": 2e-4,
    "map/entropy": 4.61,
    "seconds/rollout": 5.12,
    "seconds/reward": 0.2,
    "seconds/update": 4.2,
    "eval/reward": 0.9,
    "eval/strict": 0.47,
}


def test_summary_line():
    assert summary_line(12, METRICS) == (
        "#12     reward  0.513  spread  0.301  clip   1.2/ 12.5%  |r-1| 1.5e-05  grad  0.800  KL 2.0e-04"
        "  entropy  4.610  9.5 s: rollout 5.1 update 4.2  held-out  0.470"
    )
    assert summary_line(0, {"eval/reward": 0.5}) == "#0      held-out  0.500"
    assert "nan" in summary_line(1, {"reward/mean": float("nan")})


def test_summary_lines_align_and_fit():
    wild = {**METRICS, "reward/mean": -23.6, "grad_norm": 1e-9, "kl/base": 123.0, "clip/low": 1.0}
    wild |= {f"seconds/phase{i}": 1e4 for i in range(9)}
    one, other = summary_line(1, METRICS), summary_line(99_999, wild)
    assert len(one) <= WIDTH
    assert len(other) <= WIDTH
    assert one.index("entropy") == other.index("entropy")
    assert "reward -23.60 " in other
    assert "grad  1e-09 " in other
    train = {k: v for k, v in METRICS.items() if not k.startswith("eval/")}
    assert summary_line(1, train).endswith("entropy  4.610  9.5 s: rollout 5.1 reward 0.2 update 4.2")
    assert len(summary_line(1, train)) <= WIDTH


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_moves_on_a_terminal_and_is_silent_elsewhere():
    terminal, file = _Terminal(), io.StringIO()
    for stream in (terminal, file):
        with Progress(stream, interval=0).phase("rollout", total=4) as advance:
            advance(1)
            advance(3)
    assert file.getvalue() == ""
    drawn = [line for line in terminal.getvalue().split("\r") if line.strip()]
    assert [re.search(r"^rollout .* (\d)/4 ", line)[1] for line in drawn] == ["0", "1", "4"]
    assert terminal.getvalue().endswith("\r")  # what follows overwrites the line
    assert terminal.getvalue().split("\r")[-2].strip() == ""


def test_progress_is_erased_by_an_exception_and_draws_seldom():
    terminal = _Terminal()

    def body() -> None:
        with Progress(terminal, interval=60).phase("reward") as advance:
            for _ in range(1000):
                advance(1)
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        body()
    first, *rest = [line for line in terminal.getvalue().split("\r") if line]
    assert first.startswith("reward  : 0it")
    assert "".join(rest).strip() == ""
