"""A tiny Stable Diffusion with random weights, in diffusers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlt2i.policies.tiny import save_tiny
from rlt2i.policies.tiny.pipelines import DDIM_SCHEDULE as SCHEDULE
from tests.policies.conftest import CLIP_LENGTH

__all__ = ["SCHEDULE", "save_pipeline", "stock_pipeline"]


def save_pipeline(folder: Path, **scheduler: Any) -> Path:
    """Write a pipeline directory; `scheduler` overrides fields of its DDIM scheduler."""
    return save_tiny("StableDiffusionPipeline", folder, clip_length=CLIP_LENGTH, **scheduler)


def stock_pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
