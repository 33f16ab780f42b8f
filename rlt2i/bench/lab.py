"""What theory says of credit, and what the library's own parts measure: the laboratory of `rlt2i bench lab`.

Noise outside of the judged region moves the gradient and not the reward. A weight map w of mean one that does not
depend on that noise multiplies the gradient's mean by the mean of w inside the region and its variance by the mean of
w^2, where places count alike. Hence

    SNR(w) / SNR(1) = (mean of w inside)^2 / (mean of w^2)

which is 1/a for the oracle (w = 1/a inside, 0 outside), a for maps permuted anew for every rollout (their mean is 1 at
every place), and 0 for the inverted oracle. A step of fixed length gains in proportion to the cosine between the
gradient of one batch and its mean, sqrt(SNR / (1 + SNR)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from rlt2i.algorithm import Algorithm
from rlt2i.bench.folder import csv_text
from rlt2i.bench.gradients import AllCredits, GradientQuality, gradient_quality, update_gradient
from rlt2i.bench.lab_figure import lab_svg
from rlt2i.bench.lab_world import SIDE, TOKENS, LabTask, Linear, RegionBrightness
from rlt2i.credit.algebra import Allocation, Product
from rlt2i.credit.controls import Inverted, Oracle, Shuffled
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.engine import Engine
from rlt2i.functional.allocation import inverted_map, mean_one
from rlt2i.interfaces import Objective, Policy, Sampler
from rlt2i.learner import Learner
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.reinforce import Reinforce
from rlt2i.parameter_sets import ParameterSets
from rlt2i.runs.files import replace_text
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.tasks.base import as_prompts

REVERSE = SDE(num_steps=6, window=(0, 3), kernel=FlowSDE(noise_level=0.9))
OBJECTIVES: dict[str, tuple[Objective, Sampler]] = {
    "clipped, ratio of a place": (ClippedSurrogate(clip_range=1e-2, ratio="location"), REVERSE),
    "clipped, ratio of a token": (ClippedSurrogate(clip_range=1e-2, ratio="token"), REVERSE),
    "REINFORCE": (Reinforce(), REVERSE),
    "DiffusionNFT": (DiffusionNFT(), ODE(num_steps=6)),
}
FLOOR = 1e-6
PROMPTS, GROUP = 4, 8


def allocations(mix: float = 1.0) -> dict[str, tuple[Allocation, ...]]:
    """The credits that theory speaks of; `mix` blends the oracle with the uniform map."""
    oracle = Oracle(mix=mix, floor=FLOOR)
    return {
        "uniform": (),
        "oracle": (oracle,),
        "shuffled": (Shuffled(allocation=oracle),),
        "inverted": (Inverted(allocation=oracle),),
    }


# ---------------------------------------------------------------------------------------------------------- theory


def gain_of_map(weight: Tensor, inside: Tensor) -> float:
    """SNR over that of uniform credit, for a map that is the same for all rollouts: (mean inside)^2 / mean of w^2.

    Args:
        weight: [...] >= 0.
        inside: [...] bool, where the reward looks.
    """
    return float(weight[inside].mean() ** 2 / weight.square().mean())


def expected_gain(name: str, tokens: int, mix: float = 1.0) -> float:
    """What theory says of one of `allocations` for a region of so many tokens.

    Raises:
        ValueError: for a name that theory does not speak of.
    """
    inside = torch.arange(TOKENS) < tokens
    oracle = (1 - mix) + mix * mean_one(inside.double()[None] + FLOOR, dims=(1,))[0]
    if name == "uniform":
        return 1.0
    if name == "oracle":
        return gain_of_map(oracle, inside)
    if name == "shuffled":  # every place has the mean weight in expectation
        return float(1 / oracle.square().mean())
    if name == "inverted":
        return gain_of_map(inverted_map(oracle.view(1, 1, 1, -1)).flatten(), inside)
    raise ValueError(f"expected_gain({name!r}): theory speaks of {', '.join(allocations())}.")


def expected_ratio_of_steps(snr: float, other: float) -> float:
    """Gain of one unit-length step over another's, from the SNR of a batch of each."""
    return math.sqrt(snr / (1 + snr)) / math.sqrt(other / (1 + other))


# ------------------------------------------------------------------------------------------------------ measurement


@attrs.frozen(kw_only=True)
class Gain:
    """One credit under one objective.

    Attributes:
        objective, credit: which.
        tokens: of the region, of 16.
        mix: of the oracle that the credit is made from.
        expected: SNR over uniform, by theory.
        quality: as measured.
    """

    objective: str
    credit: str
    tokens: int
    mix: float
    expected: float
    quality: GradientQuality


def algorithm(objective: Objective, sampler: Sampler, credit: Product | AllCredits, tokens: int) -> Algorithm:
    """The laboratory with a loaded policy."""
    return Algorithm(
        policy=Linear(), sampler=sampler, reward=RegionBrightness(tokens=tokens), credit=credit, objective=objective
    ).load()


def engine(parts: Algorithm, seed: int) -> Engine:
    """What collects in the laboratory."""
    return Engine(algorithm=parts, image_size=SIDE, rollout_batch_size=512, seed=seed)


def measure(objective: str, tokens: int, *, mix: float = 1.0, batches: int = 300, seed: int = 0) -> list[Gain]:
    """Gains of all credits on shared batches of 4 x 8 rollouts."""
    loss, sampler = OBJECTIVES[objective]
    credits = AllCredits({n: Product(advantage=GroupRelative(), allocations=a) for n, a in allocations(mix).items()})
    parts = algorithm(loss, sampler, credits, tokens)
    policy = parts.policy
    assert isinstance(policy, Policy)
    sets = ParameterSets(policy.trainable_parameters())
    for name in sorted(loss.needs.parameter_sets):
        sets.add(name)
    gradients: dict[str, list[Tensor]] = {name: [] for name in credits.credits}
    for batch in range(batches):
        prompts = LabTask().train_prompts(seed=seed, start=batch * PROMPTS, count=PROMPTS)
        drawn = as_prompts(prompts, group_size=GROUP, start=batch * PROMPTS)
        experience = engine(parts, seed).collect(drawn, iteration=batch).experience
        for name, credit in credits.made.items():
            own = attrs.evolve(experience, credit=credit)
            gradients[name].append(
                update_gradient(policy, loss, parts.reward, own, sets, seed=batch, micro_batch_size=512)
            )
    return [
        Gain(
            objective=objective,
            credit=name,
            tokens=tokens,
            mix=mix,
            expected=expected_gain(name, tokens, mix),
            quality=quality,
        )
        for name, quality in gradient_quality(gradients).items()
    ]


def train(credit: str, tokens: int, *, seed: int, iterations: int = 10, step: float = 0.02) -> float:
    """Mean reward gained by `iterations` steps of one length, under the clipped surrogate.

    Start and end are judged on the same prompts and noise, which no iteration saw.

    Args:
        credit: of `allocations`.
        step: length of each step in parameter space; the direction alone differs between credits.
    """
    loss, sampler = OBJECTIVES["clipped, ratio of a place"]
    parts = algorithm(loss, sampler, Product(advantage=GroupRelative(), allocations=allocations()[credit]), tokens)
    policy = parts.policy
    assert isinstance(policy, Policy)
    parameters, task = policy.trainable_parameters(), LabTask()
    held_out = engine(parts, seed + 10**6)
    judged = as_prompts(task.eval_prompts(16), group_size=32)
    before = held_out.collect(judged, iteration=0).experience.rewards.final.mean()
    # A norm limit far below any gradient's, and a rate that undoes it: every step has length `step`.
    limit = 1e-6
    optimizer = torch.optim.SGD(parameters.values(), lr=step / limit)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    learner = Learner(
        policy=policy,
        objective=loss,
        reward=parts.reward,
        optimizer=optimizer,
        sets=ParameterSets(parameters),
        micro_batch_size=512,
        max_grad_norm=limit,
        seed=seed,
    )
    for iteration in range(iterations):
        prompts = task.train_prompts(seed=seed, start=iteration * PROMPTS, count=PROMPTS)
        drawn = as_prompts(prompts, group_size=GROUP, start=iteration * PROMPTS)
        learner.learn(engine(parts, seed).collect(drawn, iteration=iteration).experience)
    after = held_out.collect(judged, iteration=0).experience.rewards.final.mean()
    return float(after - before)


# --------------------------------------------------------------------------------------------------------- command


def run_lab(
    out: Path,
    *,
    batches: int = 300,
    seeds: int = 12,
    tokens: Sequence[int] = (1, 2, 4, 8),
    mixes: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0),
    say: Callable[[str], None] = print,
) -> None:
    """Measure, compare with theory, and write lab.csv, lab_training.csv and lab.svg."""
    out.mkdir(parents=True, exist_ok=True)
    main = "clipped, ratio of a place"
    say(f"{'objective':<26} {'area':>6} {'mix':>5} {'credit':<9} {'theory':>7} {'measured':>9} {'error':>6}")
    gains: list[Gain] = []
    settings = [(main, n, 1.0) for n in tokens] + [(name, 4, 1.0) for name in OBJECTIVES if name != main]
    settings += [(main, 1, mix) for mix in mixes if mix != 1.0]
    for name, count, mix in settings:
        for gain in measure(name, count, mix=mix, batches=batches):
            gains.append(gain)
            q = gain.quality
            say(
                f"{name:<26} {count:>3}/16 {mix:>5.2f} {gain.credit:<9} {gain.expected:>7.2f} {q.gain:>9.2f} "
                f"{q.gain_error:>6.2f}"
            )
    training = [
        (count, seed, credit, train(credit, count, seed=seed))
        for count in (1, 4)
        for seed in range(seeds)
        for credit in allocations()
    ]
    columns = ("objective", "credit", "tokens", "mix", "theory", "gain", "gain_error", "snr", "snr_error", "batches")
    rows = [
        (g.objective, g.credit, g.tokens, g.mix, g.expected, g.quality.gain, g.quality.gain_error, g.quality.snr,
         g.quality.snr_error, g.quality.batches)
        for g in gains
    ]  # fmt: skip
    replace_text(out / "lab.csv", csv_text(columns, rows))
    replace_text(out / "lab_training.csv", csv_text(("tokens", "seed", "credit", "gained"), training))
    replace_text(out / "lab.svg", lab_svg(rows, training))
    say(f"{out / 'lab.csv'}\n{out / 'lab_training.csv'}\n{out / 'lab.svg'}")
