"""Small algorithms for tests: one line to an engine and a learner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlt2i.algorithm import Algorithm
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.engine import Collected, Engine
from rlt2i.interfaces import CreditAssigner, Objective, Reward, Sampler
from rlt2i.learner import Learner
from rlt2i.parameter_sets import ParameterSets
from rlt2i.samplers.sde import SDE
from rlt2i.tasks.base import as_prompts
from tests.helpers.toy import SIDE, QuadrantBrightness, ToySpec, ToyTask
from tests.helpers.toy_pairs import toy_pairs

UNIFORM = Product(advantage=GroupRelative())


def learning_curve(algorithm: Algorithm, *, updates: int, learning_rate: float = 0.1) -> list[float]:
    """The mean reward of every batch of a short run."""
    engine, learner = toy_engine(algorithm), toy_learner(algorithm, learning_rate=learning_rate)
    rewards = []
    for update in range(updates):
        batch = collect(engine, update=update)
        learner.learn(batch.experience)
        rewards.append(float(batch.scores.scores.mean()))
    return rewards


def toy_algorithm(
    objective: Objective,
    *,
    credit: CreditAssigner = UNIFORM,
    sampler: Sampler | None = None,
    reward: Reward | None = None,
) -> Algorithm:
    return Algorithm(
        policy=ToySpec(),
        sampler=sampler or SDE(num_steps=6, window=(0, 3)),
        reward=reward or QuadrantBrightness(),
        credit=credit,
        objective=objective,
    ).load()


def toy_engine(algorithm: Algorithm, *, rollout_batch_size: int = 64, seed: int = 1, **options: object) -> Engine:
    return Engine(algorithm=algorithm, image_size=SIDE, rollout_batch_size=rollout_batch_size, seed=seed, **options)  # type: ignore[arg-type]


def toy_learner(
    algorithm: Algorithm,
    *,
    learning_rate: float = 0.05,
    micro_batch_size: int = 256,
    optimizer_steps_per_iteration: int = 1,
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
) -> Learner:
    parameters = algorithm.policy.trainable_parameters()  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return Learner(
        policy=algorithm.policy,  # type: ignore[arg-type]
        objective=algorithm.objective,
        reward=algorithm.reward,
        optimizer=optimizer,
        sets=ParameterSets(parameters),
        micro_batch_size=micro_batch_size,
        optimizer_steps_per_iteration=optimizer_steps_per_iteration,
        max_grad_norm=1e9,
        reduce_sum=reduce_sum,
    )


def collect(engine: Engine, *, update: int = 0, prompts: int = 4, group_size: int = 8, first: int = 0) -> Collected:
    start = update * prompts + first
    task = toy_pairs() if engine.algorithm.sampler.metadata_keys else ToyTask()
    drawn = task.train_prompts(seed=0, start=start, count=prompts)
    return engine.collect(as_prompts(drawn, group_size=group_size, start=start), iteration=update)


def gradients(learner: Learner, experience: object) -> dict[str, Tensor]:
    """The gradient of one update, caught before the step."""
    caught: dict[str, Tensor] = {}

    def step(norm: float) -> None:
        for name, parameter in learner.policy.trainable_parameters().items():
            assert parameter.grad is not None
            caught[name] = parameter.grad.clone()

    original = Learner._step
    Learner._step = lambda self, norm: step(norm)  # type: ignore[method-assign]
    try:
        learner.learn(experience)  # type: ignore[arg-type]
    finally:
        Learner._step = original  # type: ignore[method-assign]
    return caught
