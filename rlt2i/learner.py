"""One learner optimises for every objective: micro-batches, one backward per loss, clip, step, named parameter sets."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.distributed import OtherProcessFailed, because_of, sum_in_buckets, telling
from rlt2i.functional.ema import power_decay
from rlt2i.functional.shards import is_sharded, local, rows_of
from rlt2i.functional.transfer import on_host, to_device
from rlt2i.interfaces import Objective, Policy, Reward, UpdateContext
from rlt2i.objectives.reduction import trainable_steps
from rlt2i.parameter_sets import ONLINE, ParameterSets
from rlt2i.rewards.gradient import reward_gradient
from rlt2i.seeds import derive_seed
from rlt2i.types import Experience


class UpdateRefused(RuntimeError):
    """An update that would have poisoned the weights. The state is as it was before the whole batch."""


@attrs.define
class Averages:
    """Means (and maxima, for names ending in "max") of the observations of an update.

    They stay where they were made until the log asks for the result: one copy to the host, summed there in the order in
    which they were added.
    """

    parts: list[tuple[str, Tensor, Tensor | None]] = attrs.field(factory=list)

    def add(self, metrics: Mapping[str, Tensor], steps: Tensor | None = None) -> None:
        """Observations [N] by name; with `steps` [N], clip shares and ratios are also kept apart by step."""
        for name, values in metrics.items():
            by_step = steps if name.startswith(("clip/", "ratio/")) else None
            self.parts.append((name, values.detach().flatten(), by_step))

    def result(self) -> dict[str, float]:
        """Name -> mean or maximum; the host waits for the device once."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def one(name: str, values: Tensor) -> None:
            if name.split("@")[0].endswith("max"):
                sums[name], counts[name] = torch.maximum(sums.get(name, values.new_zeros(())), values.max()), 1
            else:
                sums[name] = sums.get(name, values.new_zeros(())) + values.sum()
                counts[name] = counts.get(name, 0) + len(values)

        for name, values, steps in self._on_host():
            one(name, values)
            for step in [] if steps is None else steps.unique().tolist():
                one(f"{name}@{step}", values[steps == step])
        return {name: float(total / counts[name]) for name, total in sums.items()}

    def _on_host(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Every observation as float64, and its steps."""
        there = [
            to_device(x, values.device).double()
            for _, values, steps in self.parts
            for x in (values, steps)
            if x is not None
        ]
        here = iter(torch.cat(there).cpu().split([len(x) for x in there]) if there else ())
        for name, _, steps in self.parts:
            yield name, next(here), None if steps is None else next(here).long()


@attrs.frozen(kw_only=True, eq=False)
class _State:
    """All that the optimizer steps of a batch change, in host memory.

    Attributes:
        parameters, sets: tensors by name.
        optimizer: the optimizer's state of each parameter, and the learning rate of each of its groups.
        optimizer_step: the learner's own count.
    """

    parameters: Mapping[str, Any]
    sets: Mapping[str, Any]
    optimizer: tuple[list[tuple[Any, dict[str, Any]]], list[float]]
    optimizer_step: int

    @classmethod
    def of(cls, learner: Learner) -> _State:
        changing = {"old", "ema"} & set(learner.sets.names)
        return cls(
            parameters={name: _copied(tensor) for name, tensor in learner.sets.values(ONLINE).items()},
            sets={f"{s}/{name}": _copied(x) for s in changing for name, x in learner.sets.values(s).items()},
            optimizer=(
                [(p, {key: _copied(x) for key, x in state.items()}) for p, state in learner.optimizer.state.items()],
                [group["lr"] for group in learner.optimizer.param_groups],
            ),
            optimizer_step=learner.optimizer_step,
        )

    @torch.no_grad()
    def restore(self, learner: Learner) -> None:
        for name, parameter in learner.sets.values(ONLINE).items():
            local(parameter).copy_(self.parameters[name])
        for key, copied in self.sets.items():
            name, _, parameter_name = key.partition("/")
            local(learner.sets.values(name)[parameter_name]).copy_(copied)
        states, rates = self.optimizer
        known = {id(parameter): state for parameter, state in states}
        for owner in [p for p in learner.optimizer.state if id(p) not in known]:
            del learner.optimizer.state[owner]
        for parameter, state in states:
            for key, value in state.items():
                now = learner.optimizer.state[parameter].get(key)
                if isinstance(now, Tensor):
                    local(now).copy_(value)
                else:
                    learner.optimizer.state[parameter][key] = value
        for group, rate in zip(learner.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        learner.optimizer.zero_grad(set_to_none=True)
        learner.optimizer_step = self.optimizer_step


def _copied(value: Any) -> Any:
    # Into pinned memory, without waiting: what is put back follows on the same queue.
    return local(value).detach().to("cpu", copy=True, non_blocking=True) if isinstance(value, Tensor) else value


@attrs.define
class Learner:
    """Turns experience into updates of the policy.

    Attributes:
        policy, objective: what learns, and from which loss.
        reward: whose gradient objectives may ask for.
        optimizer: over `policy.trainable_parameters()`.
        sets: named copies of the parameters.
        micro_batch_size: (rollout, step) pairs per forward pass.
        optimizer_steps_per_iteration: steps of the optimizer per rollout batch; each sees its own share of the groups.
        max_grad_norm: global norm at which gradients are clipped.
        ema_decay: of the evaluation average, or None.
        seed: of the run.
        warmup_steps: linear warm-up of the learning rate.
        reduce_sum: adds a tensor up over all processes, in place; None for one process.
        optimizer_step: steps of the optimizer taken so far.
    """

    policy: Policy
    objective: Objective
    reward: Reward
    optimizer: torch.optim.Optimizer
    sets: ParameterSets
    micro_batch_size: int
    optimizer_steps_per_iteration: int = 1
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    seed: int = 0
    warmup_steps: int = 0
    reduce_sum: Callable[[Tensor], Tensor] | None = None
    optimizer_step: int = 0
    _read: set[str] = attrs.field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        averaged = {"ema"} if self.ema_decay is not None else set()
        for name in sorted((self.objective.needs.parameter_sets | averaged) - set(self.sets.names)):
            self.sets.add(name)
        for name in self.objective.needs.parameter_sets:
            if (values := self.objective.starting_values(name)) is not None:
                self.sets.load(name, values)
                self._read.add(name)

    @property
    def saved_sets(self) -> tuple[str, ...]:
        """The sets that a checkpoint keeps: not those that can be made again, the reference and what was read."""
        return tuple(name for name in self.sets.names if name != "reference" and name not in self._read)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.policy.trainable_parameters().values())

    def learn(
        self, experience: Experience | Sequence[Experience], advance: Callable[[int], None] = lambda count: None
    ) -> dict[str, float]:
        """All optimizer steps of one rollout batch, or none; `advance` is called after every backward pass.

        Where images are of several sizes there is one experience for each, and every step learns from all of them.

        Where something fails after the first of several steps, weights, optimizer and parameter sets are put back as
        they were before the batch. Until then a copy of them waits in host memory.

        Raises:
            UpdateRefused: on a NaN or infinite loss or gradient, on every process alike.
            OtherProcessFailed: when only others have failed.
        """
        batches = [experience] if isinstance(experience, Experience) else list(experience)
        parts = list(zip(*(self._split(batch) for batch in batches), strict=True))
        if len(parts) == 1:
            return self._steps(parts, advance)
        before = _State.of(self)
        try:
            return self._steps(parts, advance)
        except BaseException:
            before.restore(self)
            raise

    def _steps(self, parts: list[tuple[Experience, ...]], advance: Callable[[int], None]) -> dict[str, float]:
        needs = self.objective.needs
        if len(parts) > 1 and needs.old_log_probs:
            # The first update is on policy by construction; the later ones need log-probs from the same graph and
            # batches.
            with self._failing_together():
                parts = [parts[0], *(tuple(self._replayed(batch) for batch in part) for part in parts[1:])]
        averages = Averages()
        for index, part in enumerate(parts):
            averages.add(self._update(part, advance, on_policy=index == 0))
        if "old" in needs.parameter_sets:
            self.sets.blend("old", self.objective.old_decay(self.optimizer_step))
        return averages.result()

    def _split(self, experience: Experience) -> list[Experience]:
        """Whole groups, spread over the optimizer steps of this rollout batch."""
        if self.optimizer_steps_per_iteration == 1:
            return [experience]
        own = on_host(experience.groups)
        groups = own.unique()
        if len(groups) % self.optimizer_steps_per_iteration:
            raise ValueError(
                f"optimizer_steps_per_iteration={self.optimizer_steps_per_iteration} does not divide the "
                f"{len(groups)} groups of this process. Choose a divisor, so that every step sees equally many."
            )
        # In the order of their identities, so that several processes split as one would (see `shard_prompts`).
        shares = groups.chunk(self.optimizer_steps_per_iteration)
        return [experience.take(torch.isin(own, part).nonzero()[:, 0]) for part in shares]

    def _informative_rows(self, experience: Experience) -> Tensor:
        rows = self.objective.needs.rows
        if rows == "valid":
            return on_host(experience.rewards.valid).nonzero()[:, 0]
        return informative_rows(experience, whole_groups=rows == "groups")

    def _context(self, num_rollouts: int, num_groups: int, num_pairs: int = 1, *, on_policy: bool) -> UpdateContext:
        return UpdateContext(
            seed=derive_seed(self.seed, "update", self.optimizer_step),
            micro_batch_size=self.micro_batch_size,
            num_rollouts=num_rollouts,
            num_groups=num_groups,
            num_pairs=num_pairs,
            on_policy=on_policy,
            weights=self.sets.use,
            reward_gradient=functools.partial(
                reward_gradient, self.policy, self.reward, rollout_batch_size=self.micro_batch_size
            ),
        )

    @torch.no_grad()
    def _replayed(self, experience: Experience) -> Experience:
        """The experience with log-probabilities recomputed through the update's own forward pass and batch geometry."""
        trajectory = experience.trajectory
        log_probs = trajectory.log_probs.clone()
        rows = self._informative_rows(experience)
        informative = experience.take(rows)
        trainable = trainable_steps(informative, stochastic_only=True)
        for rollouts, steps in self._context(1, 1, on_policy=True).micro_batches(trainable):
            pairs = informative.step_batch(rollouts, steps)
            velocity = self.policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
            transition = trajectory.transition(pairs.latents, velocity, pairs.sigma, pairs.sigma_next)
            log_probs[to_device(rows, steps.device)[rollouts], steps] = trajectory.log_prob_map(
                pairs.next_latents, transition
            )
        return attrs.evolve(experience, trajectory=attrs.evolve(trajectory, log_probs=log_probs))

    def _update(
        self, batches: Sequence[Experience], advance: Callable[[int], None], *, on_policy: bool
    ) -> dict[str, Tensor]:
        """One step of the optimizer, from batches that differ in the size of their images."""
        rows = [self._informative_rows(batch) for batch in batches]
        num_rollouts, num_groups, num_informative, num_pairs = self._total(
            float(sum(on_host(batch.rewards.valid).sum() for batch in batches)),
            float(sum(len(on_host(batch.groups).unique()) for batch in batches)),
            float(sum(map(len, rows))),
            torch.stack([_trained_pairs(batch) for batch in batches]).sum(),
        )
        taken = [batch.take(kept) for batch, kept in zip(batches, rows, strict=True)]
        informative = [batch for batch in taken if batch.num_rollouts]
        averages, total = Averages(), torch.zeros((), device=self.parameters[0].device)
        self.optimizer.zero_grad(set_to_none=True)
        with contextlib.ExitStack() as undo:
            undo.callback(self.optimizer.zero_grad, set_to_none=True)
            counts = [max(1, round(count)) for count in (num_rollouts, num_groups, num_pairs)]
            with self._failing_together():
                for batch in informative:
                    context = self._context(*counts, on_policy=on_policy)
                    for loss in self.objective.losses(self.policy, batch, context=context):
                        loss.value.backward()
                        total = total + loss.value.detach()
                        averages.add(loss.metrics, loss.steps)
                        advance(1)
            gradient = self._reduced_gradient_norm()
            # The only time that a single process waits for the backward passes.
            value, norm = self._total(total, norm_of=gradient)
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise UpdateRefused(
                    f"update {self.optimizer_step + 1}: loss={value:g}, gradient norm={norm:g}. The update was not "
                    "applied. Look for overflow in the reward or advantages; lower learning_rate or use float32."
                )
            if norm > 0:
                self._step(gradient)
        self.optimizer_step += 1
        result = {k: torch.tensor([v]) for k, v in averages.result().items()}
        return result | {
            "loss/total": torch.tensor([value]),
            "grad_norm": torch.tensor([norm]),
            "informative": torch.tensor([num_informative / max(1.0, num_rollouts)]),
        }

    def _step(self, norm: Tensor) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm.double())
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1.0, (self.optimizer_step + 1) / max(1, self.warmup_steps))
        self.optimizer.step()
        if self.ema_decay is not None:
            step = self.optimizer_step + 1
            self.sets.blend("ema", power_decay(step, decay=self.ema_decay, warmup=10))

    def _reduced_gradient_norm(self) -> Tensor:
        """Sum the gradients over processes (the losses are shares of one mean) and take their global norm.

        Those of sharded parameters have been summed in the backward passes; each process holds its part of the sum.
        """
        if is_sharded(self.parameters[0]):
            assert self.reduce_sum is not None, "shards are spread over processes"
            squares, copies = _squared_norm_here(self.parameters)
            return (self.reduce_sum(squares) / copies).sqrt()
        if self.reduce_sum is not None:
            own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            for parameter, gradient in zip(self.parameters, sum_in_buckets(own, self.reduce_sum), strict=True):
                parameter.grad = gradient
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """A block without collectives: where it fails on one process, such as out of memory, none waits for that one.

        Raises:
            OtherProcessFailed: when only others have failed; the error itself where it happened.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = error is not None
        if self.reduce_sum is not None:
            with because_of(error):
                failed = self._total(float(failed))[0] > 0
        if failed:
            raise telling(error) or OtherProcessFailed(
                f"optimizer step {self.optimizer_step + 1}: another process failed; see its message."
            )

    def _total(self, *values: float | Tensor, norm_of: Tensor | None = None) -> list[float]:
        """The sums over all processes, and a number that is the same on all of them: read together."""
        device = self.parameters[0].device
        there = [
            v.double() if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=device)
            for v in values
        ]
        totals = torch.stack(there)
        if self.reduce_sum is not None:
            totals = self.reduce_sum(totals)
        if norm_of is not None:
            totals = torch.cat([totals, norm_of.to(device).double()[None]])
        return [float(total) for total in totals.tolist()]


def _squared_norm_here(parameters: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The square of the norm of what is here of the gradients of sharded parameters, and how many hold a copy of it.

    Returns:
        Scalar float64 on their device; processes that hold an equal copy, this one included.
    """
    here = [local(p.grad) for p in parameters if p.grad is not None]
    squares = torch.zeros((), dtype=torch.float64, device=local(parameters[0]).device)
    if here:
        squares = torch.stack(torch._foreach_norm(here, dtype=torch.float32)).double().square().sum()
    return squares, rows_of(parameters[0]).replicas  # all parameters lie on one mesh


def _trained_pairs(experience: Experience) -> Tensor:
    """How many (rollout, step) pairs have a log-probability and a valid reward."""
    trained = trainable_steps(experience, stochastic_only=True) & experience.rewards.valid[:, None]
    return trained.sum()


def informative_rows(experience: Experience, *, whole_groups: bool = False) -> Tensor:
    """Rows with a valid reward and some advantage: the others would add nothing but the cost of their forward pass.

    [N] long, on the host.

    Args:
        whole_groups: keep all valid rows of a group of which one has some advantage, for objectives that compare them.
    """
    valid = experience.rewards.valid
    there = (experience.credit.advantage != 0).flatten(1).any(dim=1).to(valid.device)
    valid, some = on_host(torch.stack([valid, there & valid])).unbind()  # one wait for both
    if whole_groups:
        groups = on_host(experience.groups)
        some = torch.isin(groups, groups[some])
    return (some & valid).nonzero()[:, 0]
