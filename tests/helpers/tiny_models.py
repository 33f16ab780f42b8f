"""The classes of the released reward models with a few thousand random weights, saved to disk as releases are."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from safetensors.torch import save_file

SIDE = 32


def save_tokenizer(folder: Path, *, begin: str, end: str) -> int:
    """One token per character. Returns the number of the end token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", begin, end, *string.ascii_letters, *string.digits, " "]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token=begin, eos_token=end
    )
    fast.save_pretrained(folder)
    return vocabulary[end]


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIPModel with its tokenizer; 77 text positions, images of 32 pixels."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    end = save_tokenizer(folder, begin="<s>", end="</s>")
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shared, "vocab_size": 80, "eos_token_id": end, "bos_token_id": 2, "pad_token_id": 0}
    vision = {**shared, "image_size": SIDE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    spread(model)
    model.save_pretrained(folder)
    return folder


def save_blip(folder: Path, seed: int = 0) -> Path:
    """The two encoders and the head of ImageReward, and a tokenizer in the same folder."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    torch.manual_seed(seed)
    save_tokenizer(folder, begin="[CLS]", end="[SEP]")
    vision = BlipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    text = BlipTextConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        encoder_hidden_size=32,
        vocab_size=80,
        max_position_embeddings=40,
        is_decoder=True,
        bos_token_id=2,
        eos_token_id=3,
        sep_token_id=3,
        pad_token_id=0,
    )
    towers = {"vision": BlipVisionModel(vision), "text": BlipTextModel(text, add_pooling_layer=False)}
    for name, model in towers.items():
        spread(model)
        model.save_pretrained(folder / name)
    save_file({"weight": torch.randn(24), "bias": torch.tensor(0.5)}, folder / "head.safetensors")
    return folder


QWEN_WORDS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_TEMPLATE = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>rate - {prompt}\nnow <|Reward|>"


def save_qwen_tokenizer(folder: Path) -> dict[str, int]:
    """One token per character, and the special tokens of Qwen2-VL. Returns the numbers of all tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *QWEN_WORDS, *string.ascii_letters, *string.digits, *" -<|>?\n"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.add_tokens(list(QWEN_WORDS), special_tokens=True)
    fast.save_pretrained(folder)
    return vocabulary


def tiny_qwen2_vl(words: dict[str, int], rows: int):
    """The configuration of a Qwen2-VL of two layers."""
    from transformers import Qwen2VLConfig

    text = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    special = {"image_token_id": words["<|image_pad|>"], "video_token_id": words["<|video_pad|>"]}
    special |= {"vision_start_token_id": words["<|vision_start|>"], "vision_end_token_id": words["<|vision_end|>"]}
    return Qwen2VLConfig(text_config=text, vision_config=vision, **special)


def save_hpsv3(folder: Path, seed: int = 0) -> Path:
    """What `rlt2i reward convert hpsv3` writes, of a Qwen2-VL of two layers, and a tokenizer in the same folder."""
    from transformers import Qwen2VLModel

    torch.manual_seed(seed)
    words = save_qwen_tokenizer(folder)
    model = Qwen2VLModel(tiny_qwen2_vl(words, len(words) + 1))
    spread(model)
    model.save_pretrained(folder)
    sizes = {"0": (24, 32), "3": (8, 24), "5": (2, 8)}
    head = {f"{name}.weight": torch.randn(size) / size[1] ** 0.5 for name, size in sizes.items()}
    head |= {f"{name}.bias": torch.randn(size[0]) for name, size in sizes.items()}
    save_file(head, folder / "head.safetensors")
    (folder / "template.txt").write_text(QWEN_TEMPLATE, encoding="utf-8")
    return folder


def save_head(folder: Path, width: int = 16, bias: float = 5.0) -> Path:
    """A collapsed aesthetic head."""
    folder.mkdir(parents=True, exist_ok=True)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(3))
    save_file({"weight": weight, "bias": torch.tensor(bias)}, folder / "head.safetensors")
    return folder


def save_detector(folder: Path, seed: int = 0) -> Path:
    """A Mask2Former with a Swin of four blocks and six queries."""
    from transformers import Mask2FormerConfig, SwinConfig

    from rlt2i.rewards.mask2former import detector_class

    torch.manual_seed(seed)
    swin = SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        num_labels=80,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_attention_heads=2,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=2,
    )
    detector_class()(config).save_pretrained(folder)
    return folder


def spread(model: torch.nn.Module) -> None:
    """Larger weights than the usual initialisation: otherwise every image and text looks the same."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
