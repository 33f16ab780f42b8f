"""A Stable Diffusion 3 of two narrow blocks with random weights, and rollouts of it: what engines hand to a bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

import rlt2i
from rlt2i.functional.schedules import even_sigmas
from rlt2i.policies.attention.maps import Where
from rlt2i.policies.attention.recorder import recording
from rlt2i.policies.attention.watch import watch
from rlt2i.samplers.kernels import FlowSDE

TEXTS, GROUP = ("a red circle", "two blue squares"), 2
NUM, SIDE, CHANNELS = len(TEXTS) * GROUP, 8, 4
NUM_STEPS, SDE_STEPS = 4, [0, 2]
_TOKENIZER = Path(rlt2i.__file__).parent / "tasks" / "shapes" / "pipeline" / "tokenizer"


@attrs.frozen(eq=False)
class Tiny:
    """The network, CLIP's tokenizer, and embeddings of the prompts of NUM rollouts."""

    transformer: Any
    tokenizer: Any
    embeds: Tensor
    pooled: Tensor

    @classmethod
    def build(cls) -> Tiny:
        from diffusers import SD3Transformer2DModel
        from transformers import CLIPTokenizer

        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=SIDE, patch_size=2, in_channels=CHANNELS, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
            out_channels=CHANNELS, pos_embed_max_size=SIDE,
        ).eval()  # fmt: skip
        tokenizer = CLIPTokenizer.from_pretrained(_TOKENIZER)
        embeds = torch.randn(len(TEXTS), tokenizer.model_max_length, 16).repeat_interleave(GROUP, dim=0)
        return cls(transformer, tokenizer, 3 * embeds, torch.randn(len(TEXTS), 16).repeat_interleave(GROUP, dim=0))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.transformer.parameters())

    def velocity(self, states: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        return self.transformer(
            hidden_states=states, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=1000 * sigma,
            return_dict=False,
        )[0]  # fmt: skip

    def rollout(self, *, guidance: float = 1.0, sde: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """States [NUM, T+1, C, H, W], velocities [NUM, T, C, H, W] and sigmas of a Flow-SDE with noise 0.7."""
        sigmas, kernel, draw = even_sigmas(NUM_STEPS), FlowSDE(noise_level=0.7), torch.Generator().manual_seed(1)
        state = torch.randn(NUM, CHANNELS, SIDE, SIDE, generator=draw)
        states, velocities = [state], []
        with torch.no_grad():
            for t in range(NUM_STEPS):
                now, after = sigmas[t].expand(NUM), sigmas[t + 1].expand(NUM)
                velocity = self.velocity(state, now, self.embeds, self.pooled)
                if guidance != 1:
                    empty = self.velocity(state, now, torch.zeros_like(self.embeds), torch.zeros_like(self.pooled))
                    velocity = empty + guidance * (velocity - empty)
                if sde and t in SDE_STEPS:
                    step = kernel.transition(state, velocity, now, after, sigma_max=float(sigmas[1]))
                    state = step.mean + step.std * torch.randn(state.shape, generator=draw)
                else:
                    state = state + velocity * (after - now)[:, None, None, None]
                states.append(state)
                velocities.append(velocity)
        return torch.stack(states, dim=1), torch.stack(velocities, dim=1), sigmas

    def attention(self, states: Tensor, sigma: Tensor, name: str, tokens: Tensor, members: Tensor) -> Tensor:
        """The map of one pass, watched by hand."""
        attentions, grid = [block.attn for block in self.transformer.transformer_blocks], (SIDE // 2, SIDE // 2)
        where = Where(grid=grid, image=0, tokens=tokens + grid[0] * grid[1], members=members)
        watch(attentions, states.device, states.dtype)
        with torch.no_grad(), recording(frozenset({name}), num_blocks=2, where=where) as recorder:
            self.velocity(states, sigma, self.embeds, self.pooled)
        for attention in attentions:
            del attention.forward
        return recorder.captures()[name]

    def gradient(self) -> Tensor:
        """All gradients, flat; they are cleared."""
        flat = torch.cat([p.grad.flatten().clone() for p in self.parameters if p.grad is not None])
        self.transformer.zero_grad()
        return flat
