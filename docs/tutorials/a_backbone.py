# %% [markdown]
# # A backbone
#
# A model that has a pipeline in diffusers takes about thirty lines: where its blocks are, its schedule, how it encodes text
# and how it predicts. Loading, adapters, exact attention maps, guidance, caches, decoding, export and cost are the kit's.
# Here: Lumina-Image 2, from a tiny pipeline of the real class with random weights.

# %%
import tempfile
from pathlib import Path
from typing import ClassVar

import attrs
import torch

from rlt2i import (
    SDE,
    Algorithm,
    ClippedSurrogate,
    GroupRelative,
    JPEGCompressibility,
    Product,
    Prompts,
    TextAttention,
)
from rlt2i.policies.pretrained import PretrainedPolicy, PretrainedSpec
from rlt2i.policies.tiny import save_tiny


# %%
@attrs.frozen(kw_only=True, eq=False)
class LuminaPolicy(PretrainedPolicy):
    order: ClassVar = "text_image"  # what a block attends to, in this order

    def blocks(self):  # in the order in which they run
        return list(self.network.layers)

    def sigmas(self, num_steps, size):
        return self.scheduler_sigmas(num_steps, mu=self.shift_of(self.latent_channels))

    def written(self, text):  # what the tokenizer reads, and where the prompt begins in it
        template = f"{self.pipe.system_prompt} <Prompt Start> "
        return template + text, len(template)

    def encode_text(self, text, *, negative):
        written = text if negative else self.written(text)[0]
        embeddings, mask = self.pipe._get_gemma_prompt_embeds(
            written, device=self.device, max_sequence_length=self.spec.max_sequence_length
        )
        return {"embeddings": embeddings[0], "mask": mask[0]}

    def text_end(self, conditioning):  # text tokens before the image, of each row
        return conditioning["mask"].sum(dim=1)

    def predict(self, latents, sigma, conditioning):
        text = {"encoder_hidden_states": conditioning["embeddings"], "encoder_attention_mask": conditioning["mask"]}
        return -self.network(hidden_states=latents, timestep=1 - sigma, return_dict=False, **text)[0]


@attrs.frozen(kw_only=True)
class Lumina(PretrainedSpec):
    max_sequence_length: int = 256
    pipeline: ClassVar = "Lumina2Pipeline"
    policy: ClassVar = LuminaPolicy

    def text_shapes(self):
        width = self.config("transformer")["cap_feat_dim"]
        return {"embeddings": (self.max_sequence_length, width), "mask": (self.max_sequence_length,)}


# %% [markdown]
# Is it right? The whole noise-free rollout must give the latents of the stock pipeline, from the same noise.

# %%
folder = save_tiny("Lumina2Pipeline", Path(tempfile.mkdtemp()))
spec = Lumina(path=str(folder), lora_rank=4)
policy = spec.load()
prompts = Prompts.of(["a red cat on a blue box"])
noise = torch.randn(1, *policy.latent_shape((32, 64)), generator=torch.Generator().manual_seed(0))
latents, sigmas = noise, policy.sigmas(4, (32, 64))
with torch.no_grad():
    conditioning = policy.encode(prompts)
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        latents = latents + (after - now) * policy.velocity(latents, now.expand(1), conditioning)

import diffusers

stock = diffusers.Lumina2Pipeline.from_pretrained(folder)
stock.set_progress_bar_config(disable=True)
theirs = stock(
    prompts.texts[0],
    latents=noise,
    height=32,
    width=64,
    num_inference_steps=4,
    guidance_scale=1.0,
    output_type="latent",
).images
print("largest difference to the stock pipeline:", float((latents - theirs).abs().max()))

# %% [markdown]
# Every credit works on it at once: maps come from the attention that the blocks compute anyway.

# %%
with torch.no_grad():
    velocity, captures = policy.velocity_with_captures(
        latents, sigmas[:1], conditioning, frozenset({"attention/image_to_text/all"})
    )
    assert torch.equal(velocity, policy.velocity(latents, sigmas[:1], conditioning))  # to be watched changes nothing
for name, value in captures.items():
    print(name, list(value.shape))

Algorithm(
    policy=spec,
    sampler=SDE(num_steps=4),
    reward=JPEGCompressibility(),
    credit=Product(advantage=GroupRelative(), allocations=(TextAttention(),)),
    objective=ClippedSurrogate(),
)
print("STAR fits")

# %% [markdown]
# `rlt2i check policy my_module:Lumina` runs the whole list of what a backbone must get right. The recipe names it as
# `policy: {type: "my_module:Lumina", path: ...}`.
