from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from rlt2i.policies.sd3 import SD3
from rlt2i.types import Prompts

TEXT = "a red cat"


def run(policy, latents, sigma):
    with torch.no_grad():
        return policy.velocity(latents, sigma, policy.encode(Prompts.of([TEXT])).take(torch.zeros(len(latents)).long()))


def stock_velocity(pipeline, latents, sigma):
    embeddings, _, pooled, _ = pipeline.encode_prompt(TEXT, None, None, do_classifier_free_guidance=False)
    with torch.no_grad():
        return pipeline.transformer(
            hidden_states=latents,
            encoder_hidden_states=embeddings.expand(len(latents), -1, -1),
            pooled_projections=pooled.expand(len(latents), -1),
            timestep=1000 * sigma,
        ).sample


def perturb(policy, scale=0.3):
    draw = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter.data += scale * torch.randn(parameter.shape, generator=draw)


@pytest.fixture
def batch():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.8, 0.3])


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (4, 4), (8, 2)])
def test_stock_pipeline_loads_the_lora_with_every_key(clip_pipeline, stock, tmp_path, batch, rank, alpha):
    policy = SD3(path=str(clip_pipeline), lora_rank=rank, lora_alpha=alpha).load()
    before = run(policy, *batch)
    perturb(policy)
    ours = run(policy, *batch)
    assert (ours - before).abs().max() > 1e-2
    policy.export(tmp_path)

    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        saved = {name.removeprefix("transformer.") for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert len(saved) == len(policy.trainable_parameters()) == 2 * (4 * 8 - 1)  # the last block has no to_add_out

    pipeline = stock(clip_pipeline)
    pipeline.load_lora_weights(tmp_path)
    loaded = {
        name.replace(".default_0", "")
        for name, _ in pipeline.transformer.named_parameters()
        if "lora_" in name
    }  # fmt: skip
    assert loaded == saved
    torch.testing.assert_close(stock_velocity(pipeline, *batch), ours, atol=1e-5, rtol=1e-4)


def test_loaders_that_ignore_metadata_get_the_same_strength(clip_pipeline, stock, tmp_path, batch):
    from safetensors.torch import load_file

    policy = SD3(path=str(clip_pipeline), lora_rank=4, lora_alpha=16).load()
    perturb(policy)
    policy.export(tmp_path)
    pipeline = stock(clip_pipeline)
    pipeline.load_lora_weights(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    torch.testing.assert_close(stock_velocity(pipeline, *batch), run(policy, *batch), atol=1e-5, rtol=1e-4)


def test_a_full_fine_tune_exports_a_pipeline(clip_pipeline, stock, tmp_path, batch):
    policy = SD3(path=str(clip_pipeline)).load()
    perturb(policy, 0.02)
    policy.export(tmp_path / "out")
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert not any(path.suffix in {".bin", ".pt", ".pkl", ".pth"} for path in tmp_path.rglob("*"))
    pipeline = stock(tmp_path / "out")
    torch.testing.assert_close(stock_velocity(pipeline, *batch), run(policy, *batch), atol=1e-6, rtol=1e-5)
    again = SD3(path=str(tmp_path / "out")).load()
    assert torch.equal(run(again, *batch), run(policy, *batch))


def test_lora_starts_as_the_base_model_and_from_its_seed(clip_pipeline, batch):
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    first = SD3(path=str(clip_pipeline), lora_rank=4, lora_seed=3).load()
    assert torch.equal(torch.rand(1), expected_draw)  # the global generator was not touched
    again = SD3(path=str(clip_pipeline), lora_rank=4, lora_seed=3).load()
    other = SD3(path=str(clip_pipeline), lora_rank=4, lora_seed=4).load()
    assert torch.equal(run(first, *batch), run(SD3(path=str(clip_pipeline)).load(), *batch))
    for name, parameter in first.trainable_parameters().items():
        assert torch.equal(parameter, again.trainable_parameters()[name])
        assert ("lora_B" in name) == bool(parameter.eq(0).all())
        assert "lora_B" in name or not torch.equal(parameter, other.trainable_parameters()[name])
    assert list(first.trainable_parameters()) == list(again.trainable_parameters())


def test_bf16_lora_computes_in_bf16_with_float32_masters(clip_pipeline, batch):
    policy = SD3(path=str(clip_pipeline), lora_rank=4, dtype="bfloat16").load()
    reference = SD3(path=str(clip_pipeline), lora_rank=4).load()
    for each in (policy, reference):
        perturb(each, 0.1)
    kinds = set()
    linear = policy.network.transformer_blocks[1].attn.to_q
    hook = linear.register_forward_hook(lambda module, inputs, output: kinds.add((inputs[0].dtype, output.dtype)))
    rounded, exact = run(policy, *batch), run(reference, *batch)
    hook.remove()
    assert kinds == {(torch.bfloat16, torch.bfloat16)}
    assert 0 < (rounded - exact).square().mean() < 0.1**2 * exact.square().mean()
