"""Tokenizers that know a few words whole and spell all others, and text encoders of two layers."""

from __future__ import annotations

import string
from typing import Any

WORDS = (
    "a", "an", "the", "red", "blue", "green", "cat", "cats", "dog", "box", "boxes", "two", "and", "of", "on", "photo",
    "sign", "saying", "hello", "world", "left",
)  # fmt: skip
_SYMBOLS = "\"'.,!?-:"
_START, _END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(length: int) -> Any:
    """Byte-pair encoding that knows WORDS whole and spells everything else letter by letter."""
    from transformers import CLIPTokenizer

    symbols = string.ascii_lowercase + string.digits + _SYMBOLS
    vocab = [_START, _END, *symbols, *(symbol + "</w>" for symbol in symbols)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # right to left, so that no word's merge can interrupt another's
            pair = (pieces[-2], pieces[-1])
            pieces[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                vocab.append(pieces[-1])
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=length)


def unigram_tokenizer(**options: Any) -> Any:
    """A unigram model that knows WORDS whole (with the leading space mark) and letters; T5's kind of tokenizer."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [("\u2581" + word, -3.0) for word in WORDS]
    pieces += [(symbol, -6.0) for symbol in string.ascii_letters + string.digits + _SYMBOLS + "<>"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, **options)


def clip_encoder(tokenizer: Any, *, projection: bool, width: int = 16) -> Any:
    """CLIP's text encoder, with large initial weights so that prompts differ."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, projection_dim=width,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_factor=8.0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_encoder(tokenizer: Any, *, width: int = 48) -> Any:
    """T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def gemma_encoder(tokenizer: Any, *, width: int = 32, length: int = 1024) -> Any:
    """Gemma 2, with one pair of key and value heads for two query heads."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=length, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, attn_implementation="eager", initializer_range=0.5,
    )  # fmt: skip
    return Gemma2Model(config)
