"""Released checkpoints under other names compute the same: against networks written out in the released layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlt2i.rewards import releases
from rlt2i.rewards.aesthetic import load_head
from rlt2i.rewards.convert import collapse_linear, image_reward_to_transformers, open_clip_to_transformers


def fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


class Block(nn.Module):
    """open_clip's residual block."""

    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Stack(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(16))
        self.positional_embedding = nn.Parameter(torch.empty(5, 16))
        self.conv1 = nn.Conv2d(3, 16, 8, 8, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(16), nn.LayerNorm(16)
        self.transformer = Stack(16)
        self.proj = nn.Parameter(torch.empty(16, 6))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(20, 12)
        self.positional_embedding = nn.Parameter(torch.empty(7, 12))
        self.transformer = Stack(12)
        self.ln_final = nn.LayerNorm(12)
        self.text_projection = nn.Parameter(torch.empty(12, 6))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def text(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection


def test_an_open_clip_model_embeds_the_same_after_conversion():
    from transformers import CLIPConfig, CLIPModel

    theirs = OpenCLIP()
    fill(theirs)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu", "projection_dim": 6}
    text = {"hidden_size": 12, "intermediate_size": 24, "vocab_size": 20, "max_position_embeddings": 7}
    text |= {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    ours = CLIPModel(CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=6)).eval()
    ours.load_state_dict(open_clip_to_transformers(theirs.state_dict()))
    images, tokens = torch.randn(3, 3, 16, 16), torch.tensor([[1, 5, 19, 0, 0], [1, 4, 3, 7, 19], [1, 19, 0, 0, 0]])
    with torch.no_grad():
        output = ours(pixel_values=images, input_ids=tokens)
        for embeds, expected in (
            (output.image_embeds, theirs.visual(images)),
            (output.text_embeds, theirs.text(tokens)),
        ):
            torch.testing.assert_close(embeds, nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)


class ViTBlock(nn.Module):
    """BLIP's vision block, timm's names."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        joint = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*joint).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](attended)
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class VisualEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.empty(1, 5, 16))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 16, 8, 8)})
        self.blocks = nn.ModuleList(ViTBlock(16) for _ in range(2))
        self.norm = nn.LayerNorm(16, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def test_image_reward_splits_into_encoders_and_head():
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    visual = VisualEncoder()
    fill(visual)
    text_config = BlipTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, encoder_hidden_size=16,
        vocab_size=30, max_position_embeddings=9, is_decoder=True, bos_token_id=2, eos_token_id=3, sep_token_id=3,
    )  # fmt: skip
    text = BlipTextModel(text_config, add_pooling_layer=False)
    head = nn.Sequential(nn.Linear(8, 5), nn.Dropout(), nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 1)).eval()
    state = {f"blip.visual_encoder.{k}": v for k, v in visual.state_dict().items()}
    state |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}
    state |= {f"mlp.layers.{k}": v for k, v in head.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(9)
    vision_state, text_state, affine = image_reward_to_transformers(state)
    config = BlipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    ours = BlipVisionModel(config).eval()
    ours.load_state_dict(vision_state)
    text.load_state_dict(text_state)
    images, states = torch.randn(2, 3, 16, 16), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).last_hidden_state, visual(images), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states @ affine["weight"] + affine["bias"], head(states)[:, 0])


def test_a_stack_of_linear_layers_collapses_by_hand():
    # 3 (2 x + y + 1) - 4 = 6 x + 3 y - 1
    layers = {
        "0.weight": torch.tensor([[2.0, 1.0]]),
        "0.bias": torch.tensor([1.0]),
        "2.weight": torch.tensor([[3.0]]),
        "2.bias": torch.tensor([-4.0]),
    }
    affine = collapse_linear(layers)
    assert affine["weight"].tolist() == [6.0, 3.0]
    assert affine["bias"].item() == -1.0
    with pytest.raises(ValueError, match="2 outputs"):
        collapse_linear({"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)})


def test_the_command_writes_what_the_reward_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    head = nn.Sequential(nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 1)).eval()
    checkpoint = tmp_path / "head.pth"
    torch.save({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, checkpoint)
    monkeypatch.setenv("RLT2I_WEIGHTS", str(tmp_path / "weights"))
    name = "aesthetic_sac_logos_ava1_l14"
    releases.main([name, "--checkpoint", str(checkpoint)])
    weight, bias = load_head(name, "cpu")
    states = torch.randn(5, 6)
    torch.testing.assert_close(states @ weight + bias, head(states)[:, 0].detach())
    # Another file than the expected one is refused before it is read.
    with pytest.raises(ValueError, match="not used"):
        releases.main(["hpsv2", "--checkpoint", str(checkpoint), "--sha256", "0" * 64])
    assert not (tmp_path / "weights" / "hpsv2").exists()
