"""Every backbone against the stock pipeline of its class, on tiny random weights that are saved and loaded again."""

from __future__ import annotations

import attrs
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

from rlt2i.captures import attention_name, parse_attention_name, select_blocks
from rlt2i.interfaces import RolloutRequest
from rlt2i.policies.flux import FluxPolicy
from rlt2i.policies.flux2 import Flux2Policy
from rlt2i.policies.pretrained.autoencoder import to_vae
from rlt2i.policies.sana import SanaPolicy
from rlt2i.policies.tiny import save_tiny
from rlt2i.samplers.ode import ODE
from rlt2i.seeds import RolloutNoise
from rlt2i.types import Prompts
from tests.policies.backbone_cases import CASES, NAMES, STEPS

TEXTS = ("a red cat and a blue dog", 'a sign saying "HELLO" on two boxes')


@pytest.fixture(scope="module", params=NAMES)
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


def some_names(spec):
    blocks = ("0", "1-2", "all")
    return frozenset(attention_name(direction, block) for direction in spec.directions for block in blocks)


@pytest.mark.parametrize("square", [True, False], ids=["square", "oblong"])
def test_noise_free_rollouts_equal_the_stock_pipeline_bit_for_bit(case, spec, policy, stock, square):
    size = 64 if square else case.oblong
    trajectory = rollout(policy, size)
    expected = case.draw(stock, policy, trajectory.conditioning, trajectory.latents[:, 0])
    assert torch.equal(stock.scheduler.sigmas, trajectory.sigmas)
    assert torch.equal(case.shown(policy, trajectory.clean_latents), expected)
    for options in case.also:
        again = case.draw(stock, policy, trajectory.conditioning, trajectory.latents[:, 0], **options)
        assert torch.equal(again, expected)
    watched = rollout(policy, size, some_names(spec))
    assert torch.equal(watched.latents, trajectory.latents)
    h, w = policy.token_grid(size)
    assert all(capture.shape == (4, STEPS, 4, h, w) for capture in watched.captures.values())


def test_guided_rollouts_equal_the_stock_pipeline(case, spec, stock):
    if case.guidance is None:
        pytest.skip("the stock pipeline has no guidance of its own")
    for ours, theirs in case.guided:
        policy = attrs.evolve(spec, guidance_scale=3.0, negative_prompt="green", **ours).load()
        trajectory = rollout(policy, case.oblong)
        conditioning, noise = trajectory.conditioning, trajectory.latents[:, 0]
        negative = case.given(conditioning, row=-1, prefix="negative_")
        expected = case.draw(stock, policy.policy, conditioning, noise, **negative, **theirs, **{case.guidance: 3.0})
        torch.testing.assert_close(case.shown(policy.policy, trajectory.clean_latents), expected, atol=1e-5, rtol=1e-5)
        unguided = case.draw(stock, policy.policy, conditioning, noise)
        assert (unguided - expected).abs().max() > 1e-2


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

    num_blocks, by_row = spec.num_blocks(spec.config("transformer")), {}
    for rows in case.together(conditioning):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "scaled_dot_product_attention", spy)
            case.draw(stock, policy, conditioning.take(torch.tensor(rows)), trajectory.latents[rows, 0])
        blocks = seen[case.blocks_before :][case.of_text :: 1 + case.of_text][:num_blocks]
        by_row |= {row: [block[i] for block in blocks] for i, row in enumerate(rows)}
    h, w = policy.token_grid(size)
    for name, capture in trajectory.captures.items():
        direction, selector = parse_attention_name(name)
        chosen = select_blocks(selector, num_blocks)
        for row, prompt in enumerate(conditioning.rows.tolist()):
            own = int(conditioning["mask"][row].sum()) if "mask" in conditioning.tensors else 0
            image, words_from = case.places(h * w, conditioning["embeddings"].shape[1], own)
            for concept, span in enumerate(conditioning.token_spans[prompt]):
                words = [words_from + position for position in span.positions["text"]]
                maps = [
                    by_row[row][i][image][:, words].sum(1)
                    if direction == "image_to_text"
                    else by_row[row][i][words][:, image].mean(0)
                    for i in chosen
                ]
                expected = torch.stack(maps).mean(dim=0).view(h, w)
                assert (capture[row, 0, concept] - expected).abs().max() < 1e-6
                assert expected.max() > 1e-3


@torch.no_grad()
def test_text_equals_the_stock_pipeline(case, policy, stock):
    conditioning = policy.encode(PROMPTS)
    options = {"max_sequence_length": policy.spec.max_sequence_length}
    options |= {"complex_human_instruction": policy.instruction} if isinstance(policy, SanaPolicy) else {}
    for row, text in enumerate(TEXTS):
        for name, (expected,) in case.text(stock, text, **options).items():
            found = conditioning[name][2 * row]
            assert torch.equal(found[: len(expected)], expected)
            assert not found[len(expected) :].any()
            if len(expected) < len(found):
                assert conditioning["mask"][2 * row].tolist() == [True] * len(expected) + [False] * (
                    len(found) - len(expected)
                )


def test_words_are_found_among_the_tokens_that_the_network_sees(case, policy):
    """The tokens that the text encoder reads of a prompt, at the places where its words are said to be."""
    encoder, seen = policy.pipe.text_encoder, []
    if isinstance(policy, FluxPolicy):
        encoder = policy.pipe.text_encoder_2
    prompts = ("a red cat and a blue dog.", "two cats: a sign saying 'HELLO' and fine dogs", " the RED box, a red box")
    hook = encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0]),
        with_kwargs=True,
    )
    try:
        for text in prompts:
            policy.encode_text(text, negative=False)
    finally:
        hook.remove()
    component = getattr(policy.pipe, policy.tokenizer)
    tokenizer = getattr(component, "tokenizer", component)
    for text, ids, spans in zip(prompts, seen, policy.encode(Prompts.of(prompts)).token_spans, strict=True):
        (ids,) = ids.tolist()
        if isinstance(policy, SanaPolicy):
            ids = [ids[0], *ids[-policy.spec.max_sequence_length + 1 :]]
        assert spans
        for span in spans:
            read = tokenizer.decode([ids[case.dropped + position] for position in span.positions["text"]])
            words = span.phrase.lower()
            assert "".join(read.lower().split()).count("".join(words.split())) == text.lower().count(words)


@torch.no_grad()
def test_images_equal_the_stock_pipelines(case, policy, stock):
    request = RolloutRequest(
        noise=RolloutNoise(range(4), range(4, 8)), captures=frozenset(), image_size=case.oblong, group_size=2
    )
    trajectory = ODE(num_steps=2).rollout(policy, policy.encode(PROMPTS), request)
    expected = case.draw(stock, policy, trajectory.conditioning, trajectory.latents[:, 0], output="pt", steps=2)
    images = policy.decode(trajectory.clean_latents)
    assert images.shape == (4, 3, *case.oblong)
    assert (images - expected).abs().max() <= case.near
    assert images.is_contiguous()
    assert policy.encode_images(images).shape == trajectory.clean_latents.shape


@torch.no_grad()
def test_encoded_images_are_what_the_decoder_inverts(policy):
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    latents = policy.encode_images(images)
    pixels = 2 * images - 1
    if getattr(policy.vae.config, "in_channels", 3) == 4:
        pixels = torch.cat([pixels, torch.ones(2, 1, 32, 48)], dim=1)  # opaque
    raw = policy.vae.encode(pixels[:, :, None] if hasattr(policy.vae.config, "z_dim") else pixels)
    mean = raw.latent_dist.mode() if hasattr(raw, "latent_dist") else raw.latent
    mean = mean[:, :, 0] if hasattr(policy.vae.config, "z_dim") else mean
    torch.testing.assert_close(to_vae(policy.vae, latents), mean, atol=1e-5, rtol=1e-5)
    if isinstance(policy, Flux2Policy):
        theirs = policy.pipe._encode_vae_image(2 * images - 1, generator=None)
        torch.testing.assert_close(latents, theirs, atol=0, rtol=0)


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
    before = case.draw(stock, trained, conditioning, noise)
    stock.load_lora_weights(tmp_path)
    try:
        loaded = case.draw(stock, trained, conditioning, noise)
    finally:
        stock.unload_lora_weights()
    assert (loaded - before).abs().max() > 1e-2
    torch.testing.assert_close(loaded, case.shown(trained, trajectory.clean_latents), atol=1e-5, rtol=1e-5)


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
    cell = policy.patch * policy.pixels_per_latent
    assert policy.token_grid((step, 3 * step)) == (step // cell, 3 * step // cell)
    with pytest.raises(ValueError, match=rf"size=\(33, {step}\).*multiple of {step}.*is {32} x {step}"):
        policy.latent_shape((33, step))
    for size in (0, -step, (step, 0)):
        with pytest.raises(ValueError, match="nearest"):
            policy.token_grid(size)


def test_every_adapter_learns_and_checkpointing_changes_nothing(case, spec, policy):
    conditioning = policy.encode(PROMPTS)
    latents = torch.randn(4, *policy.latent_shape(32), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.7, 0.4, 0.1])
    gradients = []
    for each in (policy, attrs.evolve(spec, gradient_checkpointing=True).load()):
        parameters = each.trainable_parameters()
        assert all(p.dtype == torch.float32 for p in parameters.values())
        velocity = each.velocity(latents, sigma, conditioning)
        gradients.append(torch.autograd.grad(velocity.square().mean(), list(parameters.values()), allow_unused=True))
    for name, plain, checkpointed in zip(parameters, *gradients, strict=True):
        idle = any(f"{layer}.lora" in name for layer in case.idle)
        assert (plain is None) == (checkpointed is None) == idle
        assert idle or torch.equal(plain, checkpointed)
