"""What a plan says of memory: networks that judge, and that what it counts is what an iteration takes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.plan_against_measured import CASES, PHASES, compare
from rlt2i.credit.feature_saliency import FeatureSaliency
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.recipes import list_recipes, load_recipe
from rlt2i.recipes.parts import PARTS
from rlt2i.rewards import convert, mask2former
from rlt2i.rewards.aesthetic import Aesthetic
from rlt2i.rewards.clipscore import CLIPScore
from rlt2i.rewards.combinators import WeightedSum
from rlt2i.rewards.geneval import GenEvalReward
from rlt2i.rewards.hpsv2 import HPSv2
from rlt2i.rewards.hpsv3 import HPSv3
from rlt2i.rewards.imagereward import ImageReward
from rlt2i.rewards.pickscore import PickScore
from rlt2i.rewards.pooled import Pooled
from rlt2i.rewards.sharded import OnDevice, Sharded
from rlt2i.rewards.sizes import PARAMETERS
from rlt2i.rewards.validity import Guarded
from rlt2i.training.dry_run import batch_plan, judges_of, plan_of

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "plan_against_measured.csv"
LOW, HIGH = 0.9, 1.35
"""Counted over measured; too low is the dangerous side."""
VIT_L, VIT_H = 4 * 427_616_513, 4 * 986_109_441
DETECTOR = 4 * PARAMETERS["mask2former_swin-s_mmdet"]


class Mine(Reward):
    """Of somebody who has not said what it keeps."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        count = len(batch.prompts)
        return RewardOutput(scores=torch.zeros(count), valid=torch.ones(count, dtype=torch.bool))


# ----------------------------------------------------------------------------------------------------- what judges


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (PickScore(), {"yuvalkirstain/PickScore_v1": VIT_H}),
        (HPSv2(path="hpsv2"), {"hpsv2": VIT_H}),
        (CLIPScore(), {"openai/clip-vit-large-patch14": VIT_L}),
        (CLIPScore(path="somebody/clip"), {"somebody/clip": None}),
        (
            Aesthetic(),
            {"openai/clip-vit-large-patch14": VIT_L, "aesthetic_sac_logos_ava1_l14": 4 * 769},
        ),
        (HPSv3(), {"hpsv3": 2 * PARAMETERS["hpsv3"]}),
        (ImageReward(), {"imagereward-v1.0": 4 * PARAMETERS["imagereward-v1.0"]}),
        (GenEvalReward(), {"mask2former_swin-s_mmdet": DETECTOR, "openai/clip-vit-large-patch14": VIT_L}),
        (Mine(), {"Mine": None}),
        (Guarded(reward=PickScore()), {"yuvalkirstain/PickScore_v1": VIT_H}),
        # CLIP ViT-L/14 is loaded once for both.
        (
            WeightedSum(rewards={"a": (CLIPScore(), 1.0), "b": (GenEvalReward(), 1.0)}),
            {"openai/clip-vit-large-patch14": VIT_L, "mask2former_swin-s_mmdet": DETECTOR},
        ),
        (OnDevice(reward=PickScore(), device="cuda:1"), {}),
        (OnDevice(reward=PickScore(), device="cpu"), {}),
        (OnDevice(reward=PickScore(), device="cuda"), {"yuvalkirstain/PickScore_v1": VIT_H}),
        (Sharded(replicas=tuple(OnDevice(reward=Mine(), device=f"cuda:{i}") for i in range(2))), {"Mine": None}),
        (Pooled(reward=Mine(), kind="process"), {}),
        (Pooled(reward=Mine(), kind="thread"), {"Mine": None}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_reward_keeps_beside_the_policy(reward: Reward, expected: dict[str, int | None], monkeypatch, tmp_path):
    monkeypatch.setenv("RLT2I_WEIGHTS", str(tmp_path))
    assert reward.networks() == expected


def test_weights_that_are_at_hand_are_counted_by_their_files(tmp_path: Path):
    save_file({"a": torch.zeros(3, 5, dtype=torch.float16), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert CLIPScore(path=str(tmp_path)).networks() == {str(tmp_path): 4 * (3 * 5 + 7)}  # loaded in float32
    assert FeatureSaliency(model=str(tmp_path)).networks()[str(tmp_path)] > 2 * 15 + 4 * 7


def test_every_reward_of_the_package_says_what_it_keeps():
    from rlt2i.config import load_object

    kinds = [load_object(reference) for reference in PARTS["Reward"].values()]
    assert [kind.__name__ for kind in kinds if kind.networks is Reward.networks] == ["Function"]


@pytest.mark.slow
def test_numbers_of_parameters_are_those_of_the_configurations():
    from transformers import BlipTextModel, BlipVisionModel, CLIPConfig, CLIPModel, Qwen2VLModel

    def clip(width: int, layers: int, patch: int, text: int) -> Any:
        vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        vision |= {"patch_size": patch, "num_attention_heads": width // 64}
        words = {"hidden_size": text, "intermediate_size": 4 * text, "num_attention_heads": text // 64}
        return CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=text))

    with torch.device("meta"):
        vision, words = convert.blip_configs()
        blip = torch.nn.ModuleList([BlipVisionModel(vision), BlipTextModel(words, add_pooling_layer=False)])
        built = {
            "openai/clip-vit-base-patch32": clip(768, 12, 32, 512),
            "openai/clip-vit-base-patch16": clip(768, 12, 16, 512),
            "openai/clip-vit-large-patch14": clip(1024, 24, 14, 768),
            "yuvalkirstain/PickScore_v1": CLIPModel(convert.vit_h_config()),
            "hpsv3": Qwen2VLModel(convert.qwen2_vl_config(151_658)),  # a token of its own; the head is apart
            "imagereward-v1.0": blip,
            "mask2former_swin-s_mmdet": mask2former.detector_class()(mask2former.official_config()),
        }
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in built.items()}
    head = {"imagereward-v1.0": 769}  # the collapsed head: 768 weights and a bias
    assert {name: n + head.get(name, 0) for name, n in count.items()} == {name: PARAMETERS[name] for name in count}


def test_networks_that_judge_are_part_of_every_phase_and_unknown_ones_are_named():
    recipe = load_recipe("star-cells")
    batch = batch_plan(recipe, world_size=1)
    bare = plan_of(recipe, batch)
    judged = load_recipe("star-cells", ["heldout={clip: {type: CLIPScore}, other: {type: CLIPScore, path: a/b}}"])
    plan = plan_of(judged, batch)
    assert {phase: plan.memory[phase] - bare.memory[phase] for phase in bare.memory} == dict.fromkeys(PHASES, VIT_L)
    assert plan.resident["judge openai/clip-vit-large-patch14"] == VIT_L
    assert plan.not_counted == ("judge a/b",)
    text = plan.table()
    assert "of which judge openai/clip-vit-large-patch14" in text
    assert [line.split() for line in text.splitlines() if "not counted" in line] == [["judge", "a/b", "not", "counted"]]


@pytest.mark.slow
def test_every_shipped_recipe_knows_the_size_of_its_judges():
    unknown = {entry.name: judges_of(load_recipe(entry.name)) for entry in list_recipes()}
    assert {name: judges for name, judges in unknown.items() if None in judges.values()} == {}


def test_credit_that_looks_with_a_network_of_its_own_is_counted():
    assert judges_of(load_recipe("feature-saliency-shapes")) == {"vit_base_patch14_reg4_dinov2.lvd142m": 4 * 86_582_016}


# ----------------------------------------------------------------------------------------------- counted and measured


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "SD3 tiny" else pytest.mark.slow) for case in CASES]
)
def test_what_is_counted_is_what_an_iteration_takes(case: str):
    for phase, (counted, measured) in compare(*CASES[case]).items():
        assert LOW <= counted / measured <= HIGH, (phase, counted, measured)


def test_the_committed_comparison_is_of_these_cases_and_within_the_factor():
    with RESULT.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["case"], row["recipe"], row["phase"]) for row in rows] == [
        (case, name, phase) for case, (name, _) in CASES.items() for phase in PHASES
    ]
    assert all(LOW <= int(row["counted_bytes"]) / int(row["measured_bytes"]) <= HIGH for row in rows)
