"""The LAION aesthetic predictor: one affine map on CLIP ViT-L/14's image embedding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs
import torch
from torch import Tensor

from rlt2i.rewards.clip_family import CLIPTowers, ImageTextReward, Towers, load_clip
from rlt2i.rewards.weights import find_weights

HEAD_FILE: Final = "head.safetensors"


@attrs.define
class AestheticTowers(Towers):
    """CLIP's image tower and the head."""

    clip: CLIPTowers
    weight: Tensor
    bias: Tensor

    @property
    def side(self) -> int:
        return self.clip.side

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[U, 0]: beauty does not depend on the prompt here."""
        return self.weight.new_zeros(len(prompts), 0)

    def images(self, pixels: Tensor) -> Tensor:
        """[N, D] of length one."""
        return self.clip.images(pixels)


@attrs.frozen(kw_only=True)
class Aesthetic(ImageTextReward):
    """How much people liked such pictures on a scale of 1 to 10; mostly 4.5 to 6.5. The prompt plays no part.

    The released head is five linear layers without activations, hence exactly one affine map of 769 numbers.
    A policy trained on it alone exploits it within a few hundred updates: watch it, but do not train on it
    alone.

    Attributes:
        path: the CLIP ViT-L/14 of OpenAI that the head was trained on.
        revision: of its hub repository.
        head: folder with the collapsed head, or name of converted weights.
    """

    span = (-20.0, 30.0)

    path: str = "openai/clip-vit-large-patch14"
    revision: str = "main"
    head: str = "aesthetic_sac_logos_ava1_l14"

    def towers(self, device: torch.device) -> AestheticTowers:
        weight, bias = load_head(self.head, str(device))
        return AestheticTowers(load_clip(self.path, self.revision, "", str(device)), weight, bias)

    def compare(self, towers: Towers, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        assert isinstance(towers, AestheticTowers)
        return {"score": images @ towers.weight + towers.bias}

    def close(self) -> None:
        load_head.cache_clear()
        load_clip.cache_clear()


@functools.lru_cache(maxsize=4)
def load_head(path: str, device: str) -> tuple[Tensor, Tensor]:
    """[D] weight and scalar bias of a collapsed head."""
    from safetensors.torch import load_file

    stored = load_file(Path(find_weights(path, of="Aesthetic")) / HEAD_FILE, device=device)
    return stored["weight"].float(), stored["bias"].float()
