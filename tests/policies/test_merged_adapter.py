"""An adapter merged into the weights: the same velocity up to rounding, and everything as before afterwards."""

from __future__ import annotations

import pytest
import torch

from rlt2i.parameter_sets import ParameterSets
from rlt2i.policies.guidance import Guided
from rlt2i.policies.sd3 import SD3
from rlt2i.policies.tiny import save_tiny
from rlt2i.types import Prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    save_tiny("StableDiffusion3Pipeline", folder)
    return folder


def policy_of(folder, dtype: str) -> Guided:
    """With an adapter that does something."""
    policy = SD3(path=str(folder), dtype=dtype, lora_rank=4, max_sequence_length=16).load()
    draw = torch.Generator().manual_seed(0)
    for parameter in policy.trainable_parameters().values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return Guided(policy=policy, scale=3.0)


def velocity(policy: Guided) -> torch.Tensor:
    conditioning = policy.encode(Prompts.of(["a red circle"], group_size=2))
    latents = torch.randn(2, *policy.latent_shape(32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return policy.velocity(latents, torch.tensor([0.9, 0.4]), conditioning)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_merged_and_not_differ_by_the_stated_bound(folder, dtype, bound):
    policy = policy_of(folder, dtype)
    apart = velocity(policy)
    with policy.merged():
        together = velocity(policy)
    assert 0 < (together - apart).norm() / apart.norm() < bound
    without = policy_of(folder, dtype)
    for parameter in without.trainable_parameters().values():
        parameter.data.zero_()
    assert (velocity(without) - apart).norm() / apart.norm() > 5 * bound  # the adapter is much more than the bound
    assert torch.equal(velocity(policy), apart)


def test_it_merges_the_set_in_force_and_gives_everything_back(folder):
    policy = policy_of(folder, "float32")
    before = {name: tensor.clone() for name, tensor in policy.policy.network.state_dict().items()}
    sets = ParameterSets(policy.trainable_parameters())
    sets.add("old")
    for parameter in policy.trainable_parameters().values():
        parameter.data.zero_()

    def merge_and_stop() -> None:
        with policy.merged():
            torch.testing.assert_close(velocity(policy), apart, rtol=1e-4, atol=1e-5)
            assert not torch.is_grad_enabled()
            raise KeyError("stop")

    with sets.use("old"):
        apart = velocity(policy)
        with pytest.raises(KeyError, match="stop"):
            merge_and_stop()
        assert torch.is_grad_enabled()
    sets.load("online", sets.values("old"))
    after = policy.policy.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
