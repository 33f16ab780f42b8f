"""Laws of the velocity: its form, its purity, its independence of company, and its direction where one can tell."""

from __future__ import annotations

import torch
from torch import Tensor

from rlt2i.conformance.subject import Subject, distance, require
from rlt2i.functional.transitions import clean_prediction
from rlt2i.samplers.chunked import rollout
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.types import Prompts

WRONG_WAY = -0.3
"""Correlation with eps - x_0 below which a velocity points the wrong way; a random network stays near 0."""


def form(subject: Subject) -> None:
    """velocity is float32, finite, and shaped as the latents, square or not."""
    for size in subject.sizes:
        latents = subject.noise(size)
        with torch.no_grad():
            out = subject.policy.velocity(latents, subject.sigma, subject.conditioning)
        require(
            out.shape == latents.shape,
            f"velocity is {list(out.shape)} for latents {list(latents.shape)} (size {size})"
            + (": it is packed; unpack it as the pipeline does before it steps." if out.ndim != 4 else "."),
        )
        require(
            out.dtype is torch.float32,
            f"velocity is {out.dtype}; log-probabilities are differences of near numbers, so end with .float().",
        )
        require(bool(torch.isfinite(out).all()), "velocity holds NaN or infinity at the levels of its own schedule.")


def purity(subject: Subject) -> None:
    """The same question has the same answer, whatever was asked in between; arguments and global randomness stay."""
    policy, conditioning = subject.policy, subject.conditioning
    latents, sigma, global_state = subject.latents.clone(), subject.sigma.clone(), torch.get_rng_state()
    first = subject.velocity()
    require(
        torch.equal(latents, subject.latents) and torch.equal(sigma, subject.sigma),
        "velocity changes its arguments; a trajectory keeps these latents. Compute out of place.",
    )
    require(torch.equal(first, subject.velocity()), "velocity twice, two answers: is dropout on, or noise drawn in it?")
    with torch.no_grad():
        policy.velocity(subject.noise(subject.size, 7)[:1], sigma[-1:], conditioning.take(torch.tensor([3])))
        policy.velocity_with_captures(subject.noise(subject.size, 8), sigma.flip(0), conditioning, subject.some_names)
        policy.encode(Prompts.of(("something else", "two cats")))
        policy.sigmas(3, subject.size)
    again = subject.velocity()
    require(
        torch.equal(first, again),
        f"velocity differs by {distance(again, first):.1e} after other questions: state leaks between calls. Keep "
        "nothing of a call in the policy.",
    )
    require(
        torch.equal(global_state, torch.get_rng_state()),
        "velocity draws from torch's global generator; a run could not be resumed bit for bit.",
    )


def gradient_mode(subject: Subject) -> None:
    """velocity is the same bit for bit with and without gradient: the first ratio of an update is exactly 1."""
    without, within = subject.velocity(), subject.velocity(grad=True)
    require(
        torch.equal(without, within.detach()),
        f"velocity differs by {distance(within, without):.1e} (relative) with gradient: rollout and update would "
        "disagree. Use one kernel and one precision in both.",
    )


def company_of_rows(subject: Subject) -> str:
    """A row's velocity does not depend on the rows beside it, nor on their order."""
    together = subject.velocity()
    order = torch.tensor([4, 0, 5, 2, 3, 1])[: subject.num_rows]
    policy = subject.policy
    with torch.no_grad():
        permuted = policy.velocity(subject.latents[order], subject.sigma[order], subject.conditioning.take(order))
        rows = [torch.tensor([i]) for i in range(subject.num_rows)]
        alone = torch.cat(
            [policy.velocity(subject.latents[r], subject.sigma[r], subject.conditioning.take(r)) for r in rows]
        )
    moved, single = distance(permuted, together[order]), distance(alone, together)
    require(
        max(moved, single) < subject.tolerance,
        f"velocity of a row depends on its batch: {moved:.1e} in another order, {single:.1e} alone (relative). Does "
        "something average over the batch, or take sigma or text of the first row for all?",
    )
    return f"in another order {moved:.1e}, alone {single:.1e}"


def sigma_and_prompt_matter(subject: Subject) -> None:
    """Noise level and prompt reach the network, row by row."""
    policy, latents, conditioning = subject.policy, subject.latents, subject.conditioning
    same = latents[:1].expand_as(latents).contiguous()
    level = subject.sigma[1:2].expand(len(latents)).contiguous()
    one_prompt = conditioning.take(torch.zeros(len(latents), dtype=torch.long))
    with torch.no_grad():
        by_level = policy.velocity(same, subject.sigma, one_prompt)
        by_prompt = policy.velocity(same, level, conditioning)
    require(
        distance(by_level[-1:], by_level[:1]) > subject.tolerance,
        "velocity is the same at every sigma: the noise level does not reach the network.",
    )
    require(
        distance(by_prompt[2:3], by_prompt[:1]) > subject.tolerance,
        "velocity is the same for every prompt: the text does not reach the network, or one row of it serves all.",
    )


def direction(subject: Subject) -> str:
    """velocity points from the clean latents to the noise, v = eps - x_0; a random network cannot tell."""
    with torch.no_grad():
        images = rollout(
            subject.policy, ODE(num_steps=8), subject.prompts, seed=0, image_size=subject.size,
            rollout_batch_size=subject.num_rows, device=subject.device,
        )  # fmt: skip
        clean, noise = images.clean_latents, subject.noise(subject.size, 3)
        level = torch.full((len(clean),), 0.6, device=subject.device)
        noisy = 0.4 * clean + 0.6 * noise
        out = subject.policy.velocity(noisy, level, subject.conditioning)
    along = float(_correlation(out, noise - clean))
    require(
        along > WRONG_WAY,
        f"velocity points the wrong way: its correlation with eps - x_0 is {along:.2f}. Turn the sign where the "
        "network predicts x_0 - eps (Z-Image, Lumina-2).",
    )
    error = (clean_prediction(noisy, out, level) - clean).pow(2).mean()
    return f"correlation {along:.2f} with eps - x_0, error of x_0 {float(error):.2g} (a random network has about 0)"


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)


def chunks(subject: Subject) -> str:
    """A rollout does not depend on how many are denoised together."""
    together, alone = (
        rollout(
            subject.policy, SDE(num_steps=3), subject.prompts, seed=1, image_size=subject.size,
            rollout_batch_size=size, device=subject.device,
        ).latents
        for size in (subject.num_rows, 1)
    )  # fmt: skip
    apart = distance(alone, together)
    require(
        apart < 20 * subject.tolerance,
        f"rollouts differ by {apart:.1e} (relative) when they are made one by one: rollout_batch_size would change "
        "results.",
    )
    return f"{apart:.1e}"


def first_ratio(subject: Subject) -> None:
    """Log-probabilities of a rollout, replayed with gradient, are the same: the first ratio is exactly 1."""
    policy = subject.policy
    trajectory = rollout(
        policy, SDE(num_steps=3), subject.prompts, seed=2, image_size=subject.size,
        rollout_batch_size=subject.num_rows, device=subject.device,
    )  # fmt: skip
    now, then = (trajectory.sigmas[i].expand(subject.num_rows) for i in (1, 2))
    out = policy.velocity(trajectory.latents[:, 1], now, trajectory.conditioning)
    transition = trajectory.transition(trajectory.latents[:, 1], out, now, then)
    replayed = trajectory.log_prob_map(trajectory.latents[:, 2], transition)
    off = float((replayed.detach() - trajectory.log_probs[:, 1]).abs().max())
    require(off == 0.0, f"log-probabilities differ by {off:.1e} when a step is replayed; the first ratio is not 1.")


LAWS = (form, purity, gradient_mode, company_of_rows, sigma_and_prompt_matter, direction, chunks, first_ratio)
