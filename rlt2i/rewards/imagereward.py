"""ImageReward: BLIP reads the prompt while looking at the image; a head says how much people like it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from rlt2i.rewards.aesthetic import HEAD_FILE
from rlt2i.rewards.clip_family import ImageTextReward, Towers
from rlt2i.rewards.weights import find_weights, from_safetensors

MEAN: Final = 0.16717362830052426
STD: Final = 1.0333394966054072
"""Of the raw scores on the authors' data; the reward is standardised by them."""

MAX_TOKENS: Final = 35
"""Longer prompts are cut, as in training."""


@attrs.define
class BLIPTowers(Towers):
    """The image encoder apart, the text encoder with its cross-attention, and the collapsed head."""

    vision: Any
    text: Any
    tokenizer: Any
    weight: Tensor
    bias: Tensor

    @property
    def side(self) -> int:
        return int(self.vision.config.image_size)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[U, 2, L] token numbers and attention mask, padded to MAX_TOKENS as in training."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return torch.stack([tokens["input_ids"], tokens["attention_mask"]], dim=1).to(self.weight.device)

    def images(self, pixels: Tensor) -> Tensor:
        """[N, P, D] patch states."""
        return self.vision(pixel_values=pixels).last_hidden_state

    def fuse(self, images: Tensor, texts: Tensor) -> Tensor:
        """[N] raw scores: the head on the state of the first token, which has attended to the image."""
        state = self.text(
            input_ids=texts[:, 0],
            attention_mask=texts[:, 1],
            encoder_hidden_states=images,
            encoder_attention_mask=torch.ones(images.shape[:2], dtype=torch.long, device=images.device),
            is_decoder=False,
        ).last_hidden_state[:, 0]
        return state @ self.weight + self.bias


@attrs.frozen(kw_only=True)
class ImageReward(ImageTextReward):
    """Preference of people, standardised: mean 0 and deviation 1 on the authors' data; about -2.3 to 2.

    The released head has no activations and is stored as one affine map. Xu et al. 2023, arXiv:2304.05977.

    Attributes:
        path: folder of the converted model, or name of converted weights.
        tokenizer: BERT's; the two tokens that BLIP adds do not occur in prompts.
    """

    span = (-10.0, 10.0)

    path: str = "imagereward-v1.0"
    tokenizer: str = "google-bert/bert-base-uncased"

    def towers(self, device: torch.device) -> BLIPTowers:
        return load_blip(self.path, self.tokenizer, str(device))

    def compare(self, towers: Towers, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        assert isinstance(towers, BLIPTowers)
        return {"score": (towers.fuse(images, texts) - MEAN) / STD}

    def close(self) -> None:
        load_blip.cache_clear()


@functools.lru_cache(maxsize=2)
def load_blip(path: str, tokenizer: str, device: str) -> BLIPTowers:
    """Frozen float32 encoders from the folders `vision` and `text`, and the head beside them."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

    folder = Path(find_weights(path, of="ImageReward"))
    vision = from_safetensors(BlipVisionModel, folder / "vision", of="ImageReward", dtype=torch.float32)
    text = from_safetensors(
        BlipTextModel, folder / "text", of="ImageReward", dtype=torch.float32, add_pooling_layer=False
    )
    head = load_file(folder / HEAD_FILE, device=device)
    return BLIPTowers(
        vision=vision.eval().requires_grad_(False).to(device),
        text=text.eval().requires_grad_(False).to(device),
        tokenizer=AutoTokenizer.from_pretrained(find_weights(tokenizer, of="ImageReward")),
        weight=head["weight"].float(),
        bias=head["bias"].float(),
    )
