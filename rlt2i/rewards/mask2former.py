"""GenEval's detector on transformers: Mask2Former (Swin-S), the official weights, mmdet's semantics.

GenEval is defined by mmdetection's checkpoint (Apache-2.0). `convert` renames its parameters; the only ones
that change are Swin's patch merging, whose channels mmdet orders as nn.Unfold does, and joint projections,
which are split. The transformers processor is not used: it antialiases, and its post-processing drops boxes
and overlaps.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transform

from rlt2i.rewards.weights import find_weights, from_safetensors

MEAN: Final = (123.675, 116.28, 103.53)
STD: Final = (58.395, 57.12, 57.375)
PAD_VALUE: Final = 128.0
LONG, SHORT, STRIDE = 1333, 800, 32
"""An image is resized to fit LONG x SHORT and padded to a multiple of STRIDE, in pixels."""
TOP: Final = 100
"""(query, class) pairs kept per image, before any threshold."""


@attrs.frozen(kw_only=True, eq=False)
class Instances:
    """What was found in one image, by descending class probability.

    Attributes:
        labels: [N] long class indices.
        scores: [N] float32, class probability x mean mask probability inside the mask.
        boxes: [N, 4] float32 (x1, y1, x2, y2) in pixels of the image; tight around the mask, 0 when it is
            empty.
        masks: [N, H, W] bool.
    """

    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor

    def above(self, threshold: float) -> Instances:
        """Those with a higher score."""
        keep = self.scores > threshold
        return Instances(
            labels=self.labels[keep], scores=self.scores[keep], boxes=self.boxes[keep], masks=self.masks[keep]
        )


def fitted_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) after resizing to fit LONG x SHORT with the ratio kept: 512 x 512 becomes 800 x 800."""
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def network_input(images: Tensor) -> Tensor:
    """[N, 3, H, W] uint8 RGB to [N, 3, h, w] float32: bilinear, not antialiased; padded grey; normalised."""
    size = list(fitted_size(*images.shape[-2:]))
    resized = transform.resize(images.float(), size, antialias=False).round()  # whole grey levels, as mmdet's
    pad_h, pad_w = (-edge % STRIDE for edge in size)
    padded = transform.pad(resized, [0, 0, pad_w, pad_h], fill=PAD_VALUE)
    return transform.normalize(padded, list(MEAN), list(STD))


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
) -> Instances:
    """Logits of one image to objects, as mmdet's fusion head does. A query may appear under two classes.

    Args:
        class_logits: [Q, C + 1]; the last is "no object".
        mask_logits: [Q, h, w] at a quarter of the padded input.
        padded, resized, original: (height, width) of the network input, of the valid part of it, of the
            image.
    """
    masks = F.interpolate(mask_logits[None], size=padded, mode="bilinear", align_corners=False)
    masks = masks[..., : resized[0], : resized[1]]
    masks = F.interpolate(masks, size=original, mode="bilinear", align_corners=False)[0]
    probabilities = class_logits.softmax(-1)[:, :-1]
    confidence, flat = probabilities.flatten().topk(min(TOP, probabilities.numel()))
    query, labels = flat // probabilities.shape[1], flat % probabilities.shape[1]
    inside = masks > 0
    inside_count = inside.flatten(1).sum(1)
    certainty = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside_count + 1e-6)
    return Instances(
        labels=labels,
        scores=confidence * certainty[query],
        boxes=mask_boxes(inside)[query],
        masks=inside[query],
    )


def mask_boxes(masks: Tensor) -> Tensor:
    """[N, 4] float32 tight boxes (x1, y1, x2, y2) of [N, H, W] bool masks, ends exclusive; 0 when empty."""
    spans = []
    for along in (masks.any(1), masks.any(2)):
        length = along.shape[1]
        first = along.int().argmax(1)
        end = length - along.flip(1).int().argmax(1)
        spans.append((first, torch.where(along.any(1), end, torch.zeros_like(end))))
    (x1, x2), (y1, y2) = spans
    return torch.stack([x1, y1, x2, y2], dim=1).float()


@functools.cache
def detector_class() -> Any:
    """Mask2FormerForUniversalSegmentation without its training loss, which would need SciPy."""
    from transformers.models.mask2former import modeling_mask2former as parts

    class Mask2FormerDetector(parts.Mask2FormerPreTrainedModel):
        _keys_to_ignore_on_load_unexpected: ClassVar = [r"^criterion\."]

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = parts.Mask2FormerModel(config)
            self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
            """[N, Q, C + 1] class logits and [N, Q, h, w] mask logits of the last decoder layer."""
            output = self.model(pixel_values=pixel_values, output_hidden_states=True, return_dict=True)
            queries = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)
            return self.class_predictor(queries), output.masks_queries_logits[-1]

    return Mask2FormerDetector


@functools.lru_cache(maxsize=2)
def load_detector(path: str, device: str) -> Any:
    """A frozen float32 detector from converted weights or the hub."""
    source = find_weights(path, of="GenEvalReward")
    model = from_safetensors(detector_class(), source, of="GenEvalReward", dtype=torch.float32)
    return model.eval().requires_grad_(False).to(device)


def detect(model: Any, images: Tensor, *, threshold: float) -> list[Instances | None]:
    """Objects above the threshold in each of [N, 3, H, W] images; None where the network gave no numbers."""
    pixels = network_input(images)
    class_logits, mask_logits = model(pixel_values=pixels)
    original = (images.shape[-2], images.shape[-1])
    padded = (pixels.shape[-2], pixels.shape[-1])
    results: list[Instances | None] = []
    for classes, masks in zip(class_logits, mask_logits, strict=True):
        if not (torch.isfinite(classes).all() and torch.isfinite(masks).all()):
            results.append(None)
            continue
        whole = instances(classes, masks, padded=padded, resized=fitted_size(*original), original=original)
        results.append(whole.above(threshold))
    return results


# -------------------------------------------------------------------------------------------- conversion

_ENCODER: Final = "model.pixel_level_module.encoder."
_PIXEL: Final = "model.pixel_level_module.decoder."
_QUERIES: Final = "model.transformer_module."
_EMBEDDER: Final = _QUERIES + "decoder.mask_predictor.mask_embedder."
_LAYER: Final = "panoptic_head.transformer_decoder.layers"
_PIXEL_LAYER: Final = "panoptic_head.pixel_decoder.encoder.layers"

_RENAME: Final[tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]] = (
    # Swin
    (r"^backbone\.patch_embed\.projection\.", _ENCODER + "swin.embeddings.patch_embeddings.projection."),
    (r"^backbone\.patch_embed\.norm\.", _ENCODER + "swin.embeddings.norm."),
    (r"^backbone\.norm(\d)\.", lambda m: f"{_ENCODER}hidden_states_norms.stage{int(m[1]) + 1}."),
    (r"^backbone\.stages\.(\d+)\.", _ENCODER + r"swin.encoder.layers.\1."),
    (r"\.(blocks\.\d+)\.norm1\.", r".\1.layernorm_before."),
    (r"\.(blocks\.\d+)\.norm2\.", r".\1.layernorm_after."),
    (r"\.attn\.w_msa\.(relative_position_bias)_table$", r".attention.\1.\1_table"),
    (r"\.attn\.w_msa\.proj\.", ".attention.o_proj."),
    (r"\.(blocks\.\d+)\.ffn\.layers\.0\.0\.", r".\1.mlp.fc1."),
    (r"\.(blocks\.\d+)\.ffn\.layers\.1\.", r".\1.mlp.fc2."),
    # pixel decoder
    (r"^panoptic_head\.pixel_decoder\.input_convs\.(\d)\.conv\.", _PIXEL + r"input_projections.\1.0."),
    (r"^panoptic_head\.pixel_decoder\.input_convs\.(\d)\.gn\.", _PIXEL + r"input_projections.\1.1."),
    (r"^panoptic_head\.pixel_decoder\.level_encoding\.weight$", _PIXEL + "level_embed"),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.", _PIXEL + "adapter_1.0."),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.", _PIXEL + "adapter_1.1."),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.", _PIXEL + "layer_1.0."),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.", _PIXEL + "layer_1.1."),
    (r"^panoptic_head\.pixel_decoder\.mask_feature\.", _PIXEL + "mask_projection."),
    (rf"^{re.escape(_PIXEL_LAYER)}\.(\d)\.", _PIXEL + r"encoder.layers.\1."),
    (r"(encoder\.layers\.\d)\.attentions\.0\.", r"\1.self_attn."),
    (r"(encoder\.layers\.\d)\.norms\.0\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d)\.norms\.1\.", r"\1.final_layer_norm."),
    # query decoder: cross-attention, self-attention, feed-forward, in this order
    (r"^panoptic_head\.transformer_decoder\.post_norm\.", _QUERIES + "decoder.layernorm."),
    (rf"^{re.escape(_LAYER)}\.(\d)\.", _QUERIES + r"decoder.layers.\1."),
    (r"(decoder\.layers\.\d)\.attentions\.0\.attn\.", r"\1.cross_attn."),
    (r"(decoder\.layers\.\d)\.attentions\.1\.attn\.", r"\1.self_attn."),
    (r"(decoder\.layers\.\d)\.norms\.0\.", r"\1.cross_attn_layer_norm."),
    (r"(decoder\.layers\.\d)\.norms\.1\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d)\.norms\.2\.", r"\1.final_layer_norm."),
    (r"(layers\.\d)\.ffns\.0\.layers\.0\.0\.", r"\1.fc1."),
    (r"(layers\.\d)\.ffns\.0\.layers\.1\.", r"\1.fc2."),
    (r"^panoptic_head\.query_embed\.", _QUERIES + "queries_embedder."),
    (r"^panoptic_head\.query_feat\.", _QUERIES + "queries_features."),
    (r"^panoptic_head\.level_embed\.", _QUERIES + "level_embed."),
    (r"^panoptic_head\.cls_embed\.", "class_predictor."),
    (r"^panoptic_head\.mask_embed\.(\d)\.", lambda m: f"{_EMBEDDER}{int(m[1]) // 2}.0."),
)  # fmt: skip

_NO_PARAMETER = re.compile(r"relative_position_index$|num_batches_tracked|\.loss_")
_MERGING = re.compile(r"\.downsample\.(reduction\.weight|norm\.(weight|bias))$")
_JOINT = re.compile(r"\.(?:attn\.w_msa\.qkv\.|self_attn\.in_proj_)(weight|bias)$")


def official_config() -> Any:
    """The Mask2FormerConfig of mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco."""
    from transformers import Mask2FormerConfig, SwinConfig

    swin = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        image_size=224,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(backbone_config=swin, num_labels=80)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of an mmdetection 2.x Mask2Former (Swin) under transformers' names."""
    converted = {}
    for old, tensor in state.items():
        if _NO_PARAMETER.search(old):
            continue
        name = old
        for pattern, new in _RENAME:
            name = re.sub(pattern, new, name)
        if _MERGING.search(name):
            tensor = _patch_merging(tensor)
        joint = _JOINT.search(name)
        if joint is None:
            converted[name] = tensor
            continue
        attention = ".attention." if ".attn.w_msa." in name else ".self_attn."
        for part, piece in zip("qkv", tensor.chunk(3, dim=0), strict=True):
            converted[f"{name[: joint.start()]}{attention}{part}_proj.{joint[1]}"] = piece.clone()
    return converted


def _patch_merging(tensor: Tensor) -> Tensor:
    """Last axis from nn.Unfold's (C, rows, columns) to Swin's (4, C), which goes column by column."""
    lead = tensor.shape[:-1]
    by_channel = tensor.reshape(*lead, -1, 4)
    return by_channel.transpose(-1, -2)[..., [0, 2, 1, 3], :].reshape(*lead, -1).contiguous()
