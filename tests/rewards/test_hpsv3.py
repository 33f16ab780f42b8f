"""HPSv3 on a Qwen2-VL of two layers with random weights: the stock network's numbers, and laws for any weights."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlt2i.interfaces import RewardBatch
from rlt2i.rewards import convert, releases
from rlt2i.rewards.hpsv3 import AREA, HPSv3, image_size
from tests.helpers.tiny_models import QWEN_TEMPLATE, save_hpsv3, save_qwen_tokenizer, tiny_qwen2_vl

PROMPTS = ["a red cow", "two", "a red cow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> HPSv3:
    return HPSv3(path=str(folder), tokenizer=str(folder), dtype="float32")


def images_of(count: int, height: int = 448, width: int = 448) -> torch.Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return (nn.functional.interpolate(noise, size=(height, width)) * 255).round().to(torch.uint8)


def batch_of(images: torch.Tensor, prompts: list[str]) -> RewardBatch:
    return RewardBatch(images=images, prompts=prompts, metadata=[{} for _ in prompts])


def test_the_size_by_hand():
    # 512 / 28 is nearest 18 tokens a side, which are too many pixels; 16 x 16 tokens are 200,704.
    assert image_size(512, 512) == image_size(1024, 1024) == image_size(448, 448) == (448, 448)
    # sqrt(512 * 1024 / 200704) = 1.6162: 512 / 1.6162 / 28 = 11.3 rows and twice as many columns, 22.6.
    assert image_size(512, 1024) == (11 * 28, 22 * 28)
    # sqrt(200704 / (300 * 200)) = 1.829: 300 * 1.829 / 28 = 19.6 and 200 * 1.829 / 28 = 13.06, both up.
    assert image_size(300, 200) == (20 * 28, 14 * 28)
    assert image_size(20, 9000)[0] == 28  # a strip keeps one row of tokens


def test_the_size_is_that_of_the_stock_processor():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    edges = (64, 200, 336, 448, 500, 512, 640, 777, 1024, 1536)
    for height in edges:
        for width in edges:
            expected = smart_resize(height, width, factor=28, min_pixels=AREA, max_pixels=AREA)
            assert image_size(height, width) == expected


def stock_scores(folder: Path, images: torch.Tensor, prompt: str, after: str) -> torch.Tensor:
    """[N, 2] of the stock network and processor with an image token written for every token, and a head of modules."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen2VLModel

    model = Qwen2VLModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    text = QWEN_TEMPLATE.replace("{prompt}", prompt).replace("<|image_pad|>", "<|image_pad|>" * 256) + after
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]] * len(images))
    pictures = Qwen2VLImageProcessor()(images=list(images), return_tensors="pt")
    order = torch.arange(ids.shape[1]).expand(3, len(images), -1)
    with torch.no_grad():
        states = model(
            input_ids=ids,
            pixel_values=pictures["pixel_values"],
            image_grid_thw=pictures["image_grid_thw"],
            position_ids=order,
        ).last_hidden_state
        layers = load_file(folder / "head.safetensors")
        head = nn.Sequential(
            nn.Linear(32, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 2)
        ).eval()
        head.load_state_dict(layers)
        place = int((ids[0] == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero()[0])
        return head(states[:, place])


@pytest.mark.parametrize("after", ["", "\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"])
def test_the_score_is_the_stock_networks(reward: HPSv3, folder: Path, after: str):
    """What follows the reward token, which the authors write too, changes nothing."""
    images = images_of(2)
    output = reward.score(batch_of(images, ["a red cow"] * 2))
    expected = stock_scores(folder, images, "a red cow", after)
    torch.testing.assert_close(output.scores, expected[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.components["deviation"], expected[:, 1].exp(), atol=1e-4, rtol=1e-4)
    assert output.valid.all()


def test_batches_order_and_padding_do_not_matter(reward: HPSv3):
    images = images_of(3, 96, 64)
    together = reward.score(batch_of(images, PROMPTS)).scores
    alone = torch.cat([reward.score(batch_of(images[i : i + 1], PROMPTS[i : i + 1])).scores for i in range(3)])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
    chunked = attrs.evolve(reward, rollout_batch_size=2).score(batch_of(images.flip(0), PROMPTS[::-1])).scores
    torch.testing.assert_close(chunked.flip(0), together, atol=2e-4, rtol=1e-4)
    assert together.unique().numel() == 3
    assert reward.score(batch_of(images, ["two"] * 3)).scores[0] != together[0]


@pytest.mark.parametrize("word", ["<|Reward|>", "<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_a_prompt_cannot_bring_special_tokens(reward: HPSv3, word: str):
    images = images_of(1)
    scores = [reward.score(batch_of(images, [f"a {text} cow"])).scores for text in (word, word.replace("<|", "< |"))]
    assert torch.equal(*scores)
    assert torch.isfinite(scores[0]).all()


def test_a_strip_is_judged_by_its_middle(reward: HPSv3):
    """One pixel high and thousands wide would be thousands of tokens: beyond 16 : 1 the ends are cut."""
    strip = images_of(1, 16, 4096)
    middle = strip[..., 2048 - 128 : 2048 + 128]
    scores = [reward.score(batch_of(images, ["two"])).scores for images in (strip, middle)]
    assert torch.equal(*scores)


def test_the_differentiable_score_is_the_score(reward: HPSv3):
    images = images_of(1)
    floats = (images.float() / 255).requires_grad_()
    score = reward.score_tensor(floats, ["two"])
    torch.testing.assert_close(score.detach(), reward.score(batch_of(images, ["two"])).scores, atol=1e-4, rtol=1e-4)
    score.sum().backward()
    assert floats.grad is not None
    assert float(floats.grad.abs().sum()) > 0


def test_half_precision_runs_and_is_near(reward: HPSv3):
    images = images_of(2)
    exact = reward.score(batch_of(images, PROMPTS[:2])).scores
    rounded = attrs.evolve(reward, dtype="bfloat16").score(batch_of(images, PROMPTS[:2])).scores
    assert rounded.dtype is torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.2, rtol=0.1)


MODULE = '''
import never_imported
INSTRUCTION = """
rate it
Textual prompt - {text_prompt}

"""
INSTRUCTION_debug = "no"
prompt_with_special_token = """
Say: <|Reward|>

END
"""
'''


def test_the_question_is_read_and_nothing_is_run():
    assert convert.hpsv3_template(MODULE) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>\nrate it\nTextual prompt - {prompt}\n\n\nSay: <|Reward|>"
    )
    with pytest.raises(ValueError, match=r"holds \['INSTRUCTION'\], expected"):
        convert.hpsv3_template(MODULE.replace("prompt_with_special_token", "other"))


def test_the_released_names_become_those_of_the_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import Qwen2VLModel

    model = Qwen2VLModel.from_pretrained(folder)
    state = {}
    for name, tensor in model.state_dict().items():
        old = name.replace("language_model.", "model.") if name.startswith("language_model.") else name
        state[old] = tensor.contiguous()
    state |= {f"rm_head.{name}": tensor for name, tensor in load_file(folder / "head.safetensors").items()}
    state["lm_head.weight"] = torch.zeros(2, 32)
    checkpoint = tmp_path / "HPSv3.safetensors"
    save_file(state, checkpoint)
    words = save_qwen_tokenizer(tmp_path / "words")
    monkeypatch.setenv("RLT2I_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(convert, "qwen2_vl_config", lambda rows: tiny_qwen2_vl(words, rows))
    monkeypatch.setattr(releases, "hpsv3_module", lambda: MODULE)
    releases.main(["hpsv3", "--checkpoint", str(checkpoint)])
    template = tmp_path / "weights" / "hpsv3" / "template.txt"
    assert template.read_text() == convert.hpsv3_template(MODULE)
    template.write_text(QWEN_TEMPLATE)
    batch = batch_of(images_of(1), ["two"])
    converted = HPSv3(tokenizer=str(folder), dtype="float32").score(batch).scores
    original = HPSv3(path=str(folder), tokenizer=str(folder), dtype="float32").score(batch).scores
    assert torch.equal(converted, original)
    # A checkpoint of something else is refused.
    del state["rm_head.5.bias"]
    save_file(state, checkpoint)
    with pytest.raises(ValueError, match="not the expected checkpoint"):
        releases.main(["hpsv3", "--checkpoint", str(checkpoint)])


def test_the_released_network_has_the_released_shapes():
    from transformers import Qwen2VLModel

    with torch.device("meta"):
        model = Qwen2VLModel(convert.qwen2_vl_config(151658))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["language_model.embed_tokens.weight"] == (151658, 3584)
    assert shapes["language_model.layers.27.self_attn.k_proj.weight"] == (4 * 128, 3584)
    assert shapes["visual.merger.mlp.2.weight"] == (3584, 4 * 1280)
    # 7.07 billion in the language model without its head (28 layers), 0.68 in the vision tower.
    assert 7.6e9 < sum(p.numel() for p in model.parameters()) < 7.9e9


def test_what_is_missing_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RLT2I_WEIGHTS", str(tmp_path))
    batch = batch_of(images_of(1), ["two"])
    with pytest.raises(FileNotFoundError, match="rlt2i reward convert hpsv3"):
        HPSv3().score(batch)
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(folder)
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"of the tokenizer at .*Use the tokenizer of Qwen/Qwen2-VL-7B-Instruct"):
        HPSv3(path=str(folder), tokenizer=str(tmp_path / "other"), dtype="float32").score(batch)
