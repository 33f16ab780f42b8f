"""The training-free half of the benchmark: several credits on the same rollouts of fixed weights.

Credit is judged by where it lies and by the gradient that follows from it, without an update. Every number is a mean
over independent batches with its standard error (the jackknife's, which for a mean is the usual one).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rlt2i.algorithm import Algorithm
from rlt2i.bench.controls import controls_of
from rlt2i.bench.gradients import AllCredits, gradient_quality, update_gradient
from rlt2i.bench.maps import (
    blocks_of,
    localisation_lift,
    overlap_of_peaks,
    rank_correlation,
    share_by_decile,
    sign_agreement,
    step_gains,
)
from rlt2i.bench.probe_rows import Measured, Saved, Tally, read_batch, write_batch
from rlt2i.credit.influence import Influence
from rlt2i.credit.steps import trained_steps
from rlt2i.engine import Engine
from rlt2i.evaluation.localisation import area_under_roc
from rlt2i.functional.maps import effective_support
from rlt2i.functional.surrogate import scaled_clip_range
from rlt2i.interfaces import CreditContext, Policy
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.parameter_sets import ParameterSets
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.checkpoint import load_checkpoint
from rlt2i.runs.files import replace_text
from rlt2i.tasks.base import TaskPrompt, as_prompts
from rlt2i.training.observations import map_entropy
from rlt2i.types import Credit, Experience

BLOCKS = 4
"""Blocks a side of the intervention on noise."""
INFLUENCE_ROLLOUTS = 8


@attrs.frozen(kw_only=True, eq=False)
class Probe:
    """Measures a recipe's credit and its controls on fixed weights.

    Attributes:
        recipe: whose parts.
        parts: them, loaded, with all credits at once.
        sets: "reference" holds the base weights.
        group_size, prompts: of a batch.
        seed: of prompts and noise.
        device: where the policy is.
    """

    recipe: Recipe
    parts: Algorithm
    sets: ParameterSets
    prompts: int
    group_size: int
    seed: int
    device: torch.device | str

    @classmethod
    def of(
        cls, recipe: Recipe, *, prompts: int, group_size: int, seed: int, device: torch.device | str = "cpu"
    ) -> Probe:
        """Load a recipe's base weights, with its credit and the controls of it."""
        credits = AllCredits(controls_of(recipe), also=frozenset({"clean_predictions"}))
        parts = attrs.evolve(recipe.algorithm(), credit=credits).load(device)
        assert isinstance(parts.policy, Policy)
        sets = ParameterSets(parts.policy.trainable_parameters())
        sets.add("reference")
        return cls(
            recipe=recipe, parts=parts, sets=sets, prompts=prompts, group_size=group_size, seed=seed, device=device
        )

    @property
    def policy(self) -> Policy:
        assert isinstance(self.parts.policy, Policy)
        return self.parts.policy

    @property
    def credits(self) -> AllCredits:
        assert isinstance(self.parts.credit, AllCredits)
        return self.parts.credit

    def use_weights(self, checkpoint: Path) -> None:
        """Put the online weights of a checkpoint in place of the base."""
        saved = load_checkpoint(checkpoint).tensors["online"]
        with torch.no_grad():
            for key, parameter in self.policy.trainable_parameters().items():
                parameter.copy_(saved[key])

    def measure(
        self,
        weights: str,
        *,
        batches: int,
        interventions: int,
        folder: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> list[Measured]:
        """All measures at the weights at hand.

        Args:
            weights: what to call them.
            batches: independent rollout batches, for maps, gradients and what a step of them clips.
            interventions: batches in which steps are completed and noise is redrawn; they cost many rollouts each.
            folder: where finished batches and interventions are kept, and found again by the next call with the same
                probe, which may ask for more of them; by default in memory alone.

        Raises:
            ValueError: when the folder was made by another probe.
        """
        if folder is not None:
            self._claim(folder, weights)
        sets = ParameterSets(self.policy.trainable_parameters())
        for name in sorted(self.parts.objective.needs.parameter_sets):
            sets.add(name)
        tally = Tally()
        gradients: dict[str, list[Tensor]] = {name: [] for name in self.credits.credits}
        started = time.perf_counter()

        def kept(what: str, number: int, count: int, work: Callable[[], Saved]) -> Saved:
            place = folder / f"{what}-{number:04d}.safetensors" if folder else None
            saved = read_batch(place) if place else None
            if saved is None:
                saved = work()
                if place:
                    write_batch(place, *saved)
                say(f"{weights}: {what} {number + 1} of {count}, {time.perf_counter() - started:.0f} s")
            return saved

        for batch in range(batches):
            measured, own = kept("batch", batch, batches, functools.partial(self._batch, weights, batch, sets))
            tally.merge(measured)
            for name, gradient in own.items():
                gradients[name].append(gradient)
        # Without noise a step does what was expected of it, and there is nothing to redraw.
        for batch in range(interventions if self.parts.sampler.stochastic_steps(0) else 0):
            work = functools.partial(self._intervention, batch)
            tally.merge(kept("intervention", batch, interventions, work)[0])
        rows = list(tally.rows(weights))
        for name, q in gradient_quality(gradients).items() if batches >= 3 else ():
            for measure, value, error in (
                ("gradient SNR", q.snr, q.snr_error),
                ("gradient SNR over uniform", q.gain, q.gain_error),
                ("cosine of two batches", q.cosine, q.cosine_error),
            ):
                rows.append(
                    Measured(weights=weights, credit=name, measure=measure, value=value, error=error, batches=q.batches)
                )
        return rows

    def _claim(self, folder: Path, weights: str) -> None:
        """Write down what is measured in a folder, or see that it is the same."""
        what = {"recipe": self.recipe.hash, "prompts": self.prompts, "group_size": self.group_size, "seed": self.seed}
        text = json.dumps({**what, "weights": weights}, indent=1) + "\n"
        file = folder / "probe.json"
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            raise ValueError(f"{folder}: holds batches of another probe ({file}). Name another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)

    def _batch(self, weights: str, batch: int, sets: ParameterSets) -> Saved:
        """What one batch gives: its measures, and a gradient [D] bfloat16 per credit."""
        tally = Tally()
        gradients: dict[str, Tensor] = {}
        experience, context, made = self._credited(batch, self.prompts, self.group_size)
        self._maps(tally, context, made)
        self._categories(tally, batch, context, made)
        for name, credit in made.items():
            own = attrs.evolve(experience, credit=credit)
            gradient = self._gradient(own, sets, batch)
            gradients[name] = gradient.bfloat16().cpu()  # float16 would lose the smallest to zero
            self._clips(tally, name, own, gradient)
        if weights != "base":
            self._drift(tally, context, made)
        return tally, gradients

    def _intervention(self, batch: int) -> Saved:
        """What the completed steps of one batch and redrawn noise say; no gradients."""
        tally = Tally()
        _, context, made = self._credited(batch, self.prompts, self.group_size)
        self._steps(tally, context, made)
        self._influence(tally, batch)
        return tally, {}

    def _credited(
        self, batch: int, prompts: int, group_size: int
    ) -> tuple[Experience, CreditContext, Mapping[str, Credit]]:
        """A rollout batch, what its credit was assigned from, and each credit by name."""
        experience = self._collect(batch, prompts, group_size)
        assert self.credits.context is not None
        return experience, self.credits.context, dict(self.credits.made)

    def _collect(self, batch: int, prompts: int, group_size: int) -> Experience:
        train, start = self.recipe.train, batch * prompts
        engine = Engine(
            algorithm=self.parts,
            image_size=train.image_size,
            rollout_batch_size=train.rollout_batch_size,
            seed=self.seed,
            share_initial_noise=train.share_initial_noise,
            device=torch.device(self.device),
        )
        drawn = self._drawn(batch, prompts)
        return engine.collect(as_prompts(drawn, group_size=group_size, start=start), iteration=batch).experience

    def _drawn(self, batch: int, prompts: int) -> list[TaskPrompt]:
        return self.recipe.task.train_prompts(seed=self.seed, start=batch * prompts, count=prompts)

    def _gradient(self, experience: Experience, sets: ParameterSets, batch: int) -> Tensor:
        return update_gradient(
            self.policy,
            self.parts.objective,
            self.parts.reward,
            experience,
            sets,
            seed=batch,
            micro_batch_size=self.recipe.train.micro_batch_size,
        )

    # ---------------------------------------------------------------------------------------------------- measures

    def _maps(self, tally: Tally, context: CreditContext, made: Mapping[str, Credit]) -> None:
        """Where maps lie and how concentrated they are, at the steps that are trained; good and bad images apart."""
        steps = trained_steps(context)
        for name, credit in made.items():
            weight = _whole(credit, context)
            tally.add(name, "effective support", effective_support(weight[:, list(steps)]))
            tally.add(name, "largest weight", weight[:, list(steps)].amax(dim=(2, 3)))
            entropy = map_entropy(weight)[:, list(steps)]
            advantage = credit.advantage.mean(dim=(1, 2, 3))
            tally.add(name, "entropy, better than its group", entropy[advantage > 0])
            tally.add(name, "entropy, worse than its group", entropy[advantage < 0])
            if context.rewards.maps is None:
                continue
            inside = region_of(context)
            lift = localisation_lift(weight, inside)
            for step in steps:
                tally.add(name, f"localisation lift, step {step}", lift[:, step])
            first = area_under_roc(weight[:, steps[0]].flatten(1), inside.flatten(1))
            tally.add(name, f"AUC of the region, step {steps[0]}", first)
            tally.add(name, "lift, better than its group", lift[:, list(steps)][advantage > 0])
            tally.add(name, "lift, worse than its group", lift[:, list(steps)][advantage < 0])

    def _categories(self, tally: Tally, batch: int, context: CreditContext, made: Mapping[str, Credit]) -> None:
        """The lift by category of the prompt: maps may find a colour and not know how many of it were asked for."""
        categories = [prompt.category for prompt in self._drawn(batch, self.prompts) for _ in range(self.group_size)]
        if context.rewards.maps is None or set(categories) == {"all"}:
            return
        steps, inside = list(trained_steps(context)), region_of(context)
        for name, credit in made.items():
            lift = localisation_lift(_whole(credit, context), inside)[:, steps]
            for category in dict.fromkeys(categories):
                rows = torch.tensor([c == category for c in categories], device=lift.device)
                tally.add(name, f"lift, {category}", lift[rows])

    def _steps(self, tally: Tally, context: CreditContext, made: Mapping[str, Credit]) -> None:
        """Does a step that is praised do good? By completing the image from both of its ends."""
        steps = trained_steps(context)
        gains = step_gains(context, steps)
        for name, credit in made.items():
            signed = (credit.advantage * credit.weight * credit.mask).mean(dim=(2, 3))
            signed = signed.expand(len(gains), context.trajectory.num_steps)[:, list(steps)]
            tally.add(name, "step-sign agreement", sign_agreement(signed, gains)[None])

    def _influence(self, tally: Tally, batch: int) -> None:
        """Rank correlation of maps with what redrawn noise of a block does to the reward, on one prompt's rollouts."""
        _, context, made = self._credited(10**6 + batch, 1, INFLUENCE_ROLLOUTS)
        measured = Influence(blocks=BLOCKS, mix=1.0, floor=1e-6).weight(context)
        for name, credit in made.items():
            weight = _whole(credit, context)
            rows = [
                rank_correlation(blocks_of(weight[:, step], BLOCKS), blocks_of(measured[:, step], BLOCKS))
                for step in trained_steps(context)
            ]
            tally.add(name, "influence, rank correlation", torch.stack(rows))

    def _drift(self, tally: Tally, context: CreditContext, made: Mapping[str, Credit]) -> None:
        """How far the maps are from those that the base weights would give in the same states."""
        trajectory = context.trajectory
        names = frozenset(name for name in trajectory.captures if name in self.policy.offers)
        each = []
        with torch.no_grad(), self.sets.use("reference"):
            for t in range(trajectory.num_steps):
                latents = trajectory.latents[:, t]
                sigma = trajectory.sigmas[t].expand(len(latents))
                each.append(self.policy.velocity_with_captures(latents, sigma, trajectory.conditioning, names)[1])
        captures = {name: torch.stack([at[name] for at in each], dim=1) for name in names}
        before = attrs.evolve(
            context, trajectory=attrs.evolve(trajectory, captures={**trajectory.captures, **captures})
        )
        for name, credit in self.credits.credits.items():
            then, now = _whole(credit.assign(before), before), _whole(made[name], context)
            for step in trained_steps(context):
                a, b = then[:, step].flatten(1), now[:, step].flatten(1)
                tally.add(name, f"map drift, overlap with the base's, step {step}", overlap_of_peaks(a, b))

    def _clips(self, tally: Tally, name: str, experience: Experience, gradient: Tensor) -> None:
        """Share of places whose ratio leaves the clip range after one step of Adam, by decile of the map."""
        objective = self.parts.objective
        if not isinstance(objective, ClippedSurrogate) or objective.ratio != "location":
            return
        trajectory, parameters = experience.trajectory, list(self.policy.trainable_parameters().values())
        steps = trajectory.stochastic.nonzero()[:, 0]
        rollouts = torch.arange(trajectory.num_rollouts, device=steps.device)
        before = self._log_probs(experience, rollouts, steps)
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                p.sub_(self.recipe.train.learning_rate * g.view_as(p).sign())
        ratio = (self._log_probs(experience, rollouts, steps) - before).exp()
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
        left = ((ratio - 1).abs() > scaled_clip_range(objective.clip_range, ratio[0, 0].numel())).float()
        tally.add(name, "places clipped after one step", left.mean()[None])
        weight = experience.credit.weight.expand(len(rollouts), trajectory.num_steps, -1, -1)[:, steps]
        if weight.shape[2:] != (1, 1):
            fine = interpolate(weight, size=ratio.shape[2:], mode="nearest")
            by_decile = share_by_decile(left.flatten(), fine.flatten())
            tally.add(name, "places clipped, lowest decile of the map", by_decile[:1])
            tally.add(name, "places clipped, highest decile of the map", by_decile[-1:])

    @torch.no_grad()
    def _log_probs(self, experience: Experience, rollouts: Tensor, steps: Tensor) -> Tensor:
        """[B, S, H, W] of the steps taken, under the weights at hand."""
        trajectory, log_probs = experience.trajectory, []
        for step in steps.tolist():
            states = experience.step_batch(rollouts, torch.full_like(rollouts, step))
            velocity = self.policy.velocity(states.latents, states.sigma, states.conditioning)
            transition = trajectory.transition(states.latents, velocity, states.sigma, states.sigma_next)
            log_probs.append(trajectory.log_prob_map(states.next_latents, transition))
        return torch.stack(log_probs, dim=1)


def region_of(context: CreditContext) -> Tensor:
    """[B, h, w] bool on the token grid: tokens of which a good part was judged."""
    maps = context.rewards.maps
    assert maps is not None, "the oracle asks for maps"
    return interpolate(maps[:, None].float(), size=context.token_grid, mode="area")[:, 0] > 0.25


def _whole(credit: Credit, context: CreditContext) -> Tensor:
    """[B, T, h, w] weights on the token grid."""
    shape = (context.trajectory.num_rollouts, context.trajectory.num_steps, *context.token_grid)
    return credit.weight.expand(shape)
