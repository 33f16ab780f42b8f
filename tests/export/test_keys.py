"""The names of other tools, held against the converters that diffusers has for files of those tools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlt2i.export.keys import KOHYA, published_modules, table_of
from rlt2i.export.lora import convert, pairs_of


def networks() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Name -> (a network without storage, layers to adapt): attention and feed-forward, wherever a tool names them.

    FLUX.1 has its real width, which the converters know by heart.
    """
    import diffusers as d

    joint = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj")
    joint += ("attn.add_v_proj", "attn.to_add_out")
    sd3 = d.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )  # fmt: skip
    flux = d.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=8, pooled_projection_dim=8,
    )  # fmt: skip
    flux2 = d.Flux2Transformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip
    qwen = d.QwenImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    zimage = d.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[2, 2, 4], axes_lens=[16, 16, 16],
    )  # fmt: skip
    ff = ("ff.net.0.proj", "ff.net.2")
    single = ("proj_mlp", "1.proj_out")
    return {
        "SD3": (sd3, (*joint, *ff, "attn2.to_q", "attn2.to_v", "attn2.to_out.0")),
        "FLUX.1": (flux, (*joint, *ff, "ff_context.net.0.proj", *single)),
        "FLUX.2": (flux2, (*joint, "ff.linear_in", "ff_context.linear_out", "attn.to_qkv_mlp_proj")),
        "Qwen-Image": (qwen, (*joint, "img_mlp.net.0.proj", "txt_mlp.net.2")),
        "Z-Image": (zimage, ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "w1", "w2")),
    }


@pytest.fixture(scope="module")
def adapted() -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """Name -> (network, the weights of an adapter of rank 2 in PEFT's names)."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        made = networks()
    for name, (network, targets) in made.items():
        weights = {}
        for key, module in network.named_modules():
            if key.endswith(tuple(f".{target}" for target in targets)) and isinstance(module, torch.nn.Linear):
                weights[f"{key}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
                weights[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
        found[name] = network, weights
    return found


def probe(size: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, size)


def deltas(weights: Any, prefix: str = "") -> dict[str, Tensor]:
    """Module -> what the adapter adds to its output for one input."""
    return {
        name.removeprefix(prefix): up @ (down @ probe(down.shape[1])) for name, (down, up) in pairs_of(weights).items()
    }


def through_lora(tensors: dict[str, Tensor], converter: str) -> dict[str, Tensor]:
    """What a loader of diffusers makes of the file."""
    from diffusers.loaders import lora_conversion_utils

    return deltas(getattr(lora_conversion_utils, converter)(dict(tensors)), "transformer.")


class Rest(dict):  # type: ignore[type-arg]
    """A checkpoint whose other entries are zeros."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, torch.zeros(6, 1))

    def __getitem__(self, key: str) -> Any:
        return super().get(key, torch.zeros(6, 1))


def through_checkpoint(tensors: dict[str, Tensor], converter: str) -> dict[str, Tensor]:
    """What diffusers' reader of published checkpoints makes of up @ down, added to a checkpoint of zeros."""
    from diffusers.loaders import single_file_utils

    added = {name: up @ down for name, (down, up) in pairs_of(tensors).items()}
    weights = Rest({f"{name.removeprefix('diffusion_model.')}.weight": delta for name, delta in added.items()})
    read = getattr(single_file_utils, converter)(weights)
    found = {key.removesuffix(".weight"): tensor for key, tensor in read.items() if key.endswith(".weight")}
    return {name: tensor @ probe(tensor.shape[1]) for name, tensor in found.items() if tensor.ndim == 2}


CASES = {
    ("SD3", "comfyui"): (through_checkpoint, "convert_sd3_transformer_checkpoint_to_diffusers"),
    ("FLUX.1", "kohya"): (through_lora, "_convert_kohya_flux_lora_to_diffusers"),
    ("FLUX.2", "comfyui"): (through_lora, "_convert_non_diffusers_flux2_lora_to_diffusers"),
    ("FLUX.2", "kohya"): (through_lora, "_convert_kohya_flux2_lora_to_diffusers"),
    ("Qwen-Image", "comfyui"): (through_lora, "_convert_non_diffusers_qwen_lora_to_diffusers"),
    ("Qwen-Image", "kohya"): (through_lora, "_convert_non_diffusers_qwen_lora_to_diffusers"),
    ("Z-Image", "comfyui"): (through_checkpoint, "convert_z_image_transformer_checkpoint_to_diffusers"),
    ("Z-Image", "kohya"): (through_lora, "_convert_non_diffusers_z_image_lora_to_diffusers"),
}


@pytest.mark.parametrize(("name", "tool"), CASES)
def test_every_key_arrives_and_does_what_it_did(name, tool, adapted):
    network, weights = adapted[name]
    converted = convert(weights, network, tool)
    assert converted.known == len(converted.modules)
    assert converted.summary() == f"{converted.known} of {converted.known} layers matched, 0 unmatched"
    reader, converter = CASES[name, tool]
    read, expected = reader(dict(converted.tensors), converter), deltas(weights)
    assert expected.keys() <= read.keys(), sorted(expected.keys() - read.keys())[:5]
    for module, delta in expected.items():
        torch.testing.assert_close(read[module], delta, atol=1e-4, rtol=1e-4, msg=lambda m, n=module: f"{n}: {m}")
    others = {module for module, delta in read.items() if module not in expected and delta.any()}
    assert not others


@pytest.mark.parametrize("name", ["SD3", "FLUX.1"])
def test_kohya_and_comfyui_have_the_same_layers(name, adapted):
    # sd-scripts' networks are the published ones as well; it asks for lora_down, lora_up and an alpha of every layer.
    network, weights = adapted[name]
    kohya, comfyui = convert(weights, network, "kohya"), convert(weights, network, "comfyui")
    for module in comfyui.modules:
        key = "lora_unet_" + module.replace(".", "_")
        down, up, alpha = (kohya.tensors[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert torch.equal(down, comfyui.tensors[f"diffusion_model.{module}.lora_A.weight"])
        assert torch.equal(up, comfyui.tensors[f"diffusion_model.{module}.lora_B.weight"])
        assert float(alpha) == down.shape[0]  # so that alpha / rank is one
    assert len(kohya.tensors) == 3 * len(comfyui.modules)
    first = {"SD3": "joint_blocks_0_x_block_attn_qkv", "FLUX.1": "double_blocks_0_img_attn_qkv"}[name]
    assert f"lora_unet_{first}.lora_down.weight" in kohya.tensors


def test_stacked_ranks_by_hand():
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = torch.nn.Linear(3, 2), torch.nn.Linear(3, 1)

    from rlt2i.export.lora import _stacked

    q = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    down, up = _stacked({"q": q}, ("q", "k"), Two())
    assert (up @ down).tolist() == [[3.0, 0.0, 6.0], [4.0, 0.0, 8.0], [0.0, 0.0, 0.0]]


def test_layers_and_networks_without_a_name_are_refused(adapted):
    network, weights = adapted["FLUX.1"]
    name = "norm_out.linear.lora_{}.weight"
    strange = {**weights, name.format("A"): torch.ones(2, 4), name.format("B"): torch.ones(4, 2)}
    with pytest.raises(ValueError, match=r"1 adapted layers have no name there, such as norm_out\.linear"):
        convert(strange, network, "comfyui")
    with pytest.raises(ValueError, match="names that comfyui gives to a Linear are not on record"):
        table_of("comfyui", torch.nn.Linear(1, 1))


def test_sd15_keeps_its_names_for_kohya():
    unet = type("UNet2DConditionModel", (torch.nn.Module,), {})()
    unet.mid = torch.nn.Linear(2, 2)
    assert published_modules(KOHYA["UNet2DConditionModel"], unet) == {"mid": ("mid",)}
