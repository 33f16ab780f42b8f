"""Named parameter sets: pointers move, values and gradients do not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.tensor
from torch import nn

from rlt2i.parameter_sets import ParameterSets


def _sets(*values: float, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], ParameterSets]:
    parameters = [nn.Parameter(torch.full((2,), v, dtype=dtype)) for v in values]
    return parameters, ParameterSets({f"layer.{i}": p for i, p in enumerate(parameters)})


def test_use_exchanges_storage_and_puts_it_back():
    (p,), sets = _sets(1.0)
    sets.add("old")
    p.data.fill_(5.0)
    storage = p.data_ptr()
    with sets.use("old"):
        assert p.tolist() == [1.0, 1.0]
        assert p.data_ptr() == sets.values("old")["layer.0"].data_ptr()  # a pointer, no copy
        assert sets.values("online")["layer.0"].tolist() == [5.0, 5.0]
    assert p.tolist() == [5.0, 5.0]
    assert p.data_ptr() == storage


def test_use_restores_after_an_exception():
    (p,), sets = _sets(1.0)
    sets.add("old")
    p.data.fill_(5.0)
    with pytest.raises(KeyError, match="boom"), sets.use("old"):
        raise KeyError("boom")
    assert p.tolist() == [5.0, 5.0]
    sets.blend("old", keep=0.5)  # nothing is in force any more


def test_sets_nest_and_online_means_online_everywhere():
    (p,), sets = _sets(1.0)
    sets.add("reference")
    p.data.fill_(2.0)
    sets.add("old")
    p.data.fill_(3.0)
    seen = []
    with sets.use("online"), sets.use("reference"):
        seen.append(p[0].item())
        with sets.use("old"):
            seen.append(p[0].item())
            with sets.use("online"):
                seen.append(p[0].item())
            seen.append(p[0].item())
        seen.append(p[0].item())
    assert [*seen, p[0].item()] == [1.0, 2.0, 3.0, 2.0, 1.0, 3.0]


def test_nested_use_of_one_set_is_refused():
    _, sets = _sets(1.0)
    sets.add("old")
    with (
        sets.use("old"),
        pytest.raises(ValueError, match=r"already in force \(online > old\)"),
        sets.use("old"),
    ):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.add("x"),
        lambda s: s.blend("old", 0.5),
        lambda s: s.distance("old"),
        lambda s: s.load("old", {}),
    ],
)
def test_changes_inside_a_block_are_refused(call):
    _, sets = _sets(1.0)
    sets.add("old")
    with sets.use("old"), pytest.raises(ValueError, match="'old' is in force"):
        call(sets)


def test_gradients_do_not_notice_a_swap():
    # loss = sum(p * p): gradient 2 p of the *online* values, whatever was in force in between.
    (p,), sets = _sets(1.0)
    sets.add("reference")
    p.data.fill_(5.0)
    loss = (p * p).sum()
    with sets.use("reference"):
        reference = (p.detach() * 1).clone()
    loss.backward()
    assert reference.tolist() == [1.0, 1.0]
    assert p.grad is not None
    assert p.grad.tolist() == [10.0, 10.0]
    gradient = p.grad
    with sets.use("reference"):
        assert p.grad is gradient
        (p * p).sum().backward()  # a graph built and used inside: 2 * 1 is added
    assert p.grad.tolist() == [12.0, 12.0]


@pytest.mark.parametrize(("built", "used"), [("online", "old"), ("old", "online"), ("old", "ema")])
def test_backward_under_another_set_is_an_error_not_a_wrong_gradient(built, used):
    (p,), sets = _sets(1.0)
    sets.add("old")
    sets.add("ema")
    with sets.use(built):
        loss = (p * p).sum()
    with sets.use(used), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_optimizer_step_inside_a_block_is_reported():
    (p,), sets = _sets(1.0)
    sets.add("old")
    optimizer = torch.optim.SGD([p], lr=0.5)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="changed in place"), sets.use("old"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]
    optimizer.step()
    assert p.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("keep", "expected"), [(0.0, 3.0), (0.25, 2.5), (0.75, 1.5), (1.0, 1.0)])
def test_blend_by_hand(keep, expected):
    (p,), sets = _sets(1.0)
    sets.add("ema")
    p.data.fill_(3.0)
    sets.blend("ema", keep)
    assert sets.values("ema")["layer.0"].tolist() == [expected, expected]
    assert p.tolist() == [3.0, 3.0]


def test_blend_of_equal_values_is_exact():
    p = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    sets = ParameterSets({"p": p})
    sets.add("ema")
    for _ in range(10):
        sets.blend("ema", 0.999)
    assert torch.equal(sets.values("ema")["p"], p)


def test_bfloat16_average_moves_in_float32():
    # Next to 1.0 a bfloat16 steps by 2^-8 = .0039; an average that moves by .001 would stay for ever.
    (p,), sets = _sets(1.0, dtype=torch.bfloat16)
    sets.add("ema")
    p.data.fill_(2.0)
    for _ in range(10):
        sets.blend("ema", 0.999)
    torch.testing.assert_close(sets.values("ema")["layer.0"], torch.full((2,), 2 - 0.999**10))
    with sets.use("ema"):
        assert p.dtype is torch.bfloat16
        assert p.tolist() == [1.0078125, 1.0078125]  # 1.00996 rounded to steps of 2^-7
    assert p.tolist() == [2.0, 2.0]


def test_distance_by_hand():
    # set = (3, 3, 4, 4), norm sqrt(50); online - set = (1, 1, 0, 0), norm sqrt(2): sqrt(2 / 50) = 0.2.
    (first, _), sets = _sets(3.0, 4.0)
    sets.add("reference")
    assert sets.distance("reference").item() == 0.0
    first.data.add_(1.0)
    torch.testing.assert_close(sets.distance("reference"), torch.tensor(0.2))
    assert not sets.distance("reference").requires_grad


def test_distance_to_a_zero_set():
    (p,), sets = _sets(0.0)
    sets.add("reference")
    assert sets.distance("reference").item() == 0.0
    p.data.fill_(1.0)
    assert sets.distance("reference").item() == float("inf")


def test_state_round_trip_is_exact():
    (p, _), sets = _sets(1.0, 2.0)
    sets.add("old")
    sets.add("ema")
    p.data.fill_(3.0)
    sets.blend("ema", 0.3)
    state = {k: v.clone() for k, v in sets.state().items()}
    assert list(state) == ["old/layer.0", "old/layer.1", "ema/layer.0", "ema/layer.1"]
    _, other = _sets(0.0, 0.0)
    other.add("ema")
    other.add("old")
    other.load_state(state)
    assert all(torch.equal(other.state()[k], v) for k, v in state.items())


def test_load_online_keeps_the_parameter_and_its_storage():
    (p,), sets = _sets(1.0)
    storage = p.data_ptr()
    sets.load("online", {"layer.0": torch.tensor([7.0, 8.0])})
    assert p.tolist() == [7.0, 8.0]
    assert p.data_ptr() == storage
    assert p.requires_grad


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layer.0": torch.zeros(2)}, "'layer.1' is missing from"),
        (
            {"layer.0": torch.zeros(2), "layer.1": torch.zeros(2), "z": torch.zeros(2)},
            "'z' is unknown to this policy",
        ),
        (
            {"layer.0": torch.zeros(2), "layer.1": torch.zeros(3)},
            r"'layer.1' is torch.float32 \[3\], expected",
        ),
        ({"layer.0": torch.zeros(2), "layer.1": torch.zeros(2).double()}, "'layer.1' is torch.float64"),
    ],
)
def test_load_of_other_tensors_is_refused_and_changes_nothing(tensors, message):
    (p, _), sets = _sets(1.0, 2.0)
    with pytest.raises(ValueError, match=message):
        sets.load("online", tensors)
    assert p.tolist() == [1.0, 1.0]


def test_refusals_name_the_value_and_the_way_out():
    (p,), sets = _sets(1.0)
    with pytest.raises(ValueError, match="no trainable parameter"):
        ParameterSets({})
    with pytest.raises(ValueError, match="'b' and 'a' are the same tied parameter"):
        ParameterSets({"a": p, "b": p})
    with pytest.raises(ValueError, match=r"add\('online'\)"):
        sets.add("online")
    with (
        pytest.raises(ValueError, match=r"use\('old'\): no such set; there are \['online'\]"),
        sets.use("old"),
    ):
        pass
    sets.add("old")
    with pytest.raises(ValueError, match="the set exists"):
        sets.add("old")
    with pytest.raises(ValueError, match=r"keep=1\.5"):
        sets.blend("old", 1.5)
    with pytest.raises(ValueError, match=r"got the sets \['ema'\], expected \['old'\]"):
        sets.load_state({"ema/layer.0": torch.zeros(2)})


def test_sets_of_sharded_parameters_are_those_of_the_part_that_is_here():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        layer = nn.Linear(2, 2, bias=False)
        nn.init.constant_(layer.weight, 1.0)
        fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        sets = ParameterSets(dict(layer.named_parameters()))
        sets.add("old")
        with torch.no_grad():
            layer.weight.mul_(3.0)
        x = torch.tensor([[1.0, 1.0]])
        assert sets.distance("old") == 2.0  # |3 - 1| / |1|, four times each
        with torch.no_grad():
            assert layer(x).tolist() == [[6.0, 6.0]]
            with sets.use("old"):  # what FSDP gathers is the set, not the parameters
                assert layer(x).tolist() == [[2.0, 2.0]]
                assert sets.values("online")["weight"].to_local()[0, 0] == 3.0
                with sets.use("online"):
                    assert layer(x).tolist() == [[6.0, 6.0]]
            assert layer(x).tolist() == [[6.0, 6.0]]
        sets.blend("old", keep=0.5)
        assert sets.values("old")["weight"].to_local().flatten().tolist() == [2.0] * 4
        sets.load("online", {"weight": torch.full((2, 2), 5.0)})  # a whole tensor, of which the part is taken
        assert layer(x).tolist() == [[10.0, 10.0]]
    finally:
        torch.distributed.destroy_process_group()
