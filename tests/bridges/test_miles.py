"""The miles_diffusion bridge, against the signatures of its hooks: the real package needs sglang and a GPU."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rlt2i.bridges.miles as bridge
from rlt2i.bridges.miles import Hooks
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.region_maps import RegionMaps
from rlt2i.credit.residual_contrast import ResidualContrast
from rlt2i.credit.reward_saliency import RewardSaliency
from rlt2i.credit.text_attention import TextAttention
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.nft import DiffusionNFT
from tests.helpers.tiny_sd3 import GROUP, NUM, SDE_STEPS, TEXTS, Tiny

ARGS = SimpleNamespace(diffusion_sde_type="sde", diffusion_noise_level=0.7, seed=0, hf_checkpoint="unused")


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny.build()


class Metrics:
    """The engine's buffer of means."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def emit_mean(self, key: str, total: torch.Tensor, *, count: int) -> None:
        self.sums[key] = float(total) / count


def their_pairs(args: Any, samples: Any, rewards: Any, raw_rewards: Any) -> dict[str, Any]:
    """What the engine makes of samples: one pair per sample and stochastic step, sample after sample."""
    pairs = []
    for sample, reward, raw in zip(samples, rewards, raw_rewards, strict=True):
        for step in sample.train_metadata["sde_step_indices"]:
            latents = sample.dit_trajectory.latents
            pairs.append(
                {
                    "advantage": reward,
                    "raw_reward": raw,
                    "sample_index": sample.index,
                    "prompt": sample.prompt,
                    "latent": latents[step],
                    "next_latent": latents[step + 1],
                }
            )
    return {"train_data": pairs}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("miles", "miles.ray", "miles.ray.data_conversion_hub", "miles.ray.data_conversion_hub.flow_grpo"):
        module = types.ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    module.expand_samples_to_train_pairs = their_pairs  # type: ignore[attr-defined]


def some_samples(tiny: Tiny) -> list[Any]:
    states, velocities, sigmas = tiny.rollout()
    samples = []
    for i in range(NUM):
        reward = [1.0, 0.0, 0.25, 0.75][i]
        samples.append(
            SimpleNamespace(
                index=i,
                group_index=i // GROUP,
                prompt=TEXTS[i // GROUP],
                reward=reward,
                metadata={},
                train_metadata={"sde_step_indices": SDE_STEPS},
                get_reward_value=lambda args, value=reward: value,
                dit_trajectory=SimpleNamespace(latents=states[i], sigmas=sigmas, timesteps=1000 * sigmas[:-1]),
                rollout_debug_tensors=SimpleNamespace(rollout_model_outputs=velocities[i]),
                denoising_env=SimpleNamespace(
                    pos_cond_kwargs=SimpleNamespace(encoder_hidden_states=[tiny.embeds[i : i + 1]])
                ),
            )
        )
    return samples


def in_the_actor(tiny: Tiny, pairs: list[dict[str, Any]]) -> tuple[Any, Any, torch.Tensor]:
    """(context, prepared batch, velocity with gradient), as the engine's actor makes them from pairs."""
    sigmas = tiny.rollout()[2]
    rows = torch.tensor([pair["sample_index"] for pair in pairs])
    sigma = sigmas[torch.tensor([pair["credit_step"] for pair in pairs])]
    latents = torch.stack([pair["latent"] for pair in pairs])
    prepared = SimpleNamespace(
        latents=latents,
        timesteps_for_model=1000 * sigma,
        model=tiny.transformer,
        pos_cond={"encoder_hidden_states": tiny.embeds[rows], "pooled_projections": tiny.pooled[rows]},
        advantage=torch.tensor([pair["advantage"] for pair in pairs]),
        extras={"next_latents": torch.stack([pair["next_latent"] for pair in pairs])},
    )
    velocity = tiny.velocity(latents, sigma, tiny.embeds[rows], tiny.pooled[rows])
    return SimpleNamespace(args=ARGS, scheduler=SimpleNamespace(sigmas=sigmas)), prepared, velocity


def run_loss(hooks: Hooks, tiny: Tiny, pairs: list[dict[str, Any]], **flags: Any) -> tuple[Any, torch.Tensor, Metrics]:
    context, prepared, velocity = in_the_actor(tiny, pairs)
    metrics = Metrics()
    total = hooks.loss(context, pairs, prepared, new_pred=velocity, ref_pred=None, metrics=metrics, **flags)
    if total is None:
        return None, torch.zeros(0), metrics
    total.backward()
    return total.detach(), tiny.gradient(), metrics


def expanded(hooks: Hooks, tiny: Tiny) -> list[dict[str, Any]]:
    samples = some_samples(tiny)
    raw, advantage = hooks.post_process(ARGS, samples)
    return hooks.expand(ARGS, samples, advantage, raw)["train_data"]


def test_advantages_by_hand(tiny):
    hooks = Hooks(objective=ClippedSurrogate(), credit=Product(advantage=GroupRelative(eps=1e-6)))
    raw, advantage = hooks.post_process(ARGS, some_samples(tiny))
    assert raw == [1.0, 0.0, 0.25, 0.75]
    assert advantage == pytest.approx([1, -1, -1, 1], abs=1e-4)


def test_the_loss_is_a_sum_over_pairs(engine, tiny):
    # On policy each pair's surrogate is -A: twice (two steps) the sum of the advantages, which is 0.
    hooks = Hooks(objective=ClippedSurrogate(ratio="sample"), credit=Product(advantage=GroupRelative()))
    pairs = expanded(hooks, tiny)
    assert [pair["credit_step"] for pair in pairs] == SDE_STEPS * NUM
    total, gradient, metrics = run_loss(hooks, tiny, pairs, old_log_prob_from_new=True)
    assert float(total) == pytest.approx(0, abs=1e-5)
    first = run_loss(hooks, tiny, pairs[:2], old_log_prob_from_new=True)
    rest = run_loss(hooks, tiny, pairs[2:], old_log_prob_from_new=True)
    assert float(first[0]) == pytest.approx(-2 * pairs[0]["advantage"], abs=1e-5)
    torch.testing.assert_close(first[1] + rest[1], gradient, atol=1e-5, rtol=1e-4)
    assert metrics.sums["clipfrac"] == 0
    assert metrics.sums["loss"] == pytest.approx(float(total) / len(pairs), abs=1e-6)


def test_old_log_probabilities_are_written_place_by_place(engine, tiny):
    hooks = Hooks(objective=ClippedSurrogate(ratio="location"), credit=Product(advantage=GroupRelative()))
    pairs = expanded(hooks, tiny)
    with pytest.raises(ValueError, match="--diffusion-recompute-old-log-prob"):
        run_loss(hooks, tiny, pairs)
    on_policy = run_loss(hooks, tiny, pairs, old_log_prob_from_new=True)
    assert run_loss(hooks, tiny, pairs, write_old_log_prob=True)[0] is None
    again = run_loss(hooks, tiny, pairs)
    torch.testing.assert_close(again[1], on_policy[1])
    assert all(pair["log_prob_old"].ndim == 0 and pair["log_prob_old_map"].ndim == 2 for pair in pairs)
    for pair in pairs:
        pair["log_prob_old_map"] = pair["log_prob_old_map"] - 1  # every ratio e, far beyond the clip range
    assert run_loss(hooks, tiny, pairs)[2].sums["clipfrac"] == pytest.approx(0.5)  # of the positive advantages


def test_contrast_and_regions_become_weights(engine, tiny):
    contrast = Product(advantage=GroupRelative(), allocations=(ResidualContrast(mix=1.0),))
    weights = [p["credit_weight"] for p in expanded(Hooks(objective=ClippedSurrogate(), credit=contrast), tiny)]
    assert all(w.shape == (4, 4) and abs(float(w.mean()) - 1) < 1e-5 and w.std() > 0.01 for w in weights)

    hooks = Hooks(
        objective=ClippedSurrogate(), credit=Product(advantage=GroupRelative(), allocations=(RegionMaps(mix=1.0),))
    )
    samples = some_samples(tiny)
    for sample in samples:
        sample.metadata = {"regions": [{"box": [0, 0, 0.5, 0.5], "credit": 1.0}]}
    raw, advantage = hooks.post_process(ARGS, samples)
    pairs = hooks.expand(ARGS, samples, advantage, raw)["train_data"]
    good = pairs[0]["credit_weight"]  # above its group's mean: praised where the region is
    assert good[:2, :2].min() > 3
    assert good[2:, 2:].max() < 0.2
    assert torch.equal(pairs[2]["credit_weight"], torch.ones(4, 4))  # below it, and nothing hurt the score
    plain = Hooks(objective=ClippedSurrogate(), credit=Product(advantage=GroupRelative()))
    gradient = run_loss(hooks, tiny, pairs, old_log_prob_from_new=True)[1]
    uniform = run_loss(plain, tiny, expanded(plain, tiny), old_log_prob_from_new=True)[1]
    assert torch.nn.functional.cosine_similarity(gradient, uniform, dim=0) < 0.999


def test_attention_is_read_in_the_actor(engine, tiny, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny.tokenizer)
    sharp = lambda mix: TextAttention(blocks="all", mix=mix, sharpness=4.0, blur=0.0, doubt=0)
    credit = lambda mix: Product(advantage=GroupRelative(), allocations=(sharp(mix),))
    found = {}
    for mix in (0.0, 1.0):
        hooks = Hooks(objective=ClippedSurrogate(), credit=credit(mix))
        pairs = expanded(hooks, tiny)
        assert pairs[0]["core_tokens"].ndim == 1
        found[mix] = run_loss(hooks, tiny, pairs, old_log_prob_from_new=True)[1]
    plain = Hooks(objective=ClippedSurrogate(), credit=Product(advantage=GroupRelative()))
    uniform = run_loss(plain, tiny, expanded(plain, tiny), old_log_prob_from_new=True)[1]
    torch.testing.assert_close(found[0.0], uniform, atol=1e-5, rtol=1e-4)
    assert torch.nn.functional.cosine_similarity(found[1.0], uniform, dim=0) < 0.9999


def test_refusals(engine, tiny):
    with pytest.raises(ValueError, match="DiffusionNFT needs the parameters of an old policy"):
        Hooks(objective=DiffusionNFT())
    with pytest.raises(ValueError, match="RewardSaliency needs 'reward/gradient', which miles_diffusion does not hand"):
        Hooks(objective=ClippedSurrogate(), credit=Product(advantage=GroupRelative(), allocations=(RewardSaliency(),)))
    contrast = Product(advantage=GroupRelative(), allocations=(ResidualContrast(),))
    samples = some_samples(tiny)
    samples[1].rollout_debug_tensors = None
    with pytest.raises(ValueError, match="--diffusion-debug-mode"):
        Hooks(objective=ClippedSurrogate(), credit=contrast).post_process(ARGS, samples)
    deterministic = SimpleNamespace(**{**vars(ARGS), "diffusion_noise_level": 0.0})
    with pytest.raises(ValueError, match="has no log-probability per place"):
        Hooks(objective=ClippedSurrogate()).post_process(deterministic, some_samples(tiny))


def test_a_version_without_the_hub_is_named(monkeypatch, tiny):
    old = types.ModuleType("miles")
    old.__path__, old.__version__ = [], "0.1.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "miles", old)
    hooks = Hooks(objective=ClippedSurrogate(), credit=Product(advantage=GroupRelative()))
    with pytest.raises(ImportError, match=r"the installed miles 0\.1\.0 lacks. Use miles_diffusion of July 2026"):
        hooks.expand(ARGS, some_samples(tiny), [0.0] * NUM, [0.0] * NUM)
    assert "loss_hub" in bridge.SINCE
