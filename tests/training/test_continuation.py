"""A run goes on from whatever ended it, with what may change changed and with what may not refused."""

from __future__ import annotations

import json
import signal

import attrs
import pytest
import torch

from rlt2i.evaluation.inspection import load_policy
from rlt2i.runs.belonging import continuity
from rlt2i.runs.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from rlt2i.runs.metrics import read_metrics
from rlt2i.tasks.promptfile import PromptFileTask
from rlt2i.training.start import train
from rlt2i.training.trainer import Trainer
from tests.helpers import toy_recipe
from tests.helpers.toy import ToyPolicy, ToySpec


def small(**train: object):
    """One group of two, no second optimizer step, no evaluation unless asked for."""
    least = {
        "iterations": 2,
        "prompts_per_iteration": 2,
        "group_size": 2,
        "optimizer_steps_per_iteration": 1,
        "eval_prompts": 0,
        "checkpoint_every": 10,
    }
    return toy_recipe.clipped(**(least | train))


def test_resume_on_a_directory_without_a_checkpoint_starts(tmp_path, capsys):
    train(small(iterations=1), tmp_path / "run", resume="latest")
    assert "no checkpoint yet, so the run starts at the beginning" in capsys.readouterr().out
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-00000001"


def test_a_run_that_failed_before_its_first_checkpoint_may_be_started_again(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("no such weights")

    with monkeypatch.context() as patch:
        patch.setattr(ToySpec, "load", fails)
        with pytest.raises(RuntimeError, match="no such weights"):
            train(small(iterations=1), tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").exists()
    train(small(iterations=1, learning_rate=0.01), tmp_path / "run")
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [1]


@pytest.mark.parametrize(
    ("where", "error"),
    [("_collect", ZeroDivisionError("x")), ("_judge", MemoryError()), ("_keep_maps", KeyboardInterrupt())],
)
def test_any_exception_leaves_the_last_finished_iteration(tmp_path, monkeypatch, where, error):
    """Bit for bit the checkpoint of a run that was not disturbed."""
    whole = small(eval_prompts=2, eval_steps=1, eval_every=1)
    train(whole, tmp_path / "whole")
    plain = getattr(Trainer, where)

    def fails(self: Trainer, *args: object, **kwargs: object) -> object:
        if self.iteration == 1:
            raise error
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, where, fails)
    with pytest.raises(type(error)):
        train(whole, tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-00000001"
    monkeypatch.undo()
    train(whole, tmp_path / "run", resume="latest")
    one, two = (load_checkpoint(tmp_path / name / "checkpoint-00000002") for name in ("whole", "run"))
    for group in one.tensors:
        for name, value in one.tensors[group].items():
            assert torch.equal(value, two.tensors[group][name]), (group, name)


def test_a_signal_in_an_evaluation_saves_at_once_and_the_weights_are_judged_after_the_resume(tmp_path, monkeypatch):
    recipe = small(eval_prompts=4, eval_steps=1, eval_every=1, rollout_batch_size=2)
    plain, calls = ToyPolicy.velocity, []

    def velocity(self: ToyPolicy, latents, sigma, conditioning):
        if len(latents) == 2 and not torch.is_grad_enabled() and (tmp_path / "run" / "maps").exists():
            calls.append(1)
            if len(calls) == 1:
                signal.raise_signal(signal.SIGHUP)
        return plain(self, latents, sigma, conditioning)

    monkeypatch.setattr(ToyPolicy, "velocity", velocity)
    train(recipe, tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-00000001"
    monkeypatch.undo()
    train(recipe, tmp_path / "run", resume="latest")
    assert [r["step"] for r in read_metrics(tmp_path / "run", "eval")] == [0, 1, 2]


def test_evaluation_files_that_are_missing_or_damaged_are_made_again(tmp_path, capsys):
    recipe = small(eval_prompts=2, eval_steps=1, iterations=1)
    train(recipe, tmp_path / "run")
    images = tmp_path / "run" / "images"
    kept = (images / "eval-000000.safetensors").read_bytes()
    (images / "eval-000000.safetensors").write_bytes(b"")
    (images / "eval-000001.safetensors").unlink()
    train(attrs.evolve(recipe, train=attrs.evolve(recipe.train, iterations=2)), tmp_path / "run", resume="latest")
    assert "The starting weights are judged again" in capsys.readouterr().out
    assert (images / "eval-000000.safetensors").read_bytes() == kept
    last = read_metrics(tmp_path / "run", "eval")[-1]
    assert last["step"] == 2
    assert "eval/strict_gain" in last


def test_batch_sizes_may_change_on_resume_and_one_line_says_so(tmp_path, capsys):
    train(small(iterations=1, eval_prompts=2, eval_steps=1), tmp_path / "run")
    changed = small(eval_prompts=4, eval_steps=2, micro_batch_size=3, rollout_batch_size=2)
    train(changed, tmp_path / "run", resume="latest")
    said = capsys.readouterr().out
    assert "train.micro_batch_size 16 -> 3: the continuation is no longer bit for bit" in said
    assert "eval/strict_gain" in read_metrics(tmp_path / "run", "eval")[-1]
    with pytest.raises(CheckpointError, match="another recipe"):
        train(small(learning_rate=0.01), tmp_path / "run", resume="latest")


def test_changed_data_are_refused_on_resume_unless_accepted_and_then_written_down(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a bright corner {i}\n" for i in range(12)))
    recipe = attrs.evolve(small(iterations=1), task=PromptFileTask(train=str(prompts)))
    train(recipe, tmp_path / "run")
    longer = attrs.evolve(recipe, train=attrs.evolve(recipe.train, iterations=2))
    assert continuity(longer) == continuity(recipe)
    prompts.write_text("".join(f"a red corner {i}\n" for i in range(12)))
    with pytest.raises(ValueError, match=r"task\.train: .*prompts\.txt has other content"):
        train(longer, tmp_path / "run", resume="latest")
    train(longer, tmp_path / "run", resume="latest", accept_changes=True)
    started = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert "prompts.txt has other content" in started["resumed"][-1]["accepted_changes"][0]


def test_checkpoints_of_another_run_are_refused(tmp_path):
    train(small(iterations=1), tmp_path / "run")
    train(attrs.evolve(small(iterations=1), policy=ToySpec(seed=5)), tmp_path / "other")
    theirs = tmp_path / "other" / "checkpoint-00000001"
    with pytest.raises(CheckpointError, match="not a checkpoint of the run"):
        load_policy(small(), run_dir=tmp_path / "run", checkpoint=theirs)
    with pytest.raises(CheckpointError, match="trained from another policy"):
        load_policy(small(), checkpoint=theirs)


@pytest.mark.parametrize("damage", ["state", "shape", "name", "set"])
def test_forged_checkpoints_are_refused_with_a_reason(tmp_path, damage):
    train(small(iterations=1), tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-00000001"
    loaded = load_checkpoint(path)
    tensors, state = {k: dict(v) for k, v in loaded.tensors.items()}, dict(loaded.state)
    if damage == "state":
        del state["optimizer_step"]
    elif damage == "shape":
        tensors["online"]["bias"] = tensors["online"]["bias"][:1]  # would broadcast
    elif damage == "name":
        tensors["online"]["bios"] = tensors["online"].pop("bias")
    else:
        del tensors["optimizer"]
    save_checkpoint(tmp_path / "run", 1, tensors=tensors, state=state, export=None, keep=1)
    with pytest.raises(CheckpointError, match=r"checkpoint-00000001"):
        train(small(), tmp_path / "run", resume="latest")
    if damage in ("shape", "name"):
        with pytest.raises(CheckpointError, match="weights of another one"):
            load_policy(small(), run_dir=tmp_path / "run", weights="online")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trackers": ("trackio",)}, "trackio"),
        ({"eval_prompts": 3}, "no multiple"),
    ],
)
def test_what_can_be_known_early_is_said_before_anything_is_loaded_or_written(tmp_path, monkeypatch, change, message):
    def refuses(self: object, count: int) -> list[object]:
        raise ValueError("no multiple")

    def never(*_: object) -> None:
        raise AssertionError("weights were loaded")

    recipe = small(**change)
    monkeypatch.setattr(ToySpec, "load", never)
    monkeypatch.setattr(type(recipe.task), "eval_prompts", refuses)
    with pytest.raises(ValueError, match=message):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
