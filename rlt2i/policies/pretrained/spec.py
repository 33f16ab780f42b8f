"""The specification of a diffusers pipeline to train: everything that is known without its weights."""

from __future__ import annotations

import contextlib
import inspect
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import attrs
import torch
from attrs import validators

from rlt2i.captures import DIRECTIONS, NEGATIVE, Direction, attention_names, parse_attention_name
from rlt2i.config import neutral
from rlt2i.inputs.textfiles import user_path
from rlt2i.interfaces import Policy, PolicySpec
from rlt2i.policies.guidance import GuidanceForm, Guided, LinearGuidance
from rlt2i.types import ImageSize

Dtype = Literal["float32", "bfloat16"]
Residence = Literal["device", "cpu", "disk"]
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}
_TASKS = Path(__file__).resolve().parents[2] / "tasks"
_EMBEDDED = {f"embedded:{world}": _TASKS / world / "pipeline" for world in ("shapes", "cells")}


_LINEAR = LinearGuidance()
_WIDEST = 16384
"""Rank or scale of an adapter: wider than any layer of these networks."""


def _positive(instance: Any, attribute: Any, value: int | None) -> None:
    if value is not None and not 1 <= value <= _WIDEST:
        raise ValueError(
            f"{type(instance).__name__}({attribute.name}={value}): must lie from 1 to {_WIDEST}, or be None for no "
            "adapter."
        )


@attrs.frozen(kw_only=True)
class PretrainedSpec(PolicySpec):
    """A diffusers pipeline to train.

    Attributes:
        path: a pipeline directory, or a repository of the hub.
        revision: of the hub repository.
        lora_rank: rank of the adapter that learns; None trains the whole network.
        lora_alpha: scale of the adapter is alpha / rank; default `alpha_per_rank` * rank.
        lora_targets: layers that get an adapter.
        lora_seed: of the adapter's initial weights.
        guidance_scale: classifier-free guidance in rollout, replay, update *and* evaluation; 1 is none.
        guidance: the formula of guidance.
        negative_prompt: what guidance leads away from.
        uncond_grad: let gradients flow through the negative prompt's pass too.
        reuse_negative: where they do not, the first optimizer step on a rollout takes the negative prompt's velocities
            from the rollout instead of computing them again: a quarter of its work, for as much memory as the latents.
        dtype: of the frozen weights and the computation. What learns is always kept in float32.
        vae_dtype: of the autoencoder; default `dtype`.
        text_encoders: where they stay between prompts. "device" is fastest; "cpu" moves them to the device to encode
            and back; "disk" frees them and reads them again for a prompt that was not encoded yet.
        text_cache: directory in which encoded prompts are kept from run to run; None keeps them in memory alone.
        gradient_checkpointing: recompute each block in the backward pass; less memory, a third more work.
        compile: compile each block.

    Class attributes, what a backbone says:
        pipeline: name of its pipeline class in diffusers.
        policy: its policy class, a PretrainedPolicy.
        network: name of the component that learns.
        targets: default `lora_targets`.
        alpha_per_rank: default `lora_alpha` / `lora_rank`.
        directions: of its attention maps.
        known: hub repository -> JSON file of component configurations that the package ships.
        absent: what stands for a component, where a pipeline is built without one and asks it something.
        licences: hub repository -> the licence of its weights, and whether an account must accept it first ("gated").
    """

    path: str = attrs.field(validator=validators.min_len(1))
    revision: str | None = None
    lora_rank: int | None = attrs.field(default=None, validator=_positive)
    lora_alpha: int | None = attrs.field(default=None, validator=_positive)
    lora_targets: tuple[str, ...] = attrs.field(
        default=attrs.Factory(lambda self: type(self).targets, takes_self=True), converter=tuple
    )
    lora_seed: int = 0
    guidance_scale: float = attrs.field(default=1.0)
    guidance: GuidanceForm = neutral(_LINEAR)
    negative_prompt: str = neutral("")
    uncond_grad: bool = False
    reuse_negative: bool = neutral(True)
    dtype: Dtype = attrs.field(default="float32", validator=validators.in_(tuple(_DTYPES)))
    vae_dtype: Dtype | None = attrs.field(default=None, validator=validators.in_((None, *_DTYPES)))
    text_encoders: Residence = attrs.field(default="device", validator=validators.in_(get_args(Residence)))
    text_cache: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False

    pipeline: ClassVar[str]
    policy: ClassVar[Any]
    network: ClassVar[str] = "transformer"
    targets: ClassVar[tuple[str, ...]] = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    alpha_per_rank: ClassVar[int] = 1
    directions: ClassVar[tuple[Direction, ...]] = DIRECTIONS
    known: ClassVar[Mapping[str, Path]] = {}
    licences: ClassVar[Mapping[str, str]] = {}
    absent: ClassVar[Mapping[str, Any]] = {}

    @lora_alpha.validator
    def _check_alpha(self, _: Any, value: int | None) -> None:
        if value is not None and self.lora_rank is None:
            raise ValueError(
                f"{self._name}(lora_alpha={value}, lora_rank=None): without an adapter there is nothing to scale. "
                f"Set lora_rank, or drop lora_alpha to train the whole {self.network}."
            )

    @lora_targets.validator
    def _check_targets(self, _: Any, value: tuple[str, ...]) -> None:
        if not value or any(len(name) == 1 for name in value):
            raise ValueError(f"{self._name}(lora_targets={value}): name at least one layer, as a list of strings.")

    @guidance_scale.validator
    def _check_guidance(self, _: Any, value: float) -> None:
        if not 0 <= value < float("inf"):
            raise ValueError(
                f"{self._name}(guidance_scale={value}): use 1.0 for no guidance, 4.5 as published SD3.5 recipes do."
            )

    @property
    def _name(self) -> str:
        return type(self).__name__

    # ------------------------------------------------------------------------------------------- what a backbone says

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        """Watched blocks of the network, from its configuration alone."""
        return int(config["num_layers"])

    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what `encode_text` gives for the longest prompt, from configurations alone; "mask" is integer."""

    def components(self) -> dict[str, Any]:
        """Arguments of the pipeline's `from_pretrained`, such as the components that are left out."""
        return {}

    def drawing(self) -> dict[str, Any] | None:
        """Arguments with which the stock pipeline draws, without guidance, what this policy draws without guidance.

        None where the policy samples otherwise than its pipeline, by choice.
        """
        import diffusers

        if self.config("")["scheduler"][1] != "FlowMatchEulerDiscreteScheduler":
            return None  # another solver
        takes = inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters
        scale = "true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale"
        options = {scale: self.guidance.neutral, "use_resolution_binning": False}
        if hasattr(self, "max_sequence_length"):
            options["max_sequence_length"] = self.max_sequence_length
        return {name: value for name, value in options.items() if name in takes}

    def stock_call(self) -> dict[str, Any]:
        """Arguments of the stock pipeline's call that say what the fields of this spec say, guidance included."""
        import diffusers

        takes = inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters
        length = getattr(self, "max_sequence_length", None)
        options = {
            "true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale": float(self.guidance_scale),
            **({"negative_prompt": self.negative_prompt} if self.guided and self.negative_prompt else {}),
            **({} if length is None else {"max_sequence_length": length}),
        }
        return {name: value for name, value in options.items() if name in takes}

    def check(self) -> None:
        """Refuse, before any weight is read, a pipeline that this policy does not cover.

        Raises:
            ValueError: saying why, and what to use instead.
        """

    # ------------------------------------------------------------------------------------------------------- the rest

    @property
    def source(self) -> Path | str:
        """The pipeline directory, or the hub repository if there is no such directory.

        Raises:
            ValueError: when the path is meant to be local and is not there.
        """
        if self.path.startswith("embedded:") and self.path not in _EMBEDDED:
            raise ValueError(f"{self._name}(path={self.path!r}): the package contains {', '.join(_EMBEDDED)}.")
        folder = _EMBEDDED.get(self.path, user_path(self.path))
        if folder.is_dir():
            return folder
        if self.path in _EMBEDDED or folder.is_absolute() or self.path.startswith(".") or self.path.count("/") != 1:
            example = next(iter(self.known), "stabilityai/stable-diffusion-3.5-medium")
            raise ValueError(
                f"{self._name}(path={self.path!r}): {folder} is no directory. Give a pipeline directory (with "
                f"model_index.json) or a hub repository such as {example!r}."
            )
        return self.path

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of one component (or of the pipeline, ""), read without weights.

        Raises:
            ValueError: when the directory holds no such component.
        """
        known = json.loads(self.known[self.path].read_text()) if self.path in self.known else {}
        if component in known:
            return dict(known[component])
        name = {"": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}.get(
            component, f"{component}/config.json"
        )
        source = self.source
        if isinstance(source, str):
            from huggingface_hub import hf_hub_download

            with fetching(self):
                file = Path(hf_hub_download(source, name, revision=self.revision))
            return dict(json.loads(file.read_text()))
        if not (source / name).is_file():
            index = source / "model_index.json"
            kind = json.loads(index.read_text()).get("_class_name") if index.is_file() else None
            raise ValueError(
                f"{self._name}(path={self.path!r}): {source / name} is missing; this is no diffusers {self.pipeline}"
                f"{f', but a {kind}' if kind else ''}."
            )
        return dict(json.loads((source / name).read_text()))

    @property
    def offers(self) -> frozenset[str]:
        recorded = self.guided and self.reuse_negative and not self.uncond_grad
        return self.map_names | ({NEGATIVE} if recorded else frozenset())

    @property
    def map_names(self) -> frozenset[str]:
        """The attention maps that it can record."""
        names = attention_names(self.num_blocks(self.config(self.network)))
        return frozenset(name for name in names if parse_attention_name(name)[0] in self.directions)

    @property
    def text_tokens(self) -> int:
        """Length of the text sequence that the network attends to."""
        return self.text_shapes()["embeddings"][0]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of frozen weights and activations."""
        return _DTYPES[self.dtype]

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the network's weights: float32 if they learn themselves."""
        return torch.float32 if self.lora_rank is None else self.compute_dtype

    @property
    def image_dtype(self) -> torch.dtype:
        """Of the autoencoder."""
        return _DTYPES[self.vae_dtype or self.dtype]

    @property
    def guided(self) -> bool:
        """Whether there is a second pass for a negative prompt."""
        return self.guidance_scale != self.guidance.neutral

    def check_image_size(self, size: ImageSize) -> None:
        try:
            self.check()
            policy = self.policy.on_meta(self)
        except OSError:
            return  # configurations out of reach: loading will say so
        policy.token_grid(size)

    def load(self, device: torch.device | str = "cpu") -> Policy:
        policy: Policy = self.policy.load(self, torch.device(device))
        if not self.guided:
            return policy
        return Guided(
            policy=policy,
            scale=self.guidance_scale,
            form=self.guidance,
            negative_prompt=self.negative_prompt,
            uncond_grad=self.uncond_grad,
            reuse_negative=self.reuse_negative,
        )


@contextlib.contextmanager
def fetching(spec: PretrainedSpec) -> Iterator[None]:
    """Name the repository, and what to do without a network, where its files cannot be fetched.

    Raises:
        ValueError: naming the path, the reason and the way out.
    """
    try:
        yield
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not isinstance(spec.source, str):
            raise ValueError(
                f"{type(spec).__name__}(path={spec.path!r}): {reason} Weights are read from .safetensors alone, since "
                "pickled ones (.bin) can run any code; save the pipeline with safe_serialization=True."
            ) from error
        raise ValueError(
            f"{type(spec).__name__}(path={spec.path!r}): its files cannot be fetched ({reason}) Without a network, "
            f"fetch them where there is one (hf download {spec.path}) and set policy.path to the folder."
        ) from error
