"""The scripts that measure speed do their work at a size where no number means anything."""

from __future__ import annotations

import pytest

from benchmarks import gpu, side_by_side


def test_gpu_measures_every_section_on_a_toy_network(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "compile_blocks", lambda blocks: None)
    page = tmp_path / "gpu.md"
    table = gpu.main(["--tiny", "--batches", "2", "--out", str(page)])
    rows = dict(table.rows)
    assert not [row for row in table.rows if row[1].startswith(("failed", "not run"))], table.rows
    for how in ("eager", "compiled"):
        assert "images/s" in rows[f"rollout, {how}, 2 images"]
        assert rows[f"update, {how}, micro-batch 2, |ratio - 1| at most"] == "0.0e+00"
    assert all(f"| {name} | {value} |" in page.read_text(encoding="utf-8") for name, value in table.rows)


def test_gpu_says_what_failed_and_what_was_not_run():
    table = gpu.Table(budget=60)
    table.section("broken", lambda: (_ for _ in ()).throw(ValueError("no such kernel")))
    table.budget = -1
    table.section("late", lambda: iter([("never", "1")]))
    assert table.rows[0] == ("broken", "failed: ValueError: no such kernel")
    assert table.rows[1][0] == "late"
    assert table.rows[1][1].startswith("not run: ")


def test_a_real_size_network_has_the_parameters_of_sd35_medium():
    spec = gpu._Scaled(path="stabilityai/stable-diffusion-3.5-medium", dtype="bfloat16", scale=gpu.Scale())
    network = gpu._Policy.on_meta(spec).network
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_243_171_520


def test_side_by_side_names_the_peers_that_are_not_there(monkeypatch, capsys):
    monkeypatch.delenv("PEERS", raising=False)
    found = side_by_side.main(["--images", "2", "--rounds", "1", "--width", "32", "--size", "32"])
    assert set(found) == {"rlt2i", "rlt2i, with maps"}
    assert found["rlt2i"] == (1.0, 1.0, 1.0)
    said = capsys.readouterr().out
    assert "flow_grpo: not timed" in said
    assert "Flow-Factory: not timed" in said


@pytest.mark.parametrize("name", ["flow_grpo", "Flow-Factory"])
def test_a_peer_that_does_not_import_is_named_with_the_reason(name, tmp_path, monkeypatch, capsys):
    (tmp_path / name).mkdir()
    monkeypatch.setenv("PEERS", str(tmp_path))
    monkeypatch.setattr(side_by_side, "measure", lambda arms, rounds: {arm.name: [(1.0, 1.0)] for arm in arms})
    assert set(side_by_side.main(["--images", "2", "--width", "32", "--size", "32"])) == {"rlt2i", "rlt2i, with maps"}
    assert f"{name}: not timed, ModuleNotFoundError" in capsys.readouterr().out
