"""The networks of an embedded pipeline: Stable Diffusion 3's own classes, at a size that a CPU can train.

Every function imports diffusers and transformers when called, because importing them costs seconds.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

LATENT_CHANNELS: Final = 4
PATCH: Final = 2
WIDTH: Final = 128
HEADS: Final = 4
LAYERS: Final = 4
TEXT_WIDTH: Final = 64

_DOWNSAMPLING = 2
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


@attrs.frozen(kw_only=True)
class World:
    """What a world asks of its pipeline.

    Attributes:
        words: every word a prompt can contain; each becomes one token.
        max_tokens: length of a tokenised prompt: one token per word of the longest, plus start and end.
        canvas: side of the largest image, in pixels.
    """

    words: tuple[str, ...]
    max_tokens: int
    canvas: int


def latent_side(pixels: int) -> int:
    """Side of the latents of an image with sides of `pixels`."""
    return pixels // _DOWNSAMPLING


def byte_pair_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges that turn every one of `words` into a single token.

    The most frequent adjacent pair is merged first, ties in alphabetical order, until each word is one piece.
    Merging prefixes word by word would be shorter, and wrong: "triangle" would split "triangles".
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in pieces):
        pairs = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build_tokenizer(world: World) -> CLIPTokenizer:
    """A CLIP tokenizer that knows the words of a world as one token each, and spells any other."""
    from transformers import CLIPTokenizer

    merges = byte_pair_merges(world.words)
    entries = [_BOS, _EOS, *_ALPHABET, *(letter + "</w>" for letter in _ALPHABET), *(a + b for a, b in merges)]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=world.max_tokens)


def build_text_encoder(vocabulary_size: int, max_tokens: int, *, activation: str, generator: torch.Generator) -> Any:
    """A two-layer CLIP text encoder with random weights.

    SD3 reads the hidden states *before* the last layer and the final norm. At CLIP's own initial scale
    (std 0.02) they would be too faint for the transformer to notice the prompt, so embeddings start at the
    scale of a normalised activation: std 1.0 for words, 0.5 for positions.

    Args:
        vocabulary_size: Rows of the word embedding.
        max_tokens: Rows of the position embedding.
        activation: "quick_gelu" for the first encoder, "gelu" for the second, as in SD3.
        generator: Source of the weights.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_tokens,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder: CLIPTextModelWithProjection = _seeded(lambda: CLIPTextModelWithProjection(config), generator)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "token_embedding" in name:
                parameter.normal_(0.0, 1.0, generator=generator)
            elif "position_embedding" in name:
                parameter.normal_(0.0, 0.5, generator=generator)
    return encoder


def build_transformer(side: int, generator: torch.Generator) -> SD3Transformer2DModel:
    """A four-block MMDiT with random weights: image tokens of width 128, queries and keys normalised.

    Args:
        side: Of the largest latents; smaller ones take the first positions in each direction.
        generator: Source of the weights.
    """
    from diffusers import SD3Transformer2DModel

    transformer = _seeded(
        lambda: SD3Transformer2DModel(
            sample_size=side,
            patch_size=PATCH,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=LAYERS,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=side // PATCH,
            qk_norm="rms_norm",
        ),
        generator,
    )
    with torch.no_grad():
        transformer.context_embedder.bias.zero_()
    return transformer


def build_autoencoder(canvas: int, generator: torch.Generator) -> AutoencoderKL:
    """A KL autoencoder with random weights: RGB images to latents of 4 channels and half their side, no attention."""
    from diffusers import AutoencoderKL

    return _seeded(
        lambda: AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=8,
            sample_size=canvas,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0,
            scaling_factor=1.0,
        ),
        generator,
    )


def _seeded(build: Any, generator: torch.Generator) -> Any:
    """Call `build` under a seed from `generator`: constructors read the global RNG, and must not disturb it."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def build_pipeline(autoencoder: AutoencoderKL, world: World, generator: torch.Generator) -> StableDiffusion3Pipeline:
    """A complete SD3 pipeline around `autoencoder`, with random text encoders and transformer, and no T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tokenizer = build_tokenizer(world)
    return StableDiffusion3Pipeline(
        transformer=build_transformer(latent_side(world.canvas), generator),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder,
        text_encoder=build_text_encoder(len(tokenizer), world.max_tokens, activation="quick_gelu", generator=generator),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(len(tokenizer), world.max_tokens, activation="gelu", generator=generator),
        tokenizer_2=build_tokenizer(world),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def load_pipeline(directory: Path) -> StableDiffusion3Pipeline:
    """Load a pipeline directory in float32, through diffusers' own loader.

    Raises:
        ValueError: `directory` holds no pipeline.
    """
    from diffusers import StableDiffusion3Pipeline

    if not (directory / "model_index.json").is_file():
        raise ValueError(
            f"load_pipeline({str(directory)!r}): no model_index.json there. "
            "Train one with `rlt2i pretrain WORLD --out DIR`."
        )
    return StableDiffusion3Pipeline.from_pretrained(
        directory, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32, use_safetensors=True
    )


def save_pipeline(pipeline: StableDiffusion3Pipeline, directory: Path) -> None:
    """Write `pipeline` as float16 safetensors that stock diffusers can load; its modules stay as they are."""
    from diffusers import StableDiffusion3Pipeline

    components: dict[str, Any] = {
        name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part
        for name, part in pipeline.components.items()
        if name not in ("image_encoder", "feature_extractor")
    }
    for part in ("transformer", "vae"):
        # diffusers would otherwise write down which directory on this machine they were loaded from.
        components[part].register_to_config(_name_or_path="")
    StableDiffusion3Pipeline(**components).save_pretrained(directory, safe_serialization=True)


def tokenise(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Texts -> [B, L] token ids, padded with the end token to the tokenizer's length as SD3 does."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids


def encode_text(pipeline: StableDiffusion3Pipeline, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What SD3 conditions on, without T5.

    Args:
        pipeline: Owner of both text encoders.
        token_ids: [B, L].

    Returns:
        [B, L, 128] hidden states and [B, 128] pooled embeddings; gradients flow.
    """
    first = pipeline.text_encoder(token_ids, output_hidden_states=True)
    second = pipeline.text_encoder_2(token_ids, output_hidden_states=True)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return hidden, torch.cat([first.text_embeds, second.text_embeds], dim=-1)


def encode_images(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """[B, 3, H, W] images in [0, 1] -> [B, 4, H/2, W/2] normalised latents (the posterior's mean)."""
    latents = autoencoder.encode(images * 2 - 1).latent_dist.mean
    return (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor


def decode_latents(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """[B, 4, h, w] normalised latents -> [B, 3, 2h, 2w] images in [0, 1]."""
    unscaled = latents / autoencoder.config.scaling_factor + autoencoder.config.shift_factor
    return (autoencoder.decode(unscaled).sample / 2 + 0.5).clamp(0, 1)
