from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys

import attrs
import pytest
import torch

from rlt2i.captures import attention_name, attention_names
from rlt2i.policies.sd3 import SD3, SD3Policy
from rlt2i.types import Prompts

TEXTS = ("a red cat and a blue dog", 'a sign saying "HELLO WORLD"')


def euler(policy, noise, conditioning, sigmas):
    latents = noise
    with torch.no_grad():
        for sigma, sigma_next in itertools.pairwise(sigmas):
            velocity = policy.velocity(latents, sigma.expand(len(latents)), conditioning)
            latents = latents + (sigma_next - sigma) * velocity
    return latents


def draw(policy, rows, seed=0):
    return torch.randn(rows, *policy.latent_shape(32), generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"lora_alpha": 4}, "nothing to scale"),
        ({"lora_targets": "attn.to_q", "lora_rank": 2}, "list of strings"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1"),
        ({"schedule": "karras"}, "schedule"),
        ({"dtype": "float16"}, "dtype"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"zero_text_tokens": -1}, "zero_text_tokens"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        SD3(path="nowhere/at-all", **options)


def test_a_missing_directory_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match="model_index"):
        SD3(path=str(tmp_path / "missing")).load()
    with pytest.raises(ValueError, match="no diffusers StableDiffusion3Pipeline"):
        SD3(path=str(tmp_path)).load()
    with pytest.raises(ValueError, match="embedded"):
        SD3(path="embedded:cubes").load()


def test_offers_need_the_transformer_config_alone(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"num_layers": 6}))
    assert SD3(path=str(tmp_path)).offers == attention_names(6)


def test_offers_of_sd35_medium_need_no_network():
    offers = SD3(path="stabilityai/stable-diffusion-3.5-medium").offers
    assert attention_name("image_to_text", "8-15") in offers
    assert attention_name("text_to_image", 23) in offers
    assert attention_name("image_to_text", 24) not in offers


@pytest.mark.hub
def test_the_shipped_config_is_that_of_the_hub():
    from huggingface_hub import hf_hub_download

    name = "stabilityai/stable-diffusion-3.5-medium"
    with open(hf_hub_download(name, "transformer/config.json")) as file:
        theirs = json.load(file)
    ours = SD3(path=name).config("transformer")
    assert {key: theirs[key] for key in ours} == ours


def test_import_is_cheap():
    code = "import rlt2i.policies.sd3, sys; assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_t5_that_is_not_there_is_refused(clip_pipeline):
    with pytest.raises(ValueError, match="no third text encoder"):
        SD3(path=str(clip_pipeline), text_encoder_3=True).load()


def test_a_lora_target_that_is_not_there_is_refused(clip_pipeline):
    with pytest.raises(ValueError, match=r"attn\.qkv"):
        SD3(path=str(clip_pipeline), lora_rank=2, lora_targets=("attn.qkv",)).load()


# ----------------------------------------------------------------------------------------------------------- text


def test_embeddings_equal_diffusers_without_t5(clip_pipeline, stock):
    policy, pipeline = SD3(path=str(clip_pipeline)).load(), stock(clip_pipeline)
    conditioning = policy.encode(Prompts.of(TEXTS))
    for row, text in enumerate(TEXTS):
        embeddings, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        assert embeddings.shape[1] == 16 + 256  # as the stock pipeline appends them by default
        assert torch.equal(conditioning["embeddings"][row], embeddings[0])
        assert torch.equal(conditioning["pooled"][row], pooled[0])


@pytest.mark.parametrize("length", [8, 12])
def test_embeddings_equal_diffusers_with_t5(t5_pipeline, stock, length):
    policy, pipeline = SD3(path=str(t5_pipeline), max_sequence_length=length).load(), stock(t5_pipeline)
    conditioning = policy.encode(Prompts.of(TEXTS))
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            embeddings, _, pooled, _ = pipeline.encode_prompt(
                text, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
        assert embeddings.shape[1] == 16 + length
        assert torch.equal(conditioning["embeddings"][row], embeddings[0])
        assert torch.equal(conditioning["pooled"][row], pooled[0])


def test_zero_text_tokens_stand_in_for_a_t5_that_is_not_used(t5_pipeline, stock):
    policy = SD3(path=str(t5_pipeline), text_encoder_3=False, zero_text_tokens=9).load()
    pipeline = stock(t5_pipeline, text_encoder_3=None, tokenizer_3=None)
    expected = pipeline.encode_prompt(TEXTS[0], None, None, do_classifier_free_guidance=False, max_sequence_length=9)[0]
    conditioning = policy.encode(Prompts.of(TEXTS[:1]))
    assert torch.equal(conditioning["embeddings"], expected)
    assert all("t5" not in span.positions for span in conditioning.token_spans[0])


def test_a_group_shares_one_row_and_prompts_do_not_influence_each_other(clip_pipeline):
    policy = SD3(path=str(clip_pipeline)).load()
    conditioning = policy.encode(Prompts.of(TEXTS, group_size=3))
    assert conditioning.tensors["embeddings"].shape[0] == 2
    assert conditioning.rows.tolist() == [0, 0, 0, 1, 1, 1]
    alone = SD3(path=str(clip_pipeline)).load().encode(Prompts.of(TEXTS[1:]))
    assert torch.equal(alone["embeddings"][0], conditioning["embeddings"][5])


def test_each_prompt_is_encoded_once(clip_pipeline, monkeypatch):
    policy = SD3(path=str(clip_pipeline)).load()
    calls, original = [], SD3Policy.encode_text

    def count(self, text, **options):
        calls.append(text)
        return original(self, text, **options)

    monkeypatch.setattr(SD3Policy, "encode_text", count)
    for _ in range(2):
        policy.encode(Prompts.of((*TEXTS, TEXTS[0])))
    assert calls == list(TEXTS)


def test_core_phrases_are_found_in_both_streams(t5_pipeline):
    policy = SD3(path=str(t5_pipeline), max_sequence_length=12).load()
    prompts = attrs.evolve(Prompts.of(("two red cats", "a dog")), core=(("cat",), ()))
    conditioning = policy.encode(prompts)
    # clip: <bos> two red cats; t5 (from 16): two red cats
    assert [dict(span.positions) for span in conditioning.token_spans[0]] == [{"clip": (3,), "t5": (18,)}]
    assert [span.phrase for span in conditioning.token_spans[1]] == ["dog"]


# -------------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_own_ode_equals_the_stock_pipeline(t5_pipeline, stock, guidance_scale):
    policy = SD3(path=str(t5_pipeline), max_sequence_length=12, guidance_scale=guidance_scale).load()
    noise = draw(policy, 2)
    conditioning = policy.encode(Prompts.of(TEXTS))
    latents = euler(policy, noise, conditioning, policy.sigmas(4, 32))
    reference = stock(t5_pipeline)(
        list(TEXTS), latents=noise, num_inference_steps=4, guidance_scale=guidance_scale, max_sequence_length=12,
        output_type="latent", height=32, width=32,
    ).images  # fmt: skip
    torch.testing.assert_close(latents, reference, atol=2e-5, rtol=1e-4)


def test_images_equal_the_stock_pipeline_on_an_even_schedule(clip_pipeline, stock):
    policy = SD3(path=str(clip_pipeline)).load()
    noise = draw(policy, 2)
    sigmas = policy.sigmas(3, 32)
    assert torch.equal(sigmas, torch.tensor([1.0, 2 / 3, 1 / 3, 0.0]))
    images = policy.decode(euler(policy, noise, policy.encode(Prompts.of(TEXTS)), sigmas))
    reference = stock(clip_pipeline)(
        list(TEXTS), latents=noise, num_inference_steps=3, sigmas=sigmas[:-1].tolist(), guidance_scale=1.0,
        output_type="pt", height=32, width=32,
    ).images  # fmt: skip
    torch.testing.assert_close(images, reference, atol=2e-5, rtol=1e-4)
    assert images.min() >= 0
    assert images.max() <= 1


def test_schedules(t5_pipeline, clip_pipeline):
    shifted = SD3(path=str(t5_pipeline)).load().sigmas(10, 32)
    torch.testing.assert_close(shifted[1:3], torch.tensor([0.96013, 0.91335]), atol=1e-5, rtol=0)
    assert torch.equal(SD3(path=str(t5_pipeline), schedule="even").load().sigmas(4, 32), torch.linspace(1.0, 0.0, 5))
    last = SD3(path=str(clip_pipeline), schedule="sd3").load().sigmas(10, 32)[-2]
    torch.testing.assert_close(last, torch.tensor(0.001))


def test_a_scheduler_that_shifts_by_image_size_is_refused(clip_pipeline, tmp_path):
    shutil.copytree(clip_pipeline, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dynamic_shifting": True}))
    with pytest.raises(ValueError, match="shifts by image size"):
        SD3(path=str(tmp_path)).load()
    assert SD3(path=str(tmp_path), schedule="even").load().sigmas(2, 32).tolist() == [1.0, 0.5, 0.0]


# -------------------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 2}, {"lora_rank": 2, "dtype": "bfloat16"}, {"dtype": "bfloat16"}]
)
def test_policy_contract(clip_pipeline, options):
    policy = SD3(path=str(clip_pipeline), **options).load()
    conditioning = policy.encode(Prompts.of(TEXTS, group_size=2))
    latents, sigma = draw(policy, 4), torch.tensor([1.0, 0.7, 0.4, 0.1])
    assert policy.latent_shape(32) == (4, 16, 16)
    assert policy.token_grid(32) == (8, 8)

    velocity = policy.velocity(latents, sigma, conditioning)
    assert velocity.shape == latents.shape
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, policy.velocity(latents, sigma, conditioning))  # no dropout, no state
    velocity.square().mean().backward()
    trained = policy.trainable_parameters()
    assert trained
    assert all(p.dtype == torch.float32 and p.device == latents.device for p in trained.values())
    touched = [name for name, p in trained.items() if p.grad is not None]
    assert len(touched) == len(trained)
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    encoders = (policy.pipe.text_encoder, policy.pipe.text_encoder_2)
    frozen = [p for m in (policy.network, policy.vae, *encoders) for p in m.parameters()]
    assert sum(p.requires_grad for p in frozen) == len(trained)
    assert not any(m.training for m in (policy.network, policy.vae, *encoders))

    images = policy.decode(latents)
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32


def test_gradients_reach_the_latents(clip_pipeline):
    policy = SD3(path=str(clip_pipeline), lora_rank=2).load()
    latents = draw(policy, 1).requires_grad_()
    policy.decode(policy.velocity(latents, torch.tensor([0.5]), policy.encode(Prompts.of(TEXTS[:1])))).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_rows_do_not_influence_each_other(clip_pipeline):
    policy = SD3(path=str(clip_pipeline)).load()
    conditioning = policy.encode(Prompts.of(TEXTS, group_size=2))
    latents, sigma = draw(policy, 4), torch.tensor([1.0, 0.7, 0.4, 0.1])
    rows = torch.tensor([3, 0])
    with torch.no_grad():
        together = policy.velocity(latents, sigma, conditioning)[rows]
        alone = policy.velocity(latents[rows], sigma[rows], conditioning.take(rows))
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_image_sizes_that_do_not_fit_are_refused(clip_pipeline):
    policy = SD3(path=str(clip_pipeline)).load()
    for size in (30, 0, 4 * 17):
        with pytest.raises(ValueError, match="multiple of 4, at most 64"):
            policy.latent_shape(size)


def test_bf16_full_fine_tuning_keeps_float32_masters(clip_pipeline):
    reference, policy = (SD3(path=str(clip_pipeline), dtype=dtype).load() for dtype in ("float32", "bfloat16"))
    conditioning = reference.encode(Prompts.of(TEXTS))
    latents, sigma = draw(policy, 2), torch.tensor([0.9, 0.3])
    exact = reference.velocity(latents, sigma, conditioning)
    rounded = policy.velocity(latents, sigma, policy.encode(Prompts.of(TEXTS)))
    assert 0 < (exact - rounded).square().mean() < 0.15**2 * exact.square().mean()
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(parameter, reference.trainable_parameters()[name])
