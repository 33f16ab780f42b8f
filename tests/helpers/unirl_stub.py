"""The signatures of unirl 0.2.0 that the bridge plugs into, for machines without it."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch


class FieldKind(enum.Enum):
    CONCAT = enum.auto()
    SHARED = enum.auto()


class Batch:
    """Rows that are cut along the first axis of every field of kind CONCAT."""

    @property
    def batch_size(self) -> int:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.metadata.get("kind") is FieldKind.CONCAT and value is not None:
                return value.batch_size if isinstance(value, Batch) else len(value)
        return 0

    def select(self, rows: torch.Tensor) -> Any:
        def cut(f: dataclasses.Field[Any]) -> Any:
            value = getattr(self, f.name)
            if value is None or f.metadata.get("kind") is not FieldKind.CONCAT:
                return value
            if isinstance(value, Batch):
                return value.select(rows)
            if isinstance(value, dict):
                return {name: part.select(rows) for name, part in value.items()}
            return value[rows] if isinstance(value, torch.Tensor) else [value[i] for i in rows.tolist()]

        return type(self)(**{f.name: cut(f) for f in dataclasses.fields(self)})  # type: ignore[arg-type]

    def slice(self, start: int, end: int) -> Any:
        return self.select(torch.arange(start, end))


ROWS = {"kind": FieldKind.CONCAT}


@dataclasses.dataclass
class LatentSegment(Batch):
    latents: torch.Tensor | None = dataclasses.field(default=None, metadata=ROWS)
    sigmas: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    sde_logp: torch.Tensor | None = dataclasses.field(default=None, metadata=ROWS)
    sde_indices: torch.Tensor | None = None
    log_probs: torch.Tensor | None = dataclasses.field(default=None, metadata=ROWS)


@dataclasses.dataclass
class Part(Batch):
    sample_ids: list[str] = dataclasses.field(default_factory=list, metadata=ROWS)
    segment: LatentSegment | None = dataclasses.field(default=None, metadata=ROWS)
    conditions: dict[str, Batch] = dataclasses.field(default_factory=dict, metadata=ROWS)
    rewards: torch.Tensor | None = dataclasses.field(default=None, metadata=ROWS)
    component_rewards: dict[str, torch.Tensor] | None = None
    advantages: torch.Tensor | None = dataclasses.field(default=None, metadata=ROWS)
    metadata: list[dict[str, Any]] = dataclasses.field(default_factory=list, metadata=ROWS)

    @property
    def group_ids(self) -> list[str]:
        return [name.rsplit("/", 1)[0] for name in self.sample_ids]


@dataclasses.dataclass
class TextEmbedCondition(Batch):
    embeds: torch.Tensor | None = dataclasses.field(default=None, metadata=ROWS)
    pooled: torch.Tensor | None = dataclasses.field(default=None, metadata=ROWS)


@dataclasses.dataclass
class SD3Conditions(Batch):
    text: TextEmbedCondition | None = dataclasses.field(default=None, metadata=ROWS)
    negative_text: TextEmbedCondition | None = dataclasses.field(default=None, metadata=ROWS)

    @classmethod
    def from_dict(cls, conditions: Mapping[str, Any]) -> SD3Conditions:
        return cls(**conditions)


@dataclasses.dataclass(frozen=True)
class AlgorithmStepResult:
    loss: float
    metrics: Mapping[str, Any]
    num_steps_or_tokens: int
    has_backward: bool


class StageAlgorithm:
    requires_ema_rollout = False
    supports_multi_update = False
    requires_backend = False
    requires_advantages = True
    recomputes_anchor = False
    anchor_fields: tuple[str, ...] = ()

    def prepare_segment(self, *, conditions: Any, segment: Any) -> None: ...

    def prepare_part(self, part: Any) -> Any:
        return part


@dataclasses.dataclass
class DiffusionSamplingParams:
    guidance_scale: float = 7.5
    eta: float = 1.0
    num_inference_steps: int = 50
    height: int = 256
    width: int = 256
    sde_indices: list[int] | None = None


def typed_conditions(conditions: Any, conditions_cls: Any) -> Any:
    return conditions if conditions_cls is None else conditions_cls.from_dict(dict(conditions))


@contextlib.contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    with model.disabled():
        yield


def install() -> None:
    """Put these signatures where `import unirl` finds them."""
    modules = {
        "unirl": {"__version__": "0.2.0"},
        "unirl.algorithms.base": {
            "StageAlgorithm": StageAlgorithm,
            "AlgorithmStepResult": AlgorithmStepResult,
            "typed_conditions": typed_conditions,
        },
        "unirl.distributed.tensor.batch": {"Batch": Batch, "FieldKind": FieldKind},
        "unirl.types.segments.latent": {"LatentSegment": LatentSegment},
        "unirl.types.sample": {"Part": Part},
        "unirl.types.conditions": {"TextEmbedCondition": TextEmbedCondition},
        "unirl.types.sampling": {"DiffusionSamplingParams": DiffusionSamplingParams},
        "unirl.models.sd3.conditions": {"SD3Conditions": SD3Conditions},
        "unirl.train.lora": {"adapters_disabled": adapters_disabled},
    }
    for name, names in modules.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            if package not in sys.modules:
                sys.modules[package] = types.ModuleType(package)
                sys.modules[package].__path__ = []  # type: ignore[attr-defined]
        vars(sys.modules[name]).update(names)
