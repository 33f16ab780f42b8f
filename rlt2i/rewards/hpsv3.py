"""HPSv3: Qwen2-VL reads the image and a request to rate it; a head on one token says how much people like it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transform

from rlt2i.rewards.aesthetic import HEAD_FILE
from rlt2i.rewards.clip_family import MEAN, STD, ImageTextReward, Towers, bicubic, cut_ends
from rlt2i.rewards.sizes import bytes_of
from rlt2i.rewards.weights import find_weights, from_safetensors

TEMPLATE_FILE: Final = "template.txt"
"""Beside the converted weights: what the model was trained to be asked, {prompt} and one image token included."""
REWARD_TOKEN: Final = "<|Reward|>"
"""Added to the vocabulary; the head reads the state of this token, which has seen all that comes before it."""
AREA: Final = 256 * 28 * 28
"""Pixels of every image, about: 256 image tokens of 28 x 28."""
HEAD_LAYERS: Final = ("0", "3", "5")
"""Linear layers of the released head; ReLU stands between them, and dropout that is off."""


def image_size(height: int, width: int, *, unit: int = 28, area: int = AREA) -> tuple[int, int]:
    """(height, width) in multiples of `unit`: at most `area` pixels where the image has more, else at least as many.

    The rule of the Qwen2-VL processors with their two limits set to one number, as the authors of HPSv3 do.

    Args:
        height, width: of the image, in pixels.
        unit: pixels of an image token.
        area: in pixels.
    """
    rows, columns = (max(unit, round(edge / unit) * unit) for edge in (height, width))
    if rows * columns > area:
        shrink = math.sqrt(height * width / area)
        # A very long image would have no row left; its shorter edge keeps one token.
        rows, columns = (max(unit, math.floor(edge / shrink / unit) * unit) for edge in (height, width))
    elif rows * columns < area:
        grow = math.sqrt(area / (height * width))
        rows, columns = (math.ceil(edge * grow / unit) * unit for edge in (height, width))
    return rows, columns


@attrs.define
class VLMTowers(Towers):
    """A Qwen2-VL without its language head, the reward head, and the words around the image."""

    model: Any
    tokenizer: Any
    head: dict[str, Tensor]
    template: str

    @property
    def side(self) -> int:
        return math.isqrt(AREA)

    @property
    def unit(self) -> int:
        """Pixels of an image token."""
        vision = self.model.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[U, 2, L] token numbers and mask: one image token, the reward token at the end, padded on the right."""
        # No prompt may bring special tokens of its own: a second image, or a second place to rate.
        conversations = [self.template.replace("{prompt}", prompt.replace("<|", "< |")) for prompt in prompts]
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in conversations]
        longest, device = max(map(len, rows)), self.model.device
        ids = torch.zeros(len(rows), 2, longest, dtype=torch.long)
        for line, row in zip(ids, rows, strict=True):
            line[0, : len(row)], line[1, : len(row)] = torch.tensor(row), 1
        return ids.to(device)

    def images(self, pixels: Tensor) -> Tensor:
        """[N, P, D] states of P image tokens, of [N, 3, h, w] normalised pixels."""
        vision = self.model.config.vision_config
        patch, merge = vision.patch_size, vision.spatial_merge_size
        count, channels, height, width = pixels.shape
        rows, columns = height // patch, width // patch
        # Patches that become one token are adjacent; a still image fills the axis of time by repetition.
        cut = pixels.reshape(count, channels, rows // merge, merge, patch, columns // merge, merge, patch)
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, vision.temporal_patch_size, -1, -1)
        grid = torch.tensor([[1, rows, columns]] * count, device=pixels.device)
        flat = cut.reshape(count * rows * columns, -1).to(self.model.dtype)
        states = self.model.visual(flat, grid_thw=grid).pooler_output
        return states.view(count, -1, states.shape[-1])

    def rate(self, images: Tensor, texts: Tensor) -> Tensor:
        """[N, 2] float32: mean of the preference, and the logarithm of its standard deviation."""
        ids, mask = texts[:, 0], texts[:, 1]
        embeds, places = (
            self.model.get_input_embeddings()(ids),
            ids.eq(self.model.config.image_token_id).long().argmax(1),
        )
        before = int(places[0])
        assert bool(places.eq(before).all()), "the words before the image are the same for every prompt"
        ones = mask.new_ones(images.shape[:2])
        joint = torch.cat([embeds[:, :before], images.to(embeds.dtype), embeds[:, before + 1 :]], dim=1)
        attend = torch.cat([mask[:, :before], ones, mask[:, before + 1 :]], dim=1)
        # The authors call the language model without positions, so every token counts one further along all three axes.
        order = torch.arange(joint.shape[1], device=joint.device).expand(3, len(joint), -1)
        states = self.model.language_model(
            inputs_embeds=joint, attention_mask=attend, position_ids=order, use_cache=False
        ).last_hidden_state
        last = attend.sum(1) - 1
        state = states[torch.arange(len(states), device=states.device), last].float()
        for layer in HEAD_LAYERS:
            state = F.linear(state, self.head[f"{layer}.weight"], self.head[f"{layer}.bias"])
            state = state if layer == HEAD_LAYERS[-1] else F.relu(state)
        return state


@attrs.frozen(kw_only=True)
class HPSv3(ImageTextReward):
    """Mean of the preference that the model predicts, about -5 to 15. Component: `deviation`, how unsure it is.

    Some tools multiply it by 0.1. 8.3 billion parameters: 16 GB in bfloat16 beside the policy, or on another device or
    machine (`OnDevice`, `RemoteReward`). The released file is one safetensors under older names; it is converted once,
    and the question that the model was trained on comes with it. Ma et al. 2025, arXiv:2508.03789.

    Attributes:
        path: folder of the converted model, name of converted weights, or hub name of a repository with such files.
        revision: of the hub repository at `path`.
        tokenizer: Qwen2-VL's.
        tokenizer_revision: of its hub repository.
        dtype: of the network; the head is always float32.
        rollout_batch_size: images per forward pass of about 800 tokens each.
    """

    span = (-100.0, 100.0)
    preprocessing: ClassVar[str] = "bicubic to multiples of 28 pixels with 200,704 in all, 8 bit, OpenAI mean, std"

    path: str = "hpsv3"
    revision: str = "main"
    tokenizer: str = "Qwen/Qwen2-VL-7B-Instruct"
    tokenizer_revision: str = "main"
    dtype: Literal["bfloat16", "float16", "float32"] = attrs.field(
        default="bfloat16", validator=validators.in_(("bfloat16", "float16", "float32"))
    )
    rollout_batch_size: int = attrs.field(default=8, validator=validators.ge(1))

    def towers(self, device: torch.device) -> VLMTowers:
        return load_hpsv3(self.path, self.revision, self.tokenizer, self.tokenizer_revision, self.dtype, str(device))

    def networks(self) -> Mapping[str, int | None]:
        return {self.path: bytes_of(self.path, each=getattr(torch, self.dtype).itemsize)}

    def pixels(self, towers: Towers, images: Tensor, *, rounded: bool) -> Tensor:
        assert isinstance(towers, VLMTowers)
        images = cut_ends(images.float())
        size = image_size(images.shape[-2], images.shape[-1], unit=towers.unit)
        return transform.normalize(bicubic(images, size, rounded=rounded), list(MEAN), list(STD))

    def compare(self, towers: Towers, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        assert isinstance(towers, VLMTowers)
        rated = towers.rate(images, texts)
        return {"score": rated[:, 0], "deviation": rated[:, 1].exp()}

    def close(self) -> None:
        load_hpsv3.cache_clear()


@functools.lru_cache(maxsize=2)
def load_hpsv3(path: str, revision: str, tokenizer: str, tokenizer_revision: str, dtype: str, device: str) -> VLMTowers:
    """The frozen network, its head and its words.

    Raises:
        FileNotFoundError: when there are no converted weights.
        ValueError: when tokenizer and weights do not belong together.
    """
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Qwen2VLModel

    folder = find_weights(path, of="HPSv3")
    model = from_safetensors(Qwen2VLModel, folder, of="HPSv3", revision=revision, dtype=getattr(torch, dtype))
    words = AutoTokenizer.from_pretrained(find_weights(tokenizer, of="HPSv3"), revision=tokenizer_revision)
    words.add_tokens([REWARD_TOKEN], special_tokens=True)
    rows = model.get_input_embeddings().weight.shape[0]
    if words.convert_tokens_to_ids(REWARD_TOKEN) != rows - 1:
        raise ValueError(
            f"HPSv3: {REWARD_TOKEN} is token {words.convert_tokens_to_ids(REWARD_TOKEN)} of the tokenizer at "
            f"{tokenizer!r}, but the last of {rows} rows in the weights at {path!r}. Use the tokenizer of "
            "Qwen/Qwen2-VL-7B-Instruct."
        )
    head, template = (_beside(folder, name, revision) for name in (HEAD_FILE, TEMPLATE_FILE))
    return VLMTowers(
        model=model.eval().requires_grad_(False).to(device),
        tokenizer=words,
        head={name: tensor.float() for name, tensor in load_file(head, device=device).items()},
        template=template.read_text(encoding="utf-8"),
    )


def _beside(folder: str, name: str, revision: str) -> Path:
    """A file of the folder or hub repository with the weights."""
    if Path(folder).exists():
        return Path(folder) / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(folder, name, revision=revision))
