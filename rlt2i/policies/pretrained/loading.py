"""Reading the components of a pipeline and preparing the network that learns."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from rlt2i.policies.lora import add_lora
from rlt2i.policies.pretrained.spec import PretrainedSpec, fetching

_GRAPH_LIMIT = 64
"""Blocks share one code object. Its variants x shapes x gradient modes exceed dynamo's default of 8 graphs."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Load weights without a progress bar for every component."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Keep the libraries from warning of every long prompt; a run and `rlt2i sample` say it once, with what is lost."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in levels:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)


_on_host: ContextVar[bool] = ContextVar("network on host", default=False)


@contextlib.contextmanager
def network_on_host() -> Iterator[None]:
    """Networks that are loaded within it stay on the CPU, for who cuts them before a device holds a part."""
    token = _on_host.set(True)
    try:
        yield
    finally:
        _on_host.reset(token)


def place(network: torch.nn.Module, device: torch.device) -> None:
    """Put a network where it computes."""
    if not _on_host.get():
        network.to(device)


def read_pipeline(spec: PretrainedSpec) -> Any:
    """The stock pipeline with all its components on the CPU, in their precision; only safetensors are read."""
    import diffusers

    source = {"pretrained_model_name_or_path": spec.source, "revision": spec.revision, "use_safetensors": True}
    with fetching(spec):
        network = _class(spec, spec.network).from_pretrained(**source, subfolder=spec.network, dtype=spec.weight_dtype)
        vae = _class(spec, "vae").from_pretrained(**source, subfolder="vae", dtype=spec.image_dtype)
        options = {**spec.components(), spec.network: network, "vae": vae, "dtype": spec.compute_dtype}
        return getattr(diffusers, spec.pipeline).from_pretrained(**source, **options)


def read_text_encoder(spec: PretrainedSpec, name: str) -> Any:
    """One text encoder on the CPU, for a pipeline that had to let it go."""
    import transformers

    source = {"pretrained_model_name_or_path": spec.source, "revision": spec.revision, "use_safetensors": True}
    kind = getattr(transformers, _kinds(spec)[name])
    return kind.from_pretrained(**source, subfolder=name, dtype=spec.compute_dtype).eval().requires_grad_(False)


def meta_pipeline(spec: PretrainedSpec) -> Any:
    """The pipeline with network and autoencoder on the meta device, where tensors have shapes but no storage."""
    import diffusers

    pipeline = getattr(diffusers, spec.pipeline)
    with torch.device("meta"):
        network = _class(spec, spec.network).from_config(spec.config(spec.network))
        vae = _class(spec, "vae").from_config(spec.config("vae"))
    cast(network, spec.weight_dtype)
    cast(vae, spec.image_dtype)
    parameters = list(inspect.signature(pipeline.__init__).parameters.values())[1:]
    absent = {each.name: None if each.default is each.empty else each.default for each in parameters}
    given = {key: value for key, value in spec.components().items() if key in absent}
    return pipeline(**(absent | dict(spec.absent) | given | {spec.network: network, "vae": vae}))


def meta_text_encoders(spec: PretrainedSpec) -> torch.nn.ModuleList:
    """The pipeline's text encoders on the meta device."""
    import transformers

    left_out = {name for name, value in spec.components().items() if value is None}
    encoders = []
    for name, kind in _kinds(spec).items():
        if name.startswith("text_encoder") and name not in left_out:
            encoder = getattr(transformers, kind)
            with torch.device("meta"):
                encoders.append(encoder(encoder.config_class(**spec.config(name))))
    return torch.nn.ModuleList(encoders).to(spec.compute_dtype)


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """In place, buffers too; parameters stay the same objects."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _kinds(spec: PretrainedSpec) -> dict[str, str]:
    """Component -> name of its class; the pipeline's index lists them as [library, class]."""
    pairs = {name: kind for name, kind in spec.config("").items() if isinstance(kind, list) and len(kind) == 2}
    return {name: kind for name, (_, kind) in pairs.items() if isinstance(kind, str)}


def _class(spec: PretrainedSpec, component: str) -> Any:
    import diffusers

    return getattr(diffusers, _kinds(spec)[component])


def prepare(spec: PretrainedSpec, network: Any, vae: Any) -> None:
    """Decide, in place, what learns and how."""
    network.eval().requires_grad_(spec.lora_rank is None)
    vae.eval().requires_grad_(False)
    if spec.lora_rank is not None:
        alpha = spec.lora_alpha or spec.alpha_per_rank * spec.lora_rank
        add_lora(network, rank=spec.lora_rank, alpha=alpha, targets=spec.lora_targets, seed=spec.lora_seed)
    if spec.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if getattr(vae, "_supports_gradient_checkpointing", False):
        vae.enable_gradient_checkpointing()  # only where a reward's gradient asks for it; nothing here is larger


def compile_blocks(blocks: Iterable[torch.nn.Module]) -> None:
    """Compile each block in place, whole; fullgraph, so that a graph break is an error and not a slow surprise."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPH_LIMIT)
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
