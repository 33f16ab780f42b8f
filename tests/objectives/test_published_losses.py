"""Each objective against its published loss, written out once more in plain torch: value and gradient of an update.

Policy, old policy and reference all differ, so every ratio, branch and penalty counts. Every rollout has a weight map:
the published mean over places becomes a weighted one, inside of ratios, logits and implicit rewards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import attrs
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from rlt2i.functional.gaussian import LOG_SQRT_2PI
from rlt2i.interfaces import Objective, Sampler, UpdateContext
from rlt2i.objectives.awm import AWM
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.crd import CRD
from rlt2i.objectives.dgpo import DGPO
from rlt2i.objectives.dppo import FlowDPPO
from rlt2i.objectives.draws import shared_noise
from rlt2i.objectives.grpo_guard import GRPOGuard
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.online_dpo import OnlineDPO
from rlt2i.objectives.penalty import KLPenalty, VelocityPenalty
from rlt2i.objectives.sft import WeightedMatching
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.types import Experience
from tests.helpers.build import collect, toy_algorithm, toy_engine
from tests.helpers.toy import SIDE, ToyPolicy

NOISE, STEPS = 0.9, 3
REVERSE = SDE(num_steps=6, window=(0, STEPS), kernel=FlowSDE(noise_level=NOISE))


def mean(values: Tensor) -> Tensor:
    """[B, C, H, W] -> [B]: published numbers are means over all latent coordinates."""
    return values.mean(dim=(1, 2, 3))


def wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


@attrs.frozen(kw_only=True, eq=False)
class World:
    """Rollouts of the toy policy with random advantages A [B] and maps [B, H, W], and three sets of weights."""

    policy: ToyPolicy
    experience: Experience
    weights: dict[str, dict[str, Tensor]]
    A: Tensor
    map: Tensor

    @classmethod
    def of(cls, objective: Objective, sampler: Sampler) -> World:
        algorithm = toy_algorithm(objective, sampler=sampler)
        policy = algorithm.policy
        assert isinstance(policy, ToyPolicy)
        found = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
        draw = torch.Generator().manual_seed(9)
        weights = {
            name: {
                k: v.detach() + spread * torch.randn(v.shape, generator=draw)
                for k, v in policy.trainable_parameters().items()
            }
            for name, spread in (("online", 0.05), ("old", 0.03), ("reference", 0.1))
        }
        A = 2 * torch.randn(found.num_rollouts, generator=draw)
        A[0] = 9.0  # beyond the clip
        map_ = torch.rand(found.num_rollouts, SIDE, SIDE, generator=draw) + 0.1
        map_ = map_ / map_.mean(dim=(1, 2), keepdim=True)
        credit = attrs.evolve(found.credit, advantage=wide(A), weight=map_[:, None], grid=(SIDE, SIDE))
        found = attrs.evolve(found, credit=credit)
        world = cls(policy=policy, experience=found, weights=weights, A=A, map=map_)
        world._load("online")
        return world

    def _load(self, name: str) -> None:
        for k, parameter in self.policy.trainable_parameters().items():
            parameter.data.copy_(self.weights[name][k])

    @contextlib.contextmanager
    def under(self, name: str) -> Iterator[None]:
        self._load(name)
        try:
            yield
        finally:
            self._load("online")

    @property
    def context(self) -> UpdateContext:
        count = self.experience.num_rollouts

        def no_reward(*_: object) -> None:
            raise AssertionError("no objective here asks for it")

        return UpdateContext(
            seed=5,
            micro_batch_size=8,
            num_rollouts=count,
            num_groups=2,
            num_pairs=count * STEPS,
            on_policy=False,
            weights=self.under,
            reward_gradient=no_reward,  # type: ignore[arg-type]
        )

    def weighted(self, values: Tensor) -> Tensor:
        """[B, C, H, W] or [B, H, W] -> [B]: the mean over latent coordinates under the weight map."""
        places = values.mean(dim=1) if values.ndim == 4 else values
        return (self.map * places).mean(dim=(1, 2))

    @property
    def noise(self) -> Tensor:
        """[B], by how much the map widens the noise of a mean over places, and with it the clip range."""
        return (self.map**2).mean(dim=(1, 2)).sqrt()

    def velocity(self, x: Tensor, t: Tensor, name: str = "online") -> Tensor:
        conditioning = self.experience.trajectory.conditioning
        if name == "online":
            return self.policy.velocity(x, t, conditioning)
        with torch.no_grad(), self.under(name):
            return self.policy.velocity(x, t, conditioning)

    def step(self, index: int, name: str = "online") -> tuple[Tensor, ...]:
        """v, mean, s, full std, dt and log-prob [B, H, W] of a Flow-SDE step."""
        trajectory = self.experience.trajectory
        x, x_next = trajectory.latents[:, index], trajectory.latents[:, index + 1]
        now, then = trajectory.sigmas[index], trajectory.sigmas[index + 1]
        v = self.velocity(x, now.expand(len(x)), name)
        s = NOISE * torch.sqrt(now / (1 - (trajectory.sigmas[1] if now == 1 else now)))
        dt = then - now
        mu = x * (1 + s**2 / (2 * now) * dt) + v * (1 + s**2 * (1 - now) / (2 * now)) * dt
        full = s * torch.sqrt(-dt)
        log_prob = -((x_next - mu) ** 2) / (2 * full**2) - torch.log(full) - LOG_SQRT_2PI
        return v, mu, s, full, dt, log_prob.mean(dim=1)

    def images(self, objective: Objective, keys: Tensor, noise_keys: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """x_0, noise, sigma and x_sigma for every draw."""
        x0 = self.experience.trajectory.clean_latents
        sigma, _ = objective.sigmas.draw(self.experience, keys, context=self.context)  # type: ignore[attr-defined]
        for draw, t in enumerate(sigma.T):
            noise = shared_noise(self.context, noise_keys, torch.full((len(x0),), draw), tuple(x0.shape[1:]), x0.device)
            yield x0, noise, t, (1 - wide(t)) * x0 + wide(t) * noise


def compare(objective: Objective, world: World, published: Callable[[], Tensor], *, on_policy: bool = False) -> None:
    parameters = world.policy.trainable_parameters()
    ours, context = torch.zeros(()), attrs.evolve(world.context, on_policy=on_policy)
    for loss in objective.losses(world.policy, world.experience, context=context):
        loss.value.backward()
        ours = ours + loss.value.detach()
    found = {k: p.grad.clone() for k, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    expected = published()
    expected.backward()
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)
    for k, parameter in parameters.items():
        scale = float(parameter.grad.abs().max())  # type: ignore[union-attr]
        torch.testing.assert_close(found[k], parameter.grad, rtol=1e-3, atol=1e-4 * scale)


def clip(A: Tensor, ratio: Tensor, eps: float) -> Tensor:
    return torch.max(-A * ratio, -A * ratio.clamp(1 - eps, 1 + eps))


@pytest.mark.parametrize(("form", "eps"), [("flow_grpo", 1e-3), ("exact", 0.2), ("v", 1e-2), ("x", 1e-2)])
def test_clipped_surrogate(form, eps: float):
    objective = ClippedSurrogate(ratio="sample", clip_range=eps, kl_penalty=KLPenalty(weight=0.4, form=form))
    world = World.of(objective, REVERSE)
    with torch.no_grad():
        old = [world.step(t, "old")[5] for t in range(STEPS)]
    recorded = world.experience.trajectory.log_probs.clone()
    recorded[:, :STEPS] = torch.stack(old, dim=1)
    trajectory = attrs.evolve(world.experience.trajectory, log_probs=recorded)
    world = attrs.evolve(world, experience=attrs.evolve(world.experience, trajectory=trajectory))

    def published() -> Tensor:
        total = torch.zeros(())
        for t in range(STEPS):
            v, mu, s, full, _, log_prob = world.step(t)
            v_ref, mu_ref, *_ = world.step(t, "reference")
            kl = {
                "flow_grpo": mean((mu - mu_ref) ** 2) / (2 * s**2),
                "exact": mean((mu - mu_ref) ** 2) / (2 * full**2),
                "v": mean((v - v_ref) ** 2),
                "x": mean((mu - mu_ref) ** 2),
            }[form]
            total = (
                total
                + (clip(world.A, torch.exp(world.weighted(log_prob - old[t])), eps * world.noise) + 0.4 * kl).mean()
                / STEPS
            )
        return total

    compare(objective, world, published)


@pytest.mark.parametrize("inverse_dt", [True, False])
def test_grpo_guard(inverse_dt: bool):
    objective = GRPOGuard(clip_range=0.05, inverse_dt=inverse_dt)
    world = World.of(objective, REVERSE)

    def published() -> Tensor:
        total = torch.zeros(())
        for t in range(STEPS):
            _, mu, _, full, dt, log_prob = world.step(t)
            _, mu_old, _, _, _, old = world.step(t, "old")
            bias = ((mu - mu_old) ** 2).mean(dim=1) / (2 * full**2)
            loss = clip(world.A, torch.exp(world.weighted(log_prob - old + bias) * full), 0.05)
            total = total + (loss / (-dt if inverse_dt else 1)).mean() / STEPS
        return total

    compare(objective, world, published)


@pytest.mark.parametrize("threshold", [1e-3, 1e-2])
def test_flow_dppo(threshold: float):
    objective = FlowDPPO(threshold=threshold)
    world = World.of(objective, REVERSE)

    def published() -> Tensor:
        total, A = torch.zeros(()), world.A
        for t in range(STEPS):
            _, mu, _, full, _, log_prob = world.step(t)
            _, mu_old, _, _, _, old = world.step(t, "old")
            ratio, kl = torch.exp(world.weighted(log_prob - old)), mean((mu - mu_old) ** 2) / (2 * full**2)
            away = ((A > 0) & (ratio > 1)) | ((A < 0) & (ratio < 1))
            total = total + torch.where((kl >= threshold) & away, 0, -A * ratio).mean() / STEPS
        return total

    compare(objective, world, published)


@pytest.mark.parametrize(("beta", "mode"), [(1.0, "all"), (0.1, "binary"), (1.0, "one_only"), (0.5, "positive_only")])
@pytest.mark.parametrize("spatial", ["weight", "label"])
def test_diffusion_nft(beta: float, mode, spatial):
    objective = DiffusionNFT(beta=beta, label=mode, kl_penalty=VelocityPenalty(weight=0.1), spatial=spatial)
    world = World.of(objective, ODE(num_steps=6))
    # A map either weighs the loss of a place on both branches, or scales the advantage behind its label.
    A, loss_map = world.A[:, None, None].expand_as(world.map), world.map
    if spatial == "label":
        A, loss_map = A * world.map, torch.ones_like(A)
    clipped = A.clamp(-5, 5)
    clipped = {
        "all": clipped,
        "binary": clipped.sign(),
        "one_only": (clipped > 0).float(),
        "positive_only": clipped.clamp(0, 5),
    }[mode]
    r = (clipped / 10 + 0.5).clamp(0, 1)

    def published() -> Tensor:
        losses = []
        for x0, _, t, x in world.images(objective, world.experience.keys, world.experience.keys):
            v, v_old, v_ref = (world.velocity(x, t, name) for name in ("online", "old", "reference"))
            loss = torch.zeros(())
            for branch, share in ((beta * v + (1 - beta) * v_old, r), ((1 + beta) * v_old - beta * v, 1 - r)):
                residual = x - wide(t) * branch - x0
                scale = mean(residual.detach().abs()).clamp(min=1e-5)[:, None, None]
                loss = loss + loss_map * share * (residual**2).mean(dim=1) / scale
            losses.append((5 * loss / beta).mean() + 0.1 * mean((v - v_ref) ** 2).mean())
        return torch.stack(losses).mean()

    compare(objective, world, published)


@pytest.mark.parametrize("weighting", ["ghuber", "huber", "t2", "t", "uniform"])
@pytest.mark.parametrize(("kl", "ema"), [("uniform", 0.0), ("elbo", 0.0), ("uniform", 0.7)])
def test_awm(weighting, kl, ema: float):
    objective = AWM(
        weighting=weighting, kl_penalty=VelocityPenalty(weight=0.3, form=kl), ema_kl_weight=ema,
        clip_range=0.02, advantage_scale=2.0,
    )  # fmt: skip
    world = World.of(objective, ODE(num_steps=6))
    A, on_policy = world.A.clamp(-5, 5) / 5 * 2, ema > 0  # with a slow average there is no old policy

    def likelihood(velocity: Tensor, target: Tensor, t: Tensor) -> Tensor:
        m = world.weighted((velocity - target) ** 2)
        return {
            "uniform": -m,
            "t": -t * m,
            "t2": -(t**2) * m,
            "huber": -t * (torch.sqrt(m + 1e-10) - 1e-5),
            "ghuber": -t * ((m + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25,
        }[weighting]

    def published() -> Tensor:
        losses = []
        for x0, noise, t, x in world.images(objective, world.experience.keys, world.experience.keys):
            v, v_old, v_ref = (world.velocity(x, t, name) for name in ("online", "old", "reference"))
            now = likelihood(v, noise - x0, t)
            before = now.detach() if on_policy else likelihood(v_old, noise - x0, t)
            s = 0.7 * torch.sqrt(t / (1 - t.clamp(0, 0.99)))
            scale = 2 * s**2 if kl == "elbo" else torch.ones(())
            loss = clip(A, torch.exp(now - before), 0.02 * world.noise) + 0.3 * mean((v - v_ref) ** 2) / scale
            losses.append((loss + ema * mean((v - v_old) ** 2) / scale).mean())
        return torch.stack(losses).mean()

    compare(objective, world, published, on_policy=on_policy)


@pytest.mark.parametrize(
    ("beta", "clip_range", "anchor", "kl"),
    [(100.0, None, "reference", 0.02), (10.0, 1e-2, "old", 0.0), (10.0, 5e-3, "reference", 0.1)],
)
def test_dgpo(beta: float, clip_range: float | None, anchor, kl: float):
    objective = DGPO(beta=beta, clip_range=clip_range, anchor=anchor, kl_penalty=VelocityPenalty(weight=kl))
    world = World.of(objective, ODE(num_steps=6))
    groups, A = world.experience.groups, world.A

    def published() -> Tensor:
        losses = []
        for x0, noise, t, x in world.images(objective, groups, groups):  # noise and sigma are the group's
            v, v_old, v_ref = (world.velocity(x, t, name) for name in ("online", "old", "reference"))
            m, m_old, m_ref = (world.weighted((velocity - noise + x0) ** 2) for velocity in (v, v_old, v_ref))
            W = torch.zeros_like(A)
            for group in groups.unique():
                members = groups == group
                pull = A[members] * beta * (m - (m_ref if anchor == "reference" else m_old))[members]
                W[members] = torch.sigmoid(pull.sum() / members.sum()).detach()
            if clip_range is not None:
                # How far a sample has moved is not a matter of credit: no map.
                ratio = torch.exp(mean((v_old - noise + x0) ** 2) - mean((v - noise + x0) ** 2))
                m = torch.where(torch.where(A > 0, ratio > 1 + clip_range, ratio < 1 - clip_range), m.detach(), m)
            losses.append((W * A * m + kl * mean((v - v_ref) ** 2)).mean())
        return torch.stack(losses).mean()

    compare(objective, world, published)


@pytest.mark.parametrize(
    ("temperature", "form", "centre", "kl"),
    [(None, "mse", "group", 0.1), (1.0, "bce", "group", 0.0), (0.5, "mse", "micro_batch", 0.1)],
)
@pytest.mark.parametrize("adaptive", [True, False])
def test_crd(temperature: float | None, form, centre, kl: float, adaptive: bool):
    objective = CRD(
        temperature=temperature,
        form=form,
        centre=centre,
        kl_penalty=VelocityPenalty(weight=kl),
        beta=2.0,
        adaptive=adaptive,
    )
    world = World.of(objective, ODE(num_steps=6))
    a = (world.A / 10 + 0.5).clamp(0, 1)
    together = world.experience.groups if centre == "group" else torch.zeros_like(world.experience.groups)

    def centred(r: Tensor) -> Tensor:
        """[B] the loss of one draw."""
        loss = torch.zeros_like(r)
        signs = (0.0,) if temperature is None else (1 / temperature, -1 / temperature)
        for group in together.unique():
            members = together == group
            for sign in signs:
                q = torch.softmax(sign * a[members], dim=0)
                r_c = 2.0 * (r[members] - (q * r[members].detach()).sum())
                a_c = a[members] - (q * a[members]).sum()
                if form == "mse":
                    value = (r_c - a_c) ** 2
                else:
                    value = binary_cross_entropy_with_logits(r_c, torch.sigmoid(a_c), reduction="none")
                loss = loss.index_put((members.nonzero()[:, 0],), value / len(signs), accumulate=True)
        return loss

    def published() -> Tensor:
        losses, (groups, keys) = [], (world.experience.groups, world.experience.keys)
        for x0, noise, t, x in world.images(objective, groups, keys):  # sigma is the group's, the noise is not
            v, v_old, v_ref = (world.velocity(x, t, name) for name in ("online", "old", "reference"))
            errors = []
            for velocity in (v, v_old):
                residual = velocity - (noise - x0)
                scale = mean(residual.detach().abs()).clamp(min=1e-5) if adaptive else torch.ones(())
                errors.append(world.weighted(residual**2) / scale)
            loss = centred(errors[1] - errors[0]) * 5 / 2.0
            if kl > 0:
                least = 1e-4 / kl
                loss = loss + kl * (least + a * (1 - least)) * mean((v - v_ref) ** 2)
            losses.append(loss.mean())
        return torch.stack(losses).mean()

    compare(objective, world, published)


def test_online_dpo():
    objective = OnlineDPO(beta=50.0)
    world = World.of(objective, ODE(num_steps=6))
    groups = world.experience.groups.unique()

    def published() -> Tensor:
        losses, members = [], world.experience.groups
        for x0, noise, t, x in world.images(objective, members, members):
            now, anchor = (world.velocity(x, t, name) - noise + x0 for name in ("online", "old"))
            gap = world.weighted(now**2 - anchor**2)
            for group in groups:
                rows = (members == group).nonzero()[:, 0]
                winner, loser = rows[world.A[rows].argmax()], rows[world.A[rows].argmin()]
                losses.append(-logsigmoid(-0.5 * 50.0 * (gap[winner] - gap[loser])))
        return torch.stack(losses).mean()

    compare(objective, world, published)


def test_weighted_matching():
    objective = WeightedMatching(kl_penalty=VelocityPenalty(weight=0.1))
    world = World.of(objective, ODE(num_steps=6))

    def published() -> Tensor:
        losses = []
        for x0, noise, t, x in world.images(objective, world.experience.keys, world.experience.keys):
            v, v_ref = world.velocity(x, t), world.velocity(x, t, "reference")
            error = world.A.clamp(min=0) * world.weighted((v - noise + x0) ** 2)
            losses.append((error + 0.1 * mean((v - v_ref) ** 2)).mean())
        return torch.stack(losses).mean()

    compare(objective, world, published)
