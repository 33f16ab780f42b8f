"""STAR in a loop of one's own: an Engine that collects, a Learner that learns; no trainer, no YAML, no run directory.

python examples/minimal_loop.py --iterations 4
"""

from __future__ import annotations

import argparse

import torch

from rlt2i import (
    SD3,
    SDE,
    Algorithm,
    ClippedSurrogate,
    FlowSDE,
    GroupRelative,
    Product,
    ShapesReward,
    ShapesTask,
    TextAttention,
)
from rlt2i.engine import Engine
from rlt2i.learner import Learner
from rlt2i.parameter_sets import ParameterSets
from rlt2i.tasks.base import as_prompts


def main(iterations: int = 4, prompts: int = 4, group_size: int = 8, num_steps: int = 10) -> list[float]:
    """Train the embedded model.

    Returns:
        The mean reward of each iteration's rollouts.
    """
    attention = TextAttention(direction="text_to_image", blocks="2", blur=0.5, doubt=0.0)
    algorithm = Algorithm(
        policy=SD3(path="embedded:shapes"),
        sampler=SDE(num_steps=num_steps, window=(0, 3), kernel=FlowSDE(noise_level=0.9)),
        reward=ShapesReward(),
        credit=Product(advantage=GroupRelative(), allocations=(attention,)),
        objective=ClippedSurrogate(clip_range=2e-3),
    ).load()  # the parts were checked against each other before any weight was read

    parameters = algorithm.policy.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    engine = Engine(algorithm=algorithm, image_size=32, rollout_batch_size=32, seed=0, share_initial_noise=True)
    learner = Learner(
        policy=algorithm.policy,
        objective=algorithm.objective,
        reward=algorithm.reward,
        optimizer=optimizer,
        sets=ParameterSets(parameters),
        micro_batch_size=32,
    )

    rewards = []
    for iteration in range(iterations):
        start = iteration * prompts
        drawn = ShapesTask().train_prompts(seed=0, start=start, count=prompts)
        batch = engine.collect(as_prompts(drawn, group_size=group_size, start=start), iteration=iteration)
        metrics = learner.learn(batch.experience)
        rewards.append(batch.experience.rewards.final.mean().item())
        print(f"iteration {iteration + 1}: reward {rewards[-1]:.3f}, gradient norm {metrics['grad_norm']:.3f}")
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=4)
    main(parser.parse_args().iterations)
