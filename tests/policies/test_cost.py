from __future__ import annotations

import json

import attrs
import pytest
import torch

from rlt2i.config import load_object
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.policies.aura_flow import AuraFlow
from rlt2i.policies.cost import NotCounted, capture_share, forward_flops, make_plan
from rlt2i.policies.counts import PeakMemory, count_operations, fused_attention
from rlt2i.policies.flux2 import Flux2, Flux2Klein
from rlt2i.policies.krea2 import Krea2
from rlt2i.policies.lumina2 import Lumina2, Lumina2Policy
from rlt2i.policies.pretrained.loading import meta_text_encoders
from rlt2i.policies.qwen_image import QwenImage
from rlt2i.policies.qwen_image21 import QwenImage21
from rlt2i.policies.sd3 import SD3
from rlt2i.policies.tiny import save_tiny
from rlt2i.policies.zimage import ZImage
from rlt2i.recipes.parts import PARTS
from rlt2i.types import Prompts
from tests.helpers.backbones import marked
from tests.helpers.objective_cases import experience_for

BACKBONES = {name: load_object(reference) for name, reference in PARTS["PolicySpec"].items()}
SD35 = SD3(path="stabilityai/stable-diffusion-3.5-medium", lora_rank=32, dtype="bfloat16")


@pytest.fixture(scope="module")
def sd35():
    return SD35.policy.on_meta(SD35).network


def test_sd35_medium_has_its_parameters(sd35):
    frozen = [p for p in sd35.parameters() if not p.requires_grad]
    learnt = [p for p in sd35.parameters() if p.requires_grad]
    assert sum(p.numel() for p in frozen) == 2_243_171_520
    assert len(learnt) == 2 * 191
    assert sum(p.numel() for p in learnt) == 18_776_064


@pytest.fixture(scope="module")
def plan():
    """One optimiser step of Flow-GRPO at 512 px."""
    return make_plan(
        SD35, image_size=512, num_steps=10, trained_steps=9, rollouts_per_iteration=72, micro_batch_size=2,
        weight_copies=1,
    )  # fmt: skip


@pytest.mark.parametrize(("pixels", "text", "tera"), [(512, 333, 2.443), (1024, 205, 10.915)])
def test_forward_arithmetic_of_sd35_medium(pixels, text, tera):
    spec = attrs.evolve(SD35, lora_rank=None, dtype="float32", max_sequence_length=text - 77)
    policy = spec.policy.on_meta(spec)
    with fused_attention():
        assert forward_flops(policy, pixels) / 1e12 == pytest.approx(tera, abs=1e-3)


def test_lora_arithmetic_of_sd35_medium(plan):
    assert plan.forward_flops / 1e12 == pytest.approx(2.247, abs=1e-3)
    # 4.769 with attention's backward booked as two forwards; a fused kernel really takes two and a half.
    attention = 4.0 * 1536 * (24 * 1229**2 + 12 * 1024**2)
    assert (plan.forward_flops + plan.backward_flops - attention / 2) / 1e12 == pytest.approx(4.769, abs=1e-3)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """SD3.5-M with four blocks: the configuration files of a pipeline, without weights."""
    folder = tmp_path_factory.mktemp("short")
    configs = {name: SD35.config(name) for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")}
    configs["transformer"] = SD35.config("transformer") | {"num_layers": 4, "dual_attention_layers": [0, 1]}
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(SD35.config("")))
    return attrs.evolve(SD35, path=str(folder))


def test_operations_by_hand():
    left, right = torch.empty(2, 3, device="meta"), torch.empty(3, 5, device="meta")
    assert count_operations(lambda: left @ right) == 2 * 2 * 3 * 5
    query = torch.empty(1, 2, 7, 8, device="meta")
    with fused_attention():
        attention = lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)
        assert count_operations(attention) == 2 * (2 * 7 * 7 * 8) * 2  # scores, then values, in two heads


def test_recording_attention_is_almost_free(short):
    # One block: 1024 image tokens x 20 words x 24 heads x 2 x 64 for the scores, and x 2 for the sum over words.
    spec = attrs.evolve(short, lora_rank=None, dtype="float32")
    share = capture_share(spec, image_size=512, blocks="1")
    with fused_attention():
        forward = forward_flops(spec.policy.on_meta(spec), 512)
    assert share * forward == pytest.approx(1024 * 20 * (24 * 2 * 64 + 2))
    assert capture_share(spec, image_size=512, blocks="1-2") == pytest.approx(2 * share)
    assert 20 * share < 0.01  # the share of a network of 24 blocks is less


def test_peak_memory_by_hand():
    weight = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad(), PeakMemory(weight) as memory:
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1  # 8000 alive
        del first
        third = second.view(10, 100)  # a view owns nothing
        weight(torch.zeros(2, 4))  # 32 in, 32 out, gone at once
    assert (memory.live, memory.peak) == (4000, 8000)
    assert third.shape == (10, 100)
    del second, third
    assert memory.live == 0


def test_checkpointing_trades_memory_for_arithmetic(short):
    common = {
        "image_size": 512, "num_steps": 10, "trained_steps": 2, "rollouts_per_iteration": 24, "micro_batch_size": 8,
    }  # fmt: skip
    plain = make_plan(short, **common)
    checkpointed = make_plan(attrs.evolve(short, gradient_checkpointing=True), **common)
    base = sum(plain.resident.values())
    assert checkpointed.memory["update"] - base < 0.5 * (plain.memory["update"] - base)
    assert checkpointed.update_flops == pytest.approx(
        plain.update_flops * (2 * plain.forward_flops + plain.backward_flops)
        / (plain.forward_flops + plain.backward_flops)
    )  # fmt: skip


def test_guidance_doubles_rollouts_but_not_gradients(short):
    common = {
        "image_size": 512, "num_steps": 10, "trained_steps": 2, "rollouts_per_iteration": 24, "micro_batch_size": 2,
        "rollout_batch_size": 2,
    }  # fmt: skip
    plain, guided, through = (
        make_plan(attrs.evolve(short, guidance_scale=scale, uncond_grad=grad), **common)
        for scale, grad in ((1.0, False), (4.5, False), (4.5, True))
    )
    assert guided.rollout_flops == 2 * plain.rollout_flops == 2 * 24 * 10 * plain.forward_flops
    assert plain.update_flops == 24 * 2 * (plain.forward_flops + plain.backward_flops)
    assert guided.update_flops - plain.update_flops == pytest.approx(24 * 2 * plain.forward_flops)
    assert through.update_flops == pytest.approx(2 * plain.update_flops)
    assert guided.memory["update"] == plain.memory["update"] < through.memory["update"]


def test_table_names_every_number(plan):
    table = plan.table()
    for text in ("2,243,171,520 parameters", "18,776,064 parameters in 191 adapted layers", "1024 image + 205 text"):
        assert text in table
    assert "2.247 TFLOP per sequence" in table
    assert all(f"memory, {phase}" in table for phase in ("encode", "rollout", "update"))
    assert plan.resident["optimiser"] == 18_776_064 * 4 * 3
    # Saved activations, 512 px, LoRA, eager bf16: about 2.1 GB per sequence.
    assert (plan.memory["update"] - plan.memory["encode"]) / 2 == pytest.approx(2.1e9, rel=0.05)
    assert plan.decode_flops / 1e12 == pytest.approx(2.5, rel=0.02)


def test_full_fine_tuning_learns_everything(short):
    spec = attrs.evolve(short, lora_rank=None)
    plan = make_plan(spec, image_size=512, num_steps=2, trained_steps=1, rollouts_per_iteration=1, micro_batch_size=1)
    assert plan.parameters == plan.trainable
    assert plan.resident["optimiser"] == 2 * 4 * plan.parameters
    assert plan.memory["update"] - plan.memory["encode"] > 6 * plan.parameters  # bf16 copies and float32 gradients
    assert "full fine-tuning" in plan.table()
    assert plan.backward_flops / plan.forward_flops == pytest.approx(2.0, rel=0.05)


def test_the_decoder_is_built_in_its_own_precision():
    assert SD35.policy.on_meta(attrs.evolve(SD35, vae_dtype="float32")).vae.dtype == torch.float32
    assert SD35.policy.on_meta(SD35).vae.dtype == torch.bfloat16


@pytest.mark.parametrize("name", marked(name for name in BACKBONES if name != "SD3"))
def test_every_backbone_is_counted(name, tmp_path):
    spec = BACKBONES[name]
    policy = spec(path=str(save_tiny(spec.pipeline, tmp_path)), lora_rank=2)
    plan = make_plan(
        policy, image_size=(32, 64), num_steps=2, trained_steps=1, rollouts_per_iteration=4, micro_batch_size=2
    )
    loaded = policy.load()
    assert plan.trainable == sum(p.numel() for p in loaded.trainable_parameters().values())
    assert plan.parameters + plan.trainable == sum(p.numel() for p in loaded.network.parameters())
    h, w = loaded.token_grid((32, 64))
    assert plan.image_tokens == h * w
    longest = loaded.encode(Prompts.of(["a cat " * 400]))["embeddings"].shape[1]
    assert plan.text_tokens == longest
    assert 0 < plan.capture_share < 1
    assert plan.backward_flops > 0.9 * plan.forward_flops


@pytest.mark.parametrize(
    ("spec", "billions", "encoder"),
    [
        (Flux2Klein(), 3.88, 4.02),
        (Flux2Klein(path="black-forest-labs/FLUX.2-klein-base-9B"), 9.08, 8.19),
        (Flux2(), 32.2, 24.0),
        (ZImage(), 6.15, 4.02),
        (ZImage(path="Tongyi-MAI/Z-Image-Turbo"), 6.15, 4.02),
        (QwenImage(), 20.4, 8.29),
        (QwenImage(path="Qwen/Qwen-Image-2512"), 20.4, 8.29),
        (QwenImage21(), 7.12, 8.77),
        (Krea2(), 12.82, 4.44),
        (AuraFlow(), 6.86, 1.22),
    ],
    ids=lambda value: getattr(value, "path", None),
)
def test_real_models_have_their_parameters(spec, billions, encoder):
    """From the configurations that the package ships; nothing is fetched."""

    def count(module):
        return sum(p.numel() for p in module.parameters()) / 1e9

    assert count(spec.policy.on_meta(spec).network) == pytest.approx(billions, rel=3e-3)
    assert count(meta_text_encoders(spec)) == pytest.approx(encoder, rel=3e-3)


def test_what_reads_its_input_is_not_counted_and_says_so(tmp_path, monkeypatch):
    policy = Lumina2(path=str(save_tiny("Lumina2Pipeline", tmp_path)))
    predict = Lumina2Policy.predict
    monkeypatch.setattr(Lumina2Policy, "predict", lambda self, x, s, c: predict(self, x, s, c) * float(s.max()))
    with pytest.raises(NotCounted, match="Lumina2: its network reads values of its input"):
        make_plan(policy, image_size=64, num_steps=2, trained_steps=1, rollouts_per_iteration=4, micro_batch_size=2)


def test_text_encoders_that_leave_the_device_take_memory_only_while_they_encode(short):
    common = {"image_size": 256, "num_steps": 2, "trained_steps": 1, "rollouts_per_iteration": 1, "micro_batch_size": 1}
    stay, leave = (make_plan(attrs.evolve(short, text_encoders=where), **common) for where in ("device", "disk"))
    assert leave.memory["encode"] == stay.memory["encode"]
    assert stay.memory["update"] - leave.memory["update"] == stay.resident["text encoders"] > 10 << 30
    assert "text encoders" not in leave.resident


def test_a_batch_is_counted_with_what_is_kept_of_it_and_copied_while_learning(short):
    common = {
        "image_size": 512, "num_steps": 10, "trained_steps": 2, "rollouts_per_iteration": 24, "micro_batch_size": 8,
    }  # fmt: skip
    bare = make_plan(short, **common)
    one = make_plan(short, **common, optimizer_steps=1, noisy_steps=3, clean_predictions=10)
    four = make_plan(short, **common, optimizer_steps=4)
    latents = 24 * 16 * 64 * 64 * 4
    assert one.resident["trajectories"] == 11 * latents
    assert one.resident["images"] == 24 * 3 * 512 * 512
    assert one.resident["log-probabilities"] == 10 * latents // 16
    assert one.resident["clean predictions"] == 10 * latents
    kept = 24 * 3 * 512 * 512 + 10 * latents // 16 + 10 * latents
    assert one.memory["update"] - bare.memory["update"] == kept + 21 * latents + 10 * latents // 16
    # Without noise and captures: the latents once for all steps, and a quarter of them for the step at hand.
    assert four.memory["update"] - bare.memory["update"] == 24 * 3 * 512 * 512 + 11 * latents + 11 * latents // 4
    assert four.resident["clean predictions"] == four.resident["log-probabilities"] == 0


def test_rows_of_an_experience_are_copies_of_the_counted_size():
    batch = experience_for(ClippedSurrogate(), prompts=2, group_size=3).trajectory
    taken = batch.take(torch.arange(6))
    assert taken.latents.data_ptr() != batch.latents.data_ptr()
    _, times, channels, height, width = batch.latents.shape
    assert taken.latents.nbytes == 6 * times * channels * height * width * 4
    assert taken.log_probs.nbytes == 6 * (times - 1) * height * width * 4


def test_what_learns_is_divided_by_the_processes_that_share_it():
    spec = SD3(path="embedded:shapes")
    common = {"image_size": 32, "num_steps": 2, "trained_steps": 1, "rollouts_per_iteration": 4, "micro_batch_size": 2}
    alone, shared = (make_plan(spec, weight_copies=1, parts=parts, **common) for parts in (1, 4))
    for part in ("network", "optimiser"):  # float32: weights, two moments and a copy
        assert shared.resident[part] == pytest.approx(alone.resident[part] / 4, abs=1)
    assert shared.resident["image decoder"] == alone.resident["image decoder"]
    weights = 4 * alone.trainable
    # Weights, moments, the copy and gradients: a quarter each; on top, what is gathered, less than the whole of it.
    saved = alone.memory["update"] - shared.memory["update"]
    assert 0 < saved < 3 / 4 * 5 * weights
    assert saved > 3 / 4 * 5 * weights - 2 * weights
    assert shared.update_flops == alone.update_flops
