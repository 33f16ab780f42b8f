"""Does a run fit, and what is the smallest change that makes it fit: counted on the embedded pipeline."""

from __future__ import annotations

import shlex
from pathlib import Path

import attrs
import pytest
import yaml

from rlt2i.cli import main
from rlt2i.policies.cost import Plan
from rlt2i.recipes import Recipe, load_recipe
from rlt2i.training import fitting
from rlt2i.training.dry_run import batch_plan, plan_of
from rlt2i.training.fitting import (
    CONTEXT,
    DEVICES,
    GIB,
    UTILISATION,
    Device,
    DoesNotFitError,
    find_device,
    fit,
    needed,
    overrides,
    seconds_per_iteration,
    tight_phases,
)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("star-cells", ["train.micro_batch_size=32", "train.rollout_batch_size=48"])


@pytest.fixture(scope="module")
def counted(recipe: Recipe) -> Plan:
    return plan_of(recipe, batch_plan(recipe, world_size=1))


def device_for(peak: float) -> Device:
    return Device(name="made up", memory=needed(peak))


@pytest.mark.parametrize(
    ("text", "gib"), [("24GB", 24), ("24 GiB", 24), ("24g", 24), ("79.5GB", 79.5), ("rtx4090", 24), ("H100", 80)]
)
def test_devices_are_found_by_memory_and_by_name(text: str, gib: float):
    assert find_device(text).memory == gib * GIB


@pytest.mark.parametrize("text", ["0GB", "rtx4091", "much", "-3GB", ""])
def test_other_devices_are_refused_with_those_that_exist(text: str):
    with pytest.raises(ValueError, match=r"write its memory.*h100"):
        find_device(text)


def test_a_run_that_fits_is_left_alone(recipe: Recipe, counted: Plan):
    device = device_for(max(counted.memory.values()))
    assert tight_phases(counted, device) == []
    same, plan = fit(recipe, device, counted=counted)
    assert same == recipe
    assert plan is counted


def test_text_encoders_leave_first_and_nothing_else_changes_where_that_suffices(recipe: Recipe, counted: Plan):
    rest = max(counted.memory["rollout"], counted.memory["update"]) - counted.resident["text encoders"]
    changed, plan = fit(recipe, device_for(max(rest, counted.memory["encode"])), counted=counted)
    assert overrides(recipe, changed) == ["policy.text_encoders=cpu"]
    assert plan.memory == plan_of(changed, batch_plan(changed, world_size=1)).memory  # arithmetic agrees with a count


def test_batches_are_halved_only_in_the_phase_that_is_tight_and_no_further_than_needed(recipe: Recipe, counted: Plan):
    without = {phase: peak - counted.resident["text encoders"] for phase, peak in counted.memory.items()}
    assert without["update"] > 1.2 * max(without["rollout"], counted.memory["encode"])
    device = device_for(0.8 * without["update"])
    changed, plan = fit(recipe, device, counted=counted)
    assert tight_phases(plan, device) == []
    assert changed.train.rollout_batch_size == recipe.train.rollout_batch_size
    assert changed.train.micro_batch_size < recipe.train.micro_batch_size
    twice = attrs.evolve(changed.train, micro_batch_size=2 * changed.train.micro_batch_size)
    larger = attrs.evolve(changed, train=twice)
    assert tight_phases(plan_of(larger, batch_plan(larger, world_size=1)), device) == ["update"]


def test_what_cannot_fit_says_what_takes_the_memory(recipe: Recipe, counted: Plan):
    with pytest.raises(DoesNotFitError, match=r"encode takes .* GiB even .*stays in memory: .*lora_rank"):
        fit(recipe, Device(name="tiny", memory=CONTEXT + 1), counted=counted)


def test_time_is_arithmetic_over_a_share_of_the_stated_rate(counted: Plan):
    flops = counted.rollout_flops + 96 * counted.decode_flops + counted.update_flops
    assert seconds_per_iteration(counted, 96, DEVICES["h100"]) == pytest.approx(flops / (989e12 * UTILISATION))
    assert seconds_per_iteration(counted, 96, find_device("24GB")) is None


def test_the_command_says_whether_it_fits_and_writes_a_recipe_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, counted: Plan
):
    settings = ["--set", "train.micro_batch_size=32", "--set", "train.rollout_batch_size=48"]
    as_it_is = tmp_path / "as_it_is.yaml"
    assert main(["plan", "star-cells", *settings, "--gpu", "rtx4090", "--out", str(as_it_is)]) == 2
    assert "say --fit DEVICE as well" in capsys.readouterr().err
    assert main(["plan", "star-cells", *settings, "--fit", "rtx4090", "--out", str(as_it_is)]) == 0
    assert "fits in 24 GB (rtx4090)" in capsys.readouterr().out
    assert load_recipe(as_it_is).train.micro_batch_size == 32
    short = Device(name="short", memory=needed(0.8 * (counted.memory["update"] - counted.resident["text encoders"])))
    monkeypatch.setattr(fitting, "find_device", lambda text: short)
    out = tmp_path / "mine.yaml"
    assert main(["plan", "star-cells", *settings, "--gpu", "x"]) == 1
    assert main(["plan", "star-cells", *settings, "--fit", "x", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "--set policy.text_encoders=cpu" in said
    assert yaml.safe_load(out.read_text())["policy"]["text_encoders"] == "cpu"
    assert load_recipe(out).train.micro_batch_size < 32


def test_the_command_counts_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, counted: Plan):
    from rlt2i.training import dry_run

    counts = []
    monkeypatch.setattr(dry_run, "plan_of", lambda *_: counts.append(1) or counted)
    assert main(["plan", "star-cells", "--fit", "24GB"]) == 0
    assert len(counts) == 1
    assert "\nfits in 24 GB: " in capsys.readouterr().out


def test_what_is_printed_can_be_pasted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, counted: Plan
):
    short = Device(name="short", memory=needed(0.8 * (counted.memory["update"] - counted.resident["text encoders"])))
    monkeypatch.setattr(fitting, "find_device", lambda text: short)
    sizes = "train.image_size=[32, 32]"
    assert main(["plan", "star-cells", "--set", "train.micro_batch_size=32", "--set", sizes, "--fit", "x"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  rlt2i train"))
    assert sizes in shlex.split(line)
