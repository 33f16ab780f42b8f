"""The objectives with samplers that suit them, and what the laws about them have in common."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.interfaces import CreditAssigner, Objective, Sampler
from rlt2i.objectives.awm import AWM
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.crd import CRD
from rlt2i.objectives.dgpo import DGPO
from rlt2i.objectives.dppo import FlowDPPO
from rlt2i.objectives.draft import DRaFT
from rlt2i.objectives.grpo_guard import GRPOGuard
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.online_dpo import OnlineDPO
from rlt2i.objectives.refl import ReFL
from rlt2i.objectives.reinforce import Reinforce
from rlt2i.objectives.sft import WeightedMatching
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.types import Experience
from tests.helpers.build import UNIFORM, collect, gradients, toy_algorithm, toy_engine, toy_learner

WINDOW = SDE(num_steps=6, window=(0, 3), kernel=FlowSDE(noise_level=0.9))
FLOW = ODE(num_steps=6)

REVERSE: dict[str, Objective] = {
    "clipped": ClippedSurrogate(clip_range=1e-2),
    "guard": GRPOGuard(clip_range=1e-2),
    "dppo": FlowDPPO(threshold=1e-2),
    "reinforce": Reinforce(),
}
FORWARD: dict[str, Objective] = {
    "nft": DiffusionNFT(),
    "awm": AWM(),
    "awm-location": AWM(ratio="location"),
    "dgpo": DGPO(),
    "crd": CRD(),
    "sft": WeightedMatching(),
    "dpo": OnlineDPO(refresh_every=1),
}
BACKPROP: dict[str, Objective] = {"refl": ReFL(grad_scale=1.0), "draft": DRaFT(steps=2)}
ALL: dict[str, Objective] = REVERSE | FORWARD | BACKPROP
STAR = Product(advantage=GroupRelative(), allocations=(TextAttention(blocks="0", doubt=0.0),))
NO_MAP = Product(advantage=GroupRelative(), allocations=(TextAttention(blocks="0", mix=0.0),))


def sampler_for(objective: Objective) -> Sampler:
    return WINDOW if objective.needs.noise else FLOW


def experience_for(objective: Objective, credit: CreditAssigner = UNIFORM, **collection: int) -> Experience:
    algorithm = toy_algorithm(objective, credit=credit, sampler=sampler_for(objective))
    return collect(toy_engine(algorithm), **({"prompts": 2, "group_size": 6} | collection)).experience


def gradient(objective: Objective, experience: Experience, *, sequences: int = 1000) -> dict[str, Tensor]:
    """Of the first update of a fresh policy."""
    algorithm = toy_algorithm(objective, sampler=sampler_for(objective))
    return gradients(toy_learner(algorithm, micro_batch_size=sequences), experience)


def with_credit(experience: Experience, **fields: Tensor) -> Experience:
    """The same rollouts with other advantages, weights or masks; shapes may resolve more axes."""
    credit = experience.credit
    grids = [f.shape[2:] for f in (*fields.values(), credit.advantage, credit.weight, credit.mask)]
    height, width = torch.broadcast_shapes(*grids)
    changed = attrs.evolve(credit, **fields, grid=(height, width))
    return attrs.evolve(experience, credit=changed)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, exactly: bool = False) -> None:
    for name in expected:
        if exactly:
            assert torch.equal(found[name], expected[name]), name
        else:
            torch.testing.assert_close(
                found[name], expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
