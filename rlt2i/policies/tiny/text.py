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


def umt5_encoder(tokenizer: Any, *, width: int = 32) -> Any:
    """UMT5's encoder."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
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


_TEMPLATE_WORDS = (
    "the", "image", "by", "detailing", "color", "shape", "size", "texture", "quantity", "text", "spatial",
    "relationships", "objects", "background",
)  # fmt: skip
_LINE_STARTS = ("system", "assistant", "user", "Describe")
_CHAT_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Of the layout of Qwen3's."""


def qwen_tokenizer(**options: Any) -> Any:
    """Byte-level byte-pair encoding that knows WORDS after a space, and those of Qwen's templates, whole."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    space = "\u0120"  # the byte-level sign of a space
    words = [space + word for word in (*WORDS, *_TEMPLATE_WORDS)] + list(_LINE_STARTS)
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = dict.fromkeys([*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)])
    vocab = {token: i for i, token in enumerate(tokens)}
    for mark in _CHAT_MARKS:
        vocab[mark] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, chat_template=CHAT_TEMPLATE, **options)
    tokenizer.add_tokens(list(_CHAT_MARKS), special_tokens=True)
    return tokenizer


def qwen3_encoder(tokenizer: Any, *, width: int = 16, layers: int = 27) -> Any:
    """Qwen3, with one pair of key and value heads for two query heads; as deep as FLUX.2 reads it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048,
        attn_implementation="eager", initializer_range=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def qwen25_vl_encoder(tokenizer: Any, *, width: int = 16) -> Any:
    """Qwen2.5-VL, two layers each for text and for the images that no prompt has here."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048, "initializer_range": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "patch_size": 2, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, attn_implementation="eager")
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl_encoder(tokenizer: Any, *, width: int = 16, with_head: bool = False) -> Any:
    """Qwen3-VL, three layers for text and one for the images that no prompt has here; with its language head or not."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

    text = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048,
        "initializer_range": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    kind = Qwen3VLForConditionalGeneration if with_head else Qwen3VLModel
    return kind(Qwen3VLConfig(text_config=text, vision_config=vision, attn_implementation="eager"))


QWEN3_VL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content[0].text }}<|im_end|>\n{% endfor %}"
)
"""Of the layout of Qwen3-VL's."""


def qwen3_vl_processor() -> Any:
    """A processor of text, images and films; its tokenizer is the small one of Qwen with the marks of a picture."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = qwen_tokenizer()
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer, video_processor=Qwen3VLVideoProcessor(),
        chat_template=QWEN3_VL_TEMPLATE,
    )  # fmt: skip


MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)
"""Of the layout of Mistral Small's."""


def pixtral_processor(*, padding_side: str) -> Any:
    """A processor of text and images; its tokenizer is the small one of Qwen with Mistral's marks."""
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokenizer = qwen_tokenizer(padding_side=padding_side)
    marks = ["<s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    marks += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    tokenizer.add_tokens(marks, special_tokens=True)
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(), tokenizer=tokenizer, chat_template=MISTRAL_TEMPLATE
    )


def mistral3_encoder(tokenizer: Any, *, width: int = 16) -> Any:
    """Mistral Small 3 with its eyes; as deep as FLUX.2 reads it."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=30,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048, sliding_window=None,
        initializer_range=0.5,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        head_dim=8,
    )  # fmt: skip
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, attn_implementation="eager")
    )
