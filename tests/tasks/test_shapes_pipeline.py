"""The embedded pipeline: what is shipped, and the script that trained it."""

import copy
import json

import attrs
import pytest
import torch

from rlt2i.tasks.embedded.networks import (
    build_autoencoder,
    build_tokenizer,
    build_transformer,
    byte_pair_merges,
    decode_latents,
    encode_images,
    encode_text,
    load_pipeline,
    save_pipeline,
    tokenise,
)
from rlt2i.tasks.embedded.optimisers import Muon, orthogonalise
from rlt2i.tasks.embedded.pretraining import sample_texts
from rlt2i.tasks.shapes.networks import PIPELINE_DIR, WORLD
from rlt2i.tasks.shapes.pretrain import SCHEDULE, evaluate, pretrain
from rlt2i.tasks.shapes.prompts import all_prompts, eval_prompts
from rlt2i.tasks.shapes.vocabulary import WORDS
from tests.helpers.weight_files import weights

TINY = {
    "seed": 3,
    "schedule": attrs.evolve(SCHEDULE, steps=6, batch_size=4, eval_every=2, target=1.0),
    "autoencoder_steps": 2,
    "pool_size": 8,
    "pool_steps": 4,
    "images_per_category": 1,
    "compile_blocks": False,
}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(PIPELINE_DIR)


# Tokenizer


def test_every_word_is_one_token():
    tokenizer = build_tokenizer(WORLD)
    for prompt in all_prompts():
        assert len(tokenizer(prompt.text).input_ids) == len(prompt.text.split()) + 2 <= WORLD.max_tokens
    ids = {word: tuple(tokenizer(word, add_special_tokens=False).input_ids) for word in WORDS}
    assert len(set(ids.values())) == len(WORDS)


def test_merges_by_hand():
    # "b a</w>" occurs twice and goes first; then the prefixed word needs one more.
    assert byte_pair_merges(("ba", "cba")) == [("b", "a</w>"), ("c", "ba</w>")]


def test_unknown_words_are_spelt_out():
    tokenizer = build_tokenizer(WORLD)
    pieces = tokenizer.tokenize("hexagon")
    assert "".join(pieces) == "hexagon</w>"
    assert len(pieces) > 1


# The shipped directory


def test_shipped_directory_is_small_and_holds_no_pickle():
    files = [path for path in PIPELINE_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors"}
    index = json.loads((PIPELINE_DIR / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]


def test_stock_diffusers_loads_and_runs_it(pipeline):
    from diffusers import StableDiffusion3Pipeline

    stock = StableDiffusion3Pipeline.from_pretrained(
        PIPELINE_DIR, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    assert stock.scheduler.config.shift == 1.0
    stock.set_progress_bar_config(disable=True)
    prompts = eval_prompts(1)
    latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    images = stock(
        [prompt.text for prompt in prompts],
        latents=latents,
        sigmas=[1 - i / 10 for i in range(10)],
        num_inference_steps=10,
        guidance_scale=1.0,
        max_sequence_length=0,
        output_type="pt",
    ).images
    ours = sample_texts(pipeline, [p.text for p in prompts], canvas=32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, ours, atol=1e-3, rtol=0)


def test_stock_prompt_encoding_is_ours(pipeline):
    texts = [prompt.text for prompt in eval_prompts(2)]
    stock_hidden, _, stock_pooled, _ = pipeline.encode_prompt(
        texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=0
    )
    hidden, pooled = encode_text(pipeline, tokenise(pipeline.tokenizer, texts))
    assert torch.equal(stock_hidden, hidden)
    assert torch.equal(stock_pooled, pooled)


def test_latents_are_normalised(pipeline):
    from rlt2i.tasks.shapes.render import render, sample_scenes

    generator = torch.Generator().manual_seed(0)
    images = render(sample_scenes(eval_prompts(20), generator), generator)
    with torch.no_grad():
        latents = encode_images(pipeline.vae, images)
        error = decode_latents(pipeline.vae, latents) - images
    assert latents.shape == (120, 4, 16, 16)
    assert latents.mean().abs() < 0.1
    assert 0.8 < latents.std() < 1.2
    assert -10 * error.square().mean().log10() > 35  # dB


def test_shipped_base_is_mediocre_on_purpose(pipeline):
    # Enough for every group to get a signal, and room for reinforcement learning to rise.
    scores = evaluate(pipeline, images_per_category=20)
    assert 0.30 < scores.strict < 0.60
    assert scores.strict_by_category["position"] > 0.1
    assert scores.strict_by_category["color_attr"] > 0.1
    assert abs(scores.objects - scores.objects_wanted) < 0.3


def test_log_says_what_was_shipped():
    records = [json.loads(line) for line in (PIPELINE_DIR / "pretrain_log.jsonl").read_text().splitlines()]
    shipped = records[-1]
    assert shipped["phase"] == "shipped"
    assert 0.35 <= shipped["strict"] <= 0.60
    assert shipped["strict_by_category"]["position"] > 0.15
    assert shipped["strict_by_category"]["color_attr"] > 0.15


def test_samples_do_not_depend_on_the_batch(pipeline):
    texts = [prompt.text for prompt in eval_prompts(1)]
    whole, parts = (
        sample_texts(pipeline, texts, canvas=32, generator=torch.Generator().manual_seed(1), batch_size=size)
        for size in (6, 4)
    )
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=0)


def test_missing_directory_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"no model_index.json there. Train one with"):
        load_pipeline(tmp_path)


# Pretraining


def test_builders_are_functions_of_their_generator():
    before = torch.random.get_rng_state()
    for build, side in ((build_transformer, 16), (build_autoencoder, 32)):
        first, second = (build(side, torch.Generator().manual_seed(9)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_orthogonalise_flattens_the_spectrum():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 8, 20, generator=generator)
    for batch in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(batch))
        # The quintic does not converge to 1: it lifts everything into a band around it.
        assert ((values > 0.6) & (values < 1.3)).all()


def test_muon_moves_against_the_gradient_by_a_known_amount():
    # Orthogonal 2x2 updates have singular values near 1, so each step moves by 0.2 * sqrt(2) * lr along each.
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.eye(2)
    Muon([weight]).step(learning_rate=0.1)
    step = -weight.detach() / (0.1 * 0.2 * 2**0.5)
    torch.testing.assert_close(step, torch.eye(2), atol=0.35, rtol=0)
    assert step[0, 1] == step[1, 0] == 0


def test_muon_is_torchs_muon_up_to_bfloat16():
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 16), (8, 32), (32, 8), (16, 16))
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    start = [p.detach().clone() for p in ours]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    other = torch.optim.Muon(theirs, lr=0.01, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    muon = Muon(ours, momentum=0.95, weight_decay=0.01)
    for _ in range(3):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        muon.step(0.01)
        other.step()
    for one, two, before in zip(ours, theirs, start, strict=True):
        assert (one - two).detach().norm() < 0.02 * (one - before).detach().norm()


def test_pretraining_is_reproducible_and_resumable(tmp_path, monkeypatch):
    whole, again, broken = tmp_path / "whole", tmp_path / "again", tmp_path / "broken"
    pretrain(whole, **TINY)
    pretrain(again, **TINY)
    assert weights(whole) == weights(again)
    assert not (whole / "state").exists()

    from rlt2i.tasks.embedded import pretraining as module

    original = module.flow_matching_loss
    calls = []

    def power_cut(*arguments):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "flow_matching_loss", power_cut)
    with pytest.raises(KeyboardInterrupt):
        pretrain(broken, **TINY)
    assert (broken / "state" / "run.safetensors").exists()
    monkeypatch.setattr(module, "flow_matching_loss", original)
    resumed = pretrain(broken, **TINY)
    assert weights(broken) == weights(whole)

    records = [json.loads(line) for line in (broken / "pretrain_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["phase"] == "evaluation"] == [2, 4, 6]
    assert records[-1]["strict"] == pytest.approx(resumed.strict, abs=1e-4)


def test_pretraining_changes_every_trained_tensor(tmp_path):
    pretrain(tmp_path / "a", **TINY)
    pretrain(tmp_path / "b", **{**TINY, "seed": 4})
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(a[name] != b[name] for name in a)


def test_steps_that_nobody_would_evaluate_are_refused(tmp_path):
    with pytest.raises(ValueError, match="multiple of eval_every"):
        pretrain(tmp_path, attrs.evolve(SCHEDULE, steps=5, eval_every=2))


def test_saving_leaves_the_pipeline_in_float32(tmp_path, pipeline):
    before = copy.deepcopy(pipeline.transformer.state_dict())
    save_pipeline(pipeline, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipeline.transformer.state_dict().items())
    # What came from float16 goes back to float16 unchanged.
    shipped, saved = weights(PIPELINE_DIR), weights(tmp_path)
    assert shipped.keys() == saved.keys()
    reloaded = load_pipeline(tmp_path).transformer.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in reloaded.items())
