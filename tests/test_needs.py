"""What parts need of each other: typed, joined, and refused with the remedy of the part that has the need."""

from __future__ import annotations

import inspect
import subprocess
from pathlib import Path

import attrs
import pytest

import rlt2i.algorithm
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.interfaces import Needs
from rlt2i.objectives.awm import AWM
from rlt2i.objectives.dgpo import DGPO
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.penalty import VelocityPenalty
from rlt2i.objectives.sft import WeightedMatching
from rlt2i.samplers.ode import ODE
from tests.helpers.build import collect, toy_algorithm, toy_engine


def test_the_needs_of_several_parts_are_joined():
    joined = Needs.of_all(
        [Needs(captures={"a"}, groups=True, remedies={"a": "x"}), Needs(captures={"b"}, noise=True, rows="groups")]
    )
    assert joined == Needs(captures={"a", "b"}, groups=True, noise=True, rows="groups")
    assert joined.remedies == {"a": "x"}
    assert Needs.of_all([]) == Needs()


def test_a_refusal_names_the_part_and_gives_its_own_remedy():
    own = attrs.make_class("Own", [], bases=(TextAttention,), frozen=True, kw_only=True)
    own.needs = Needs(captures={"heat"}, remedies={"heat": "Light a fire."})
    with pytest.raises(ValueError, match=r"Own needs the captures \['heat'\].*Light a fire\."):
        toy_algorithm(DiffusionNFT(), credit=Product(advantage=GroupRelative(), allocations=(own(),)))


def test_the_algorithm_knows_no_capture_by_name():
    source = inspect.getsource(rlt2i.algorithm)
    assert not [word for word in ("attention", "edges", "preference", "EDGES", "clean_pred") if word in source]


def test_a_member_of_an_interface_may_be_a_property_everywhere():
    package = Path(rlt2i.__file__).parent
    for pattern in (r"ignore\[override\]", r"removeprefix\(.reward/"):
        assert subprocess.run(["grep", "-rnE", pattern, str(package)], capture_output=True, text=True).stdout == ""


def test_which_rollouts_have_a_gradient_depends_on_the_penalty():
    assert DiffusionNFT().needs.rows == "valid"
    assert AWM().needs.rows == "valid"
    assert AWM(ema_kl_weight=0.0).needs.rows == "advantage"
    assert DGPO().needs.rows == "groups"
    pulling = VelocityPenalty(weight=0.1)
    assert DGPO(kl_penalty=pulling).needs.rows == WeightedMatching(kl_penalty=pulling).needs.rows == "valid"
    assert WeightedMatching().needs.rows == "advantage"


def test_a_deterministic_rollout_has_no_kernel_and_says_so():
    trajectory = collect(
        toy_engine(toy_algorithm(DiffusionNFT(), sampler=ODE(num_steps=3))), prompts=1
    ).experience.trajectory
    assert trajectory.kernel is None
    assert not trajectory.noisy.any()
    zeros = trajectory.latents[:, 0]
    with pytest.raises(ValueError, match=r"the rollout is deterministic.*such as SDE"):
        trajectory.transition(zeros, zeros, trajectory.sigmas[:1], trajectory.sigmas[1:2])
