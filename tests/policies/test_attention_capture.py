from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlt2i.captures import attention_name, attention_names, parse_attention_name, select_blocks
from rlt2i.policies.attention.kernels import attend, choose_kernel
from rlt2i.policies.attention.maps import Where, image_to_text, text_to_image
from rlt2i.policies.sd3 import SD3
from rlt2i.types import Prompts

NAMES = frozenset(
    attention_name(direction, blocks)
    for direction, blocks in itertools.product(("image_to_text", "text_to_image"), ("middle", "all", "3", "0-1"))
)


# --------------------------------------------------------------------------------------------------------- names


def test_names_by_hand():
    assert attention_name("image_to_text") == "attention/image_to_text/middle"
    assert attention_name("text_to_image", 7) == "attention/text_to_image/7"
    assert parse_attention_name("attention/text_to_image/8-15") == ("text_to_image", "8-15")


@pytest.mark.parametrize(
    ("blocks", "num_blocks", "chosen"),
    [
        ("middle", 24, range(8, 16)),
        ("middle", 4, (1, 2)),
        ("middle", 1, (0,)),
        ("all", 3, range(3)),
        ("2", 3, (2,)),
        ("1-2", 4, (1, 2)),
    ],
)
def test_select_blocks(blocks, num_blocks, chosen):
    assert select_blocks(blocks, num_blocks) == tuple(chosen)


@pytest.mark.parametrize("blocks", ["", "first", "3-", "5-2", "2-2", "-1"])
def test_unknown_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="blocks="):
        attention_name("image_to_text", blocks)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="not the name of an attention map"):
        parse_attention_name("clean_predictions")
    with pytest.raises(ValueError, match="direction="):
        parse_attention_name("attention/sideways/all")
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        select_blocks("4", 4)


def test_every_name_a_network_offers_can_be_parsed_and_selected():
    names = attention_names(24)
    assert len(names) == 2 * (2 + 24 + 24 * 23 // 2)
    assert all(select_blocks(parse_attention_name(name)[1], 24) for name in names)


# --------------------------------------------------------------------------------------------------------- maths


def draw_qkv(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """[2, 3, 16 image + 6 text, 8]."""
    draw = torch.Generator().manual_seed(seed)
    return tuple((1.5 * torch.randn(2, 3, 22, 8, generator=draw, dtype=torch.float64)).to(dtype) for _ in range(3))


TOKENS = torch.tensor([[1, 3, 4], [5, 0, 0]])
MEMBERS = torch.tensor([[[1, 0], [1, 1], [0, 1]], [[1, 0], [0, 0], [0, 0]]]).bool()


def where(tokens: Tensor = TOKENS, members: Tensor = MEMBERS) -> Where:
    """The 16 image tokens come first."""
    return Where(grid=(4, 4), image=0, tokens=16 + tokens, members=members)


def explicit_maps(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps from the full softmax matrix, in float64, in plain loops."""
    matrix = (query.double() @ key.double().mT * 8**-0.5).softmax(dim=-1).mean(dim=1)
    to_text, to_image = torch.zeros(2, 2, 2, 16, dtype=torch.float64)
    for row, concept in itertools.product(range(2), range(2)):
        words = [int(t) for t, member in zip(TOKENS[row], MEMBERS[row, :, concept], strict=True) if member]
        for word in words:
            to_text[row, concept] += matrix[row, :16, 16 + word]
            to_image[row, concept] += matrix[row, 16 + word, :16] / len(words)
    return to_text, to_image


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-5)]
)
def test_maps_equal_the_explicit_softmax(dtype, tolerance):
    query, key, value = draw_qkv(dtype)
    lse = attend(query, key, value, "cpu")[1]
    to_text, to_image = explicit_maps(query, key)
    assert (image_to_text(query, key, lse, where()) - to_text).abs().max() < tolerance
    assert (text_to_image(query, key, lse, where()) - to_image).abs().max() < tolerance


def test_absent_concepts_have_maps_of_exactly_zero():
    query, key, value = draw_qkv(torch.float32)
    lse = attend(query, key, value, "cpu")[1]
    for reduce in (image_to_text, text_to_image):
        assert torch.count_nonzero(reduce(query, key, lse, where())[1, 1]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_sdpa_bit_for_bit_forward_and_backward(dtype):
    ours = [t.requires_grad_() for t in draw_qkv(dtype)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    out, lse = attend(*ours, "cpu")
    reference = F.scaled_dot_product_attention(*theirs)
    assert torch.equal(out, reference)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (out * weight).sum().backward()
    (reference * weight).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
    assert not lse.requires_grad


# ------------------------------------------------------------------------------------------------- in the network


def inputs(policy, *, texts=("a red cat and a blue dog", "two boxes"), rows=3):
    conditioning = policy.encode(Prompts.of(texts, group_size=rows // len(texts) + 1))
    conditioning = conditioning.take(torch.arange(rows))
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, *policy.latent_shape(32), generator=draw)
    return latents, torch.linspace(1.0, 0.2, rows), conditioning


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"lora_rank": 2},
        {"lora_rank": 2, "dtype": "bfloat16"},
        {"lora_rank": 2, "gradient_checkpointing": True},
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "uncond_grad": True},
    ],
    ids=str,
)
def test_watching_changes_no_bit_of_velocity_and_gradient(clip_pipeline, options, grad):
    policy = SD3(path=str(clip_pipeline), **options).load()
    latents, sigma, conditioning = inputs(policy)
    parameters = list(policy.trainable_parameters().values())
    gradients = []
    with torch.set_grad_enabled(grad):
        plain = policy.velocity(latents, sigma, conditioning)
        watched, captures = policy.velocity_with_captures(latents, sigma, conditioning, NAMES)
    assert torch.equal(plain, watched)
    assert captures.keys() == NAMES
    assert not any(c.requires_grad for c in captures.values())
    if grad:
        for velocity in (plain, watched):
            gradients.append(torch.autograd.grad(velocity.square().mean(), parameters, allow_unused=True))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_operations_as_the_stock_processor(clip_pipeline, dtype):
    from diffusers import SD3Transformer2DModel

    policy = SD3(path=str(clip_pipeline), lora_rank=2, dtype=str(dtype).removeprefix("torch.")).load()
    latents, sigma, conditioning = inputs(policy)
    network = SD3Transformer2DModel.from_pretrained(clip_pipeline, subfolder="transformer", dtype=dtype).eval()
    with torch.no_grad():
        reference = network(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=conditioning["embeddings"],
            pooled_projections=conditioning["pooled"],
            timestep=1000 * sigma,
        ).sample
        assert torch.equal(policy.velocity(latents, sigma, conditioning), reference.float())


def test_network_captures_equal_a_hooked_softmax(t5_pipeline):
    """The queries and keys of every block, seen by a hook; the maps from the full softmax in float64."""
    import rlt2i.policies.attention.watch as module

    policy = SD3(path=str(t5_pipeline), max_sequence_length=12).load()
    latents, sigma, conditioning = inputs(policy, texts=("a red cat and a cat", "the of"))
    seen = []

    def spy(query, key, value, kernel, original=module.attend, **options):
        seen.append((query.detach().double(), key.detach().double()))
        return original(query, key, value, kernel, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "attend", spy)
        captures = policy.velocity_with_captures(latents, sigma, conditioning, NAMES)[1]

    assert [span.phrase for span in conditioning.token_spans[0]] == ["red", "cat"]
    assert not conditioning.token_spans[1]
    for name in NAMES:
        direction, blocks = parse_attention_name(name)
        expected = torch.zeros(3, 2, 64, dtype=torch.float64)
        chosen = select_blocks(blocks, 4)
        for block in chosen:
            query, key = seen[block]
            matrix = (query @ key.mT * 16**-0.5).softmax(-1).mean(1)
            for row, prompt in enumerate(conditioning.rows.tolist()):
                for concept, span in enumerate(conditioning.token_spans[prompt]):
                    words = [64 + p for where in span.positions.values() for p in where]
                    image_rows = matrix[row, :64, words].sum(1)
                    text_rows = matrix[row, words, :64].mean(0)
                    expected[row, concept] += (image_rows if direction == "image_to_text" else text_rows) / len(chosen)
        assert captures[name].dtype == torch.float32
        assert captures[name].shape == (3, 2, 8, 8)
        assert (captures[name].flatten(2) - expected).abs().max() < 1e-6
        assert torch.count_nonzero(captures[name][2]) == 0  # the prompt without content


def test_captures_do_not_depend_on_which_others_are_asked_for(clip_pipeline):
    policy = SD3(path=str(clip_pipeline)).load()
    batch = inputs(policy)
    with torch.no_grad():
        together = policy.velocity_with_captures(*batch, NAMES)[1]
        for name in NAMES:
            assert torch.equal(policy.velocity_with_captures(*batch, frozenset({name}))[1][name], together[name])


def test_a_failed_pass_leaves_nobody_watching(clip_pipeline):
    from rlt2i.policies.attention import recorder

    policy = SD3(path=str(clip_pipeline)).load()
    latents, sigma, conditioning = inputs(policy)
    with pytest.raises(RuntimeError, match="channels"):
        policy.velocity_with_captures(latents[:, :1], sigma, conditioning, NAMES)
    assert recorder._active.recorder is None


def test_an_unknown_block_is_refused(clip_pipeline):
    policy = SD3(path=str(clip_pipeline)).load()
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        policy.velocity_with_captures(*inputs(policy), frozenset({attention_name("image_to_text", 9)}))


def test_kernel_choice_on_cpu():
    assert choose_kernel(torch.device("cpu"), torch.bfloat16, 16) == "cpu"


@pytest.mark.slow
def test_compiled_blocks_watch_without_changing_a_bit(clip_pipeline):
    eager = SD3(path=str(clip_pipeline), lora_rank=2).load()
    policy = SD3(path=str(clip_pipeline), lora_rank=2, compile=True).load()
    batch = inputs(policy)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        plain = policy.velocity(*batch)
        watched, captures = policy.velocity_with_captures(*batch, NAMES)
        # One graph per kind of block (dual attention, plain, last), however many there are and whoever watches.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
        reference, expected = eager.velocity_with_captures(*batch, NAMES)
    assert torch.equal(plain, watched)
    torch.testing.assert_close(plain, reference, atol=1e-5, rtol=1e-4)
    for name in NAMES:
        torch.testing.assert_close(captures[name], expected[name], atol=1e-6, rtol=1e-4)
    with_grad, captures = policy.velocity_with_captures(*batch, NAMES)
    assert with_grad.requires_grad
    assert captures.keys() == NAMES


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_kernels_agree_with_the_explicit_softmax(dtype):
    query, key, value = (t.cuda() for t in draw_qkv(dtype))
    query, key, value = (F.pad(t, (0, 56)) for t in (query, key, value))
    kernel = choose_kernel(query.device, dtype, 64)
    lse = attend(query, key, value, kernel)[1]
    to_text, to_image = explicit_maps(query[..., :8].cpu() * 8**-0.25, key[..., :8].cpu() * 8**-0.25)
    tokens, members = TOKENS.cuda(), MEMBERS.cuda()
    assert (image_to_text(query, key, lse, where(tokens, members)).cpu() - to_text).abs().max() < 1e-3
    assert (text_to_image(query, key, lse, where(tokens, members)).cpu() - to_image).abs().max() < 1e-3


@pytest.mark.gpu
def test_watching_changes_no_bit_on_the_gpu(clip_pipeline):
    spec = SD3(path=str(clip_pipeline), lora_rank=2, dtype="bfloat16", guidance_scale=3.0)
    policy = spec.load("cuda")
    latents, sigma, conditioning = inputs(policy)
    batch = latents.cuda(), sigma.cuda(), conditioning
    with torch.no_grad():
        assert torch.equal(policy.velocity(*batch), policy.velocity_with_captures(*batch, NAMES)[0])
