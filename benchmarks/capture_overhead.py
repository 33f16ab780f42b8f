"""What attention capture costs a rollout: with and without in one process, and by operation count for SD3.5-M.

python -m benchmarks.capture_overhead
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from rlt2i.captures import attention_name
from rlt2i.policies.cost import capture_share
from rlt2i.policies.sd3 import SD3
from rlt2i.samplers.chunked import rollout
from rlt2i.samplers.ode import ODE
from rlt2i.tasks.base import as_prompts
from rlt2i.tasks.shapes.task import ShapesTask


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="cost of attention capture")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = SD3().load()
    prompts = as_prompts(ShapesTask().train_prompts(seed=0, start=0, count=6), group_size=16)
    modes = {
        "nothing": frozenset[str](),
        "text to image, block 2 (the recipes)": frozenset({attention_name("text_to_image", "2")}),
        "image to text, middle": frozenset({attention_name("image_to_text", "middle")}),
        "image to text, all": frozenset({attention_name("image_to_text", "all")}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(options.repeats + 1):  # the first round warms up
        for name, captures in modes.items():
            start = time.process_time()  # processor time: what others do on this machine does not count
            rollout(policy, ODE(), prompts, seed=0, image_size=32, rollout_batch_size=96, captures=captures)
            seconds[name].append(time.process_time() - start)
    base = seconds["nothing"][1:]
    print(f"embedded model, rollout of 96 images x 10 steps, {options.repeats} rounds, {options.threads} thread")
    for name, values in seconds.items():
        ratios = [v / b for v, b in zip(values[1:], base, strict=True)]
        best, paired = min(values[1:]), statistics.median(ratios)
        print(f"{name:<38} {best:.2f} s at best, x {best / min(base):.3f}; median of paired ratios x {paired:.3f}")
    share = capture_share(SD3(path="stabilityai/stable-diffusion-3.5-medium", lora_rank=32), image_size=512)
    print(f"SD3.5-M at 512 px, image to text, middle blocks, 20 tokens: {share:.3%} of a step by operation count")


if __name__ == "__main__":
    main()
