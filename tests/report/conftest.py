"""Run directories as the trainer writes them, small and made up: a pretended model learns to paint coloured squares."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 210), "yellow": (240, 210, 40)}
NASTY = 'a <b>red</b> "square" & <script>alert(1)</script>'
"""A prompt that must reach the page as text."""

MakeRun = Callable[..., Path]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: renders in headless Chromium (skipped where it is not installed)")


def paint(colours: Sequence[str], generator: torch.Generator, side: int = 24) -> Tensor:
    """[3, side, side] uint8: soft background, one square per colour."""
    image = 205 + 30 * torch.rand(3, 1, 1, generator=generator) + 8 * torch.randn(3, side, side, generator=generator)
    place = side // max(1, len(colours))
    size = max(3, side // (3 if len(colours) < 3 else 5))
    for i, colour in enumerate(colours):
        x = i * place + int(torch.randint(0, max(1, place - size), (1,), generator=generator))
        y = int(torch.randint(2, side - size, (1,), generator=generator))
        image[:, y : y + size, x : x + size] = torch.tensor(COLOURS[colour], dtype=torch.float32)[:, None, None]
    return image.clamp(0, 255).to(torch.uint8)


def write_images(
    path: Path, step: int, *, per_category: int, chance: float, side: int = 24, preference: bool = False
) -> None:
    """images/eval-<step>.safetensors; the same draws at every step, so that a higher chance fixes images."""
    draws = torch.rand(6 * per_category, generator=torch.Generator().manual_seed(1))
    images, scores, prompts = [], [], []
    names = list(COLOURS)
    for i, draw in enumerate(draws.tolist()):
        wanted = [names[i % 4], names[(i + 1) % 4]][: 1 + i % 2]
        luck = (draw + 0.15 * math.sin(step + 7 * i)) % 1
        good = luck < chance
        generator = torch.Generator().manual_seed(i)
        images.append(paint(wanted if good else [names[(i + 2) % 4], *wanted], generator, side))
        scores.append(18 + 6 * chance - luck if preference else float(good))
        prompts.append(NASTY if i == 0 else " and ".join(f"a {colour} square" for colour in wanted))
    categories = [CATEGORIES[i // per_category] for i in range(len(draws))]
    path.mkdir(parents=True, exist_ok=True)
    info = json.dumps({"prompts": prompts, "scores": scores, "categories": categories})
    save_file({"images": torch.stack(images)}, path / f"eval-{step:06d}.safetensors", metadata={"info": info})


def write_maps(path: Path, step: int, *, samples: int = 6, steps: int = 10, grid: int = 12, side: int = 24) -> None:
    """maps/step-<step>.safetensors: attention that sharpens over the steps and follows the object."""
    sigmas = torch.linspace(1, 0, steps + 1)
    weights, clean, final, prompts, core = [], [], [], [], []
    ys, xs = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    for i in range(samples):
        generator = torch.Generator().manual_seed(100 + i)
        colour = list(COLOURS)[i % 4]
        image = paint([colour], generator, side)
        colourful = (image.float().amax(0) - image.float().amin(0)).view(grid, side // grid, grid, side // grid)
        seen = colourful.mean(dim=(1, 3)) / 255
        blob = torch.exp(-((ys - grid / 2) ** 2 + (xs - grid / 2) ** 2) / (grid / 2) ** 2)
        maps = []
        for t in range(steps):
            share = t / max(1, steps - 1)
            raw = 0.25 + (1 - share) * blob + 3 * share * seen + 0.15 * torch.rand(grid, grid, generator=generator)
            maps.append(raw / raw.mean())
        noise = torch.randn(steps, 3, side, side, generator=generator) * 90 * sigmas[1:].view(-1, 1, 1, 1)
        weights.append(torch.stack(maps))
        clean.append((image.float() + noise).clamp(0, 255).to(torch.uint8))
        final.append(image)
        prompts.append(f"a {colour} square")
        core.append([f"{colour} square"])
    good = [i % 3 == 0 if step == 0 else i % 3 != 2 for i in range(samples)]
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        "weights": torch.stack(weights),
        "clean": torch.stack(clean),
        "final": torch.stack(final),
        "sigmas": sigmas,
    }
    info = json.dumps({"prompts": prompts, "scores": [float(g) for g in good], "core": core})
    save_file(tensors, path / f"step-{step:06d}.safetensors", metadata={"info": info})


def write_metrics(path: Path, *, updates: int, every: int, rise: float, seed: int) -> None:
    """metrics.jsonl: `rise` is what strict accuracy gains from the first evaluation to the last."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size: float) -> float:
        return size * float(torch.randn(1, generator=generator))

    with path.open("w", encoding="utf-8") as file:
        for step in range(updates + 1):
            share = 1 - math.exp(-3 * step / updates)
            if step:
                row = {
                    "step": step, "phase": "train", "reward/mean": 0.6 + rise * share + noise(0.03),
                    "reward/spread": 0.3 + noise(0.02), "clip/low": abs(noise(0.04)), "clip/high": abs(noise(0.05)),
                    "ratio/max_abs_minus_one": 0.0, "grad_norm": 0.8 + abs(noise(0.3)), "kl/base": 2e-4 * step,
                    "map/entropy": 4.6 - 0.2 * share + noise(0.02), "map/effective_support": 0.6 - 0.1 * share,
                    "objects/mean": 1.7 + noise(0.03), "seconds/rollout": 5.1 + abs(noise(0.4)),
                    "seconds/reward": 0.2 + abs(noise(0.02)), "seconds/update": 4.2 + abs(noise(0.3)),
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
            if step % every == 0:
                strict = 0.47 + rise * share / (1 - math.exp(-3))
                names = enumerate(CATEGORIES)
                row = {
                    "step": step, "phase": "eval", "eval/strict": strict, "eval/strict_low": strict - 0.045,
                    "eval/strict_high": strict + 0.045, "eval/partial": 0.67 + 0.8 * rise * share,
                    "eval/reward": 0.6 + rise * share, "eval/objects": 1.74, "eval/objects_asked": 1.75,
                    "eval/images": 480,
                    **{f"eval/{name}": min(1.0, 0.3 + 0.1 * i + rise * share * (i != 2)) for i, name in names},
                }  # fmt: skip
                if step:
                    gain = strict - 0.47
                    row |= {
                        "eval/strict_gain": gain,
                        "eval/strict_gain_low": gain - 0.04,
                        "eval/strict_gain_high": gain + 0.04,
                    }
                file.write(json.dumps(row) + "\n")


RECIPE = """\
name: {name}
seed: {seed}
policy: {{type: SD3Policy, path: embedded:shapes, lora_rank: null}}
sampler: {{type: WindowSampler, num_steps: 10, steps: [0, 1, 2], noise_level: 0.9}}
reward: {{type: ShapesReward, rule: exclusive}}
credit:
  - {{type: GroupRelative, eps: 1.0e-4}}
  - {{type: TextAttention, layers: auto, mix: 1.0}}
objective: {{type: ClippedSurrogate, granularity: location, clip_range: 1.0e-2}}
prompts_per_iteration: 12
group_size: 16
"""


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A factory of run directories; every part can be left out."""

    def make(
        name: str = "star-shapes-demo",
        *,
        updates: int = 27,
        every: int = 3,
        rise: float = 0.19,
        seed: int = 0,
        recipe: bool = True,
        metrics: bool = True,
        images: bool = True,
        maps: bool = True,
        per_category: int = 8,
        side: int = 24,
        preference: bool = False,
    ) -> Path:
        run = tmp_path / name
        (run / "checkpoints" / f"step-{updates:06d}").mkdir(parents=True)
        if recipe:
            (run / "recipe.yaml").write_text(RECIPE.format(name=name, seed=seed), encoding="utf-8")
            versions = {
                "rlt2i": "0.1.0",
                "torch": "2.15.0",
                "recipe": "9f2c41d07b",
                "git": {"commit": "abc", "dirty": False},
            }
            (run / "versions.json").write_text(json.dumps(versions), encoding="utf-8")
        if metrics:
            write_metrics(run / "metrics.jsonl", updates=updates, every=every, rise=rise, seed=seed)
        if images:
            for step, chance in ((0, 0.45), (updates, 0.45 + rise)):
                write_images(
                    run / "images",
                    step,
                    per_category=per_category,
                    chance=chance,
                    side=side,
                    preference=preference,
                )
        if maps:
            for step in (0, updates):
                write_maps(run / "maps", step, side=side, grid=min(12, side))
        return run

    return make
