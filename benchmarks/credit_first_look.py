"""Does spatial credit find a signal? Signal-to-noise of the policy gradient on shared rollouts.

Every credit sees the same rollouts of the shipped base. From n independent batches with gradients g_1 .. g_n:

    signal = mean over i != j of <g_i, g_j>        (unbiased for |E g|^2)
    noise  = mean of |g_i|^2 - signal              (trace of the covariance)
    SNR    = signal / noise,   cosine = mean over i != j of cos(g_i, g_j)

with jackknife standard errors over batches, and of the *paired* difference to uniform credit.

    python -m benchmarks.credit_first_look --batches 40
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import attrs
import torch
from torch import Tensor

from rlt2i.algorithm import Algorithm
from rlt2i.credit.algebra import Allocation, Product
from rlt2i.credit.controls import Inverted, Oracle, Shuffled
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.engine import Engine
from rlt2i.interfaces import CreditAssigner, Needs, Objective, Policy, RewardGradient, Sampler, UpdateContext
from rlt2i.learner import informative_rows
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.reduction import trainable_steps
from rlt2i.parameter_sets import ParameterSets
from rlt2i.policies.sd3 import SD3
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.tasks.base import as_prompts
from rlt2i.tasks.shapes.reward import ShapesReward
from rlt2i.tasks.shapes.task import ShapesTask
from rlt2i.types import Experience, Prompts

SETTINGS: dict[str, tuple[Sampler, Objective]] = {
    "clipped": (SDE(num_steps=10, window=(0, 3), kernel=FlowSDE(noise_level=0.9)), ClippedSurrogate(ratio="location")),
    "nft": (ODE(num_steps=10), DiffusionNFT(sigmas=SigmaDraws(count=3))),
}


def credits(direction: str, blocks: str, mix: float) -> dict[str, CreditAssigner]:
    """The credits that are compared; the knobs that would blunt a map are off."""
    attention = TextAttention(direction=direction, blocks=blocks, mix=mix, doubt=0.0, blur=0.5)  # type: ignore[arg-type]
    maps: dict[str, tuple[Allocation, ...]] = {
        "uniform": (),
        "shuffled": (Shuffled(allocation=attention),),
        "attention": (attention,),
        "inverted": (Inverted(allocation=attention),),
        "oracle": (Oracle(mix=mix),),
    }
    return {name: Product(advantage=GroupRelative(), allocations=allocations) for name, allocations in maps.items()}


def gradient(policy: Policy, objective: Objective, experience: Experience, sets: ParameterSets, seed: int) -> Tensor:
    """The flat gradient of one on-policy update."""
    rows = informative_rows(experience)
    context = UpdateContext(
        seed=seed,
        micro_batch_size=144,
        num_rollouts=experience.num_rollouts,
        num_groups=len(experience.groups.unique()),
        num_pairs=max(1, int(trainable_steps(experience, stochastic_only=True).sum())),
        on_policy=True,
        weights=sets.use,
        reward_gradient=_not_needed,
    )
    parameters = list(policy.trainable_parameters().values())
    for parameter in parameters:
        parameter.grad = None
    for loss in objective.losses(policy, experience.take(rows), context=context):
        loss.value.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def _not_needed(latents: Tensor, prompts: Prompts) -> RewardGradient:
    raise ValueError("the probe compares credit under objectives that learn from scores")


def statistics(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """(SNR, mean cosine) of [n, D] gradients, from their Gram matrix."""
    return _from_gram(gradients @ gradients.T)


def _from_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    n = len(gram)
    squares = gram.diagonal()
    signal = (gram.sum() - squares.sum()) / (n * (n - 1))
    noise = squares.mean() - signal
    cosines = gram / torch.outer(squares.sqrt(), squares.sqrt()).clamp_min(1e-30)
    return signal / noise, (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))


def jackknife(grams: dict[str, Tensor], baseline: str = "uniform") -> list[dict[str, float | str]]:
    """A row per credit: SNR, cosine, and their paired differences to the baseline, each with its standard error."""
    n = len(grams[baseline])
    rows: list[dict[str, float | str]] = []

    def left_out(gram: Tensor) -> Tensor:
        keep = [torch.tensor([j for j in range(n) if j != i]) for i in range(n)]
        return torch.stack([torch.stack(_from_gram(gram[k][:, k])) for k in keep])  # [n, 2]

    def error(values: Tensor) -> Tensor:
        return ((n - 1) / n * (values - values.mean(0)).square().sum(0)).sqrt()

    base = left_out(grams[baseline])
    for name, gram in grams.items():
        snr, cosine = _from_gram(gram)
        without = left_out(gram)
        snr_error, cosine_error = error(without)
        difference = error(without - base)
        base_snr, base_cosine = _from_gram(grams[baseline])
        rows.append(
            {
                "credit": name,
                "snr": float(snr),
                "snr_se": float(snr_error),
                "cosine": float(cosine),
                "cosine_se": float(cosine_error),
                "snr_minus_uniform": float(snr - base_snr),
                "snr_minus_uniform_se": float(difference[0]),
                "cosine_minus_uniform": float(cosine - base_cosine),
                "cosine_minus_uniform_se": float(difference[1]),
            }
        )
    return rows


def probe(
    setting: str,
    *,
    path: str,
    direction: str,
    blocks: str,
    mix: float,
    batches: int,
    prompts: int,
    group_size: int,
    seed: int,
) -> list[dict[str, float | str]]:
    """Gradients of all credits on `batches` shared batches."""
    sampler, objective = SETTINGS[setting]
    compared = credits(direction, blocks, mix)
    widest = Algorithm(
        policy=SD3(path=path), sampler=sampler, reward=ShapesReward(), credit=_Everything(compared), objective=objective
    ).load()
    policy = widest.policy
    assert isinstance(policy, Policy)
    sets = ParameterSets(policy.trainable_parameters())
    for name in sorted(objective.needs.parameter_sets):
        sets.add(name)
    # Rollouts of a deterministic sampler that start from the same noise would all be the same.
    shared = bool(sampler.stochastic_steps(0))
    engine = Engine(algorithm=widest, image_size=32, rollout_batch_size=96, seed=seed, share_initial_noise=shared)
    found: dict[str, list[Tensor]] = {name: [] for name in compared}
    task, started = ShapesTask(), time.perf_counter()
    for batch in range(batches):
        drawn = as_prompts(
            task.train_prompts(seed=seed, start=batch * prompts, count=prompts),
            group_size=group_size,
            start=batch * prompts,
        )
        experience = engine.collect(drawn, iteration=batch).experience
        for name in compared:
            own = attrs.evolve(experience, credit=widest.credit.made[name])  # type: ignore[attr-defined]
            found[name].append(gradient(policy, objective, own, sets, seed=batch).half())
        print(f"{setting}: batch {batch + 1}/{batches}, {time.perf_counter() - started:.0f} s", flush=True)
    grams = {}
    for name, gradients in found.items():
        stacked = torch.stack(gradients).float()
        grams[name] = (stacked @ stacked.T).double()
    return jackknife(grams)


class _Everything(CreditAssigner):
    """Assigns all compared credits on the same rollouts, and hands out the uniform one."""

    def __init__(self, compared: dict[str, CreditAssigner]) -> None:
        self.compared = compared
        self.made: dict[str, object] = {}

    @property
    def needs(self) -> Needs:
        return Needs.of_all(credit.needs for credit in self.compared.values())

    def assign(self, context):
        self.made = {name: credit.assign(context) for name, credit in self.compared.items()}
        return self.made["uniform"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--path", default="embedded:shapes")
    parser.add_argument("--setting", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--direction", default="text_to_image")
    parser.add_argument("--blocks", default="2")
    parser.add_argument("--mix", type=float, default=0.75)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/credit_first_look.csv"))
    options = parser.parse_args()
    rows = []
    for setting in SETTINGS if options.setting == "all" else [options.setting]:
        table = probe(
            setting,
            path=options.path,
            direction=options.direction,
            blocks=options.blocks,
            mix=options.mix,
            batches=options.batches,
            prompts=options.prompts,
            group_size=options.group_size,
            seed=options.seed,
        )
        rows += [{"objective": setting, **row} for row in table]
    for row in rows:
        print(
            f"{row['objective']:<8} {row['credit']:<10} cosine {row['cosine']:+.4f} ({row['cosine_se']:.4f})  "
            f"minus uniform {row['cosine_minus_uniform']:+.4f} ({row['cosine_minus_uniform_se']:.4f})  "
            f"SNR {row['snr']:+.4f} ({row['snr_se']:.4f})"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
