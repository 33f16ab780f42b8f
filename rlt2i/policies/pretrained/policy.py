"""A loaded pipeline as a policy: encoding, velocity, captures, decoding and export are the same for every backbone."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import attrs
import torch
from torch import Tensor

from rlt2i.functional.transfer import on_both, on_host
from rlt2i.interfaces import Policy
from rlt2i.policies.attention.maps import Where
from rlt2i.policies.attention.recorder import recording
from rlt2i.policies.attention.watch import watch
from rlt2i.policies.lora import merged
from rlt2i.policies.pretrained import autoencoder
from rlt2i.policies.pretrained.export import export_adapter, export_network
from rlt2i.policies.pretrained.loading import compile_blocks, meta_pipeline, place, prepare, quietly, read_pipeline
from rlt2i.policies.pretrained.schedule import scheduler_levels, shift_of
from rlt2i.policies.pretrained.spec import PretrainedSpec
from rlt2i.policies.pretrained.text import TextEncoding
from rlt2i.policies.token_spans import Characters, character_ranges, find_spans, span_tensors
from rlt2i.types import Conditioning, ImageSize, Prompts, TokenSpan, height_and_width

Order = Literal["text_image", "image_text", "cross"]
_TOKENS, _MEMBERS, _MASK = "core_tokens", "core_members", "mask"


@attrs.frozen(kw_only=True, eq=False)
class PretrainedPolicy(Policy):
    """A loaded diffusers pipeline: the conditional velocity, without guidance.

    Attributes:
        spec: how it was loaded.
        pipe: the stock pipeline. Only its network learns; no component is ever in training mode.
        text: its encoders and what they have encoded.
        device: of everything.

    Class attributes, what a backbone says:
        attention: name of the watched attention in a block.
        patch: latents per side of an image token.
        order: what a block attends to: text before image, image before text, or text from the image ("cross").
        tokenizer: component whose tokens the image attends to: a tokenizer, or a processor that has one.
        padded: whether that component pads prompts to `text_length`, on the side that its tokenizer says.
    """

    spec: PretrainedSpec
    pipe: Any
    text: TextEncoding
    device: torch.device

    attention: ClassVar[str] = "attn"
    patch: ClassVar[int] = 2
    order: ClassVar[Order] = "text_image"
    tokenizer: ClassVar[str] = "tokenizer"
    padded: ClassVar[bool] = False

    @classmethod
    def load(cls, spec: PretrainedSpec, device: torch.device) -> Self:
        """Read the weights that the spec names."""
        spec.check()
        with quietly():
            pipe = read_pipeline(spec)
        network, vae = getattr(pipe, spec.network), pipe.vae
        prepare(spec, network, vae)
        place(network, device)
        flat = all(weight.ndim < 5 for weight in vae.parameters())  # Qwen-Image's convolutions have a time axis
        fast = flat and spec.image_dtype == torch.bfloat16
        vae.to(device, memory_format=torch.channels_last if fast else torch.preserve_format)
        policy = cls(spec=spec, pipe=pipe, text=TextEncoding(spec=spec, pipe=pipe, device=device), device=device)
        watch(policy.attentions(), device, spec.compute_dtype)
        if spec.compile:
            compile_blocks(policy.blocks())
        return policy

    @classmethod
    def on_meta(cls, spec: PretrainedSpec) -> Self:
        """The policy on the meta device, prepared as for training, without text; reads configurations alone."""
        spec = attrs.evolve(spec, text_cache=None)
        pipe, device = meta_pipeline(spec), torch.device("meta")
        prepare(spec, getattr(pipe, spec.network), pipe.vae)
        policy = cls(spec=spec, pipe=pipe, text=TextEncoding(spec=spec, pipe=pipe, device=device), device=device)
        watch(policy.attentions(), device, spec.compute_dtype)
        return policy

    # ------------------------------------------------------------------------------------------- what a backbone says

    @abstractmethod
    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        """One prompt, as its stock pipeline encodes it: tensors without a batch axis, "embeddings" [L, D] among them.

        Prompts of different lengths are padded at their end with zeros; `text_mask` tells where.

        Args:
            negative: whether it is a negative prompt; some pipelines wrap only positive ones into a template.
        """

    @abstractmethod
    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """[N, C, H, W] the velocity that the network predicts, with its sign, its time and its packing.

        Args:
            latents: [N, C, H, W] in the precision of the computation.
            sigma: [N] float32.
        """

    def units(self) -> list[torch.nn.Module]:
        """What is gathered at once where the network is sharded, the inner before the outer: what diffusers says is
        never split, else the blocks."""
        names = set(getattr(self.network, "_no_split_modules", None) or ())
        kept_whole = [module for module in self.network.modules() if type(module).__name__ in names]
        return kept_whole[::-1] or list(self.blocks())

    def blocks(self) -> Sequence[torch.nn.Module]:
        """The blocks whose attention between image and text can be watched, in the order in which they run."""
        return [*self.network.transformer_blocks, *getattr(self.network, "single_transformer_blocks", ())]

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        """[T + 1] the pipeline's levels, shifted by the number of image tokens as FLUX.1's are."""
        h, w = self.token_grid(size)
        return self.scheduler_sigmas(num_steps, mu=self.shift_of(h * w))

    def attentions(self) -> list[torch.nn.Module]:
        """The watched attention of each block."""
        return [getattr(block, self.attention) for block in self.blocks()]

    @property
    def granularity(self) -> int:
        """Sides of an image are multiples of so many pixels."""
        return self.patch * self.pixels_per_latent

    @property
    def largest(self) -> int | None:
        """Longest side in pixels, if the network has a limit."""
        return None

    @property
    def pixels_per_latent(self) -> int:
        """The autoencoder's reduction of a side."""
        return int(self.pipe.vae_scale_factor)

    @property
    def latent_channels(self) -> int:
        """Of the latents that a rollout holds."""
        return int(self.network.config.in_channels)

    @property
    def text_length(self) -> int:
        """Longest prompt in tokens, special tokens included."""
        return int(self.spec.max_sequence_length)  # type: ignore[attr-defined]

    def written(self, text: str) -> tuple[str, int]:
        """What the pipeline's tokenizer reads for a prompt, templates included, and where the prompt begins in it."""
        return text, 0

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[Characters]]]:
        """Text stream -> (where it starts among the text tokens, characters of the prompt behind each token)."""
        written, start = self.written(text)
        component = getattr(self.pipe, self.tokenizer)
        tokenizer = getattr(component, "tokenizer", component)
        first = getattr(tokenizer, "bos_token", None)
        special = not (start and first and written.startswith(first))  # else the template has written it
        ranges = character_ranges(tokenizer, written, self.text_length, padded=self.padded, special=special)
        clipped = [(max(a - start, 0), min(b - start, len(text))) for a, b in ranges]
        return {"text": (0, [(a, b) if a < b else (0, 0) for a, b in clipped])}

    def text_end(self, conditioning: Conditioning) -> int | Tensor:
        """Text tokens before the image, where text comes first: one number, or [N] where rows differ."""
        return conditioning["embeddings"].shape[1]

    def image_length(self, grid: tuple[int, int]) -> int:
        """Image tokens before the text, where the image comes first, padding included."""
        return grid[0] * grid[1]

    def where(self, latents: Tensor, conditioning: Conditioning) -> Where:
        """Where image and words are in what a block attends to."""
        grid = (latents.shape[-2] // self.patch, latents.shape[-1] // self.patch)
        tokens, members = conditioning[_TOKENS], conditioning[_MEMBERS]
        if self.order == "image_text":
            tokens = tokens + self.image_length(grid)
        start = self.text_end(conditioning) if self.order == "text_image" else 0
        return Where(grid=grid, image=start, tokens=tokens, members=members, joint=self.order != "cross")

    # -------------------------------------------------------------------------------------------- offered to a backbone

    def scheduler_sigmas(
        self, num_steps: int, *, mu: float | None = None, levels: Sequence[float] | None = None
    ) -> Tensor:
        """[T + 1] the levels of the pipeline's own scheduler; with `mu` as pipelines with a shift by size ask it.

        Args:
            levels: before the shift, without the last; evenly many by default.
        """
        return scheduler_levels(self.pipe.scheduler, num_steps, mu=mu, levels=levels, path=self.spec.path)

    def text_mask(self, conditioning: Conditioning) -> Tensor | None:
        """[N, L] bool, the tokens of the text that are no padding; None where nothing is padded."""
        return conditioning[_MASK] if _MASK in conditioning.tensors else None

    def text_rows(self, conditioning: Conditioning) -> list[Tensor]:
        """The embeddings of each rollout at their own length, for a network that takes a list."""
        rows = zip(conditioning["embeddings"], self.text_lengths(conditioning), strict=True)
        return [row[:length] for row, length in rows]

    def text_lengths(self, conditioning: Conditioning) -> list[int]:
        """The tokens of each rollout's text that are no padding."""
        if _MASK not in conditioning.tensors:
            return [conditioning.tensors["embeddings"].shape[1]] * len(conditioning)
        lengths = on_host(conditioning.tensors[_MASK]).sum(dim=1)
        return list(lengths[on_host(conditioning.rows)].tolist())

    def shift_of(self, num_tokens: int) -> float:
        """mu, the logarithm of the schedule's shift: linear in the number of image tokens (FLUX.1)."""
        return shift_of(self.pipe.scheduler, num_tokens)

    # ------------------------------------------------------------------------------------------------------- geometry

    @property
    def network(self) -> Any:
        """The network that learns."""
        return getattr(self.pipe, self.spec.network)

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.pipe.vae

    @property
    def offers(self) -> frozenset[str]:
        return self.spec.map_names

    def latent_shape(self, size: ImageSize) -> tuple[int, int, int]:
        h, w = self.token_grid(size)
        return self.latent_channels, h * self.patch, w * self.patch

    def token_grid(self, size: ImageSize) -> tuple[int, int]:
        height, width = height_and_width(size)
        step, largest = self.granularity, self.largest
        for side in (height, width):
            if side < 1 or side % step or (largest is not None and side > largest):
                at_most = "" if largest is None else f", at most {largest}"
                near = [max(step, min(round(s / step) * step, largest or s + step)) for s in (height, width)]
                raise ValueError(
                    f"size={size}: this model needs a multiple of {step}{at_most} in height and width. "
                    f"The nearest that works is {near[0]} x {near[1]}."
                )
        cell = self.patch * self.pixels_per_latent
        return height // cell, width // cell

    # ----------------------------------------------------------------------------------------------------------- text

    def encode(self, prompts: Prompts) -> Conditioning:
        return self._encode(prompts, ())

    def encode_with_negative(self, prompts: Prompts, negative: str) -> Conditioning:
        return self._encode(prompts, (negative,))

    def _encode(self, prompts: Prompts, negatives: tuple[str, ...]) -> Conditioning:
        """Rows of the prompts, then of the negative prompts, which have no phrases to look for."""
        rows = [self.text.encode(text, self.encode_text) for text in prompts.texts]
        rows += [self.text.encode(text, self.encode_text, negative=True) for text in negatives]
        spans: list[tuple[TokenSpan, ...]] = []
        for text, core in zip(prompts.texts, prompts.core, strict=True):
            streams = self.text_streams(text)
            ranges = {name: characters for name, (_, characters) in streams.items()}
            spans.append(find_spans(text, core, ranges, {name: start for name, (start, _) in streams.items()}))
        spans += [()] * len(negatives)
        tokens, members = span_tensors(spans, self.device)
        tensors = {name: _stack([row[name] for row in rows]) for name in rows[0]}
        lengths = {len(row["embeddings"]) for row in rows}
        if _MASK not in tensors and len(lengths) > 1:
            ones = [torch.ones(len(row["embeddings"]), dtype=torch.bool) for row in rows]
            tensors[_MASK] = on_both(_stack(ones), self.device)
        prompt_of_rollout = on_both(torch.arange(len(prompts.texts)).repeat_interleave(prompts.group_size), self.device)
        return Conditioning(
            tensors={**tensors, _TOKENS: tokens, _MEMBERS: members}, rows=prompt_of_rollout, token_spans=tuple(spans)
        )

    # ------------------------------------------------------------------------------------------------------- velocity

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with self.precision():
            return self.predict(latents.to(self.spec.compute_dtype), sigma, conditioning).float()

    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.spec.compile and torch.is_grad_enabled():
            # A compiled graph with gradient does not report its attention; watch a pass without gradient instead.
            with torch.no_grad():
                captures = self.velocity_with_captures(latents, sigma, conditioning, names)[1]
            return self.velocity(latents, sigma, conditioning), captures
        where = self.where(latents, conditioning)
        with recording(names, num_blocks=len(self.blocks()), where=where) as recorder:
            velocity = self.velocity(latents, sigma, conditioning)
        return velocity, recorder.captures()

    def merged(self) -> contextlib.AbstractContextManager[None]:
        return merged(self.network) if self.spec.lora_rank is not None else contextlib.nullcontext()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Of the network's arithmetic."""
        if self.spec.weight_dtype == self.spec.compute_dtype or self.device.type == "meta":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.spec.compute_dtype)  # float32 masters, bf16 arithmetic

    # --------------------------------------------------------------------------------------------------------- images

    def decode(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self.vae, latents)

    def encode_images(self, images: Tensor) -> Tensor:
        """The mean of the autoencoder's posterior, never a draw from it."""
        return autoencoder.encode(self.vae, images)

    # ------------------------------------------------------------------------------------------------------ parameters

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def export(self, folder: Path) -> None:
        """A LoRA file for `load_lora_weights`, or the network (with the rest of a pipeline that is a directory)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.spec.lora_rank is not None:
            export_adapter(self.spec, self.pipe, folder)
        else:
            export_network(self.spec, self.pipe, folder)

    def export_merged(self, folder: Path) -> None:
        """The network with its adapter merged into the weights (with the rest of a pipeline that is a directory)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        export_network(self.spec, self.pipe, folder)


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """[P, ...]; texts of different lengths are padded at their end, with zeros, which a mask must hide."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
