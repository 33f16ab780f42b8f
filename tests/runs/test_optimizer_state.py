"""Optimizer state through safetensors and JSON: bit for bit, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlt2i.runs.checkpoint import (
    generator_state,
    load_checkpoint,
    optimizer_tensors,
    restore_generator,
    restore_optimizer,
    save_checkpoint,
)


def _save(run: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, object]) -> Path:
    return save_checkpoint(run, 3, tensors=tensors, state=state, export=None, keep=1)


def _model(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 4), "a.bias": (3,), "b/odd.name": (2, 2)}
    return {k: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for k, s in shapes.items()}


def _adamw(model: dict[str, nn.Parameter], order: list[str], **options) -> torch.optim.AdamW:
    decay = [{"params": [model[k] for k in order if "bias" not in k], "weight_decay": 0.1}]
    rest = [{"params": [model[k] for k in order if "bias" in k], "weight_decay": 0.0}]
    return torch.optim.AdamW(decay + rest if order[0] == "a.weight" else rest + decay, lr=0.05, **options)


def _train(model: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for number, parameter in enumerate(model.values()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


_ORDER = ["a.weight", "a.bias", "b/odd.name"]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "betas": (0.8, 0.99)}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_through_files_continues_bit_for_bit(tmp_path, options, dtype):
    straight = _model(dtype=dtype)
    _train(straight, _adamw(straight, _ORDER, **options), range(6))

    first = _model(dtype=dtype)
    optimizer = _adamw(first, _ORDER, **options)
    optimizer.param_groups[0]["lr"] = 0.05  # as a schedule would
    _train(first, optimizer, range(3))
    tensors, state = optimizer_tensors(optimizer, first)
    path = _save(tmp_path, {"online": dict(first), "optimizer": tensors}, {"optimizer": state})

    loaded = load_checkpoint(path)
    second = _model(seed=1, dtype=dtype)
    for name, parameter in second.items():
        parameter.data.copy_(loaded.tensors["online"][name])
    # Other order of groups and parameters, other hyper-parameters: names decide, the checkpoint wins.
    other = _adamw(second, _ORDER[::-1], **{**options, "betas": (0.1, 0.2)})
    restore_optimizer(other, second, loaded.tensors["optimizer"], loaded.state["optimizer"])
    _train(second, other, range(3, 6))
    for name in straight:
        assert torch.equal(straight[name], second[name]), name
    assert isinstance(other.param_groups[0]["betas"], tuple)


def test_optimizer_tensors_by_name():
    model = _model()
    optimizer = _adamw(model, _ORDER)
    assert optimizer_tensors(optimizer, model)[0] == {}
    _train(model, optimizer, range(1))
    tensors, state = optimizer_tensors(optimizer, model)
    assert sorted(tensors) == sorted(f"{n}/{k}" for n in model for k in ("exp_avg", "exp_avg_sq", "step"))
    # After one step, exp_avg = (1 - 0.9) g.
    assert model["a.bias"].grad is not None
    torch.testing.assert_close(tensors["a.bias/exp_avg"], 0.1 * model["a.bias"].grad)
    assert tensors["a.bias/step"].item() == 1.0
    assert [g["parameters"] for g in state["groups"]] == [["a.weight", "b/odd.name"], ["a.bias"]]
    assert [g["options"]["weight_decay"] for g in state["groups"]] == [0.1, 0.0]
    assert json.loads(json.dumps(state))["optimizer"] == "AdamW"


def test_restored_state_is_a_copy_and_a_tensor_rate_keeps_its_identity():
    model = _model()
    optimizer = torch.optim.AdamW(model.values(), lr=torch.tensor(0.05))
    _train(model, optimizer, range(2))
    tensors, state = optimizer_tensors(optimizer, model)
    other = torch.optim.AdamW(model.values(), lr=torch.tensor(0.5))
    rate = other.param_groups[0]["lr"]
    restore_optimizer(other, model, tensors, state)
    assert other.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.05)
    before = tensors["a.bias/step"].item(), tensors["a.bias/exp_avg"].clone()
    _train(model, other, range(1))
    assert tensors["a.bias/step"].item() == before[0]
    assert torch.equal(tensors["a.bias/exp_avg"], before[1])


def test_optimizer_state_of_another_run_is_refused():
    model = _model()
    optimizer = _adamw(model, _ORDER)
    _train(model, optimizer, range(1))
    tensors, state = optimizer_tensors(optimizer, model)
    with pytest.raises(ValueError, match="holds the state of AdamW, this run uses SGD"):
        restore_optimizer(torch.optim.SGD(model.values(), lr=1.0), model, tensors, state)
    with pytest.raises(ValueError, match="2 parameter groups differ from this run's 1"):
        restore_optimizer(torch.optim.AdamW(model.values()), model, tensors, state)
    renamed = {k.replace("a.", "c."): v for k, v in model.items()}
    with pytest.raises(ValueError, match=r"differ from this run's 2, first at 'a.bias'"):
        restore_optimizer(_adamw(model, _ORDER), renamed, tensors, state)
    with pytest.raises(ValueError, match=r"'a.bias/exp_avg' has shape \[5\], its parameter \[3\]"):
        restore_optimizer(optimizer, model, {**tensors, "a.bias/exp_avg": torch.zeros(5)}, state)
    assert torch.equal(optimizer.state[model["a.bias"]]["exp_avg"], tensors["a.bias/exp_avg"])
    with pytest.raises(ValueError, match=r"parameter 0 of group 1, shape \[3\], has no name"):
        optimizer_tensors(optimizer, {k: v for k, v in model.items() if k != "a.bias"})


def test_generator_state_round_trip(tmp_path):
    generator = torch.Generator().manual_seed(5)
    torch.randn(7, generator=generator)
    path = _save(tmp_path, {"rng": {"shuffle": generator_state(generator)}}, {})
    expected = torch.randn(9, generator=generator)
    other = torch.Generator()
    restore_generator(other, load_checkpoint(path).tensors["rng"]["shuffle"])
    assert torch.equal(torch.randn(9, generator=other), expected)
    with pytest.raises(ValueError, match=r"got torch.uint8 \[16\], a cpu generator has torch.uint8"):
        restore_generator(other, torch.zeros(16, dtype=torch.uint8))
