"""What a reward costs that runs beside the rollout: one process, arms in turns, ratios to the rollout alone.

    python -m benchmarks.overlap [--groups 16] [--chunk 4] [--repeats 3]

"waits": a reward that sleeps, as a remote one would keep us waiting, for as long as the rollout of its images took.
"OCR": the OCR reward, which needs a core of its own, beside its own share of the rollout. One thread for the network.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import attrs
import torch

from rlt2i.engine import Engine
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.recipes import load_recipe
from rlt2i.rewards.ocr import OCRReward
from rlt2i.runs.stopwatch import Stopwatch
from rlt2i.tasks.base import as_prompts
from rlt2i.tasks.ocr.task import OCRTask


@attrs.frozen(kw_only=True)
class Waits(Reward):
    """Scores 0.5 after so many seconds for each image."""

    seconds: float

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        count = len(batch.prompts)
        time.sleep(self.seconds * count)
        return RewardOutput.all_valid(torch.linspace(0.4, 0.6, count))


def seconds_of(engine: Engine, reward: Reward, groups: int, group_size: int) -> tuple[float, Stopwatch]:
    """To collect one batch, and where the time went."""
    prompts = as_prompts(OCRTask().train_prompts(seed=0, start=0, count=groups), group_size=group_size)
    engine = attrs.evolve(engine, algorithm=attrs.evolve(engine.algorithm, reward=reward))
    watch, start = Stopwatch(), time.perf_counter()
    engine.collect(prompts, iteration=0, watch=watch)
    return time.perf_counter() - start, watch


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Command line; returns the ratios that it prints."""
    parser = argparse.ArgumentParser(description="cost of a reward beside the rollout")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    algorithm = load_recipe("uniform-shapes").algorithm().load("cpu")
    engine = Engine(algorithm=algorithm, image_size=32, rollout_batch_size=options.chunk, seed=0)
    sizes = (options.groups, options.group_size)
    seconds_of(engine, Waits(seconds=0.0), *sizes)  # warms up
    ocr = OCRReward(workers=1)
    rows: dict[str, list[float]] = {
        "waits": [],
        "waits, one after the other": [],
        "OCR": [],
        "OCR, one after the other": [],
    }
    for _ in range(options.repeats):
        alone, _ = seconds_of(engine, Waits(seconds=0.0), *sizes)
        waits = Waits(seconds=alone / (options.groups * options.group_size))
        rows["waits"].append(seconds_of(engine, waits, *sizes)[0] / alone)
        rows["waits, one after the other"].append(2.0)
        together, watch = seconds_of(engine, ocr, *sizes)
        rows["OCR"].append(together / alone)
        rows["OCR, one after the other"].append(1 + watch.beside["reward"] / alone)
    count = options.groups * options.group_size
    print(f"{count} images in chunks of {options.chunk}, embedded pipeline, {options.repeats} repeats, medians")
    ratios = {name: statistics.median(values) for name, values in rows.items()}
    for name, ratio in ratios.items():
        print(f"{name:<28} {ratio:5.2f} x the rollout alone")
    return ratios


if __name__ == "__main__":
    main()
