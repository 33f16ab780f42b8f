"""SDXL: a UNet told the size and crop of the picture it is to imitate, each row its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from rlt2i.functional.transfer import to_device
from rlt2i.policies.guidance import EXTRA
from rlt2i.policies.pretrained import DATA
from rlt2i.policies.unet import UNetPolicy, UNetSpec
from rlt2i.types import Conditioning, ImageSize, Prompts, height_and_width, image_size

SOURCE, CROP = "original_size", "crop"
"""Metadata of a prompt, [height, width] and [top, left] in pixels, that go before the fields of the spec."""
_PICTURE = f"{EXTRA}original_size_and_crop"


@attrs.frozen(kw_only=True, eq=False)
class SDXLPolicy(UNetPolicy):
    """A loaded SDXL."""

    spec: SDXL

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        embeddings, _, pooled, _ = self.pipe.encode_prompt(text, None, self.device, 1, False)
        if negative and not text and self.pipe.config.force_zeros_for_empty_prompt:
            embeddings, pooled = torch.zeros_like(embeddings), torch.zeros_like(pooled)
        return {"embeddings": embeddings[0], "pooled": pooled[0]}

    def encode(self, prompts: Prompts) -> Conditioning:
        return self._with_pictures(super().encode(prompts), prompts)

    def encode_with_negative(self, prompts: Prompts, negative: str) -> Conditioning:
        return self._with_pictures(super().encode_with_negative(prompts, negative), prompts)

    def _with_pictures(self, encoded: Conditioning, prompts: Prompts) -> Conditioning:
        """Beside each prompt the size and crop of its picture; 0 x 0 stands for that of the image to be drawn."""
        size = height_and_width(self.spec.original_size or 0)
        rows = [(*_pair(row, SOURCE, size), *_pair(row, CROP, self.spec.crop)) for row in prompts.metadata]
        rows += [(*size, *self.spec.crop)] * (len(encoded.tensors["embeddings"]) - len(rows))
        pictures = to_device(torch.tensor(rows, dtype=torch.float32), self.device)
        return attrs.evolve(encoded, tensors={**encoded.tensors, _PICTURE: pictures})

    def further(self, x: Tensor, conditioning: Conditioning) -> Mapping[str, Any]:
        drawn = torch.stack([x.new_full((len(x),), side * self.pixels_per_latent) for side in x.shape[-2:]], dim=1)
        picture = conditioning[_PICTURE].to(x.dtype) if _PICTURE in conditioning.tensors else x.new_zeros(len(x), 4)
        original = torch.where(picture[:, :2] > 0, picture[:, :2], drawn)
        time_ids = torch.cat([original, picture[:, 2:], drawn], dim=1)
        return {"added_cond_kwargs": {"text_embeds": conditioning["pooled"], "time_ids": time_ids}}


@attrs.frozen(kw_only=True)
class SDXL(UNetSpec):
    """A Stable Diffusion XL base pipeline to train.

    Attributes:
        original_size: of the picture that an image is to look cut from, which small ones make blurred; None is the
            size of the image. A prompt's metadata "original_size" goes before it.
        crop: (top, left) of the cut, in pixels. A prompt's metadata "crop" goes before it.
        negative_prompt: where empty, embeddings of zeros, if the pipeline forces them.
    """

    path: str = attrs.field(default="stabilityai/stable-diffusion-xl-base-1.0", validator=attrs.validators.min_len(1))
    original_size: ImageSize | None = attrs.field(default=None, converter=image_size)
    crop: tuple[int, int] = attrs.field(default=(0, 0))

    pipeline: ClassVar = "StableDiffusionXLPipeline"
    policy: ClassVar = SDXLPolicy
    known: ClassVar = {"stabilityai/stable-diffusion-xl-base-1.0": DATA / "sdxl_base.json"}
    licences: ClassVar = {"stabilityai/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M; open"}

    @crop.validator
    def _check_crop(self, _: Any, value: tuple[int, int]) -> None:
        if min(value) < 0:
            raise ValueError(f"SDXL(crop={value}): (top, left) in pixels, 0 or more.")

    @original_size.validator
    def _check_original_size(self, _: Any, value: ImageSize | None) -> None:
        if value is not None and min(height_and_width(value)) < 1:
            raise ValueError(f"SDXL(original_size={value}): a side of a picture has at least 1 pixel.")

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        first, second = self.config("text_encoder"), self.config("text_encoder_2")
        return {
            "embeddings": (first["max_position_embeddings"], first["hidden_size"] + second["hidden_size"]),
            "pooled": (second["projection_dim"],),
        }

    def components(self) -> dict[str, Any]:
        return {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}

    def drawing(self) -> dict[str, Any] | None:
        if self.config("")["scheduler"][1] != "EulerDiscreteScheduler":
            return None
        original = None if self.original_size is None else height_and_width(self.original_size)
        sizes = {"original_size": original, "crops_coords_top_left": self.crop}
        return {"guidance_scale": 1.0, **sizes}

    def check(self) -> None:
        """Refuse the refiner and networks that are told other things."""
        super().check()
        unet = self.config("unet")
        if unet.get("addition_embed_type") != "text_time" or self.config("")["text_encoder"][0] is None:
            raise ValueError(
                f"{self.who}: its UNet is not told text, size and crop as SDXL base is. The refiner continues images "
                "that another model began; use the base model, or policy.type=StableDiffusion for 1.x and 2.x."
            )
        if unet.get("time_cond_proj_dim") is not None:
            raise ValueError(f"{self.who}: its UNet reads the guidance scale, as distilled ones do. Use SDXL base.")


def _pair(metadata: Mapping[str, Any], name: str, default: tuple[int, int]) -> tuple[float, float]:
    """
    Raises:
        ValueError: when the metadata hold something else than two numbers.
    """
    value = metadata.get(name, default)
    if not (
        isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int | float) for side in value)
    ):
        raise ValueError(f"SDXL: the metadata {name!r} of a prompt are {value!r}; write two numbers of pixels.")
    return value[0], value[1]
