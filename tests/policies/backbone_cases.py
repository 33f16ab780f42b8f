"""Backbones as their laws see them: a spec, tiny weights, and how the stock pipeline is asked for the same picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch

from rlt2i.policies.aura_flow import AuraFlow
from rlt2i.policies.flux import Flux
from rlt2i.policies.flux2 import Flux2, Flux2Klein
from rlt2i.policies.guidance import IntervalGuidance, OffsetGuidance, RescaledGuidance
from rlt2i.policies.krea2 import Krea2
from rlt2i.policies.lumina2 import Lumina2
from rlt2i.policies.pretrained.autoencoder import to_vae
from rlt2i.policies.qwen_image import QwenImage
from rlt2i.policies.qwen_image21 import QwenImage21
from rlt2i.policies.sana import Sana
from rlt2i.policies.zimage import ZImage

STEPS = 4


def pack_flux(stock, latents):
    n, c, h, w = latents.shape
    return stock._pack_latents(latents, n, c, h, w)


def unpack_flux(stock, output, like):
    scale = stock.vae_scale_factor
    return stock._unpack_latents(output, like.shape[2] * scale, like.shape[3] * scale, scale)


def unpack_qwen(stock, output, like):
    return unpack_flux(stock, output, like)[:, :, 0]


def unpack_krea2(stock, output, like):
    scale = stock.vae_scale_factor
    return stock._unpack_latents(output, like.shape[2] * scale, like.shape[3] * scale)[:, :, 0]


def krea2_text(stock, text, **options):
    return dict(zip(("embeddings", "mask"), stock.encode_prompt(text, **options), strict=True))


def flux2_text(stock, text, **options):
    return {"embeddings": stock.encode_prompt(text, **options)[0]}


def rows_of(tensor, mask):
    """A list of texts at their own lengths."""
    return [row[: int(kept.sum())] for row, kept in zip(tensor, mask, strict=True)]


@attrs.frozen
class Case:
    """A backbone against its stock pipeline.

    Attributes:
        options: of the spec.
        tiny: of the tiny pipeline.
        call: of the stock pipeline.
        arguments: of the stock pipeline -> tensor of our conditioning; those of the negative prompt begin "negative_".
        guidance: the stock pipeline's argument for the scale of true guidance; None where it has none.
        guided: forms of guidance to compare: our options and the stock pipeline's, beside the scale.
        text: name -> tensor with a batch axis, what the stock pipeline makes of one prompt.
        pack, unpack: our latents as the stock pipeline takes them, and what it gives as ours.
        shown: our latents as the stock pipeline shows them; FLUX.2-klein gives those that its autoencoder decodes.
        listed: whether the stock pipeline takes a list of texts.
        blocks_before: calls of scaled_dot_product_attention before the first watched block.
        dropped: tokens that the tokenizer reads and the network never sees, at the start; negative: the reverse.
        idle: ends of the names of adapted layers that no gradient reaches: text that leaves the last block.
        order: "text_image" or "padded_text_image" (the image begins where the row's own text ends, or the longest
            one), "image_text" (the text begins at a multiple of 32), or "cross".
        slow: marked so, as the class of another case is much the same.
        oblong: a size; the tokens of the default fill no multiple of 32 where an image token is 4 x 4 pixels.
        by_length: whether padding changes what the stock pipeline draws; texts of one length go through it at a time.
        also: further arguments of the stock pipeline, each of which must not change what it draws.
        of_text: calls of scaled_dot_product_attention in a block, before the one in which the image asks.
        images: of the stock pipeline as a page shows them.
        near: how far images may be from the stock pipeline's.
    """

    spec: Any
    options: dict
    tiny: dict
    call: dict
    arguments: dict
    text: Callable
    guidance: str | None = "guidance_scale"
    guided: tuple = (({}, {}),)
    pack: Callable = lambda stock, latents: latents
    unpack: Callable = lambda stock, output, like: output
    shown: Callable = lambda policy, latents: latents
    listed: bool = False
    blocks_before: int = 0
    dropped: int = 0
    idle: tuple[str, ...] = ()
    order: str = "text_image"
    oblong: tuple[int, int] = (48, 80)
    slow: bool = False
    by_length: bool = False
    also: tuple[dict, ...] = ()
    of_text: int = 0
    images: Callable = lambda images: images
    near: float = 0.0

    def places(self, image, text, own):
        """The image among keys and queries, and where the first token of the text is."""
        if self.order == "cross":
            return slice(0, image), 0
        if self.order == "image_text":
            return slice(0, image), -(-image // 32) * 32
        start = own if self.order == "text_image" and own else text
        start += max(0, -self.dropped)
        return slice(start, start + image), 0

    def together(self, conditioning):
        """Rollouts that go through the stock pipeline at once."""
        if not self.by_length:
            return [list(range(len(conditioning)))]
        lengths = conditioning["mask"].sum(dim=1).tolist()
        return [[i for i, its in enumerate(lengths) if its == length] for length in sorted(set(lengths))]

    def given(self, conditioning, *, row=None, prefix=""):
        """Arguments of the stock pipeline: the rollouts' own texts, or that of one row of the conditioning."""
        if self.by_length:
            masks = conditioning["mask"] if row is None else conditioning.tensors["mask"][row][None]
            (length,) = set(masks.sum(dim=1).tolist())
            embeddings = conditioning.tensors["embeddings"][:, :length]
            conditioning = attrs.evolve(conditioning, tensors={"embeddings": embeddings})

        def tensor(name):
            if name not in conditioning.tensors:
                return None
            if row is None:
                return conditioning[name]
            return conditioning.tensors[name][row][None].expand(
                len(conditioning), *[-1] * (conditioning.tensors[name].ndim - 1)
            )

        found = {theirs: tensor(ours) for theirs, ours in self.arguments.items()}
        if self.listed:
            mask = tensor("mask")
            found = {name: list(text) if mask is None else rows_of(text, mask) for name, text in found.items()}
        return {prefix + name: value for name, value in found.items() if value is not None}

    def draw(self, stock, policy, conditioning, noise, *, output="latent", steps=STEPS, **options):
        """Latents, or images, of the stock pipeline from the same noise and texts."""
        height, width = (side * policy.pixels_per_latent for side in noise.shape[2:])
        found, order = [], []
        for rows in self.together(conditioning):
            own, arguments = noise[rows], self.given(conditioning.take(torch.tensor(rows)))
            arguments |= {name: value[: len(rows)] for name, value in options.items() if name.startswith("negative_")}
            drawn = stock(
                latents=self.pack(stock, own), num_inference_steps=steps, height=height, width=width,
                output_type=output, **{**self.call, **options, **arguments},
            )[0]  # fmt: skip
            found.append(self.unpack(stock, drawn, own) if output == "latent" else self.images(drawn))
            order += rows
        return torch.cat(found)[torch.tensor(order).argsort()]


def on_white(images):
    return images[:, :3] * images[:, 3:] + (1 - images[:, 3:])


def flux_text(stock, text, **options):
    embeddings, pooled, _ = stock.encode_prompt(text, None, **options)
    return {"embeddings": embeddings, "pooled": pooled}


def masked_text(stock, text, **options):
    embeddings, mask, *_ = stock.encode_prompt(text, do_classifier_free_guidance=False, **options)
    return {"embeddings": embeddings, "mask": mask}


SANA_CALL = {"guidance_scale": 1.0, "use_resolution_binning": False, "negative_prompt": None}
MASKED = {"prompt_embeds": "embeddings", "prompt_attention_mask": "mask"}
OFFSET = OffsetGuidance()
CASES = {
    "flux": Case(
        Flux, {"max_sequence_length": 24}, {}, {"guidance_scale": 3.5, "max_sequence_length": 24},
        {"prompt_embeds": "embeddings", "pooled_prompt_embeds": "pooled"}, flux_text, guidance="true_cfg_scale",
        pack=pack_flux, unpack=unpack_flux,
    ),
    "sana": Case(
        Sana, {"max_sequence_length": 24}, {"qk_norm": None}, SANA_CALL, MASKED, masked_text, order="cross",
        oblong=(32, 96), slow=True,
    ),
    "sana15": Case(
        Sana, {"max_sequence_length": 24}, {}, SANA_CALL, MASKED, masked_text, order="cross", oblong=(32, 96),
    ),
    "lumina2": Case(
        Lumina2, {"max_sequence_length": 200}, {}, {"guidance_scale": 1.0}, MASKED, masked_text, blocks_before=2,
    ),
    "flux2_klein": Case(
        Flux2Klein, {"max_sequence_length": 40}, {}, {"guidance_scale": 1.0}, {"prompt_embeds": "embeddings"},
        flux2_text, shown=lambda policy, latents: to_vae(policy.vae, latents),
    ),
    "flux2": Case(
        Flux2, {"max_sequence_length": 220}, {}, {"guidance_scale": 4.0}, {"prompt_embeds": "embeddings"},
        flux2_text, guidance=None, slow=True, unpack=lambda stock, output, like: output.mT.reshape(like.shape),
    ),
    "z_image": Case(
        ZImage, {"max_sequence_length": 60}, {}, {"guidance_scale": 0.0}, {"prompt_embeds": "embeddings"},
        lambda stock, text, **options: {"embeddings": stock.encode_prompt(text, None, False, **options)[0][0][None]},
        guided=(
            ({}, {}),
            (
                {"guidance": RescaledGuidance(of=OFFSET, over="image", limit=0.9)},
                {"cfg_normalization": 0.9},
            ),
            ({"guidance": IntervalGuidance(low=0.6, of=OFFSET)}, {"cfg_truncation": 0.4}),
        ),
        listed=True, blocks_before=2, order="image_text",
    ),
    "qwen_image": Case(
        QwenImage, {"max_sequence_length": 40}, {}, {"true_cfg_scale": 1.0},
        {"prompt_embeds": "embeddings", "prompt_embeds_mask": "mask"},
        lambda stock, text, **options: {"embeddings": stock.encode_prompt(text, **options)[0]},
        guidance="true_cfg_scale", pack=pack_flux, unpack=unpack_qwen, dropped=34, order="padded_text_image",
        idle=("2.attn.to_add_out",),
    ),
    "qwen_image21": Case(
        QwenImage21, {"max_sequence_length": 40}, {}, {"true_cfg_scale": 1.0, "use_kv_cache": False},
        {"prompt_embeds": "embeddings"}, lambda stock, text, **_: {"embeddings": stock.encode_prompt(text)[0]},
        guidance="true_cfg_scale", pack=pack_flux, unpack=unpack_qwen, dropped=38, order="cross", oblong=(32, 96),
        by_length=True, also=({"use_kv_cache": True},), of_text=1, images=on_white, near=1e-6, slow=True,
    ),
    "krea2": Case(
        Krea2, {"max_sequence_length": 40}, {}, {"guidance_scale": 0.0},
        {"prompt_embeds": "embeddings", "prompt_embeds_mask": "mask"}, krea2_text,
        pack=pack_flux, slow=True, unpack=unpack_krea2, blocks_before=2, dropped=34, order="padded_text_image",
    ),
    "aura_flow": Case(
        AuraFlow, {"max_sequence_length": 24}, {}, {"guidance_scale": 1.0},
        {"prompt_embeds": "embeddings", "prompt_attention_mask": "embeddings"},
        lambda stock, text, **options: {
            "embeddings": stock.encode_prompt(text, do_classifier_free_guidance=False, **options)[0]
        },
        dropped=-8, slow=True,
    ),
}  # fmt: skip
NAMES = [pytest.param(name, marks=pytest.mark.slow) if case.slow else name for name, case in CASES.items()]
