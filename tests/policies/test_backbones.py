"""Every backbone against the stock pipeline of its class, on tiny random weights that are saved and loaded again."""

from __future__ import annotations

import attrs
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

from rlt2i.captures import attention_name, parse_attention_name, select_blocks
from rlt2i.interfaces import RolloutRequest
from rlt2i.policies.flux import Flux
from rlt2i.policies.lumina2 import Lumina2
from rlt2i.policies.sana import Sana
from rlt2i.policies.tiny import save_tiny
from rlt2i.samplers.ode import ODE
from rlt2i.seeds import RolloutNoise
from rlt2i.types import Prompts

TEXTS = ("a red cat and a blue dog", 'a sign saying "HELLO" on two boxes')
STEPS = 4


@attrs.frozen
class Case:
    """A backbone: its spec, and how its stock pipeline is asked for latents from given embeddings."""

    spec: type
    options: dict
    tiny: dict
    call: dict
    embeddings: dict
    blocks_before: int = 0
    """Calls of scaled_dot_product_attention before the first watched block."""


SANA_CALL = {"guidance_scale": 1.0, "use_resolution_binning": False, "negative_prompt": None}
CASES = {
    "flux": Case(
        Flux, {"max_sequence_length": 24}, {}, {"guidance_scale": 3.5, "max_sequence_length": 24},
        {"prompt_embeds": "embeddings", "pooled_prompt_embeds": "pooled"},
    ),
    "sana": Case(
        Sana, {"max_sequence_length": 24}, {"qk_norm": None}, SANA_CALL,
        {"prompt_embeds": "embeddings", "prompt_attention_mask": "mask"},
    ),
    "sana15": Case(
        Sana, {"max_sequence_length": 24}, {}, SANA_CALL,
        {"prompt_embeds": "embeddings", "prompt_attention_mask": "mask"},
    ),
    "lumina2": Case(
        Lumina2, {"max_sequence_length": 200}, {}, {"guidance_scale": 1.0},
        {"prompt_embeds": "embeddings", "prompt_attention_mask": "mask"}, blocks_before=2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    return save_tiny(case.spec.pipeline, tmp_path_factory.mktemp("tiny"), **case.tiny)


@pytest.fixture(scope="module")
def spec(case, folder):
    return case.spec(path=str(folder), lora_rank=2, **case.options)


@pytest.fixture(scope="module")
def policy(spec):
    return spec.load()


@pytest.fixture(scope="module")
def stock(case, folder):
    import diffusers

    pipe = getattr(diffusers, case.spec.pipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPTS = Prompts.of(TEXTS, group_size=2)


def rollout(policy, size, captures=frozenset()):
    request = RolloutRequest(
        noise=RolloutNoise(range(4), range(4, 8)), captures=captures, image_size=size, group_size=2
    )
    return ODE(num_steps=STEPS).rollout(policy, policy.encode(PROMPTS), request)


def stock_latents(case, stock, policy, conditioning, noise, **options):
    packed = case.spec is Flux
    n, c, h, w = noise.shape
    latents = stock(
        latents=stock._pack_latents(noise, n, c, h, w) if packed else noise, num_inference_steps=STEPS,
        height=h * stock.vae_scale_factor, width=w * stock.vae_scale_factor, output_type="latent",
        **{name: conditioning[ours] for name, ours in case.embeddings.items()}, **(case.call | options),
    )[0]  # fmt: skip
    scale = stock.vae_scale_factor
    return stock._unpack_latents(latents, h * scale, w * scale, scale) if packed else latents


def some_names(spec):
    blocks = ("0", "1-2", "all")
    return frozenset(attention_name(direction, block) for direction in spec.directions for block in blocks)


@pytest.mark.parametrize("size", [64, (32, 96)], ids=str)
def test_noise_free_rollouts_equal_the_stock_pipeline_bit_for_bit(case, spec, policy, stock, size):
    trajectory = rollout(policy, size)
    expected = stock_latents(case, stock, policy, trajectory.conditioning, trajectory.latents[:, 0])
    assert torch.equal(stock.scheduler.sigmas, trajectory.sigmas)
    assert torch.equal(trajectory.clean_latents, expected)
    watched = rollout(policy, size, some_names(spec))
    assert torch.equal(watched.latents, trajectory.latents)
    h, w = policy.token_grid(size)
    assert all(capture.shape == (4, STEPS, 4, h, w) for capture in watched.captures.values())


def test_guided_rollouts_equal_the_stock_pipeline(case, spec, stock):
    policy = attrs.evolve(spec, guidance_scale=3.0, negative_prompt="green").load()
    trajectory = rollout(policy, (32, 96))
    conditioning = trajectory.conditioning
    negative = {
        f"negative_{name}": conditioning.tensors[ours][-1:].expand(4, *conditioning.tensors[ours].shape[1:])
        for name, ours in case.embeddings.items()
    }
    scale = "true_cfg_scale" if case.spec is Flux else "guidance_scale"
    noise = trajectory.latents[:, 0]
    expected = stock_latents(case, stock, policy.policy, conditioning, noise, **negative, **{scale: 3.0})
    torch.testing.assert_close(trajectory.clean_latents, expected, atol=1e-5, rtol=1e-5)
    unguided = stock_latents(case, stock, policy.policy, conditioning, noise)
    assert (unguided - expected).abs().max() > 0.1


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_watching_changes_no_bit(spec, policy, grad):
    conditioning = policy.encode(PROMPTS)
    latents = torch.randn(4, *policy.latent_shape((32, 64)), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.7, 0.4, 0.1])
    with torch.set_grad_enabled(grad):
        plain = policy.velocity(latents, sigma, conditioning)
        watched, captures = policy.velocity_with_captures(latents, sigma, conditioning, some_names(spec))
    assert torch.equal(plain, watched)
    assert plain.requires_grad == grad
    assert not any(capture.requires_grad for capture in captures.values())


def test_maps_equal_the_explicit_softmax_of_the_stock_network(case, spec, policy, stock):
    """Queries, keys and masks of every attention of the stock pipeline's first step; the softmax in float64."""
    size = (32, 64)
    trajectory = rollout(policy, size, some_names(spec))
    conditioning, seen = trajectory.conditioning, []

    def spy(query, key, value, attn_mask=None, scale=None, original=functional.scaled_dot_product_attention, **options):
        scores = query.double() @ key.double().mT * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            mask = attn_mask if attn_mask.dtype is not torch.bool else torch.where(attn_mask, 0.0, -torch.inf)
            scores = scores + mask.double()
        seen.append(scores.softmax(-1).mean(dim=1))
        return original(query, key, value, attn_mask=attn_mask, scale=scale, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", spy)
        stock_latents(case, stock, policy, conditioning, trajectory.latents[:, 0])
    num_blocks = spec.num_blocks(spec.config("transformer"))
    blocks = seen[case.blocks_before : case.blocks_before + num_blocks]
    h, w = policy.token_grid(size)
    for name, capture in trajectory.captures.items():
        direction, selector = parse_attention_name(name)
        chosen = select_blocks(selector, num_blocks)
        for row, prompt in enumerate(conditioning.rows.tolist()):
            start = 0 if case.spec is Sana else conditioning["embeddings"].shape[1]
            if case.spec is Lumina2:
                start = int(conditioning["mask"][row].sum())
            image = slice(start, start + h * w)
            for concept, span in enumerate(conditioning.token_spans[prompt]):
                words = list(span.positions["text"])
                maps = [
                    blocks[i][row][image][:, words].sum(1)
                    if direction == "image_to_text"
                    else blocks[i][row][words][:, image].mean(0)
                    for i in chosen
                ]
                expected = torch.stack(maps).mean(dim=0).view(h, w)
                assert (capture[row, 0, concept] - expected).abs().max() < 1e-6
                assert expected.max() > 1e-3


@torch.no_grad()
def test_text_equals_the_stock_pipeline(case, policy, stock):
    conditioning = policy.encode(PROMPTS)
    options = {"max_sequence_length": policy.spec.max_sequence_length}
    for row, text in enumerate(TEXTS):
        if case.spec is Flux:
            embeddings, pooled, _ = stock.encode_prompt(text, None, **options)
            assert torch.equal(conditioning["pooled"][2 * row], pooled[0])
        else:
            options |= {"complex_human_instruction": policy.instruction} if case.spec is Sana else {}
            embeddings, mask, *_ = stock.encode_prompt(text, do_classifier_free_guidance=False, **options)
            assert torch.equal(conditioning["mask"][2 * row], mask[0])
        assert torch.equal(conditioning["embeddings"][2 * row], embeddings[0])


def test_words_are_found_among_the_tokens_that_the_network_sees(case, policy):
    spans = {span.phrase: span.positions["text"] for row in policy.encode(PROMPTS).token_spans for span in row}
    assert {"red", "cat", "blue", "dog", "sign", "HELLO", "boxes"} <= set(spans)
    tokenizer = getattr(policy.pipe, policy.tokenizer)
    ids = tokenizer(policy.written(TEXTS[0])[0], max_length=policy.text_length, padding="max_length").input_ids
    if case.spec is Sana:
        ids = [ids[0], *ids[-policy.spec.max_sequence_length + 1 :]]
    for word in ("red", "cat", "blue", "dog"):
        assert [tokenizer.decode([ids[position]]).strip() for position in spans[word]] == [word]


def test_images_equal_the_stock_pipelines(case, policy, stock):
    latents = torch.randn(2, *policy.latent_shape((32, 64)), generator=torch.Generator().manual_seed(0))
    config = stock.vae.config
    with torch.no_grad():
        images = policy.decode(latents)
        scaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        decoded = stock.vae.decode(scaled, return_dict=False)[0]
        expected = stock.image_processor.postprocess(decoded, output_type="pt")
        again = policy.encode_images(images)
    assert images.shape == (2, 3, 32, 64)
    assert torch.equal(images, expected)
    assert images.is_contiguous()
    assert again.shape == latents.shape


def test_the_stock_pipeline_loads_the_adapter_with_every_key(case, spec, stock, tmp_path):
    trained = spec.load()
    draw = torch.Generator().manual_seed(1)
    for parameter in trained.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    trajectory = rollout(trained, (32, 64))
    trained.export(tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert len(file.keys()) == len(trained.trainable_parameters())
    noise, conditioning = trajectory.latents[:, 0], trajectory.conditioning
    before = stock_latents(case, stock, trained, conditioning, noise)
    stock.load_lora_weights(tmp_path)
    try:
        loaded = stock_latents(case, stock, trained, conditioning, noise)
    finally:
        stock.unload_lora_weights()
    assert (loaded - before).abs().max() > 1e-2
    torch.testing.assert_close(loaded, trajectory.clean_latents, atol=1e-5, rtol=1e-5)


def test_merged_weights_are_a_pipeline_of_its_own(case, spec, tmp_path):
    trained = spec.load()
    draw = torch.Generator().manual_seed(1)
    for parameter in trained.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    trained.export_merged(tmp_path)
    merged = attrs.evolve(spec, path=str(tmp_path), lora_rank=None).load()
    assert not any("lora" in name for name in merged.trainable_parameters())
    ours, theirs = rollout(trained, 32).clean_latents, rollout(merged, 32).clean_latents
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)


def test_rows_do_not_influence_each_other(policy):
    conditioning = policy.encode(PROMPTS)
    latents = torch.randn(4, *policy.latent_shape(32), generator=torch.Generator().manual_seed(0))
    sigma, rows = torch.tensor([1.0, 0.7, 0.4, 0.1]), torch.tensor([3, 0])
    with torch.no_grad():
        together = policy.velocity(latents, sigma, conditioning)[rows]
        alone = policy.velocity(latents[rows], sigma[rows], conditioning.take(rows))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_does(policy):
    step = policy.granularity
    assert policy.token_grid((step, 3 * step)) == (step // policy.granularity, 3 * step // policy.granularity)
    with pytest.raises(ValueError, match=rf"size=\(33, {step}\).*multiple of {step}.*is {32} x {step}"):
        policy.latent_shape((33, step))
    for size in (0, -step, (step, 0)):
        with pytest.raises(ValueError, match="nearest"):
            policy.token_grid(size)


def test_every_adapter_learns_and_checkpointing_changes_nothing(spec, policy):
    conditioning = policy.encode(PROMPTS)
    latents = torch.randn(4, *policy.latent_shape(32), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.7, 0.4, 0.1])
    gradients = []
    for each in (policy, attrs.evolve(spec, gradient_checkpointing=True).load()):
        parameters = each.trainable_parameters()
        assert all(p.dtype == torch.float32 for p in parameters.values())
        velocity = each.velocity(latents, sigma, conditioning)
        gradients.append(torch.autograd.grad(velocity.square().mean(), list(parameters.values()), allow_unused=True))
    assert all(gradient is not None for gradient in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
