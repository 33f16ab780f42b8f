"""Model rewards on tiny random weights of the released classes: laws that hold for any weights, and the formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlt2i.interfaces import RewardBatch
from rlt2i.rewards.aesthetic import Aesthetic
from rlt2i.rewards.clip_family import MEAN, STD, ImageTextReward, clip_pixels, load_clip
from rlt2i.rewards.clipscore import CLIPScore
from rlt2i.rewards.hpsv2 import HPSv2
from rlt2i.rewards.imagereward import ImageReward
from rlt2i.rewards.pickscore import PickScore
from rlt2i.rewards.weights import find_weights, weights_identity
from tests.helpers.tiny_models import SIDE, save_blip, save_clip, save_head

NAMES = ("pickscore", "cosine", "hessel", "percent", "hpsv2", "aesthetic", "imagereward")
PROMPTS = ["a red cow", "two dogs", "a red cow", "x", "a red cow", "two dogs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    save_clip(root / "clip")
    save_blip(root / "blip")
    save_head(root / "head")
    return root


@pytest.fixture(params=NAMES)
def reward(request: pytest.FixtureRequest, folder: Path) -> ImageTextReward:
    clip, blip = str(folder / "clip"), str(folder / "blip")
    return {
        "pickscore": lambda: PickScore(path=clip, tokenizer=""),
        "cosine": lambda: CLIPScore(path=clip),
        "hessel": lambda: CLIPScore(path=clip, scale="hessel"),
        "percent": lambda: CLIPScore(path=clip, scale="percent"),
        "hpsv2": lambda: HPSv2(path=clip, tokenizer=""),
        "aesthetic": lambda: Aesthetic(path=clip, head=str(folder / "head")),
        "imagereward": lambda: ImageReward(path=blip, tokenizer=blip),
    }[request.param]()


def images_of(count: int, height: int = 48, width: int = 48, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(noise, size=(height, width)) * 255).round().to(torch.uint8)


def batch_of(images: torch.Tensor, prompts: list[str]) -> RewardBatch:
    return RewardBatch(images=images, prompts=prompts, metadata=[{} for _ in prompts])


def test_a_batch_scores_as_its_images_do_alone(reward: ImageTextReward):
    # The repeated prompts are encoded once in the batch and every time alone.
    images = images_of(6)
    together = reward.score(batch_of(images, PROMPTS))
    alone = [reward.score(batch_of(images[i : i + 1], PROMPTS[i : i + 1])) for i in range(6)]
    torch.testing.assert_close(together.scores, torch.cat([a.scores for a in alone]), atol=2e-4, rtol=1e-4)
    assert together.valid.all()
    assert together.scores.unique().numel() > 2
    low, high = reward.span or (-torch.inf, torch.inf)
    assert ((together.scores >= low) & (together.scores <= high)).all() or isinstance(reward, Aesthetic | ImageReward)


def test_order_and_chunks_do_not_matter(reward: ImageTextReward):
    import attrs

    images, order = images_of(6), [3, 0, 5, 1, 4, 2]
    scores = reward.score(batch_of(images, PROMPTS)).scores
    shuffled = reward.score(batch_of(images[order], [PROMPTS[i] for i in order])).scores
    torch.testing.assert_close(shuffled, scores[order], atol=2e-4, rtol=1e-4)
    chunked = attrs.evolve(reward, rollout_batch_size=4).score(batch_of(images, PROMPTS)).scores
    torch.testing.assert_close(chunked, scores, atol=2e-4, rtol=1e-4)


def test_the_differentiable_score_is_the_score_and_has_a_gradient(reward: ImageTextReward):
    # At the model's own resolution nothing is resized, so nothing is rounded.
    images = images_of(3, SIDE, SIDE)
    floats = (images.float() / 255).requires_grad_()
    scores = reward.score_tensor(floats, PROMPTS[:3])
    torch.testing.assert_close(scores, reward.score(batch_of(images, PROMPTS[:3])).scores, atol=2e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(reward.score_tensor(floats, PROMPTS[:3])[0], floats)
    if not (isinstance(reward, CLIPScore) and reward.scale != "cosine" and scores[0] == 0):
        assert gradient[0].abs().sum() > 0
    assert gradient[1:].abs().sum() == 0
    large = images_of(2, 64, 96)
    exact = reward.score(batch_of(large, PROMPTS[:2])).scores
    torch.testing.assert_close(reward.score_tensor(large.float() / 255, PROMPTS[:2]), exact, atol=0.2, rtol=0.05)


def test_scores_are_the_formulas_on_the_models_own_outputs(folder: Path):
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder / "clip").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
    images = images_of(6, SIDE, SIDE)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        output = model(
            pixel_values=(images / 255 - mean) / std, **tokenizer(PROMPTS, padding=True, return_tensors="pt")
        )
    cosine = (output.image_embeds * output.text_embeds).sum(-1)
    clip, batch = str(folder / "clip"), batch_of(images, PROMPTS)
    expected = {
        PickScore(path=clip, tokenizer=""): output.logits_per_image.diagonal(),
        CLIPScore(path=clip): cosine,
        CLIPScore(path=clip, scale="hessel"): 2.5 * cosine.clamp_min(0),
        CLIPScore(path=clip, scale="percent"): 100 * cosine.clamp_min(0),
        HPSv2(path=clip, tokenizer=""): cosine,
    }
    for reward, scores in expected.items():
        torch.testing.assert_close(reward.score(batch).scores, scores, atol=1e-4, rtol=1e-4)
    weight = torch.randn(16, generator=torch.Generator().manual_seed(3))
    aesthetic = Aesthetic(path=clip, head=str(folder / "head")).score(batch).scores
    torch.testing.assert_close(aesthetic, output.image_embeds @ weight + 5.0, atol=1e-4, rtol=1e-4)


def test_image_reward_is_its_formula_on_the_models_own_outputs(folder: Path):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

    blip = folder / "blip"
    vision = BlipVisionModel.from_pretrained(blip / "vision").eval()
    text = BlipTextModel.from_pretrained(blip / "text", add_pooling_layer=False).eval()
    tokenizer, head = AutoTokenizer.from_pretrained(blip), load_file(blip / "head.safetensors")
    images = images_of(6, SIDE, SIDE)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):  # one pair at a time, and without padding
        tokens = tokenizer([prompt], truncation=True, max_length=35, return_tensors="pt")
        with torch.no_grad():
            seen = vision(pixel_values=((image / 255 - mean) / std)[None]).last_hidden_state
            read = text(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=seen,
                is_decoder=False,
            ).last_hidden_state[0, 0]
        raw = float(read @ head["weight"] + head["bias"])
        expected.append((raw - 0.16717362830052426) / 1.0333394966054072)
    scores = ImageReward(path=str(blip), tokenizer=str(blip)).score(batch_of(images, PROMPTS)).scores
    torch.testing.assert_close(scores, torch.tensor(expected), atol=2e-4, rtol=1e-4)


def test_a_prompt_longer_than_the_model_reads_keeps_its_end_token(folder: Path):
    towers = load_clip(str(folder / "clip"), "main", "", "cpu")
    with torch.no_grad():
        long, longer, short = towers.texts(["a" * 75, "a" * 200, "a"])
    torch.testing.assert_close(long, longer)
    assert not torch.allclose(long, short)


def test_pixels_are_those_of_the_released_processor():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for height, width in ((64, 64), (48, 80), (20, 24)):
        image = images_of(1, height, width)
        expected = processor(image[0], return_tensors="pt")["pixel_values"]
        ours = clip_pixels(image.float() / 255, 32, rounded=True)
        # One grey level is 0.0151 after normalising; Pillow and torchvision differ by up to two when enlarging.
        difference = (ours - expected).abs()
        assert difference.max() < 0.031
        assert (difference > 0.0156).float().mean() < 0.001


def test_a_sliver_is_not_blown_up():
    sliver = torch.rand(1, 3, 512, 1)
    assert clip_pixels(sliver, 224, rounded=True).shape == (1, 3, 224, 224)


def test_weights_that_are_not_numbers_give_invalid_samples_not_zero(tmp_path: Path, folder: Path):
    head = save_head(tmp_path / "broken", bias=float("nan"))
    output = Aesthetic(path=str(folder / "clip"), head=str(head)).score(batch_of(images_of(2), PROMPTS[:2]))
    assert output.valid.tolist() == [False, False]
    assert output.info == [{"error": "the model returned nan"}] * 2


def test_missing_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RLT2I_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"rlt2i reward convert hpsv2\.1"):
        HPSv2().score(batch_of(images_of(1), ["x"]))
    (tmp_path / "hpsv2.1").mkdir()
    assert find_weights("hpsv2.1", of="HPSv2") == str(tmp_path / "hpsv2.1")
    assert find_weights("owner/name", of="HPSv2") == "owner/name"


def test_the_fingerprint_tells_weights_apart_and_ignores_memory_settings(tmp_path: Path, folder: Path):
    other = save_clip(tmp_path / "clip", seed=1)
    here = PickScore(path=str(folder / "clip"), tokenizer="")
    assert weights_identity(str(other)) != weights_identity(str(folder / "clip"))
    assert here.fingerprint() == PickScore(path=str(folder / "clip"), tokenizer="", rollout_batch_size=1).fingerprint()
    assert here.fingerprint() != PickScore(path=str(other), tokenizer="").fingerprint()
