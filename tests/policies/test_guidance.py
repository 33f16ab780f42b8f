from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.captures import NEGATIVE, attention_name
from rlt2i.policies.guidance import (
    Guided,
    IntervalGuidance,
    LinearGuidance,
    OffsetGuidance,
    RescaledGuidance,
)
from rlt2i.policies.sd3 import SD3, SD3Policy
from rlt2i.types import Prompts

NAMES = frozenset({attention_name("image_to_text"), attention_name("text_to_image", "all")})
PROMPTS = Prompts.of(("a red cat", "two blue dogs and a box"), group_size=2)


@pytest.fixture(scope="module")
def policy(clip_pipeline):
    return SD3(path=str(clip_pipeline), lora_rank=2).load()


@pytest.fixture
def batch(policy):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, *policy.latent_shape(32), generator=draw), torch.tensor([1.0, 0.8, 0.5, 0.2])


def branches(policy, batch):
    conditional = policy.velocity(*batch, policy.encode(PROMPTS))
    empty = policy.encode(Prompts.of([""])).take(torch.zeros(4).long())
    return conditional, policy.velocity(*batch, empty)


def grads(policy, value):
    return torch.autograd.grad(value.square().mean(), list(policy.trainable_parameters().values()), allow_unused=True)


@pytest.mark.parametrize("scale", [0.0, 2.0, 4.5])
def test_formula(policy, batch, scale):
    guided = Guided(policy=policy, scale=scale)
    with torch.no_grad():
        conditional, unconditional = branches(policy, batch)
        velocity = guided.velocity(*batch, guided.encode(PROMPTS))
    torch.testing.assert_close(velocity, (1 - scale) * unconditional + scale * conditional, atol=1e-5, rtol=1e-4)


def test_forms_by_hand():
    # Two channels of one 2 x 2 token: v_pos = (3, 0), v_neg = (1, -2) everywhere.
    positive, negative = (torch.tensor(v).view(1, 2, 1, 1).expand(1, 2, 2, 2) for v in ((3.0, 0.0), (1.0, -2.0)))
    at = lambda form, scale: form.combine(positive, negative, scale)[0, :, 0, 0].tolist()
    assert at(LinearGuidance(), 2.0) == [5.0, 2.0]
    assert at(OffsetGuidance(), 1.0) == [5.0, 2.0]
    # The token's norm goes from sqrt(4 * 29) back to sqrt(4 * 9).
    assert at(RescaledGuidance(over="token"), 2.0) == pytest.approx([5 * 3 / 29**0.5, 2 * 3 / 29**0.5])
    assert at(RescaledGuidance(over="image"), 2.0) == pytest.approx([5 * 3 / 29**0.5, 2 * 3 / 29**0.5])
    # Rows of one channel: (3, 3) and (5, 5); the second channel of v_pos is 0.
    assert at(RescaledGuidance(over="row"), 2.0) == pytest.approx([3.0, 0.0])
    # At most twice the norm 3: 29 ** .5 = 5.4 is left alone; at most once: cut to 3.
    assert at(RescaledGuidance(over="image", limit=2.0), 2.0) == [5.0, 2.0]
    assert at(RescaledGuidance(over="image", limit=1.0), 2.0) == pytest.approx([5 * 3 / 29**0.5, 2 * 3 / 29**0.5])


def test_an_interval_guides_some_rows_and_costs_nothing_outside(policy, batch):
    form = IntervalGuidance(low=0.4, high=0.9)
    guided = Guided(policy=policy, scale=3.0, form=form)
    conditioning = guided.encode(PROMPTS)
    with torch.no_grad():
        mixed = guided.velocity(*batch, conditioning)
        everywhere = Guided(policy=policy, scale=3.0).velocity(*batch, conditioning)
        plain = policy.velocity(*batch, conditioning)
        outside = guided.velocity(batch[0], torch.full((4,), 0.95), conditioning)
    assert form.active(batch[1]).tolist() == [False, True, True, False]
    assert torch.equal(mixed, torch.where(form.active(batch[1])[:, None, None, None], everywhere, plain))
    assert torch.equal(outside, policy.velocity(batch[0], torch.full((4,), 0.95), conditioning))
    with pytest.raises(ValueError, match="nothing lies between"):
        IntervalGuidance(low=0.5, high=0.5)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(policy, batch):
    guided = Guided(policy=policy, scale=3.0, negative_prompt="a blue box")
    conditioning = guided.encode(PROMPTS)
    assert [len(spans) for spans in conditioning.token_spans] == [2, 4, 0]  # nobody looks for its words
    negative = policy.encode(Prompts.of(["a blue box"])).take(torch.zeros(4).long())
    with torch.no_grad():
        conditional, away = policy.velocity(*batch, policy.encode(PROMPTS)), policy.velocity(*batch, negative)
        assert torch.equal(guided.velocity(*batch, conditioning), away + 3 * (conditional - away))


def test_each_row_keeps_its_own_extra_conditioning(policy):
    guided = Guided(policy=policy, scale=3.0)
    conditioning = guided.encode(PROMPTS)
    extra = torch.tensor([[1.0], [2.0], [0.0]])
    conditioning = attrs.evolve(conditioning, tensors={**conditioning.tensors, "extra/size": extra})
    negative = guided._negative(conditioning)
    assert negative["extra/size"].flatten().tolist() == [1.0, 1.0, 2.0, 2.0]
    assert torch.equal(negative["embeddings"], conditioning.tensors["embeddings"][-1:].expand(4, -1, -1))


@pytest.mark.parametrize("uncond_grad", [False, True])
def test_rollout_replay_and_update_agree_to_the_last_bit(policy, batch, uncond_grad):
    guided = Guided(policy=policy, scale=3.0, form=RescaledGuidance(over="token"), uncond_grad=uncond_grad)
    conditioning = guided.encode(PROMPTS)
    with torch.no_grad():
        rollout = guided.velocity(*batch, conditioning)
    update = guided.velocity(*batch, conditioning)
    assert update.requires_grad
    assert torch.equal(rollout, update)


@pytest.mark.parametrize(
    "form", [LinearGuidance(), RescaledGuidance(over="token"), IntervalGuidance(low=0.4, high=0.9)]
)
def test_a_recorded_negative_gives_the_same_velocity_and_gradient(policy, batch, form):
    guided = Guided(policy=policy, scale=3.0, form=form)
    conditioning = guided.encode(PROMPTS)
    with torch.no_grad():
        rollout, recorded = guided.velocity_with_captures(*batch, conditioning, NAMES | {NEGATIVE})
    assert recorded.keys() == NAMES | {NEGATIVE}
    again = guided.velocity_again(*batch, conditioning, recorded)
    assert torch.equal(again, rollout)
    for ours, plain in zip(grads(policy, again), grads(policy, guided.velocity(*batch, conditioning)), strict=True):
        assert torch.equal(ours, plain)


def test_the_negative_is_offered_where_it_has_no_gradient(policy, clip_pipeline):
    assert NEGATIVE in Guided(policy=policy, scale=3.0).offers
    assert NEGATIVE not in policy.offers
    for without in ({"scale": 1.0}, {"scale": 3.0, "uncond_grad": True}, {"scale": 3.0, "reuse_negative": False}):
        assert NEGATIVE not in Guided(policy=policy, **without).offers
    for guidance in ({}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "reuse_negative": False}):
        spec = SD3(path=str(clip_pipeline), lora_rank=2, **guidance)
        assert spec.offers == spec.load().offers


def test_scale_one_is_the_policy_itself(policy, batch):
    guided = Guided(policy=policy, scale=1.0)
    conditioning = guided.encode(PROMPTS)
    assert conditioning.tensors.keys() == policy.encode(PROMPTS).tensors.keys()
    assert torch.equal(guided.velocity(*batch, conditioning), policy.velocity(*batch, conditioning))


def test_captures_come_from_the_conditional_branch(policy, batch):
    guided = Guided(policy=policy, scale=3.0)
    expected = policy.velocity_with_captures(*batch, policy.encode(PROMPTS), NAMES)[1]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            captures = guided.velocity_with_captures(*batch, guided.encode(PROMPTS), NAMES)[1]
        for name in NAMES:
            assert captures[name].shape == expected[name].shape
            torch.testing.assert_close(captures[name], expected[name], atol=1e-7, rtol=1e-5)


def test_gradient_through_the_conditional_branch_only(policy, batch):
    scale = 3.0
    guided = Guided(policy=policy, scale=scale)
    conditional, unconditional = branches(policy, batch)
    expected = grads(policy, unconditional.detach() + scale * (conditional - unconditional.detach()))
    actual = grads(policy, guided.velocity(*batch, guided.encode(PROMPTS)))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_gradient_through_both_branches(policy, batch):
    scale = 3.0
    guided = Guided(policy=policy, scale=scale, uncond_grad=True)
    conditional, unconditional = branches(policy, batch)
    expected = grads(policy, unconditional + scale * (conditional - unconditional))
    actual = grads(policy, guided.velocity(*batch, guided.encode(PROMPTS)))
    detached = grads(policy, Guided(policy=policy, scale=scale).velocity(*batch, guided.encode(PROMPTS)))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(actual, detached, strict=True))


def test_rollouts_never_refer_to_the_negative_prompt(policy, batch):
    guided = Guided(policy=policy, scale=3.0)
    conditioning = guided.encode(PROMPTS)
    assert conditioning.rows.tolist() == [0, 0, 1, 1]
    assert len(conditioning) == 4
    assert [len(spans) for spans in conditioning.token_spans] == [2, 4, 0]
    rows = torch.tensor([2, 1])
    with torch.no_grad():
        part = guided.velocity(batch[0][rows], batch[1][rows], conditioning.take(rows))
        whole = guided.velocity(*batch, conditioning)[rows]
    torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)


def test_conditioning_of_another_policy_is_refused(policy, batch):
    with pytest.raises(ValueError, match="no negative prompt"):
        Guided(policy=policy, scale=3.0).velocity(*batch, policy.encode(PROMPTS))


def test_everything_else_is_the_policys(policy, tmp_path):
    guided = Guided(policy=policy, scale=3.0)
    assert guided.offers == policy.offers | {NEGATIVE}
    assert guided.latent_shape(32) == policy.latent_shape(32)
    assert guided.token_grid(32) == policy.token_grid(32)
    assert torch.equal(guided.sigmas(4, 32), policy.sigmas(4, 32))
    assert guided.trainable_parameters().keys() == policy.trainable_parameters().keys()
    latents = torch.zeros(1, 4, 16, 16)
    assert torch.equal(guided.decode(latents), policy.decode(latents))
    guided.export(tmp_path)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_spec_decides_whether_to_wrap(clip_pipeline):
    spec = SD3(path=str(clip_pipeline), guidance_scale=4.5, uncond_grad=True)
    guided = spec.load()
    assert isinstance(guided, Guided)
    assert (guided.scale, guided.uncond_grad) == (4.5, True)
    assert isinstance(attrs.evolve(spec, guidance_scale=1.0).load(), SD3Policy)


@pytest.mark.parametrize(
    "form",
    [
        LinearGuidance(),
        OffsetGuidance(),
        *(RescaledGuidance(over=over) for over in ("token", "row", "image")),
        RescaledGuidance(over="image", limit=0.9, of=OffsetGuidance()),
        IntervalGuidance(of=RescaledGuidance(over="row")),
    ],
    ids=str,
)
def test_gradients_flow_through_every_form_and_its_norms(form):
    draw = torch.Generator().manual_seed(0)
    positive, negative = (
        torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    assert torch.autograd.gradcheck(lambda p, n: form.combine(p, n, 3.0), (positive, negative))
