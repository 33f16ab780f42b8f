"""The UniRL bridge on a small SD3, against UniRL's own classes where they are installed, else their signatures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch

from rlt2i.bridges.attention import core_tokens
from rlt2i.bridges.experience import EngineAdvantage
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.noise_aware import NoiseAware
from rlt2i.credit.region_maps import RegionMaps
from rlt2i.credit.residual_contrast import ResidualContrast
from rlt2i.credit.text_attention import TextAttention
from rlt2i.functional.advantages import group_relative_advantage
from rlt2i.functional.allocation import attention_allocation
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.dgpo import DGPO
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.penalty import KLPenalty
from tests.helpers.tiny_sd3 import GROUP, NUM, NUM_STEPS, SDE_STEPS, SIDE, TEXTS, Tiny
from tests.helpers.unirl_source import REAL_UNIRL, provide_unirl

real = pytest.mark.skipif(not REAL_UNIRL, reason="UniRL's own classes: set RLT2I_UNIRL=unirl==0.2.0, or to its folder")


@pytest.fixture(scope="module")
def unirl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    provide_unirl(tmp_path_factory.mktemp("unirl"))
    import rlt2i.bridges.unirl as bridge

    return bridge


@attrs.define(eq=False)
class Stage:
    """Does what a diffusion stage of UniRL does when an algorithm asks for it."""

    tiny: Tiny
    model: Any
    strategy: Any = attrs.field(factory=lambda: SimpleNamespace(canonical_name="flow"))

    def predict_noise_at_step(self, conditions: Any, *, sample: Any, sigma: Any, params: Any) -> Any:
        run = lambda text: self.tiny.velocity(sample, sigma, text.embeds, text.pooled)
        velocity = run(conditions.text)
        if params.guidance_scale == 1:
            return velocity
        negative = run(conditions.negative_text)
        return negative + params.guidance_scale * (velocity - negative)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny.build()


def a_stage(tiny: Tiny) -> Stage:
    return Stage(tiny, SimpleNamespace(transformer=tiny.transformer, tokenizer=tiny.tokenizer, tokenizer_3=None))


def a_part(tiny: Tiny, *, sde: bool = True) -> tuple[Any, Any]:
    """(part, params): four rollouts of two prompts, two stochastic steps of four, in UniRL's records."""
    from unirl.types.conditions import TextEmbedCondition
    from unirl.types.sample import Part
    from unirl.types.sampling import DiffusionSamplingParams
    from unirl.types.segments.latent import LatentSegment

    steps = SDE_STEPS if sde else []
    states, _, sigmas = tiny.rollout(guidance=2.0, sde=sde)
    stored = sorted({i for t in steps for i in (t, t + 1)} | {NUM_STEPS})
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.75])
    part = Part(
        sample_ids=[f"r3:p{p}/{g}" for p in range(len(TEXTS)) for g in range(GROUP)],
        segment=LatentSegment(
            latents=states[:, stored].clone(),
            sigmas=sigmas,
            indices=torch.tensor(stored),
            sde_indices=torch.tensor(steps) if steps else None,
        ),
        conditions={
            "text": TextEmbedCondition(embeds=tiny.embeds, pooled=tiny.pooled),
            "negative_text": TextEmbedCondition(
                embeds=torch.zeros_like(tiny.embeds), pooled=torch.zeros_like(tiny.pooled)
            ),
        },
        rewards=rewards,
        advantages=group_relative_advantage(rewards, GROUP, eps=1e-8),
        metadata=[{"rollout_id": 3, "prompt": text} for text in TEXTS for _ in range(GROUP)],
    )
    params = DiffusionSamplingParams(
        guidance_scale=2.0, eta=0.7, num_inference_steps=NUM_STEPS, height=SIDE, width=SIDE, sde_indices=steps
    )
    return part, params


def build(unirl: Any, tiny: Tiny, params: Any, cls: str = "StageObjective", **options: Any) -> Any:
    from unirl.models.sd3.conditions import SD3Conditions

    stage = options.pop("stage", None) or a_stage(tiny)
    return getattr(unirl, cls)(params=params, stage=stage, conditions_cls=SD3Conditions, **options)


def one_update(algorithm: Any, part: Any, tiny: Tiny, *, cut: int = 1) -> tuple[float, torch.Tensor]:
    """(loss, gradient) as UniRL's train stack gets them, in `cut` micro-batches."""
    algorithm.prepare_segment(conditions=part.conditions, segment=part.segment)
    part = algorithm.prepare_part(part)
    total, size = 0.0, len(part.sample_ids) // cut
    for start in range(0, size * cut, size):
        micro = part.slice(start, start + size)
        result = algorithm.compute_loss_and_backward(
            conditions=micro.conditions,
            segment=micro.segment,
            advantages=micro.advantages,
            training_progress=0.0,
            loss_scale=1 / cut,
        )
        assert result.has_backward
        assert all(math.isfinite(value) for value in result.metrics.values())
        total += result.loss / cut
    return total, tiny.gradient()


def test_a_ratio_per_sample_by_hand(unirl, tiny):
    # On policy every ratio is 1, so the loss is -mean A = 0 within a group, and clipping never acts.
    part, params = a_part(tiny)
    algorithm = build(unirl, tiny, params, objective=ClippedSurrogate(ratio="sample"))
    loss, gradient = one_update(algorithm, part, tiny)
    assert loss == pytest.approx(0, abs=1e-6)
    assert gradient.norm() > 0
    assert algorithm.anchor_fields == ("log_probs",)
    assert algorithm.recomputes_anchor
    assert algorithm.supports_multi_update


@real
def test_uniform_credit_is_unirls_own_flow_grpo(unirl, tiny):
    from unirl.algorithms.flowgrpo import FlowGRPO
    from unirl.models.sd3.conditions import SD3Conditions
    from unirl.models.sd3.diffusion import SD3DiffusionStage, SD3DiffusionStep
    from unirl.sde.kernels import FlowSDEStrategy
    from unirl.train.stack.anchor import prepare_segment_anchors, validate_anchor_contract

    part, params = a_part(tiny)
    stage = SD3DiffusionStage(
        model=SimpleNamespace(transformer=tiny.transformer, device=torch.device("cpu")),
        step=SD3DiffusionStep(),
        strategy=FlowSDEStrategy(),
        autocast_precision="fp32",
        trajectory_precision="fp32",
    )
    theirs = FlowGRPO(params=params, stage=stage, old_logp_source="replay", conditions_cls=SD3Conditions)
    ours = build(unirl, tiny, params, stage=stage, objective=ClippedSurrogate(ratio="sample"))
    found = []
    for algorithm in (theirs, ours):
        validate_anchor_contract(algorithm)
        mine = part.select(torch.arange(4))
        prepare_segment_anchors(algorithm, mine, (((0, 2), (2, 4)),), order=None)  # their own driver of the anchors
        found.append((mine.segment, *one_update(algorithm, mine, tiny)))
    (their_segment, their_loss, their_gradient), (segment, loss, gradient) = found
    torch.testing.assert_close(segment.log_probs.mean(dim=(2, 3)), their_segment.sde_logp, atol=1e-6, rtol=1e-6)
    assert loss == pytest.approx(their_loss, abs=1e-6)
    torch.testing.assert_close(gradient, their_gradient, atol=1e-7, rtol=1e-4)


def test_micro_batches_add_up(unirl, tiny):
    part, params = a_part(tiny)
    objective = ClippedSurrogate(ratio="location")
    credit = Product(advantage=GroupRelative(), allocations=(TextAttention(blocks="all", mix=1.0), NoiseAware()))
    whole = one_update(build(unirl, tiny, params, objective=objective, credit=credit), part, tiny)
    part, params = a_part(tiny)
    halves = one_update(build(unirl, tiny, params, objective=objective, credit=credit), part, tiny, cut=2)
    assert halves[0] == pytest.approx(whole[0], abs=1e-6)
    torch.testing.assert_close(halves[1], whole[1], atol=1e-6, rtol=1e-4)


def test_maps_are_those_of_the_policy_itself(unirl, tiny):
    part, params = a_part(tiny)
    algorithm = build(
        unirl, tiny, params, objective=ClippedSurrogate(), credit=Product(
            advantage=EngineAdvantage(), allocations=(TextAttention(blocks="all", mix=1.0, doubt=0),)
        ),
    )  # fmt: skip
    weight = algorithm.prepare_part(part).segment.credit.weight
    assert all("forward" not in vars(block.attn) for block in tiny.transformer.transformer_blocks), "as it was"
    tokens, members = core_tokens(
        [text for text in TEXTS for _ in range(GROUP)], [()] * NUM, clip=tiny.tokenizer, t5=None,
        text_length=tiny.embeds.shape[1],
    )  # fmt: skip
    at = part.segment.indices.tolist().index(2)
    maps = tiny.attention(
        part.segment.latents[:, at], part.segment.sigmas[2].expand(NUM), "attention/image_to_text/all", tokens, members
    )
    expected = attention_allocation(maps[:, None], mix=1.0, doubt=0)
    torch.testing.assert_close(weight[:, 2:3], expected)
    assert weight.shape == (NUM, NUM_STEPS, SIDE // 2, SIDE // 2)
    assert weight.std() > 0.01


def test_a_map_moves_the_gradient_and_a_flat_one_does_not(unirl, tiny):
    part, params = a_part(tiny)
    found = {}
    for name, allocations in {
        "none": (),
        "flat": (TextAttention(blocks="all", mix=0.0),),
        "contrast": (ResidualContrast(mix=1.0),),
    }.items():
        credit = Product(advantage=GroupRelative(), allocations=allocations)
        mine = part.select(torch.arange(4))
        found[name] = one_update(build(unirl, tiny, params, objective=ClippedSurrogate(), credit=credit), mine, tiny)[1]
    torch.testing.assert_close(found["flat"], found["none"])
    assert torch.nn.functional.cosine_similarity(found["contrast"], found["none"], dim=0) < 0.999


def test_a_second_update_sees_ratios(unirl, tiny):
    part, params = a_part(tiny)
    algorithm = build(unirl, tiny, params, objective=ClippedSurrogate(clip_range=1.0, ratio="sample"))
    algorithm.prepare_segment(conditions=part.conditions, segment=part.segment)
    part = algorithm.prepare_part(part)
    step = lambda: algorithm.compute_loss_and_backward(
        conditions=part.conditions, segment=part.segment, advantages=None, training_progress=0.0, loss_scale=1.0
    )
    assert step().metrics["ratio/abs_minus_one_max"] == 0
    moved = {p: p.detach().clone() for p in tiny.parameters}
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(parameter.grad, alpha=-0.05)
    assert step().metrics["ratio/abs_minus_one_max"] > 0
    with torch.no_grad():
        for parameter, value in moved.items():
            parameter.copy_(value)
    tiny.transformer.zero_grad()


class Average:
    """UniRL's shadow weights: here half of each weight."""

    def __init__(self, tiny: Tiny) -> None:
        self.parameters = tiny.parameters
        self.uses = 0

    @contextlib.contextmanager
    def use_shadow(self) -> Iterator[None]:
        self.uses += 1
        kept = [p.data for p in self.parameters]
        for parameter in self.parameters:
            parameter.data = 0.5 * parameter.data
        yield
        for parameter, value in zip(self.parameters, kept, strict=True):
            parameter.data = value


def test_nft_learns_from_final_latents_under_the_average(unirl, tiny):
    part, params = a_part(tiny, sde=False)
    average = Average(tiny)
    algorithm = build(
        unirl, tiny, params, "AveragedStageObjective",
        objective=DiffusionNFT(), credit=Product(advantage=GroupRelative()), backend=SimpleNamespace(ema=average),
    )  # fmt: skip
    assert type(algorithm).requires_ema_rollout
    assert not algorithm.recomputes_anchor
    assert not algorithm.supports_multi_update
    loss, gradient = one_update(algorithm, part, tiny)
    assert loss > 0
    assert gradient.norm() > 0
    assert average.uses > 0


def test_a_reward_that_failed_teaches_nothing(unirl, tiny):
    part, params = a_part(tiny)
    part.rewards[1] = float("nan")
    credit = Product(advantage=GroupRelative())
    algorithm = build(unirl, tiny, params, objective=ClippedSurrogate(), credit=credit)
    algorithm.prepare_segment(conditions=part.conditions, segment=part.segment)
    found = algorithm.prepare_part(part).segment.credit
    assert found.advantage[1].abs().sum() == 0
    assert bool(found.mask.all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": DGPO()}, "DGPO compares the rollouts of a group in one forward pass, and UniRL cuts"),
        ({"objective": DiffusionNFT()}, "DiffusionNFT needs the parameters of an old policy"),
        (
            {"objective": ClippedSurrogate(kl_penalty=KLPenalty(weight=0.1))},
            "ClippedSurrogate needs the reference policy",
        ),
        (
            {
                "objective": ClippedSurrogate(),
                "credit": Product(advantage=GroupRelative(), allocations=(RegionMaps(),)),
            },
            "RegionMaps needs 'reward/regions', which UniRL does not hand to an algorithm",
        ),
    ],
)
def test_what_unirl_cannot_give_is_refused(unirl, tiny, options, message):
    _, params = a_part(tiny)
    with pytest.raises(ValueError, match=message):
        build(unirl, tiny, params, **options)


def test_refusals_of_data(unirl, tiny):
    part, params = a_part(tiny)
    attention = Product(advantage=GroupRelative(), allocations=(TextAttention(blocks="all"),))
    algorithm = build(unirl, tiny, params, objective=ClippedSurrogate(), credit=attention)
    with pytest.raises(ValueError, match="prepare_part was not called"):
        algorithm.compute_loss_and_backward(
            conditions=part.conditions, segment=part.segment, advantages=None, training_progress=0.0, loss_scale=1.0
        )
    part.metadata = [{} for _ in part.metadata]
    with pytest.raises(ValueError, match="attention maps start from the words of the prompt"):
        algorithm.prepare_part(part)
    broken = part.select(torch.tensor([0, 2, 1, 3]))
    with pytest.raises(ValueError, match="groups are not whole"):
        algorithm.prepare_part(broken)
    with pytest.raises(ValueError, match="keeps no average of its weights"):
        build(unirl, tiny, params, "AveragedStageObjective", objective=DiffusionNFT())
    part, params = a_part(tiny, sde=False)
    plain = build(unirl, tiny, params, objective=ClippedSurrogate())
    with pytest.raises(ValueError, match="the rollout recorded none"):
        one_update(plain, part, tiny)
