"""How fast the OCR reward reads: seconds per image, and images per second with one and two workers.

    python -m benchmarks.ocr_speed [--images 48] [--side 512] [--repeats 3]

Only ratios within one run mean something on another machine. Arms take turns, so that whatever else the
machine does hits all of them; the median of the repeats counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from PIL import Image, ImageDraw, ImageFont

from rlt2i.interfaces import RewardBatch
from rlt2i.rewards.ocr import OCRReward
from rlt2i.rewards.pooled import Pooled
from rlt2i.tasks.ocr.task import OCRTask


def pictures(count: int, side: int) -> RewardBatch:
    """Signs with the task's own texts."""
    prompts = OCRTask().eval_prompts(count)
    images = []
    for number, prompt in enumerate(prompts):
        image = Image.new("RGB", (side, side), (180 + number % 60, 220, 235 - number % 50))
        draw = ImageDraw.Draw(image)
        for row, word in enumerate(str(prompt.metadata["text"]).split()):
            place = (side / 2, side * (0.25 + 0.15 * row))
            draw.text(place, word, font=ImageFont.load_default(side // 10), fill=(30, 30, 60), anchor="mm")
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        images.append(raw.view(side, side, 3).permute(2, 0, 1))
    return RewardBatch(
        images=torch.stack(images),
        prompts=[prompt.text for prompt in prompts],
        metadata=[prompt.metadata for prompt in prompts],
    )


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    words.add_argument("--images", type=int, default=48)
    words.add_argument("--side", type=int, default=512)
    words.add_argument("--repeats", type=int, default=3)
    options = words.parse_args()
    batch = pictures(options.images, options.side)
    one = OCRReward(workers=1)
    two = OCRReward(workers=2)
    processes = Pooled(reward=OCRReward(workers=1), workers=2, kind="process", chunk=max(1, options.images // 8))
    want = frozenset({"maps", "regions"})
    arms: dict[str, Callable[[], float]] = {
        "1 thread": lambda: float(one.score(batch).scores.mean()),
        "1 thread, with maps and regions": lambda: float(one.score(batch, want).scores.mean()),
        "2 threads": lambda: float(two.score(batch).scores.mean()),
        "2 processes": lambda: float(processes.score(batch).scores.mean()),
    }
    means = {name: run() for name, run in arms.items()}  # loads the engines
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.repeats):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    processes.close()
    base = statistics.median(seconds["1 thread"])
    print(f"{options.images} images of {options.side} pixels, {os.cpu_count()} cores, {options.repeats} repeats")
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(
            f"{name:<32} {middle / options.images:7.3f} s/image  {options.images / middle:7.2f} images/s  "
            f"{base / middle:5.2f} x   mean reward {means[name]:.4f}"
        )


if __name__ == "__main__":
    main()
