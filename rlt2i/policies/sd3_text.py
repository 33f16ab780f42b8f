"""Stable Diffusion 3's text encoders, with the conventions of diffusers' `encode_prompt`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.policies.token_spans import Characters, character_ranges, find_spans
from rlt2i.types import TokenSpan

_CACHE_BYTES = 2 << 30


@attrs.frozen(eq=False)
class EncodedPrompt:
    """One prompt: embeddings [L, D], pooled [D'] and the characters behind the tokens of each stream."""

    embeddings: Tensor
    pooled: Tensor
    streams: dict[str, list[Characters]]


@attrs.define(eq=False, kw_only=True)
class TextEncoders:
    """CLIP-L and CLIP-G side by side on the feature axis, T5 (if there is one) behind them on the token axis.

    Prompts are encoded one at a time, so an embedding never depends on which others shared its batch; a large encoder
    saturates the device on one prompt anyway. Embeddings are cached by text.

    Attributes:
        clip_tokenizers, clip_encoders: two of each.
        t5_tokenizer, t5_encoder: both or none.
        joint_dim: width to which the CLIP embeddings are padded.
        t5_length: tokens of the T5 stream, padding included.
        zero_tokens: zero vectors that stand in for a missing T5.
    """

    clip_tokenizers: tuple[Any, Any]
    clip_encoders: tuple[Any, Any]
    t5_tokenizer: Any
    t5_encoder: Any
    joint_dim: int
    t5_length: int
    zero_tokens: int
    dtype: torch.dtype
    device: torch.device
    _cache: OrderedDict[str, EncodedPrompt] = attrs.field(factory=OrderedDict, init=False)

    @property
    def clip_length(self) -> int:
        return int(self.clip_tokenizers[0].model_max_length)

    def encode(self, text: str) -> EncodedPrompt:
        """Embeddings of one prompt, on the device, from the cache if it has them."""
        if text in self._cache:
            self._cache.move_to_end(text)
            return self._cache[text]
        encoded = self._encode(text)
        self._cache[text] = encoded
        row_bytes = encoded.embeddings.nbytes + encoded.pooled.nbytes
        while len(self._cache) * row_bytes > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return encoded

    def spans(self, text: str, core: tuple[str, ...]) -> tuple[TokenSpan, ...]:
        """Where the core phrases of one prompt sit in the joint text sequence."""
        starts = {"clip": 0, "t5": self.clip_length}
        return find_spans(text, core, self.encode(text).streams, starts)

    @torch.no_grad()
    def _encode(self, text: str) -> EncodedPrompt:
        hidden, pooled = [], []
        for tokenizer, encoder in zip(self.clip_tokenizers, self.clip_encoders, strict=True):
            output = encoder(self._ids(tokenizer, text, self.clip_length), output_hidden_states=True)
            hidden.append(output.hidden_states[-2].to(self.dtype))
            pooled.append(output[0].to(self.dtype))
        clip = torch.cat(hidden, dim=-1)
        embeddings = torch.nn.functional.pad(clip, (0, self.joint_dim - clip.shape[-1]))
        # Both CLIP tokenizers share vocabulary and merges, so one of them gives the positions.
        streams = {"clip": character_ranges(self.clip_tokenizers[0], text, self.clip_length)}
        if self.t5_encoder is not None:
            t5 = self.t5_encoder(self._ids(self.t5_tokenizer, text, self.t5_length))[0].to(self.dtype)
            embeddings = torch.cat([embeddings, t5], dim=1)
            streams["t5"] = character_ranges(self.t5_tokenizer, text, self.t5_length)
        elif self.zero_tokens:
            embeddings = torch.nn.functional.pad(embeddings, (0, 0, 0, self.zero_tokens))
        return EncodedPrompt(embeddings[0], torch.cat(pooled, dim=-1)[0], streams)

    def _ids(self, tokenizer: Any, text: str, length: int) -> Tensor:
        padded = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return padded.input_ids.to(self.device)
