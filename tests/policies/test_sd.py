"""Stable Diffusion as a flow policy, against diffusers' own pipeline and DDIM scheduler."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

from rlt2i.algorithm import Algorithm
from rlt2i.captures import attention_name
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.engine import Engine
from rlt2i.functional.epsilon import flow_to_vp, nearest_timestep, vp_sigma
from rlt2i.functional.gaussian import log_prob_map
from rlt2i.interfaces import Policy, RolloutRequest
from rlt2i.learner import Learner
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.parameter_sets import ParameterSets
from rlt2i.policies.epsilon import VPSchedule
from rlt2i.policies.guidance import Guided
from rlt2i.policies.sd import StableDiffusion, StableDiffusionPolicy
from rlt2i.samplers.kernels import DDIM
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.seeds import RolloutNoise
from rlt2i.types import Prompts, Trajectory
from tests.helpers.published_steps import ddim
from tests.helpers.sd_pipelines import SCHEDULE, save_pipeline, stock_pipeline
from tests.helpers.toy import QuadrantBrightness

TEXTS = ("a red cat and a blue dog", "two boxes")
STEPS = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """epsilon and v_prediction pipelines whose DDIM ends at a clean image, and one that ends as SD1.5's does."""
    base = tmp_path_factory.mktemp("sd")
    return {
        "epsilon": save_pipeline(base / "epsilon", set_alpha_to_one=True),
        "v_prediction": save_pipeline(base / "v", set_alpha_to_one=True, prediction_type="v_prediction"),
        "sd15": save_pipeline(base / "sd15", set_alpha_to_one=False),
    }


def rollout(policy: Policy, sampler, seed: int = 0) -> tuple[Trajectory, Tensor]:
    """One rollout for each of TEXTS, and the noise it began with."""
    noise = RolloutNoise([seed, seed + 1], [seed + 2, seed + 3])
    request = RolloutRequest(noise=noise, captures=frozenset(), image_size=32)
    trajectory = sampler.rollout(policy, policy.encode(Prompts.of(TEXTS)), request)
    return trajectory, noise.initial(policy.latent_shape(32))


def perturb(policy: Policy, scale: float) -> None:
    draw = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter.data += scale * torch.randn(parameter.shape, generator=draw)


# -------------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_ode_is_ddim_of_the_stock_pipeline(folders, prediction: str, guidance_scale: float):
    policy = StableDiffusion(path=str(folders[prediction]), guidance_scale=guidance_scale).load()
    trajectory, noise = rollout(policy, ODE(num_steps=STEPS))
    stock = stock_pipeline(folders[prediction])
    latents = stock(
        list(TEXTS), latents=noise, num_inference_steps=STEPS, guidance_scale=guidance_scale, output_type="latent",
        height=32, width=32,
    ).images  # fmt: skip
    scale = float(latents.abs().max())
    assert (trajectory.clean_latents - latents).abs().max() < 2e-5 * scale
    images = stock(
        list(TEXTS), latents=noise, num_inference_steps=STEPS, guidance_scale=guidance_scale, output_type="pt",
        height=32, width=32,
    ).images  # fmt: skip
    torch.testing.assert_close(policy.decode(trajectory.clean_latents), images, atol=1e-4, rtol=1e-3)


def test_the_last_step_ends_at_its_clean_prediction_where_diffusers_leaves_noise(folders):
    policy = StableDiffusion(path=str(folders["sd15"])).load()
    trajectory, noise = rollout(policy, ODE(num_steps=STEPS))
    scheduler, state = stock_pipeline(folders["sd15"]).scheduler, noise
    scheduler.set_timesteps(STEPS)
    embeddings = policy.encode(Prompts.of(TEXTS))["embeddings"]
    for step, timestep in enumerate(scheduler.timesteps):
        x_vp, alpha_bar = flow_to_vp(trajectory.latents[:, step], trajectory.sigmas[step])
        torch.testing.assert_close(x_vp, state, atol=2e-5 * float(state.abs().max()), rtol=0)
        torch.testing.assert_close(alpha_bar.flatten()[0], scheduler.alphas_cumprod[timestep], atol=1e-6, rtol=1e-4)
        with torch.no_grad():
            predicted = policy.network(state, timestep, encoder_hidden_states=embeddings).sample
        done = scheduler.step(predicted, timestep, state, eta=0.0)
        state = done.prev_sample
    size = float(state.abs().max())
    torch.testing.assert_close(trajectory.clean_latents, done.pred_original_sample, atol=2e-5 * size, rtol=0)
    assert (trajectory.clean_latents - state).abs().max() > 1e-3 * size  # noise of timestep 0 is left in theirs


@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_ddim_kernel_has_mean_and_std_of_the_scheduler(folders, prediction: str, eta: float):
    policy = StableDiffusion(path=str(folders[prediction])).load()
    sampler = SDE(num_steps=STEPS, kernel=DDIM(eta=eta))
    trajectory, _ = rollout(policy, sampler)
    scheduler = stock_pipeline(folders[prediction]).scheduler
    scheduler.set_timesteps(STEPS)
    conditioning = policy.encode(Prompts.of(TEXTS))
    for step in sampler.stochastic_steps(0):
        x, sigma, sigma_next = trajectory.latents[:, step], trajectory.sigmas[step], trajectory.sigmas[step + 1]
        with torch.no_grad():
            velocity = policy.velocity(x, sigma.expand(2), conditioning)
            ours = sampler.kernel.transition(
                x, velocity, sigma.expand(2), sigma_next.expand(2), sigma_max=trajectory.sigma_max
            )
            x_vp, timestep = flow_to_vp(x, sigma)[0], scheduler.timesteps[step]
            predicted = policy.network(x_vp, timestep, encoder_hidden_states=conditioning["embeddings"]).sample
        mean = scheduler.step(predicted, timestep, x_vp, eta=eta, variance_noise=torch.zeros_like(x_vp)).prev_sample
        std = eta * scheduler._get_variance(timestep, timestep - 1000 // STEPS) ** 0.5
        scaled = flow_to_vp(ours.mean, sigma_next)[0]
        torch.testing.assert_close(scaled, mean, atol=2e-5 * float(mean.abs().max()), rtol=0)
        torch.testing.assert_close(flow_to_vp(ours.std, sigma_next)[0].flatten()[0], std, atol=1e-5, rtol=1e-3)


def test_ratios_of_the_ddim_kernel_are_those_of_ddpo(folders):
    # DDPO's log-prob is that of x_vp' = k' x'. It differs from ours by log k', which no ratio sees.
    policy = StableDiffusion(path=str(folders["epsilon"]), lora_rank=2).load()
    kernel = DDIM(eta=1.0)
    trajectory, _ = rollout(policy, SDE(num_steps=STEPS, kernel=kernel))
    perturb(policy, 0.3)
    conditioning = trajectory.conditioning
    alpha_bars = policy.schedule.alpha_bars[policy.schedule.timesteps(STEPS)]
    for step in range(STEPS - 1):
        x, action = trajectory.latents[:, step], trajectory.latents[:, step + 1]
        sigma, sigma_next = (trajectory.sigmas[i].expand(2) for i in (step, step + 1))
        x_vp, action_vp = flow_to_vp(x, sigma)[0], flow_to_vp(action, sigma_next)[0]
        with torch.no_grad():
            moved = kernel.transition(x, policy.velocity(x, sigma, conditioning), sigma, sigma_next, sigma_max=1.0)
            timestep = policy.schedule.timesteps(STEPS)[step].expand(2)
            epsilon = policy.predict(x_vp, timestep, conditioning)
            in_vp = ddim(x_vp, epsilon, alpha_bars[step], alpha_bars[step + 1], eta=1.0)
        now = kernel.log_prob_map(action, moved).mean(dim=(1, 2))
        before = trajectory.log_probs[:, step].mean(dim=(1, 2))
        now_vp = log_prob_map(action_vp, in_vp.mean, in_vp.std).mean(dim=(1, 2))
        scale = torch.log(flow_to_vp(torch.ones(1, 1, 1, 1), sigma_next[:1])[0].flatten())
        torch.testing.assert_close(now_vp, now - scale, atol=2e-4, rtol=1e-4)
        assert (now - before).abs().max() > 1e-2
        before_vp = before - scale
        torch.testing.assert_close(now_vp - before_vp, now - before, atol=2e-4, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------- geometry


def test_the_schedule_is_that_of_ddim():
    from diffusers import DDIMScheduler

    schedule = VPSchedule.from_config(SCHEDULE, who="test")
    assert schedule.timesteps(50).tolist() == list(range(981, 0, -20))
    for spacing in ("leading", "trailing"):
        stock = DDIMScheduler(**SCHEDULE, timestep_spacing=spacing)
        for steps in (1, 7, 50):
            stock.set_timesteps(steps)
            mine = attrs.evolve(schedule, spacing=spacing)
            assert mine.timesteps(steps).tolist() == stock.timesteps.tolist()
    torch.testing.assert_close(schedule.alpha_bars, stock.alphas_cumprod)
    # alpha_999 = .0683, s_999 = .9977
    assert schedule.sigma_max == pytest.approx(0.9977 / (0.0683 + 0.9977), abs=2e-4)
    sigmas = schedule.sigmas(50)
    assert sigmas.dtype is torch.float32
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_a_rollout_starts_at_unit_noise_of_the_model(folders):
    policy = StableDiffusion(path=str(folders["sd15"]), guidance_scale=2.0).load()
    trajectory, noise = rollout(policy, ODE(num_steps=2))
    x_vp, _ = flow_to_vp(trajectory.latents[:, 0], trajectory.sigmas[0])
    torch.testing.assert_close(x_vp, noise, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(trajectory.latents[:, 0], trajectory.sigmas[0] * noise, rtol=1e-3)


def test_forward_objectives_stay_within_what_the_model_knows(folders):
    algorithm, engine = tiny_algorithm(folders["sd15"], DiffusionNFT(), ODE(num_steps=STEPS))
    experience = collected(engine)
    learner = tiny_learner(algorithm)
    context = learner._context(4, 1, on_policy=True)
    sigma, _ = algorithm.objective.sigmas.draw(experience, torch.arange(500), context=context)
    first = float(experience.trajectory.sigmas[0])
    assert 0.98 * first < float(sigma.max()) <= first < 0.98
    assert learner.learn(experience)["grad_norm"] > 0


def test_text_is_that_of_the_stock_pipeline(folders):
    policy = StableDiffusion(path=str(folders["sd15"])).load()
    prompts = attrs.evolve(Prompts.of(TEXTS, group_size=2), core=(("cat",), ()))
    conditioning = policy.encode(prompts)
    for row, text in enumerate(TEXTS):
        embeddings, _ = stock_pipeline(folders["sd15"]).encode_prompt(text, "cpu", 1, False)
        torch.testing.assert_close(conditioning["embeddings"][2 * row], embeddings[0])
    assert conditioning.rows.tolist() == [0, 0, 1, 1]
    assert [dict(span.positions) for span in conditioning.token_spans[0]] == [{"text": (3,)}]


def test_images_become_the_mean_of_their_latents(folders):
    policy, vae = StableDiffusion(path=str(folders["sd15"])).load(), stock_pipeline(folders["sd15"]).vae
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.encode(2 * images - 1).latent_dist.mean * 0.5
        torch.testing.assert_close(policy.encode_images(images), expected)


@pytest.mark.parametrize("image_size", [0, 4, 20])
def test_an_image_size_that_does_not_fit_is_refused(folders, image_size: int):
    policy = StableDiffusion(path=str(folders["sd15"])).load()
    assert policy.latent_shape(32) == (4, 16, 16)
    assert policy.token_grid(32) == (4, 4)
    with pytest.raises(ValueError, match="a multiple of 8"):
        policy.token_grid(image_size)


# ----------------------------------------------------------------------------------------------------------- learning


def tiny_algorithm(folder: Path, objective, sampler, credit=None, **options) -> tuple[Algorithm, Engine]:
    spec = StableDiffusion(path=str(folder), **({"lora_rank": 2, "guidance_scale": 3.0, "uncond_grad": True} | options))
    algorithm = Algorithm(
        policy=spec, sampler=sampler, reward=QuadrantBrightness(),
        credit=credit or Product(advantage=GroupRelative()), objective=objective,
    ).load()  # fmt: skip
    return algorithm, Engine(algorithm=algorithm, image_size=32, rollout_batch_size=8, seed=0)


def tiny_learner(algorithm: Algorithm) -> Learner:
    parameters = algorithm.policy.trainable_parameters()  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return Learner(
        policy=algorithm.policy, objective=algorithm.objective, reward=algorithm.reward, optimizer=optimizer,
        sets=ParameterSets(parameters), micro_batch_size=8,
    )  # type: ignore[arg-type]  # fmt: skip


def collected(engine: Engine):
    prompts = attrs.evolve(Prompts.of(TEXTS[:1], group_size=4), core=(("cat",),))
    return engine.collect(prompts, iteration=0).experience


@pytest.mark.parametrize("prediction", ["sd15", "v_prediction"])
@pytest.mark.parametrize("lora_rank", [2, None])
def test_ddpo_takes_an_update(folders, prediction: str, lora_rank: int | None):
    sampler = SDE(num_steps=4, kernel=DDIM(eta=1.0))
    objective = ClippedSurrogate(clip_range=1e-4)
    algorithm, engine = tiny_algorithm(folders[prediction], objective, sampler, lora_rank=lora_rank)
    assert isinstance(algorithm.policy, Guided)
    experience, learner = collected(engine), tiny_learner(algorithm)
    before = {name: p.detach().clone() for name, p in algorithm.policy.trainable_parameters().items()}
    metrics = learner.learn(experience)
    assert metrics["ratio/abs_minus_one_max"] == 0.0
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(before[name], p) for name, p in algorithm.policy.trainable_parameters().items())
    assert all(not p.requires_grad for p in algorithm.policy.policy.vae.parameters())


def test_the_adapter_is_loaded_by_the_stock_pipeline(folders, tmp_path: Path):
    policy = StableDiffusion(path=str(folders["sd15"]), lora_rank=2, lora_alpha=6).load()
    state, timestep = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 300])
    conditioning = policy.encode(Prompts.of(TEXTS))
    stock = stock_pipeline(folders["sd15"])
    with torch.no_grad():
        base = policy.predict(state, timestep, conditioning)
        perturb(policy, 0.3)
        trained = policy.predict(state, timestep, conditioning)
        policy.export(tmp_path)
        stock.load_lora_weights(tmp_path)
        theirs = stock.unet(state, timestep, encoder_hidden_states=conditioning["embeddings"]).sample
    assert (trained - base).abs().max() > 1e-2
    torch.testing.assert_close(theirs, trained, atol=1e-4, rtol=1e-3)


def test_a_full_fine_tune_exports_a_pipeline(folders, tmp_path: Path):
    policy = StableDiffusion(path=str(folders["sd15"])).load()
    perturb(policy, 0.02)
    policy.export(tmp_path / "out")
    again = StableDiffusion(path=str(tmp_path / "out")).load()
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(again.trainable_parameters()[name], parameter)
    assert not any(path.suffix in {".bin", ".pt", ".pkl"} for path in tmp_path.rglob("*"))


# ----------------------------------------------------------------------------------------------------- cross-attention


def test_watching_changes_nothing_and_maps_are_those_of_plain_attention(folders):
    policy = StableDiffusion(path=str(folders["sd15"]), lora_rank=2).load()
    assert isinstance(policy, StableDiffusionPolicy)
    perturb(policy, 0.2)
    assert policy.offers == StableDiffusion(path=str(folders["sd15"])).offers
    names = frozenset({attention_name("image_to_text", 0), attention_name("image_to_text", "all")})
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.7, 0.3])
    conditioning = policy.encode(attrs.evolve(Prompts.of(TEXTS), core=(("cat", "blue dog"), ("boxes",))))
    with torch.no_grad():
        plain = policy.velocity(latents, sigma, conditioning)
        watched, captures = policy.velocity_with_captures(latents, sigma, conditioning, names)
    assert torch.equal(plain, watched)

    seen: list[Tensor] = []

    class Explicit:
        """Attention probabilities as diffusers computes them."""

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            query = attn.head_to_batch_dim(attn.to_q(hidden_states))
            key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
            value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
            probabilities = attn.get_attention_scores(query, key)
            seen.append(probabilities.unflatten(0, (2, attn.heads)).mean(dim=1))  # [N, S, L]
            return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(probabilities @ value)))

    for attention in policy.attentions():
        attention.set_processor(Explicit())
    with torch.no_grad():
        policy.velocity(latents, sigma, conditioning)
    positions = [[span.positions["text"] for span in spans] for spans in conditioning.token_spans]
    by_hand = torch.zeros(2, 2, 16, 16)
    for prompt, concepts in enumerate(positions):
        for concept, where in enumerate(concepts):
            by_hand[prompt, concept] = seen[0][prompt][:, list(where)].sum(dim=-1).view(16, 16)
    found = captures[attention_name("image_to_text", 0)]
    assert found.shape == (2, 2, 4, 4)
    expected = torch.nn.functional.avg_pool2d(by_hand, 4)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert len(seen) == 4  # one down, one in the middle, two up: what the spec counted
    assert captures[attention_name("image_to_text", "all")].shape == (2, 2, 4, 4)


def test_star_runs_on_a_unet(folders):
    credit = Product(advantage=GroupRelative(), allocations=(TextAttention(blocks="all", doubt=0.0),))
    sampler = SDE(num_steps=4, kernel=DDIM(eta=1.0))
    algorithm, engine = tiny_algorithm(folders["sd15"], ClippedSurrogate(ratio="token"), sampler, credit)
    experience = collected(engine)
    assert experience.credit.weight.shape == (4, 4, 4, 4)
    assert experience.credit.weight.std() > 0
    assert tiny_learner(algorithm).learn(experience)["grad_norm"] > 0
    with pytest.raises(ValueError, match="neither StableDiffusion nor SDE offers"):
        tiny_algorithm(
            folders["sd15"], ClippedSurrogate(), sampler,
            Product(advantage=GroupRelative(), allocations=(TextAttention(direction="text_to_image"),)),
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_alpha": 4}, "nothing to scale"),
        ({"lora_targets": "to_q", "lora_rank": 2}, "list of strings"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, message: str):
    with pytest.raises(ValueError, match=message):
        StableDiffusion(path="nowhere/at-all", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2'; known is 'scaled_linear'"),
        ({"prediction_type": "sample"}, "known is 'epsilon' or 'v_prediction'"),
        ({"timestep_spacing": "linspace"}, "timestep_spacing='linspace'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ({"clip_sample": True}, "clip_sample=True"),
    ],
)
def test_schedules_that_are_not_covered_are_refused(folders, tmp_path: Path, change, message: str):
    shutil.copytree(folders["sd15"], tmp_path, dirs_exist_ok=True)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        StableDiffusion(path=str(tmp_path)).load()


def test_other_pipelines_are_refused(folders, clip_pipeline, tmp_path: Path):
    with pytest.raises(ValueError, match=r"is missing; this is no .*StableDiffusionPipeline, but a StableDiffusion3"):
        StableDiffusion(path=str(clip_pipeline)).load()
    with pytest.raises(ValueError, match="model_index"):
        _ = StableDiffusion(path=str(tmp_path / "missing")).offers
    policy = StableDiffusion(path=str(folders["sd15"])).load()
    with pytest.raises(ValueError, match="num_steps=1001"):
        policy.sigmas(1001, 32)


def test_offers_of_sd15_need_no_network():
    offers = StableDiffusion().offers
    assert attention_name("image_to_text", "5-10") in offers
    assert attention_name("image_to_text", 15) in offers
    assert attention_name("image_to_text", 16) not in offers
    assert attention_name("text_to_image", 3) not in offers


@pytest.mark.hub
def test_the_shipped_config_is_that_of_the_hub():
    from huggingface_hub import hf_hub_download

    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    theirs = json.loads(Path(hf_hub_download(name, "unet/config.json")).read_text())
    ours = StableDiffusion(path=name).config("unet")
    assert {key: theirs[key] for key in ours} == ours


def test_import_is_cheap():
    code = "import rlt2i.policies.sd, sys; assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_levels_of_the_model_find_their_own_timestep(folders):
    policy = StableDiffusion(path=str(folders["sd15"])).load()
    alpha_bars = policy.schedule.alpha_bars
    levels = vp_sigma(alpha_bars)
    assert torch.equal(nearest_timestep(levels, alpha_bars), torch.arange(1000))
    between = (levels[400] * 0.6 + levels[401] * 0.4)[None]
    assert nearest_timestep(between, alpha_bars).tolist() == [400]
    assert nearest_timestep(torch.tensor([0.99]), alpha_bars).tolist() == [999]
