"""Released checkpoints under transformers' names: pure functions of state dicts, nothing is unpickled."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Rename = Sequence[tuple[str, str]]

_OPEN_CLIP: Final[Rename] = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
)
_TRANSPOSED: Final = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
"""open_clip multiplies from the left with these."""

_BLIP_VISION: Final[Rename] = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
)


def vit_h_config() -> Any:
    """The CLIPConfig of laion/CLIP-ViT-H-14, on which PickScore and HPSv2 were trained."""
    from transformers import CLIPConfig

    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": 1024, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "eos_token_id": 2}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14}
    return CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=1024)


def open_clip_to_transformers(state: State) -> dict[str, Tensor]:
    """An open_clip model with joint qkv projections as a CLIPModel. Buffers such as attn_mask are dropped."""
    converted = {}
    for old, tensor in state.items():
        if old.endswith("attn_mask"):
            continue
        if old in _TRANSPOSED:
            converted[_TRANSPOSED[old]] = tensor.T.contiguous()
            continue
        name = _renamed(old, _OPEN_CLIP)
        joint = re.search(r"\.attn\.in_proj_(weight|bias)$", name)
        if joint is None:
            converted[name] = tensor
            continue
        for part, piece in zip("qkv", tensor.chunk(3, dim=0), strict=True):
            converted[f"{name[: joint.start()]}.self_attn.{part}_proj.{joint[1]}"] = piece.clone()
    return converted


def blip_configs() -> tuple[Any, Any]:
    """(vision, text) of ImageReward: ViT-L/16 at 224 pixels, BERT-base with cross-attention."""
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(**_sizes(1024, layers=24), image_size=224, patch_size=16, layer_norm_eps=1e-6)
    text = BlipTextConfig(
        **_sizes(768, layers=12),
        encoder_hidden_size=1024,
        vocab_size=30524,
        max_position_embeddings=512,
        layer_norm_eps=1e-12,
        is_decoder=True,
    )
    return vision, text


def _sizes(width: int, *, layers: int) -> dict[str, int]:
    """Of a transformer with heads of 64 numbers."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }


def image_reward_to_transformers(
    state: State,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """ImageReward's checkpoint as a BlipVisionModel, a BlipTextModel and the collapsed head."""
    vision = {_renamed(name, _BLIP_VISION): tensor for name, tensor in _below(state, "blip.visual_encoder.").items()}
    text = {
        name: tensor
        for name, tensor in _below(state, "blip.text_encoder.").items()
        if not name.endswith("position_ids")
    }
    return vision, text, collapse_linear(_below(state, "mlp.layers."))


def qwen2_vl_config(vocabulary: int) -> Any:
    """Qwen2-VL-7B, for a vocabulary of so many tokens."""
    from transformers import Qwen2VLConfig

    text = {
        "vocab_size": vocabulary,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    special = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    return Qwen2VLConfig(text_config=text, vision_config=vision, vision_end_token_id=151653, **special)


def hpsv3_to_transformers(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """HPSv3's checkpoint as a Qwen2VLModel and the head, "0.weight" to "5.bias".

    It was written by a transformers that had no part `language_model`; the head that predicts words is left out.
    """
    model = {f"language_model.{name}": tensor for name, tensor in _below(state, "model.").items()}
    model |= {f"visual.{name}": tensor for name, tensor in _below(state, "visual.").items()}
    return model, {name: tensor.float() for name, tensor in _below(state, "rm_head.").items()}


def hpsv3_template(source: str) -> str:
    """The question of HPSv3, out of the text of its module `data_collator_qwen.py`; nothing in it is executed.

    Returns:
        What is said up to the reward token, in the frame of Qwen2-VL's chats; {prompt} stands for the prompt.

    Raises:
        ValueError: when the module does not hold the two texts.
    """
    wanted = ("INSTRUCTION", "prompt_with_special_token")
    texts = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in wanted:
            texts[node.targets[0].id] = str(ast.literal_eval(node.value))
    if set(texts) != set(wanted) or "{text_prompt}" not in texts["INSTRUCTION"]:
        raise ValueError(f"hpsv3_template: the module holds {sorted(texts)}, expected {sorted(wanted)}.")
    # What follows the reward token cannot change its state, since attention is causal.
    request = texts["prompt_with_special_token"].partition("<|Reward|>")
    question = texts["INSTRUCTION"].replace("{text_prompt}", "{prompt}") + request[0] + request[1]
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|image_pad|><|vision_end|>{question}"
    )


def collapse_linear(layers: State) -> dict[str, Tensor]:
    """A stack of linear layers without activations as the one affine map that it is.

    Args:
        layers: "0.weight" [out, in], "0.bias" [out], "2.weight", ...; numbers give the order, the last out is
            1.

    Returns:
        weight [in] and scalar bias, float32, computed in float64.

    Raises:
        ValueError: where the last layer has several outputs.
    """
    numbers = sorted({int(name.split(".")[0]) for name in layers})
    weight = torch.eye(layers[f"{numbers[0]}.weight"].shape[1], dtype=torch.float64)
    bias = torch.zeros(weight.shape[1], dtype=torch.float64)
    for number in numbers:
        linear = layers[f"{number}.weight"].double()
        weight, bias = linear @ weight, linear @ bias + layers[f"{number}.bias"].double()
    if weight.shape[0] != 1:
        raise ValueError(f"collapse_linear: the last layer has {weight.shape[0]} outputs; a score needs one.")
    return {"weight": weight[0].float().contiguous(), "bias": bias[0].float().contiguous()}


def _renamed(name: str, rules: Rename) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _below(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
