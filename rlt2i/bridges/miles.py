"""miles_diffusion (radixark): credit and objectives of this package behind its `--custom-*-path` flags.

The flags take import paths, so a module of yours holds the hooks:

    # my_credit.py
    from rlt2i import ClippedSurrogate, GroupRelative, Product, TextAttention
    from rlt2i.bridges.miles import Hooks

    hooks = Hooks(objective=ClippedSurrogate(), credit=Product(
        advantage=GroupRelative(std="global"), allocations=(TextAttention(blocks="middle"),)))
    post_process, expand, loss = hooks.post_process, hooks.expand, hooks.loss

`post_process` computes the advantage and `expand` the maps that need whole groups, both where rollouts are collected;
`loss` reads attention, where it is wanted, in one more pass of the network and runs the objective on the velocity that
the actor computed. Written against the sources of November 2026.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.bridges.attention import attention_maps, core_tokens
from rlt2i.bridges.experience import (
    EngineAdvantage,
    MetricMeans,
    check_objective,
    credit_context,
    make_experience,
    prompt_groups,
    token_grid,
    update_context,
)
from rlt2i.bridges.miles_data import (
    RecordedVelocity,
    cell,
    clean_predictions,
    kernel_of,
    log_prob_maps,
    old_log_prob_maps,
    pairs_as_rollouts,
    rewards_of,
)
from rlt2i.bridges.versions import extension_points
from rlt2i.credit.algebra import Allocation, Product
from rlt2i.interfaces import Needs, Objective
from rlt2i.seeds import derive_seed
from rlt2i.types import Conditioning, Credit, Rewards, Trajectory

SINCE = (
    "miles_diffusion of July 2026 or newer, which has miles.backends.fsdp_utils.loss_hub: "
    "pip install git+https://github.com/radixark/miles_diffusion"
)


@attrs.frozen(kw_only=True)
class Hooks:
    """What the flags of miles_diffusion name.

    Attributes:
        objective: on the reverse process; the actor owns the forward pass, so it cannot be asked for other states.
        credit: advantage, allocations and masks. Regions come from `sample.metadata["regions"]`, where a custom reward
            wrote them; clean predictions from `--diffusion-debug-mode`; core phrases from `sample.metadata["core"]`.

    Raises:
        ValueError: when objective or credit need what the engine does not give.
    """

    objective: Objective
    credit: Product = attrs.field(factory=lambda: Product(advantage=EngineAdvantage()))

    def __attrs_post_init__(self) -> None:
        allowed = frozenset({"noise", "old_log_probs", "reference"})
        check_objective(self.objective, engine="miles_diffusion", allowed=allowed)
        if not self.objective.needs.noise:
            raise ValueError(
                f"{type(self.objective).__name__} works on the forward process: it noises images itself, and "
                "miles_diffusion's actor has run the network before. Use ClippedSurrogate() or Reinforce()."
            )
        for need in sorted(self.credit.needs.names - {"groups", "noise", "clean_predictions", "reward/regions"}):
            if not need.startswith("attention/") or need.endswith("/auto"):
                raise ValueError(
                    f"{self.credit.who_needs(need)} needs {need!r}, which miles_diffusion does not hand to its hooks. "
                    "Use TextAttention(blocks='middle'), ResidualContrast() or RegionMaps()."
                )

    # --------------------------------------------------------------------------------- where rollouts are collected

    def post_process(self, args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
        """`--custom-reward-post-process-path`: raw rewards and advantages.

        Raises:
            ValueError: for an advantage that resolves steps or places.
        """
        raw = [float(sample.get_reward_value(args)) for sample in samples]
        advantage = self.credit.advantage.advantage(self._context(args, samples, rewards_of(raw, samples)))
        if advantage.shape[1:] != (1, 1, 1):
            raise ValueError(
                f"{type(self.credit.advantage).__name__} resolves steps or places, and miles_diffusion keeps one "
                "advantage per sample. Use GroupRelative() or WinRate()."
            )
        return raw, advantage.flatten().tolist()

    def expand(self, args: Any, samples: Sequence[Any], rewards: Sequence[float], raw_rewards: Sequence[float]) -> Any:
        """`--custom-expand-samples-to-train-pairs-path`: the engine's pairs, with weight and mask beside them."""
        (own,) = extension_points(
            "miles", "miles.ray.data_conversion_hub.flow_grpo", ("expand_samples_to_train_pairs",), since=SINCE
        )
        data = own(args, samples, rewards, raw_rewards)
        context = self._context(args, samples, rewards_of(raw_rewards, samples, advantage=rewards))
        whole = attrs.evolve(self.credit, advantage=EngineAdvantage(), allocations=self._allocations(attention=False))
        credit = whole.assign(context)
        spans = self._spans(args, samples)
        pairs = iter(data["train_data"])
        for row, sample in enumerate(samples):
            for step in sample.train_metadata["sde_step_indices"]:
                pair = next(pairs)
                pair["credit_step"] = int(step)
                pair["credit_weight"] = cell(credit.weight, row, int(step))
                pair["credit_mask"] = cell(credit.mask, row, int(step))
                if spans is not None:
                    pair["core_tokens"], pair["core_members"] = spans[0][row], spans[1][row]
        return data

    def _allocations(self, *, attention: bool) -> tuple[Allocation, ...]:
        reads = lambda part: any(need.startswith("attention/") for need in part.needs.captures)
        return tuple(part for part in self.credit.allocations if reads(part) == attention)

    def _context(self, args: Any, samples: Sequence[Any], rewards: Rewards) -> Any:
        labels = [str(sample.group_index) for sample in samples]
        first = samples[0].dit_trajectory
        latents = torch.stack([sample.dit_trajectory.latents.float() for sample in samples])
        sigmas = first.sigmas.float().cpu()
        stochastic = torch.zeros(len(sigmas) - 1, dtype=torch.bool)
        stochastic[list(samples[0].train_metadata["sde_step_indices"])] = True
        captures = {}
        if "clean_predictions" in self.credit.needs.captures:
            captures["clean_predictions"] = clean_predictions(samples, latents, sigmas)
        trajectory = Trajectory(
            latents=latents,
            sigmas=sigmas,
            log_probs=latents.new_zeros(1, 1, 1, 1).expand(len(samples), len(stochastic), *latents.shape[-2:]),
            stochastic=stochastic,
            kernel=kernel_of(args),
            conditioning=Conditioning(tensors={}, rows=torch.arange(len(samples))),
            group_size=prompt_groups(labels) if self.credit.needs.groups else 1,
            captures=captures,
        )
        return credit_context(
            trajectory=trajectory,
            rewards=rewards,
            texts=[sample.prompt for sample in samples],
            metadata=[dict(sample.metadata or {}) for sample in samples],
            keys=torch.tensor([derive_seed(str(sample.index)) for sample in samples]),
            seed=int(getattr(args, "seed", 0)),
            iteration=0,
        )

    def _spans(self, args: Any, samples: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
        if not self._allocations(attention=True):
            return None
        from transformers import AutoTokenizer

        embedded = torch.cat(samples[0].denoising_env.pos_cond_kwargs.encoder_hidden_states)
        load = lambda name: AutoTokenizer.from_pretrained(args.hf_checkpoint, subfolder=name)
        clip = load("tokenizer")
        return core_tokens(
            [sample.prompt for sample in samples],
            [(sample.metadata or {}).get("core", ()) for sample in samples],
            clip=clip,
            t5=load("tokenizer_3") if embedded.shape[-2] > clip.model_max_length else None,
            text_length=embedded.shape[-2],
        )

    # ------------------------------------------------------------------------------------------- where it is trained

    def loss(
        self,
        ctx: Any,
        batch: Sequence[dict[str, Any]],
        prepared: Any,
        *,
        new_pred: Tensor,
        metrics: Any,
        ref_pred: Tensor | None = None,
        write_old_log_prob: bool = False,
        old_log_prob_from_new: bool = False,
        **_: Any,
    ) -> Tensor | None:
        """`--custom-loss-function-path`: the sum of the objective's losses over N (sample, step) pairs.

        Args:
            new_pred, ref_pred: [N, C, H, W] velocities of policy and reference.
            write_old_log_prob: write log-probabilities into the pairs instead, place by place.
            old_log_prob_from_new: whether the weights are still those of the rollout.
        """
        steps = torch.tensor([pair["credit_step"] for pair in batch], device=new_pred.device)
        trajectory = pairs_as_rollouts(ctx, prepared, steps)
        rows = torch.arange(len(batch), device=new_pred.device)
        if write_old_log_prob:
            for pair, log_prob in zip(batch, log_prob_maps(trajectory, new_pred, rows, steps), strict=True):
                pair["log_prob_old"], pair["log_prob_old_map"] = log_prob.mean().cpu(), log_prob.cpu()
            return None
        log_probs = None
        if not old_log_prob_from_new and self.objective.needs.old_log_probs:
            log_probs = trajectory.log_probs.clone()
            log_probs[rows, steps] = old_log_prob_maps(batch).to(log_probs)
        trained = torch.zeros_like(trajectory.noisy)
        trained[rows, steps] = True
        policy = RecordedVelocity(new_pred, ref_pred)
        experience = make_experience(
            trajectory=trajectory,
            log_probs=log_probs,
            trained=trained,
            credit=self._credit(batch, prepared, trajectory),
            keys=torch.tensor([derive_seed(str(pair["sample_index"])) for pair in batch], device=new_pred.device),
            groups=rows,
        )
        context = update_context(
            seed=int(getattr(ctx.args, "seed", 0)),
            num_rollouts=len(batch),
            num_pairs=1,  # the actor divides the sum by the number of pairs
            max_pairs=len(batch),
            on_policy=log_probs is None,
            weights=policy.under,
        )
        losses = list(self.objective.losses(policy.as_policy(), experience, context=context))
        total = torch.stack([loss.value for loss in losses]).sum()
        means = MetricMeans()
        for loss in losses:
            means.add(loss.metrics)
        observed = means.result()
        metrics.emit_mean("loss", total=total.detach(), count=len(batch))
        metrics.emit_mean("policy_loss", total=total.detach(), count=len(batch))
        if "clip/high" in observed:
            clipped = total.new_tensor((observed["clip/high"] + observed["clip/low"]) * len(batch))
            metrics.emit_mean("clipfrac", total=clipped, count=len(batch))
        return total

    def _credit(self, batch: Sequence[dict[str, Any]], prepared: Any, trajectory: Trajectory) -> Credit:
        device = trajectory.latents.device
        weight = torch.stack([pair["credit_weight"] for pair in batch]).to(device)[:, None]
        mask = torch.stack([pair["credit_mask"] for pair in batch]).to(device)[:, None]
        allocations = self._allocations(attention=True)
        if allocations:
            context, product = self._attention_context(batch, prepared, trajectory), weight
            for part in allocations:
                product = product * part.weight(context)
            # Maps move weight between places; how much a step weighs was said where all steps were at hand.
            weight = product * (weight.mean(dim=(2, 3), keepdim=True) / product.mean(dim=(2, 3), keepdim=True))
        advantage = prepared.advantage.float()[:, None, None, None]
        grid = torch.broadcast_shapes(weight.shape[2:], mask.shape[2:])
        return Credit(advantage=advantage, weight=weight.detach(), mask=mask, grid=(grid[0], grid[1]))

    def _attention_context(self, batch: Sequence[dict[str, Any]], prepared: Any, trajectory: Trajectory) -> Any:
        """The pairs as rollouts of one step, with the attention of one pass of the network."""
        names = Needs.of_all(part.needs for part in self._allocations(attention=True)).captures
        states = prepared.latents.float()
        stack = lambda key: torch.stack([pair[key] for pair in batch]).to(states.device)

        def forward() -> None:
            dtype = next(prepared.model.parameters()).dtype
            prepared.model(
                hidden_states=states.to(dtype),
                timestep=prepared.timesteps_for_model.to(dtype),
                return_dict=False,
                **prepared.pos_cond,
            )

        maps = attention_maps(
            prepared.model, forward, names,
            tokens=stack("core_tokens"), members=stack("core_members"), grid=token_grid(states),
        )  # fmt: skip
        single = attrs.evolve(
            trajectory,
            latents=states[:, None].expand(-1, 2, -1, -1, -1),
            sigmas=trajectory.sigmas[:2],
            log_probs=trajectory.log_probs[:, :1],
            stochastic=trajectory.stochastic[:1],
            noisy=trajectory.noisy[:, :1],
            captures={name: values[:, None] for name, values in maps.items()},
        )
        return credit_context(
            trajectory=single,
            rewards=Rewards(
                values=states.new_zeros(len(batch), 1),
                valid=torch.ones(len(batch), dtype=torch.bool, device=states.device),
            ),
            texts=[pair["prompt"] for pair in batch],
            metadata=[{} for _ in batch],
            keys=torch.tensor([derive_seed(str(pair["sample_index"])) for pair in batch]),
            seed=0,
            iteration=0,
        )
