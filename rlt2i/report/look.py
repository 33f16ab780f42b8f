"""One page of base and trained side by side: the same prompts and noise, and where credit would go in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.report.atlas import strip
from rlt2i.report.gallery import embedded
from rlt2i.report.maps import scale_end, scale_top
from rlt2i.report.page import environment
from rlt2i.runs.artifacts import MapSample

_SIDE = 512


@attrs.frozen(kw_only=True, eq=False)
class Seen:
    """What one prompt and seed look like.

    Attributes:
        prompt, seed: of both images.
        images: [2, 3, H, W] uint8, of the base and of the trained weights.
        maps: the credit's weights in a rollout of each; empty where there are none.
    """

    prompt: str
    seed: int
    images: Tensor
    maps: Sequence[MapSample] = ()


def render_look(
    pictures: Sequence[Seen], *, name: str, command: str, weights: str, steps: int, notes: Sequence[str] = ()
) -> str:
    """The page, in one piece that loads nothing from elsewhere.

    Args:
        pictures: every prompt and seed, the seeds of a prompt in a row.
        name: of the run.
        command: that draws the page again.
        weights: which of them are the trained ones.
        steps: denoising steps of the images.
        notes: what a reader should know, such as why there are no maps.
    """
    weights_shown = [sample.weights.flatten() for one in pictures for sample in one.maps]
    top = scale_top(torch.cat(weights_shown)) if weights_shown else 0.0
    prompts: dict[str, list[Mapping[str, Any]]] = {}
    for one in pictures:
        prompts.setdefault(one.prompt, []).append(_shown(one, top))
    scale = None
    if weights_shown:
        scale = {"end": scale_end(top, max(float(w.max()) for w in weights_shown)), "uniform": f"{100 / top:.1f}"}
    return (
        environment()
        .get_template("look.html")
        .render(
            name=name,
            command=command,
            weights=weights,
            steps=steps,
            notes=notes,
            prompts=prompts,
            scale=scale,
        )
    )


def _shown(one: Seen, top: float) -> Mapping[str, Any]:
    names = ("base", "trained")
    changed = (one.images[0].float() - one.images[1].float()).abs().mean() / 255
    return {
        "seed": one.seed,
        "images": [
            (name, embedded(image, f"{name}, seed {one.seed}: {one.prompt}", side=_SIDE))
            for name, image in zip(names, one.images, strict=True)
        ],
        "changed": f"{100 * float(changed):.1f} %",
        "strips": [strip((name,), sample, top) for name, sample in zip(names, one.maps, strict=False)],
    }
