"""What rewards of image and text share: preprocessing, CLIP towers, chunking, each prompt encoded once.

Scores of uint8 images follow the processors of the released models (bicubic with antialiasing, back to 8
bits, then normalised). `score_tensor` is the same without the rounding, so gradients reach the image.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import attrs
import torch
from attrs import validators
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from rlt2i.interfaces import CODE, Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import with_reasons
from rlt2i.rewards.sizes import bytes_of, weights_of
from rlt2i.rewards.weights import find_weights, from_safetensors, full_precision, weights_identity

MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
STD: Final = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's; every model here uses them."""

_LONGEST: Final = 16
"""Aspect ratio beyond which the ends of an image are cut before resizing; the centre crop drops them."""


def clip_pixels(images: Tensor, side: int, *, rounded: bool) -> Tensor:
    """Shortest edge to `side` (bicubic, antialiased), centre crop, normalise.

    Args:
        images: [N, 3, H, W] float in [0, 1].
        side: in pixels.
        rounded: back to 8 bits after resizing rows and again after columns, as Pillow does and with it the
            released processors; has no gradient.

    Returns:
        [N, 3, side, side] float32.
    """
    images = cut_ends(images.float())
    height, width = images.shape[-2:]
    short = min(height, width)
    size = [side if edge == short else int(side * edge / short) for edge in (height, width)]
    images = bicubic(images, size, rounded=rounded)
    return transform.normalize(transform.center_crop(images, [side, side]), list(MEAN), list(STD))


def bicubic(images: Tensor, size: Sequence[int], *, rounded: bool) -> Tensor:
    """[N, 3, H, W] floats in [0, 1] at another (height, width); `rounded` as in `clip_pixels`."""
    for step in ([images.shape[-2], size[1]], list(size)) if rounded else (list(size),):
        if step != list(images.shape[-2:]):
            images = transform.resize(images, step, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        if rounded:
            images = (images * 255).round() / 255
    return images


def cut_ends(images: Tensor) -> Tensor:
    """[..., H, W] to its middle, where it is very long: one pixel wide, it would grow to a hundred thousand rows."""
    height, width = images.shape[-2:]
    most = _LONGEST * min(height, width)
    top, left = (max(0, edge - most) // 2 for edge in (height, width))
    return images[..., top : top + most, left : left + most]


class Towers(ABC):
    """A loaded model that encodes images and texts apart from each other, as far as it can."""

    @property
    @abstractmethod
    def side(self) -> int:
        """Of the square images it takes, in pixels."""

    @abstractmethod
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[U, ...] whatever a comparison needs of each prompt."""

    @abstractmethod
    def images(self, pixels: Tensor) -> Tensor:
        """[N, ...] of normalised pixels, [N, 3, side, side] unless the reward prepares others; gradients flow."""


@attrs.frozen(kw_only=True)
class ImageTextReward(Reward):
    """One number for an image and its prompt, from a model with two towers. Runs where the images are.

    Attributes:
        rollout_batch_size: images per forward pass; for memory and speed. Scores change by rounding only.
    """

    offers = frozenset({"gradient"})
    preprocessing: ClassVar[str] = "shortest edge bicubic antialiased, 8 bit, centre crop, OpenAI mean, std"

    rollout_batch_size: int = attrs.field(default=32, validator=validators.ge(1))

    @abstractmethod
    def towers(self, device: torch.device) -> Towers:
        """The loaded model; cached, so that rewards on the same weights share them."""

    @abstractmethod
    def compare(self, towers: Towers, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Named [N] values of N encoded images, each with its own encoded text; "score" is the reward."""

    def pixels(self, towers: Towers, images: Tensor, *, rounded: bool) -> Tensor:
        """What the image tower takes of [N, 3, H, W] floats in [0, 1]; the rest as in `clip_pixels`."""
        return clip_pixels(images, towers.side, rounded=rounded)

    def networks(self) -> Mapping[str, int | None]:
        return {path: bytes_of(path) for path in weights_of(self)}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        device = batch.images.device
        with torch.no_grad(), full_precision(device):
            values = self._values(batch.images, batch.prompts, rounded=True)
        scores = values.pop("score")
        valid = torch.isfinite(scores)
        reasons = [None if ok else f"the model returned {score}" for ok, score in zip(valid, scores, strict=True)]
        return RewardOutput(
            scores=scores.where(valid, torch.nan),
            valid=valid,
            components=values,
            info=None if valid.all() else with_reasons(None, reasons),
        )

    def score_tensor(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()
    ) -> Tensor:
        """[B] float32 scores of [B, 3, H, W] floats in [0, 1], differentiable in the images.

        They differ from `score` by the 8-bit rounding only.
        """
        with full_precision(images.device):
            return self._values(images, prompts, rounded=False)["score"]

    def _values(self, images: Tensor, prompts: Sequence[str], *, rounded: bool) -> dict[str, Tensor]:
        towers = self.towers(images.device)
        unique = list(dict.fromkeys(prompts))
        with torch.no_grad():
            texts = towers.texts(unique)
        rows = torch.tensor([unique.index(p) for p in prompts], device=images.device)
        chunks = []
        for start in range(0, len(prompts), self.rollout_batch_size):
            chunk = slice(start, start + self.rollout_batch_size)
            floats = images[chunk].float() / 255 if rounded else images[chunk]
            encoded = towers.images(self.pixels(towers, floats, rounded=rounded))
            chunks.append(self.compare(towers, encoded, texts[rows[chunk]]))
        return {name: torch.cat([c[name] for c in chunks]).float() for name in chunks[0]}

    def fingerprint(self) -> dict[str, Any]:
        import transformers

        weights = {k: weights_identity(getattr(self, k)) for k in ("path", "head") if hasattr(self, k)}
        return {
            "reward": type(self).__name__,
            **{k: repr(v) for k, v in attrs.asdict(self, recurse=False).items() if k != "rollout_batch_size"},
            **weights,
            "preprocessing": self.preprocessing,
            "transformers": transformers.__version__,
            "code": CODE,
        }


# -------------------------------------------------------------------------------------------------- CLIP


@attrs.define
class CLIPTowers(Towers):
    """A CLIPModel with its tokenizer; embeddings come out with length one."""

    model: Any
    tokenizer: Any

    @property
    def side(self) -> int:
        return int(self.model.config.vision_config.image_size)

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), a scalar."""
        return self.model.logit_scale.exp().detach()

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[U, D]; the truncated text keeps its end token, at which CLIP pools."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        device = self.model.logit_scale.device
        output = self.model.get_text_features(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        )
        return F.normalize(projected(output), dim=-1)

    def images(self, pixels: Tensor) -> Tensor:
        """[N, D]"""
        return F.normalize(projected(self.model.get_image_features(pixel_values=pixels)), dim=-1)


def projected(output: Any) -> Tensor:
    """The projected embedding [N, D]: transformers 5 returns an output object, earlier versions a tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


@functools.lru_cache(maxsize=8)
def load_clip(path: str, revision: str, tokenizer: str, device: str) -> CLIPTowers:
    """A frozen float32 CLIPModel. `tokenizer` is a folder or hub name; empty means the same as `path`."""
    from transformers import AutoTokenizer, CLIPModel

    source = find_weights(path, of="CLIP reward")
    model = from_safetensors(CLIPModel, source, of="CLIP reward", revision=revision, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(find_weights(tokenizer, of="CLIP reward") if tokenizer else source)
    return CLIPTowers(model.eval().requires_grad_(False).to(device), words)


@attrs.frozen(kw_only=True)
class CLIPReward(ImageTextReward):
    """A function of the cosine between the embeddings of image and prompt.

    Attributes:
        path: folder of a CLIPModel, name of converted weights, or hub name.
        revision: of the hub repository; a commit pins the scores.
        tokenizer: where the tokenizer is when not at `path`.
    """

    path: str
    revision: str = "main"
    tokenizer: str = ""

    def towers(self, device: torch.device) -> CLIPTowers:
        return load_clip(self.path, self.revision, self.tokenizer, str(device))

    @abstractmethod
    def of_cosine(self, cosine: Tensor, scale: Tensor) -> Tensor:
        """[N] rewards of [N] cosines; `scale` is the model's own exp(logit_scale)."""

    def compare(self, towers: Towers, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        assert isinstance(towers, CLIPTowers)
        cosine = (images * texts).sum(-1)
        return {"score": self.of_cosine(cosine, towers.scale), "cosine": cosine}

    def close(self) -> None:
        load_clip.cache_clear()
