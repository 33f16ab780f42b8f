"""SDXL against the stock pipeline, and the size and crop that every row is told."""

from __future__ import annotations

import attrs
import pytest
import torch
from safetensors import safe_open

from rlt2i.captures import attention_name
from rlt2i.interfaces import RolloutRequest
from rlt2i.policies.sd import StableDiffusion
from rlt2i.policies.sdxl import SDXL
from rlt2i.policies.tiny import save_tiny
from rlt2i.samplers.ode import ODE
from rlt2i.seeds import RolloutNoise
from rlt2i.types import Prompts

SIZE = (16, 32)
STEPS = 4
PROMPTS = Prompts.of(("a red cat and a blue dog", "two boxes"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("StableDiffusionXLPipeline", tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def spec(folder):
    return SDXL(path=str(folder), lora_rank=2)


@pytest.fixture(scope="module")
def policy(spec):
    return spec.load()


@pytest.fixture(scope="module")
def stock(folder):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rollout(policy, prompts=PROMPTS, captures=frozenset()):
    request = RolloutRequest(noise=RolloutNoise(range(2), range(2)), captures=captures, image_size=SIZE)
    return ODE(num_steps=STEPS).rollout(policy, policy.encode(prompts), request)


def drawn(stock, row, **options):
    """[4, 8, 16] the pipeline's own latents of one prompt, from our noise."""
    noise = RolloutNoise([row], [row]).initial((4, 8, 16))
    return stock(
        PROMPTS.texts[row], height=16, width=32, num_inference_steps=STEPS, output_type="latent", latents=noise,
        **({"guidance_scale": 1.0} | options),
    )[0][0]  # fmt: skip


def close(ours, theirs):
    """Their solver steps in other variables, and a clean prediction from pure noise amplifies rounding 15 times."""
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"original_size": (64, 48), "crop": (8, 4)}, {"original_size": (64, 48), "crops_coords_top_left": (8, 4)}),
        ({"guidance_scale": 3.0}, {"guidance_scale": 3.0}),
        ({"guidance_scale": 3.0, "negative_prompt": "green"}, {"guidance_scale": 3.0, "negative_prompt": "green"}),
    ],
    ids=["plain", "size and crop", "zeros as negative", "negative prompt"],
)
def test_rollouts_equal_the_stock_pipelines(spec, stock, fields, options):
    latents = rollout(attrs.evolve(spec, **fields).load()).clean_latents
    for row in range(2):
        close(latents[row], drawn(stock, row, **options))
    assert fields == {} or (latents[0] - drawn(stock, 0)).abs().max() > 2e-2


def test_the_negative_prompt_of_every_row_keeps_that_rows_own_size_and_crop(spec, stock):
    """Two prompts of one batch that tell different pictures, under guidance: each as if it were drawn alone."""
    told = ({"original_size": [64, 48]}, {"crop": [8, 4]})
    policy = attrs.evolve(spec, guidance_scale=3.0, negative_prompt="green").load()
    latents = rollout(policy, attrs.evolve(PROMPTS, metadata=told)).clean_latents
    alike = rollout(policy).clean_latents
    options = {"guidance_scale": 3.0, "negative_prompt": "green"}
    pictures = ({"original_size": (64, 48)}, {"crops_coords_top_left": (8, 4)})
    for row, picture in enumerate(pictures):
        expected = drawn(stock, row, **options, **picture)
        close(latents[row], expected)
        assert (alike[row] - expected).abs().max() > 2e-2


def test_replay_sees_what_the_rollout_saw(spec):
    policy = attrs.evolve(spec, guidance_scale=3.0).load()
    trajectory = rollout(policy, attrs.evolve(PROMPTS, metadata=({"original_size": [64, 48]}, {})))
    sigma = trajectory.sigmas[1].expand(2)
    moved = trajectory.latents[:, 2] - trajectory.latents[:, 1]
    velocity = policy.velocity(trajectory.latents[:, 1], sigma, trajectory.conditioning.take(torch.tensor([0, 1])))
    step = (trajectory.sigmas[2] - trajectory.sigmas[1]) * velocity
    torch.testing.assert_close(step.detach(), moved, atol=1e-5, rtol=1e-5)
    swapped = policy.velocity(
        trajectory.latents[:, 1].flip(0), sigma, trajectory.conditioning.take(torch.tensor([1, 0]))
    )
    torch.testing.assert_close(swapped.flip(0), velocity, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("metadata", [{"original_size": 64}, {"crop": [1, 2, 3]}, {"crop": "left"}])
def test_metadata_that_are_no_pair_are_refused(policy, metadata):
    with pytest.raises(ValueError, match=f"{next(iter(metadata))!r}.*two numbers of pixels"):
        policy.encode(attrs.evolve(PROMPTS, metadata=(metadata, {})))


def test_every_layer_of_every_block_is_watched(spec, policy):
    assert (
        spec.num_blocks(spec.config("unet")) == len(policy.blocks()) == 2 + 2 + 4
    )  # down, middle, up; two layers each
    names = frozenset(attention_name("image_to_text", block) for block in ("0", "7", "all"))
    captures = rollout(policy, captures=names).captures
    assert all(capture.shape == (2, STEPS, 4, 2, 4) for capture in captures.values())
    assert policy.token_grid(SIZE) == (2, 4)


def test_the_stock_pipeline_loads_the_adapter_with_every_key(spec, stock, tmp_path):
    trained = spec.load()
    draw = torch.Generator().manual_seed(1)
    for parameter in trained.trainable_parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    trained.export(tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert len(file.keys()) == len(trained.trainable_parameters())
    before = drawn(stock, 0)
    stock.load_lora_weights(tmp_path)
    try:
        loaded = drawn(stock, 0)
    finally:
        stock.unload_lora_weights()
    off, effect = (loaded - rollout(trained).clean_latents[0]).abs().max(), (loaded - before).abs().max()
    assert off < 0.02 * effect


def test_relatives_that_need_something_else_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"policy\.type=SDXL"):
        StableDiffusion(path=str(folder)).check()
    plain = save_tiny("StableDiffusionPipeline", tmp_path)
    with pytest.raises(ValueError, match=r"policy\.type=StableDiffusion"):
        SDXL(path=str(plain)).check()
    for fields in ({"crop": (-1, 0)}, {"original_size": (0, 8)}):
        with pytest.raises(ValueError, match="pixel"):
            SDXL(**fields)


def test_the_published_model_has_its_parameters_and_blocks():
    spec = SDXL(dtype="bfloat16")
    policy = spec.policy.on_meta(spec)
    assert sum(parameter.numel() for parameter in policy.network.parameters()) == 2_567_463_684
    assert spec.num_blocks(spec.config("unet")) == len(policy.blocks()) == 70
    assert policy.token_grid(1024) == (32, 32)
