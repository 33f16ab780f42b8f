"""Encoded prompts, kept in memory and on disk, and text encoders that stay where memory allows."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.functional.transfer import to_device
from rlt2i.policies.pretrained.loading import quietly, read_text_encoder, without_warnings
from rlt2i.policies.pretrained.spec import PretrainedSpec

_CACHE_BYTES = 2 << 30

Encoded = Mapping[str, Tensor]
"""One prompt: name -> tensor without a batch axis."""

_PROBE = "\ue000"
"""A character of private use, which no template contains."""


def in_template(render: Callable[[str], str], text: str) -> tuple[str, int]:
    """What a template makes of a prompt, and where the prompt begins in it.

    Args:
        render: puts a prompt into the template; it may strip the blanks around it.
    """
    written, start = render(text), render(_PROBE).index(_PROBE)
    stripped = not written.startswith(text, start)
    return written, start - (len(text) - len(text.lstrip())) * stripped


@attrs.define(eq=False, kw_only=True)
class TextEncoding:
    """Encodes prompts one at a time, so an embedding never depends on which others shared its batch.

    A large encoder saturates the device on one prompt anyway.

    Attributes:
        spec: of the pipeline.
        pipe: the stock pipeline, which holds the encoders and tokenizers.
        device: of the result.
        names: of the components that are text encoders.
        folder: of the cache on disk, if any.
    """

    spec: PretrainedSpec
    pipe: Any
    device: torch.device
    names: tuple[str, ...] = attrs.field(init=False)
    folder: Path | None = attrs.field(init=False)
    _memory: OrderedDict[tuple[str, bool], Encoded] = attrs.field(factory=OrderedDict, init=False)
    _bytes: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        left_out = {self.spec.network, "vae"}
        modules = {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}
        self.names = tuple(name for name in modules if name not in left_out)
        for name in self.names:
            modules[name].eval().requires_grad_(False)
        self.folder = None
        if self.spec.text_cache is not None:
            self.folder = Path(self.spec.text_cache).expanduser() / fingerprint(self.spec)
            self.folder.mkdir(parents=True, exist_ok=True)
        self._leave()

    def encode(self, text: str, encode: Callable[..., Encoded], *, negative: bool = False) -> Encoded:
        """The encoded prompt, on the device; from a cache if one has it.

        Args:
            encode: the backbone's, called with the text and `negative`.
            negative: whether it is a negative prompt, which some pipelines treat differently.
        """
        key = (text, negative)
        if key in self._memory:
            self._memory.move_to_end(key)
            return {name: to_device(tensor, self.device) for name, tensor in self._memory[key].items()}
        encoded = self._from_disk(key)
        if encoded is None:
            self._arrive()
            try:
                with torch.no_grad(), without_warnings():
                    encoded = {name: tensor.detach() for name, tensor in encode(text, negative=negative).items()}
            finally:
                self._leave()
            self._to_disk(key, encoded)
        # Where encoders have to leave the device, memory is scarce there.
        stay = self.spec.text_encoders == "device"
        self._memory[key] = encoded if stay else {name: tensor.cpu() for name, tensor in encoded.items()}
        self._bytes += _size(encoded)
        while self._bytes > _CACHE_BYTES and len(self._memory) > 1:
            self._bytes -= _size(self._memory.popitem(last=False)[1])
        return encoded

    # ------------------------------------------------------------------------------------------------------- encoders

    def _arrive(self) -> None:
        """Bring the encoders to the device, reading them again if they were freed."""
        for name in self.names:
            if getattr(self.pipe, name) is None:
                with quietly():
                    setattr(self.pipe, name, read_text_encoder(self.spec, name))
            getattr(self.pipe, name).to(self.device)

    def _leave(self) -> None:
        """To where they stay between prompts."""
        for name in self.names:
            if self.spec.text_encoders == "disk":
                setattr(self.pipe, name, None)
            else:
                getattr(self.pipe, name).to(self.device if self.spec.text_encoders == "device" else "cpu")

    # ----------------------------------------------------------------------------------------------------------- disk

    def _file(self, key: tuple[str, bool]) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.safetensors"

    def _from_disk(self, key: tuple[str, bool]) -> Encoded | None:
        from safetensors.torch import load_file

        file = self._file(key)
        if file is None or not file.is_file():
            return None
        return load_file(file, device=str(self.device))

    def _to_disk(self, key: tuple[str, bool], encoded: Encoded) -> None:
        from safetensors.torch import save_file

        file = self._file(key)
        if file is not None:
            part = file.with_suffix(f".{os.getpid()}.part")  # several processes may write the same prompt
            save_file({name: tensor.cpu().contiguous() for name, tensor in encoded.items()}, part)
            part.replace(file)


def fingerprint(spec: PretrainedSpec) -> str:
    """A name for all that an embedding depends on besides the prompt: encoders, tokenizers, and the spec's options.

    Those are its precision and the fields that a backbone adds, such as the length of the text.
    """
    source = spec.source
    files: list[Any] = [source, spec.revision]
    if isinstance(source, Path):
        folders = [
            folder for folder in source.iterdir() if folder.name.startswith(("text_encoder", "tokenizer", "processor"))
        ]
        paths = sorted(file for folder in folders for file in folder.iterdir())
        files = [(str(file.relative_to(source)), file.stat().st_size, file.stat().st_mtime_ns) for file in paths]
    own = set(attrs.fields_dict(type(spec))) - set(attrs.fields_dict(PretrainedSpec)) | {"dtype"}  # type: ignore[type-abstract]
    options = {name: getattr(spec, name) for name in sorted(own)}
    return hashlib.sha256(json.dumps([spec.pipeline, files, options], default=str).encode()).hexdigest()


def _size(encoded: Encoded) -> int:
    return sum(tensor.nbytes for tensor in encoded.values())
