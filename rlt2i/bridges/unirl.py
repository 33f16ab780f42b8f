"""UniRL (Tencent-Hunyuan, `pip install unirl`): any objective of this package as one of its algorithms.

`StageObjective` is a `StageAlgorithm`. UniRL calls it three times a batch: `prepare_segment` freezes old
log-probabilities, place by place; `prepare_part` sees the whole groups of a process, with rewards, and computes credit;
`compute_loss_and_backward` runs the objective on a micro-batch. Written against unirl 0.2.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from rlt2i.bridges.attention import attention_maps, core_tokens
from rlt2i.bridges.experience import (
    EngineAdvantage,
    EnginePolicy,
    MetricMeans,
    check_objective,
    credit_context,
    make_experience,
    prompt_groups,
    token_grid,
    update_context,
)
from rlt2i.bridges.unirl_data import (
    SINCE,
    CreditedSegment,
    SegmentCredit,
    identities,
    kernel_of,
    rewards_of,
    stochastic_steps,
    trajectory_of,
)
from rlt2i.bridges.versions import extension_points
from rlt2i.credit.algebra import Product
from rlt2i.functional.transitions import clean_prediction
from rlt2i.interfaces import CreditAssigner, Objective
from rlt2i.types import Credit, Trajectory

StageAlgorithm, AlgorithmStepResult, typed_conditions, _ = extension_points(
    "unirl",
    "unirl.algorithms.base",
    ("StageAlgorithm", "AlgorithmStepResult", "typed_conditions", "StageAlgorithm.prepare_part"),
    since=SINCE,
)


class _StageObjective(StageAlgorithm):  # type: ignore[misc, valid-type]
    """What both algorithms below share.

    Args:
        params: UniRL's sampling parameters of the rollout.
        objective: of this package.
        credit: of this package; by default UniRL's advantage, the same at every place.
        stage, pipeline, stage_attr, backend, conditions_cls: as in UniRL's own algorithms.
        seed: of draws that belong to an update.

    Raises:
        ValueError: when objective or credit need what UniRL does not hand to an algorithm.
    """

    requires_backend = True
    requires_ema_rollout: ClassVar[bool]
    anchor_fields = ("log_probs",)

    def __init__(
        self,
        *,
        params: Any,
        objective: Objective,
        credit: CreditAssigner | None = None,
        stage: Any = None,
        pipeline: Any = None,
        stage_attr: str = "diffusion",
        backend: Any = None,
        conditions_cls: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if stage is None and pipeline is None:
            raise ValueError(f"{type(self).__name__}: pass `stage`, or the `pipeline` that has it.")
        self.stage = getattr(pipeline, stage_attr) if stage is None else stage
        self.params, self.conditions_cls, self.backend, self.seed = params, conditions_cls, backend, seed
        self.objective = objective
        self.credit = Product(advantage=EngineAdvantage()) if credit is None else credit
        self._check()
        # Old log-probabilities, place by place, are no output of any rollout engine: they are made again. An objective
        # that asks for none takes one update per batch, which is on policy by construction.
        self.recomputes_anchor = self.supports_multi_update = objective.needs.old_log_probs

    def _check(self) -> None:
        allowed = {"noise", "old_log_probs"}
        if self.backend is not None:
            allowed.add("reference")
        if self.requires_ema_rollout or self.objective.needs.noise:
            allowed.add("old")  # the average of the weights; or, on policy, the policy itself
        check_objective(self.objective, engine="UniRL", allowed=frozenset(allowed))
        if self.requires_ema_rollout and not callable(getattr(self._average, "use_shadow", None)):
            raise ValueError(
                f"{type(self).__name__}: the backend keeps no average of its weights. Give the recipe's backend an "
                "`ema_lora_cfg`, as UniRL's sd3_nft.yaml does."
            )
        for need in sorted(self.credit.needs.names - {"groups", "noise", "clean_predictions"}):
            if not need.startswith("attention/") or need.endswith("/auto"):
                raise ValueError(
                    f"{self.credit.who_needs(need)} needs {need!r}, which UniRL does not hand to an algorithm. Use "
                    "TextAttention(blocks='middle'), ResidualContrast(), or weights over steps such as NoiseAware()."
                )

    @property
    def _average(self) -> Any:
        return getattr(self.backend, "ema", None)

    # ----------------------------------------------------------------------------------------------- UniRL's hooks

    def prepare_segment(self, *, conditions: Mapping[str, Any], segment: Any) -> None:
        """Write `segment.log_probs` [B, S, H, W] of the S stochastic steps, before any update."""
        if not self.recomputes_anchor or segment.sde_indices is None:
            return
        trajectory = self._trajectory(segment)
        policy, steps = self._policy(conditions), stochastic_steps(segment)
        context = self._context(trajectory, num_steps=len(steps))
        maps = torch.zeros_like(trajectory.log_probs).contiguous()
        with torch.no_grad():
            for rollouts, at in context.micro_batches(trajectory.noisy):
                states, sigma, sigma_next = (
                    trajectory.latents[rollouts, at],
                    *(trajectory.sigmas[at + i] for i in (0, 1)),
                )
                velocity = policy.velocity(states, sigma, trajectory.conditioning.take(rollouts))
                transition = trajectory.transition(states, velocity, sigma, sigma_next)
                maps[rollouts, at] = trajectory.log_prob_map(trajectory.latents[rollouts, at + 1], transition)
        segment.log_probs = maps[:, steps]

    def prepare_part(self, part: Any) -> Any:
        """The part, its segment with credit beside it."""
        segment, labels = part.segment, list(part.group_ids)
        metadata = [dict(row or {}) for row in part.metadata] or [{} for _ in labels]
        size = prompt_groups(labels) if self.credit.needs.groups else 1
        keys = identities(part.sample_ids, segment.latents.device)
        trajectory = self._trajectory(segment, group_size=size)
        captures = self._captures(trajectory, part.conditions, metadata)
        rewards = rewards_of(part)
        credit = self.credit.assign(
            credit_context(
                trajectory=attrs.evolve(trajectory, captures=captures),
                rewards=rewards,
                texts=[str(row.get("prompt", "")) for row in metadata],
                metadata=metadata,
                keys=keys,
                seed=self.seed,
                iteration=int(metadata[0].get("rollout_id", 0)),
            )
        )
        # An invalid reward gets advantage 0, not a mask: sharded processes must run equally many passes.
        judged = torch.where(rewards.valid[:, None, None, None], credit.advantage, 0)
        each = lambda tensor: tensor.expand(len(labels), *tensor.shape[1:])
        fields = {f.name: getattr(segment, f.name) for f in dataclasses.fields(segment)}
        fields["credit"] = SegmentCredit(
            advantage=judged,
            weight=each(credit.weight),
            mask=each(credit.mask),
            keys=keys,
            groups=identities(labels, keys.device),
        )
        part.segment = CreditedSegment(**fields)
        return part

    def compute_loss_and_backward(
        self,
        *,
        conditions: Mapping[str, Any],
        segment: Any,
        advantages: Tensor | None,
        training_progress: float,
        loss_scale: float,
    ) -> Any:
        """Backward of every loss of the objective on one micro-batch; they add up to its mean.

        Raises:
            ValueError: where `prepare_part` was not called, or steps without noise meet an objective that needs it.
        """
        del advantages, training_progress  # the credit beside the segment has the advantage
        credit = getattr(segment, "credit", None)
        if credit is None:
            raise ValueError(
                f"{type(self).__name__}: the segment has no credit, so prepare_part was not called. UniRL's TrainStack "
                "calls it; another stack of unirl 0.2.0, such as that of unified models, does not."
            )
        trajectory = self._trajectory(segment)
        reverse = self.objective.needs.noise
        steps = stochastic_steps(segment)
        if reverse and not steps:
            raise ValueError(
                f"{type(self.objective).__name__} needs stochastic steps and the rollout recorded none. Use "
                "num_sde_steps >= 1 in the recipe's sampling.scheduler, or an objective on the forward process."
            )
        log_probs = None
        if self.recomputes_anchor:
            log_probs = trajectory.log_probs.clone()
            log_probs[:, steps] = segment.log_probs.to(log_probs)
        experience = make_experience(
            trajectory=trajectory,
            log_probs=log_probs,
            trained=trajectory.noisy if reverse else torch.ones_like(trajectory.noisy),
            credit=Credit(
                advantage=credit.advantage,
                weight=credit.weight,
                mask=credit.mask,
                grid=_grid(credit.advantage, credit.weight, credit.mask),
            ),
            keys=credit.keys,
            groups=credit.groups,
        )
        context = self._context(trajectory, num_steps=max(1, len(steps)), on_policy=not self.recomputes_anchor)
        total, means = 0.0, MetricMeans()
        for loss in self.objective.losses(self._policy(conditions), experience, context=context):
            (loss.value * loss_scale).backward()
            total += float(loss.value.detach())
            means.add(loss.metrics)
        return AlgorithmStepResult(
            loss=total, metrics=means.result(), num_steps_or_tokens=max(1, len(steps)), has_backward=means.count > 0
        )

    def _trajectory(self, segment: Any, *, group_size: int = 1) -> Trajectory:
        return trajectory_of(segment, kernel_of(self.stage.strategy, float(self.params.eta)), group_size=group_size)

    def _policy(self, conditions: Mapping[str, Any], *, guided: bool = True) -> EnginePolicy:
        typed = typed_conditions(conditions, self.conditions_cls)
        params = self.params if guided else dataclasses.replace(self.params, guidance_scale=1.0)

        def predict(latents: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            with self._precision(latents.device):
                return self.stage.predict_noise_at_step(typed.select(rows), sample=latents, sigma=sigma, params=params)

        return EnginePolicy(predict=predict)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """The precision of the stage's own replay."""
        dtype = getattr(self.stage, "autocast_dtype", torch.float32)
        low = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
        return torch.autocast("cuda", dtype, enabled=low)

    def _captures(
        self, trajectory: Trajectory, conditions: Mapping[str, Any], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """What the credit needs, from one pass without gradient at every stored state.

        Steps whose state was not stored repeat the latest one, like the states themselves.
        """
        attention = frozenset(need for need in self.credit.needs.captures if need.startswith("attention/"))
        captures: dict[str, list[Tensor]] = {}
        for t in range(trajectory.num_steps) if attention or "clean_predictions" in self.credit.needs.captures else ():
            if t and torch.equal(trajectory.latents[:, t], trajectory.latents[:, t - 1]):
                for values in captures.values():
                    values.append(values[-1])
                continue
            states, sigma = trajectory.latents[:, t], trajectory.sigmas[t].expand(trajectory.num_rollouts)
            if "clean_predictions" in self.credit.needs.captures:
                with torch.no_grad():
                    velocity = self._policy(conditions).velocity(states, sigma, trajectory.conditioning)
                captures.setdefault("clean_predictions", []).append(clean_prediction(states, velocity, sigma))
            if attention:
                for name, maps in self._attention(attention, states, sigma, conditions, metadata).items():
                    captures.setdefault(name, []).append(maps)
        return {name: torch.stack(values, dim=1) for name, values in captures.items()}

    def _attention(
        self,
        names: frozenset[str],
        states: Tensor,
        sigma: Tensor,
        conditions: Mapping[str, Any],
        metadata: Sequence[Mapping[str, Any]],
    ) -> dict[str, Tensor]:
        if not all(row.get("prompt") for row in metadata):
            raise ValueError(
                "attention maps start from the words of the prompt, and UniRL keeps them away from its algorithms. "
                'Repeat them in the data: {"prompt": "a red cube", "metadata": {"prompt": "a red cube"}}.'
            )
        bundle, text = self.stage.model, conditions["text"].embeds
        tokens, members = core_tokens(
            [row["prompt"] for row in metadata],
            [row.get("core", ()) for row in metadata],
            clip=bundle.tokenizer,
            t5=bundle.tokenizer_3,
            text_length=text.shape[1],
        )
        policy, rows = self._policy(conditions, guided=False), torch.arange(len(states), device=states.device)
        return attention_maps(
            bundle.transformer,
            lambda: policy.predict(states, sigma, rows),
            names,
            tokens=tokens.to(states.device),
            members=members.to(states.device),
            grid=token_grid(states),
        )

    def _context(self, trajectory: Trajectory, *, num_steps: int, on_policy: bool = True) -> Any:
        """One pass of the network takes as many (rollout, step) pairs as the micro-batch has rollouts."""
        num = trajectory.num_rollouts
        return update_context(
            seed=self.seed,
            num_rollouts=num,
            num_pairs=num * num_steps,
            max_pairs=num,
            on_policy=on_policy,
            weights=self._weights,
        )

    def _weights(self, name: str) -> AbstractContextManager[Any]:
        if name == "old":
            return self._average.use_shadow()
        from unirl.train.lora import adapters_disabled

        return adapters_disabled(self.backend.model)


class StageObjective(_StageObjective):
    """An objective of this package on a diffusion stage of UniRL, with rollouts under the current weights."""

    requires_ema_rollout = False


class AveragedStageObjective(_StageObjective):
    """The same with rollouts under UniRL's average of the weights, which is "old" to the objective: NFT and AWM."""

    requires_ema_rollout = True


def _grid(*fields: Tensor) -> tuple[int, int]:
    shape = torch.broadcast_shapes(*(field.shape[2:] for field in fields))
    return (shape[0], shape[1])
