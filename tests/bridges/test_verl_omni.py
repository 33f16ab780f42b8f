"""The verl-omni bridge, against the signatures of 0.2.0rc1: the real package needs vllm-omni, verl and tensordict."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlt2i.bridges import verl_omni
from rlt2i.bridges.attention import core_tokens
from rlt2i.bridges.experience import EnginePolicy, make_experience, update_context
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.noise_aware import NoiseAware
from rlt2i.credit.residual_contrast import ResidualContrast
from rlt2i.credit.step_gain import StepGain
from rlt2i.credit.text_attention import TextAttention
from rlt2i.functional.allocation import attention_allocation
from rlt2i.functional.transitions import flow_sde
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.types import Conditioning, Credit, Trajectory
from tests.helpers.tiny_sd3 import GROUP, NUM, NUM_STEPS, SDE_STEPS, SIDE, TEXTS, Tiny

STEP = SDE_STEPS.index(2)


class DiffusionModelBase:
    """The registry of training adapters."""

    _registry: dict[tuple[str, str], type] = {}  # noqa: RUF012

    @classmethod
    def register(cls, architecture: str, algorithm: str) -> Any:
        def decorator(subclass: type) -> type:
            cls._registry[architecture, algorithm] = subclass
            return subclass

        return decorator

    @classmethod
    def peek_class(cls, architecture: str, algorithm: str) -> type | None:
        return cls._registry.get((architecture, algorithm))


class SD3FlowGRPO(DiffusionModelBase):
    """An adapter that does what verl-omni's does: one pass, one log-probability per sample."""

    @classmethod
    def forward_and_sample_previous_step(
        cls, module, scheduler, model_config, model_inputs, negative_model_inputs, scheduler_inputs, step
    ):
        velocity = module(**model_inputs)[0]
        index = [scheduler.index_for_timestep(t) for t in scheduler_inputs["all_timesteps"][:, step]]
        sigma, sigma_next = scheduler.sigmas[index], scheduler.sigmas[[i + 1 for i in index]]
        states = scheduler_inputs["all_latents"][:, step].float()
        made = flow_sde(
            states, velocity.float(), sigma, sigma_next, sigma_max=scheduler.sigmas[1],
            noise_level=model_config.algo.noise_level,
        )  # fmt: skip
        after = scheduler_inputs["all_latents"][:, step + 1].float()
        log_prob = FlowSDE().log_prob_map(after, made).mean(dim=(1, 2))
        return log_prob, made.mean, made.scale, (sigma - sigma_next).sqrt()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """verl-omni's two registries, where the bridge looks for them; the second is returned."""
    estimators: dict[str, Any] = {}

    def register_diffusion_adv_est(name: str) -> Any:
        return lambda fn: estimators.setdefault(name, fn)

    names = {
        "verl_omni": {"__version__": "0.2.0rc1"},
        "verl_omni.pipelines": {},
        "verl_omni.pipelines.model_base": {"DiffusionModelBase": DiffusionModelBase},
        "verl_omni.trainer": {},
        "verl_omni.trainer.diffusion": {},
        "verl_omni.trainer.diffusion.diffusion_algos": {"register_diffusion_adv_est": register_diffusion_adv_est},
    }
    for name, attributes in names.items():
        module = types.ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(DiffusionModelBase, "_registry", {("StableDiffusion3Pipeline", "flow_grpo"): SD3FlowGRPO})
    return estimators


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny.build()


def a_micro_batch(tiny: Tiny) -> dict[str, Any]:
    """Arguments of the adapter's hook for the second stochastic step of four rollouts."""
    states, _, sigmas = tiny.rollout()
    timesteps = 1000 * sigmas[:-1]
    scheduler = SimpleNamespace(sigmas=sigmas, index_for_timestep=lambda t: int((timesteps - t).abs().argmin()))
    window = [0, *(i + 1 for i in SDE_STEPS)]  # verl-omni keeps the states of its window in a row
    latents = states[:, [SDE_STEPS[STEP], SDE_STEPS[STEP] + 1]]
    return {
        "module": tiny.transformer,
        "scheduler": scheduler,
        "model_config": SimpleNamespace(
            algo=SimpleNamespace(sde_type="sde", noise_level=0.7),
            extra_tokenizer_map={"clip": {"tokenizer": tiny.tokenizer, "max_length": window[-1]}},
        ),
        "model_inputs": {
            "hidden_states": latents[:, 0],
            "encoder_hidden_states": tiny.embeds,
            "pooled_projections": tiny.pooled,
            "timestep": timesteps[2].expand(NUM),
            "return_dict": False,
        },
        "negative_model_inputs": None,
        "scheduler_inputs": {
            "all_latents": latents,
            "all_timesteps": timesteps[2].expand(NUM, 1),
            "extra_info": [{"raw_prompt": text} for text in TEXTS for _ in range(GROUP)],
        },
        "step": 0,
    }


ADVANTAGE = torch.tensor([1.0, -1.0, -0.5, 0.5])


def gradient_of(adapter: Any, tiny: Tiny) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, gradient of Flow-GRPO's loss on policy)."""
    log_prob, *_ = adapter.forward_and_sample_previous_step(**a_micro_batch(tiny))
    (-ADVANTAGE * (log_prob - log_prob.detach()).exp()).mean().backward()
    return log_prob.detach(), tiny.gradient()


def test_the_number_stays_and_its_gradient_bends(engine, tiny):
    plain = gradient_of(SD3FlowGRPO, tiny)
    flat = verl_omni.register_credit("StableDiffusion3Pipeline", TextAttention(blocks="all", mix=0.0))
    assert DiffusionModelBase.peek_class("StableDiffusion3Pipeline", "flow_grpo") is flat
    log_prob, gradient = gradient_of(flat, tiny)
    assert torch.equal(log_prob, plain[0])
    torch.testing.assert_close(gradient, plain[1])
    DiffusionModelBase._registry["StableDiffusion3Pipeline", "flow_grpo"] = SD3FlowGRPO
    sharp = TextAttention(blocks="all", mix=1.0, sharpness=4.0, blur=0.0, doubt=0)
    credited = verl_omni.register_credit("StableDiffusion3Pipeline", sharp)
    log_prob, gradient = gradient_of(credited, tiny)
    assert torch.equal(log_prob, plain[0])
    assert torch.nn.functional.cosine_similarity(gradient, plain[1], dim=0) < 0.9999
    with torch.no_grad():
        assert torch.equal(credited.forward_and_sample_previous_step(**a_micro_batch(tiny))[0], plain[0])


def test_on_policy_it_is_the_clipped_surrogate_with_that_map(engine, tiny):
    allocation = TextAttention(blocks="all", mix=1.0, doubt=0)
    credited = verl_omni.register_credit("StableDiffusion3Pipeline", allocation)
    _, gradient = gradient_of(credited, tiny)

    states, _, sigmas = tiny.rollout()
    texts = [text for text in TEXTS for _ in range(GROUP)]
    tokens, members = core_tokens(texts, [()] * NUM, clip=tiny.tokenizer, t5=None, text_length=tiny.embeds.shape[1])
    maps = tiny.attention(states[:, 2], sigmas[2].expand(NUM), "attention/image_to_text/all", tokens, members)
    trajectory = Trajectory(
        latents=states, sigmas=sigmas, log_probs=torch.zeros(NUM, NUM_STEPS, SIDE, SIDE),
        stochastic=torch.ones(NUM_STEPS, dtype=torch.bool), kernel=FlowSDE(noise_level=0.7),
        conditioning=Conditioning(tensors={}, rows=torch.arange(NUM)), group_size=1,
    )  # fmt: skip
    trained = torch.zeros(NUM, NUM_STEPS, dtype=torch.bool)
    trained[:, 2] = True
    experience = make_experience(
        trajectory=trajectory, log_probs=None, trained=trained, keys=torch.arange(NUM), groups=torch.arange(NUM),
        credit=Credit(
            advantage=ADVANTAGE[:, None, None, None],
            weight=attention_allocation(maps[:, None], mix=1.0, doubt=0),
            mask=torch.ones(1, 1, 1, 1, dtype=torch.bool), grid=(SIDE // 2, SIDE // 2),
        ),
    )  # fmt: skip
    policy = EnginePolicy(predict=lambda x, sigma, rows: tiny.velocity(x, sigma, tiny.embeds[rows], tiny.pooled[rows]))
    context = update_context(
        seed=0, num_rollouts=NUM, num_pairs=NUM, max_pairs=NUM, on_policy=True, weights=lambda name: None  # type: ignore
    )  # fmt: skip
    for loss in ClippedSurrogate(ratio="location").losses(policy, experience, context=context):
        loss.value.backward()
    torch.testing.assert_close(gradient, tiny.gradient(), atol=1e-7, rtol=1e-4)


def test_weights_over_steps_scale_the_gradient(engine, tiny):
    plain = gradient_of(SD3FlowGRPO, tiny)[1]
    credited = verl_omni.register_credit("StableDiffusion3Pipeline", NoiseAware())
    # verl-omni keeps one stochastic step of the schedule here, and a mean-one weight over one step is 1.
    torch.testing.assert_close(gradient_of(credited, tiny)[1], plain)


def test_an_advantage_by_hand(engine):
    estimate = verl_omni.register_advantage("rlt2i", GroupRelative(eps=1e-6))
    assert engine["rlt2i"] is estimate
    rewards = torch.tensor([1.0, 5.0, 3.0, 5.0])[:, None].expand(-1, 2)
    advantage, returns = estimate(sample_level_rewards=rewards, index=["a", "b", "a", "b"], config=None)
    expected = torch.tensor([-1.0, 0.0, 1.0, 0.0])[:, None].expand(-1, 2)
    torch.testing.assert_close(advantage, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(returns, advantage)


def test_refusals(engine, tiny):
    with pytest.raises(ValueError, match="ResidualContrast needs 'clean_predictions'; verl-omni's adapters see single"):
        verl_omni.register_credit("StableDiffusion3Pipeline", ResidualContrast())
    with pytest.raises(ValueError, match="no adapter for architecture='FluxPipeline'"):
        verl_omni.register_credit("FluxPipeline", NoiseAware())
    credited = verl_omni.register_credit("StableDiffusion3Pipeline", TextAttention(blocks="all"))
    batch = a_micro_batch(tiny)
    batch["scheduler_inputs"]["extra_info"] = [{} for _ in range(NUM)]
    with pytest.raises(ValueError, match="Write them as extra_info"):
        credited.forward_and_sample_previous_step(**batch)
    batch = a_micro_batch(tiny)
    batch["model_config"].extra_tokenizer_map = None
    with pytest.raises(ValueError, match="extra_tokenizers"):
        credited.forward_and_sample_previous_step(**batch)
    estimate = verl_omni.register_advantage("whole", GroupRelative())
    with pytest.raises(ValueError, match="groups are not whole"):
        estimate(sample_level_rewards=torch.zeros(3, 1), index=["a", "a", "b"])
    with pytest.raises(ValueError, match="StepGain needs"):
        verl_omni.register_advantage("steps", StepGain())


def test_a_version_without_the_registry_is_named(engine, monkeypatch):
    monkeypatch.delattr(sys.modules["verl_omni.trainer.diffusion.diffusion_algos"], "register_diffusion_adv_est")
    sys.modules["verl_omni"].__version__ = "0.1.0"  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match=r"the installed verl_omni 0\.1\.0 lacks. Use verl-omni 0\.2\.0rc1 or newer"):
        verl_omni.register_advantage("rlt2i", GroupRelative())
    for name in [name for name in sys.modules if name.startswith("verl_omni")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"verl_omni is not installed. Use verl-omni 0\.2\.0rc1 or newer"):
        verl_omni.register_credit("StableDiffusion3Pipeline", NoiseAware())
