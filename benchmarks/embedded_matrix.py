"""The compatibility matrix on the embedded model: each credit under each objective makes one real update there.

    python -m benchmarks.embedded_matrix      # prints a summary; a few minutes

`benchmarks.compatibility_matrix` does credit x objective x sampler on the toy policy. Here every credit x objective has
one sampler, the first of `SAMPLERS` that takes both, and `--start`/`--stop` cut the list of credits.
"""

from __future__ import annotations

import argparse
import math

import torch

from benchmarks.compatibility_matrix import Judged, credits, objectives, samplers
from rlt2i.algorithm import Algorithm
from rlt2i.engine import Engine
from rlt2i.interfaces import Policy
from rlt2i.policies.sd3 import SD3
from rlt2i.tasks.base import as_prompts
from rlt2i.tasks.shapes.task import ShapesTask
from tests.helpers.build import toy_learner

SAMPLERS = {"SDE(FlowSDE)": 4, "TreeSDE": 8}
"""Sampler -> rollouts of a prompt."""


def main() -> None:
    """Command line."""
    words = argparse.ArgumentParser(description="one update on the embedded model for every credit and objective")
    words.add_argument("--start", type=int, default=0)
    words.add_argument("--stop", type=int, default=None)
    options = words.parse_args()
    policy = SD3().load()
    assert isinstance(policy, Policy)
    base = {name: value.detach().clone() for name, value in policy.trainable_parameters().items()}
    table, updated, refused, failed = samplers(), 0, 0, 0
    for name, credit in list(credits().items())[options.start : options.stop]:
        experiences: dict[str, object] = {}
        for objective_name, objective in objectives().items():
            for sampler_name in SAMPLERS:
                parts = {"sampler": table[sampler_name], "reward": Judged(), "credit": credit, "objective": objective}
                try:
                    algorithm = Algorithm(policy=policy, **parts)
                except ValueError:
                    continue
                break
            else:
                refused += 1
                continue
            if sampler_name not in experiences:
                drawn = ShapesTask().train_prompts(seed=0, start=0, count=2)
                engine = Engine(algorithm=algorithm, image_size=32, rollout_batch_size=16, seed=1)
                collected = engine.collect(as_prompts(drawn, group_size=SAMPLERS[sampler_name], start=0), iteration=0)
                experiences[sampler_name] = collected.experience
            norm = toy_learner(algorithm, learning_rate=1e-4).learn(experiences[sampler_name])["grad_norm"]
            with torch.no_grad():
                for key, value in policy.trainable_parameters().items():
                    value.copy_(base[key])
            if math.isfinite(norm) and norm > 0:
                updated += 1
            else:
                failed += 1
                print(f"{name} x {objective_name} ({sampler_name}): gradient {norm}", flush=True)
    print(f"{updated} updated with a finite gradient that is not zero, {refused} refused, {failed} neither", flush=True)


if __name__ == "__main__":
    main()
