"""GenEval's detector: sizes and boxes by hand, post-processing pixel by pixel, the conversion of every parameter."""

from __future__ import annotations

import math

import torch
from torch import nn

from rlt2i.rewards import mask2former as m
from rlt2i.rewards.mask2former import MEAN, PAD_VALUE, STD


def test_sizes_by_hand():
    assert m.fitted_size(512, 512) == (800, 800)
    assert m.fitted_size(1024, 1024) == (800, 800)
    assert m.fitted_size(480, 640) == (800, 1067)  # 800 / 480
    assert m.fitted_size(200, 1000) == (267, 1333)  # 1333 / 1000


def test_the_input_is_resized_padded_with_grey_and_normalised():
    images = torch.full((2, 3, 24, 40), 200, dtype=torch.uint8)
    pixels = m.network_input(images)
    assert pixels.shape == (2, 3, 800, 1344)  # 800 x 1333, padded to a multiple of 32
    for channel in range(3):
        inside = (200 - MEAN[channel]) / STD[channel]
        outside = (PAD_VALUE - MEAN[channel]) / STD[channel]
        assert torch.allclose(pixels[:, channel, :, :1333], torch.tensor(inside), atol=1e-5)
        assert torch.allclose(pixels[:, channel, :, 1333:], torch.tensor(outside), atol=1e-5)


def test_boxes_are_tight_and_an_empty_mask_has_none():
    masks = torch.zeros(3, 5, 6, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 4, 0] = True
    assert m.mask_boxes(masks).tolist() == [[2, 1, 6, 3], [0, 4, 1, 5], [0, 0, 0, 0]]


def test_post_processing_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    classes = 3 * torch.randn(5, 4, generator=generator)
    logits = torch.randn(5, 8, 8, generator=generator)
    logits[4] = -1.0  # an empty mask
    found = m.instances(classes, logits, padded=(8, 8), resized=(8, 8), original=(8, 8))
    expected = []
    for query in range(5):
        total = sum(math.exp(value) for value in classes[query].tolist())
        inside = [(y, x) for y in range(8) for x in range(8) if logits[query, y, x] > 0]
        certainty = sum(1 / (1 + math.exp(-float(logits[query, y, x]))) for y, x in inside) / max(len(inside), 1)
        for label in range(3):
            confidence = math.exp(float(classes[query, label])) / total
            box = [0, 0, 0, 0]
            if inside:
                ys, xs = zip(*inside, strict=True)
                box = [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
            expected.append((confidence, confidence * certainty, label, box, len(inside)))
    expected.sort(reverse=True)
    assert found.labels.tolist() == [label for _, _, label, _, _ in expected]
    torch.testing.assert_close(found.scores, torch.tensor([score for _, score, *_ in expected]), atol=1e-5, rtol=0)
    assert found.boxes.tolist() == [box for *_, box, _ in expected]
    assert found.masks.flatten(1).sum(1).tolist() == [size for *_, size in expected]
    assert found.above(0.2).scores.tolist() == [s for s in found.scores.tolist() if s > 0.2]


def test_masks_come_back_to_the_image_without_the_padding():
    # Left half of the valid 64 x 48 part, at a quarter of the padded 64 x 64 input; the image is 32 x 24.
    logits = torch.full((1, 16, 16), -9.0)
    logits[0, :, :6] = 9.0
    found = m.instances(torch.tensor([[5.0, 0.0]]), logits, padded=(64, 64), resized=(64, 48), original=(32, 24))
    assert found.boxes.tolist() == [[0, 0, 12, 32]]


def mmdet_names() -> dict[str, tuple[int, ...]]:
    """Names of the official checkpoint (mmdetection 2.x) with small shapes that keep what conversion looks at."""
    small, both = (4,), ("weight", "bias")
    names: dict[str, tuple[int, ...]] = {}

    def add(prefix: str, parts: tuple[str, ...] = both) -> None:
        names.update({f"{prefix}.{part}": small for part in parts})

    add("backbone.patch_embed.projection")
    add("backbone.patch_embed.norm")
    for stage, depth in enumerate((2, 2, 18, 2)):
        for block in range(depth):
            here = f"backbone.stages.{stage}.blocks.{block}"
            for layer in ("norm1", "norm2", "attn.w_msa.proj", "ffn.layers.0.0", "ffn.layers.1"):
                add(f"{here}.{layer}")
            names |= {f"{here}.attn.w_msa.qkv.weight": (12, 4), f"{here}.attn.w_msa.qkv.bias": (12,)}
            add(f"{here}.attn.w_msa", ("relative_position_bias_table", "relative_position_index"))
        add(f"backbone.norm{stage}")
        if stage < 3:
            merge = f"backbone.stages.{stage}.downsample"
            names |= {f"{merge}.reduction.weight": (6, 16), f"{merge}.norm.weight": (16,), f"{merge}.norm.bias": (16,)}
    pixel = "panoptic_head.pixel_decoder"
    for level in range(3):
        add(f"{pixel}.input_convs.{level}.conv")
        add(f"{pixel}.input_convs.{level}.gn")
    for layer in range(6):
        here = f"{pixel}.encoder.layers.{layer}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            add(f"{here}.attentions.0.{part}")
        for part in ("norms.0", "norms.1", "ffns.0.layers.0.0", "ffns.0.layers.1"):
            add(f"{here}.{part}")
    for part in ("lateral_convs.0.conv", "output_convs.0.conv", "level_encoding"):
        add(f"{pixel}.{part}", ("weight",))
    for part in ("lateral_convs.0.gn", "output_convs.0.gn", "mask_feature"):
        add(f"{pixel}.{part}")
    head = "panoptic_head"
    for layer in range(9):
        here = f"{head}.transformer_decoder.layers.{layer}"
        for attention in (0, 1):
            there = f"{here}.attentions.{attention}.attn"
            names |= {f"{there}.in_proj_weight": (12, 4), f"{there}.in_proj_bias": (12,)}
            add(f"{there}.out_proj")
        for part in ("norms.0", "norms.1", "norms.2", "ffns.0.layers.0.0", "ffns.0.layers.1"):
            add(f"{here}.{part}")
    add(f"{head}.transformer_decoder.post_norm")
    for part in ("query_embed", "query_feat", "level_embed"):
        add(f"{head}.{part}", ("weight",))
    add(f"{head}.cls_embed")
    for layer in (0, 2, 4):
        add(f"{head}.mask_embed.{layer}")
    return names


def test_every_parameter_of_the_official_checkpoint_finds_its_place():
    official = {name: torch.randn(shape) for name, shape in mmdet_names().items()}
    converted = m.convert(official)
    with torch.device("meta"):
        wanted = set(m.detector_class()(m.official_config()).state_dict())
    assert set(converted) <= wanted
    assert {name for name in wanted - set(converted) if "swin.layernorm." not in name} == set()


def test_joint_projections_are_split_in_order():
    name = "panoptic_head.transformer_decoder.layers.3.attentions.1.attn.in_proj_bias"
    converted = m.convert({name: torch.arange(6.0)})
    layer = "model.transformer_module.decoder.layers.3.self_attn"
    assert {k: v.tolist() for k, v in converted.items()} == {
        f"{layer}.q_proj.bias": [0.0, 1.0],
        f"{layer}.k_proj.bias": [2.0, 3.0],
        f"{layer}.v_proj.bias": [4.0, 5.0],
    }
    # Cross-attention stays joint in transformers.
    assert list(m.convert({name.replace("attentions.1", "attentions.0"): torch.arange(6.0)})) == [
        "model.transformer_module.decoder.layers.3.cross_attn.in_proj_bias"
    ]


def test_patch_merging_computes_the_same_in_both_orders_of_channels():
    generator = torch.Generator().manual_seed(0)
    channels, height, width = 3, 4, 6
    weight = torch.randn(5, 4 * channels, generator=generator)
    gain, shift = torch.randn(2, 4 * channels, generator=generator)
    image = torch.randn(1, channels, height, width, generator=generator)
    # mmdetection: nn.Unfold, LayerNorm, Linear.
    unfolded = nn.functional.unfold(image, 2, stride=2).transpose(1, 2)
    theirs = nn.functional.layer_norm(unfolded, (12,), gain, shift) @ weight.T
    # Swin as transformers has it: the four corners of each patch, column by column.
    grid = image.permute(0, 2, 3, 1)
    corners = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    merged = torch.cat(corners, dim=-1).reshape(1, -1, 12)
    name = "backbone.stages.0.downsample"
    state = m.convert({f"{name}.reduction.weight": weight, f"{name}.norm.weight": gain, f"{name}.norm.bias": shift})
    ours_weight, ours_gain, ours_shift = state.values()
    ours = nn.functional.layer_norm(merged, (12,), ours_gain, ours_shift) @ ours_weight.T
    torch.testing.assert_close(ours, theirs)
