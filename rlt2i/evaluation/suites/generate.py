"""The first stage of an evaluation: draw what is missing, and keep it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import attrs
from torch import Tensor

from rlt2i.evaluation.draw import Draw
from rlt2i.evaluation.health import MEASURES
from rlt2i.evaluation.suites.folder import Folder, PartWriter
from rlt2i.evaluation.suites.suite import Drawing
from rlt2i.interfaces import Policy
from rlt2i.tasks.base import as_prompts


def draw_images(draw: Draw, policy: Policy, drawings: Sequence[Drawing]) -> Tensor:
    """[N, 3, H, W] uint8 of drawings, whose index is that of the image among those of its prompt."""
    prompts = as_prompts([d.prompt for d in drawings], group_size=1)
    return draw.images(policy, attrs.evolve(prompts, draws=tuple(d.index for d in drawings)))


def generate(
    draw: Draw,
    policy: Policy,
    drawings: Sequence[Drawing],
    done: Collection[str],
    *,
    folder: Folder,
    writer: PartWriter,
    advance: Callable[[int], None],
) -> None:
    """Draw the images of a shard that are not there yet.

    A chunk that was interrupted is drawn again as a whole, though only what is missing of it is written: networks may
    round differently for batches of another size, and an interrupted evaluation must not differ from a whole one.
    """
    size = draw.rollout_batch_size
    for start in range(0, len(drawings), size):
        chunk = drawings[start : start + size]
        missing = [i for i, d in enumerate(chunk) if d.id not in done]
        if missing:
            images = draw_images(draw, policy, chunk)
            health = {measure.__name__: measure(images).tolist() for measure in MEASURES}
            records = []
            for i in missing:
                observed = {name: float(f"{values[i]:.6g}") for name, values in health.items()}
                records.append(_record(chunk[i], folder.write_image(chunk[i].id, images[i]), observed))
            writer.append(records)
        advance(len(chunk))


def _record(drawing: Drawing, pixels: str, health: dict[str, float]) -> dict[str, Any]:
    prompt = drawing.prompt
    return {
        "id": drawing.id,
        "prompt": prompt.text,
        "index": drawing.index,
        "category": prompt.category,
        "metadata": dict(prompt.metadata),
        "sha256": pixels,
        "health": health,
        **({"fixed": True} if prompt.fixed else {}),
        **({"trained_on": True} if prompt.trained_on else {}),
    }
