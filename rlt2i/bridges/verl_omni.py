"""verl-omni: credit of this package in its training adapters and its advantages, by `external_lib`.

verl-omni imports the module that `actor_rollout_ref.model.external_lib` names in its driver and in every worker:

    # my_credit.py
    from rlt2i import GroupRelative, NoiseAware, TextAttention
    from rlt2i.bridges import verl_omni

    verl_omni.register_credit("StableDiffusion3Pipeline", TextAttention(blocks="middle"), NoiseAware())
    verl_omni.register_advantage("rlt2i", GroupRelative())     # algorithm.adv_estimator=rlt2i

The loss stays verl-omni's: it reads one log-probability per sample and step. A credited adapter returns the same
number, bit for bit, and bends its gradient: grad = mean_p w_p grad log p_p. On policy this is the gradient of
`ClippedSurrogate` with the map w; which ratios are clipped is verl-omni's decision. Written against 0.2.0rc1
(a1139ba, August 2026); `flow_grpo`, `flow_dppo`, `grpo_guard` and `dance_grpo` all read that log-probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlt2i.bridges.attention import attention_maps, core_tokens
from rlt2i.bridges.experience import credit_context, prompt_groups, token_grid
from rlt2i.bridges.versions import extension_points
from rlt2i.credit.algebra import Advantage, Allocation
from rlt2i.functional.gaussian import cps_log_prob_map, log_prob_map
from rlt2i.objectives.reduction import on_grid
from rlt2i.samplers.kernels import CPS, DanceSDE, FlowSDE
from rlt2i.types import Conditioning, Rewards, Trajectory, TransitionKernel

SINCE = (
    "verl-omni 0.2.0rc1 or newer (commit a1139ba of August 2026): "
    "pip install git+https://github.com/verl-project/verl-omni"
)


def register_credit(architecture: str, *allocations: Allocation, algorithm: str = "flow_grpo") -> type:
    """Put a credited adapter in the place of the one that verl-omni registered for (architecture, algorithm).

    Args:
        architecture: of the pipeline's model_index.json, such as "StableDiffusion3Pipeline".
        allocations: weights over places and steps; their product acts.
        algorithm: `actor_rollout_ref.model.algorithm`.

    Returns:
        The credited adapter.

    Raises:
        ImportError: when verl-omni lacks the registry, naming the version that has it.
        ValueError: when there is no such adapter, or an allocation needs what the adapter does not see.
    """
    base, _, _ = extension_points(
        "verl_omni",
        "verl_omni.pipelines.model_base",
        ("DiffusionModelBase", "DiffusionModelBase.peek_class", "DiffusionModelBase.register"),
        since=SINCE,
    )
    for part in allocations:
        for need in sorted(part.needs.names - {"noise"}):
            if not need.startswith("attention/") or need.endswith("/auto"):
                raise ValueError(
                    f"{type(part).__name__} needs {need!r}; verl-omni's adapters see single steps of a micro-batch, "
                    "neither groups nor rewards. Use TextAttention(blocks='middle') or weights over steps."
                )
    adapter = base.peek_class(architecture, algorithm)
    if adapter is None:
        raise ValueError(
            f"verl-omni has no adapter for architecture={architecture!r} and algorithm={algorithm!r}. Import the "
            "module that registers it first, or name one that exists."
        )
    credited = type(f"Credited{adapter.__name__}", (adapter,), {})
    credited.forward_and_sample_previous_step = classmethod(_credited_step(credited, allocations))  # type: ignore[attr-defined]
    return base.register(architecture, algorithm=algorithm)(credited)


def register_advantage(name: str, advantage: Advantage) -> Any:
    """Make `algorithm.adv_estimator=name` an advantage of this package, on the final reward of each image.

    Raises:
        ImportError: when verl-omni lacks the registry, naming the version that has it.
        ValueError: when the advantage needs more than rewards and groups.
    """
    (register,) = extension_points(
        "verl_omni",
        "verl_omni.trainer.diffusion.diffusion_algos",
        ("register_diffusion_adv_est",),
        since=SINCE,
    )
    more = sorted(advantage.needs.names - {"groups"})
    if more:
        raise ValueError(
            f"{type(advantage).__name__} needs {more}; verl-omni's estimators see rewards and groups alone. Use "
            "GroupRelative() or WinRate()."
        )

    def estimate(sample_level_rewards: Tensor, index: Sequence[Any], **_: Any) -> tuple[Tensor, Tensor]:
        rewards, labels = sample_level_rewards[:, -1].float(), [str(label) for label in index]
        order = sorted(range(len(labels)), key=lambda i: (labels.index(labels[i]), i))
        given = advantage.advantage(_reward_context(rewards[order], [labels[i] for i in order]))
        if given.shape[1:] != (1, 1, 1):
            raise ValueError(
                f"{type(advantage).__name__} resolves steps or places; verl-omni passes one reward per image."
            )
        values = torch.empty_like(rewards)
        values[order] = given.flatten()
        spread = values[:, None].expand(-1, sample_level_rewards.shape[1]).contiguous()
        return spread, spread.clone()

    return register(name)(estimate)


def _credited_step(credited: type, allocations: tuple[Allocation, ...]) -> Any:
    def forward_and_sample_previous_step(
        cls: type,
        module: Any,
        scheduler: Any,
        model_config: Any,
        model_inputs: Mapping[str, Any],
        negative_model_inputs: Mapping[str, Any] | None,
        scheduler_inputs: Any,
        step: int,
    ) -> tuple[Tensor, ...]:
        log_prob, mean, *scales = super(credited, cls).forward_and_sample_previous_step(  # type: ignore[arg-type]
            module, scheduler, model_config, model_inputs, negative_model_inputs, scheduler_inputs, step
        )
        if torch.is_grad_enabled() and log_prob.requires_grad:  # without gradient there is nothing to bend
            after = scheduler_inputs["all_latents"][:, step + 1].float()
            if after.ndim != 4:
                raise ValueError(
                    f"all_latents[:, step]: got shape {tuple(after.shape)}, expected [B, C, H, W]. Credit over places "
                    "needs latents with two axes in space; this pipeline packs them."
                )
            weight = _weight(allocations, module, scheduler, model_config, model_inputs, scheduler_inputs, step)
            bent = (weight * _log_prob_map(model_config.algo.sde_type, after, mean, *scales)).mean(dim=(1, 2))
            log_prob = log_prob.detach() + (bent - bent.detach()).to(log_prob.dtype)
        return (log_prob, mean, *scales)

    return forward_and_sample_previous_step


def _log_prob_map(sde_type: str, after: Tensor, mean: Tensor, std_dev_t: Tensor, sqrt_dt: Tensor) -> Tensor:
    """[B, H, W], whose mean over places is verl-omni's log-probability, but for rounding."""
    if sde_type == "cps":
        return cps_log_prob_map(after, mean)
    std = std_dev_t.reshape(-1, 1, 1, 1)
    return log_prob_map(after, mean, std * sqrt_dt.reshape(-1, 1, 1, 1) if sde_type == "sde" else std)


def _weight(
    allocations: tuple[Allocation, ...],
    module: Any,
    scheduler: Any,
    model_config: Any,
    model_inputs: Mapping[str, Any],
    micro_batch: Any,
    step: int,
) -> Tensor:
    """[B, 1|h, 1|w] expanded to the latents: the product of the allocations at one step."""
    states = micro_batch["all_latents"][:, step].float()
    steps = [int(scheduler.index_for_timestep(t)) for t in micro_batch["all_timesteps"][0]]
    names = frozenset(need for part in allocations for need in part.needs.captures if need.startswith("attention/"))
    captures = _attention(names, states, module, model_config, model_inputs, micro_batch) if names else {}
    weight = states.new_ones(len(states), 1, 1)
    for part in allocations:
        if part.needs.captures & names:
            given = part.weight(_context(states, scheduler, model_config, [steps[step]], captures))[:, 0]
        else:
            given = part.weight(_context(states, scheduler, model_config, steps, {}))
            given = given[:, steps[step] if given.shape[1] > 1 else 0]
        weight = weight * given
    size = (states.shape[-2], states.shape[-1])
    return on_grid(weight, size)


def _context(
    states: Tensor, scheduler: Any, model_config: Any, steps: Sequence[int], captures: Mapping[str, Tensor]
) -> Any:
    """The micro-batch on its whole schedule, for weights over steps; with captures, on the captured step alone."""
    schedule = scheduler.sigmas.to(states.device, torch.float32)
    sigmas = schedule if not captures else schedule[steps[0] : steps[0] + 2]
    num, length = len(states), len(sigmas) - 1
    stochastic = torch.zeros(length, dtype=torch.bool, device=states.device)
    stochastic[list(steps) if not captures else [0]] = True
    trajectory = Trajectory(
        latents=states[:, None].expand(-1, length + 1, -1, -1, -1),
        sigmas=sigmas,
        log_probs=states.new_zeros(1, 1, 1, 1).expand(num, length, *states.shape[-2:]),
        stochastic=stochastic,
        kernel=_kernel(model_config.algo),
        conditioning=Conditioning(tensors={}, rows=torch.arange(num, device=states.device)),
        group_size=1,
        captures={name: maps[:, None] for name, maps in captures.items()},
    )
    return _credit_context(trajectory, states.new_zeros(num), [""] * num)


def _attention(
    names: frozenset[str],
    states: Tensor,
    module: Any,
    model_config: Any,
    model_inputs: Mapping[str, Any],
    micro_batch: Any,
) -> dict[str, Tensor]:
    tokenizers = {name: entry["tokenizer"] for name, entry in (model_config.extra_tokenizer_map or {}).items()}
    if "clip" not in tokenizers:
        raise ValueError(
            "attention maps need the text tokenizers. Set actor_rollout_ref.model.extra_tokenizers="
            "'{clip: {path: tokenizer, max_length: 77}, t5: {path: tokenizer_3, max_length: 256}}'."
        )
    rows = [getattr(row, "data", row) for row in micro_batch.get("extra_info", None) or ()]
    if len(rows) != len(states) or not all(row.get("raw_prompt") for row in rows):
        raise ValueError(
            "attention maps start from the words of the prompt. Write them as extra_info.raw_prompt when the data are "
            "prepared, as verl-omni's examples/flowgrpo_trainer/data_process/sd3_ocr.py does."
        )
    tokens, members = core_tokens(
        [row["raw_prompt"] for row in rows],
        [row.get("core", ()) for row in rows],
        clip=tokenizers["clip"],
        t5=tokenizers.get("t5"),
        text_length=model_inputs["encoder_hidden_states"].shape[1],
    )
    return attention_maps(
        module, lambda: module(**model_inputs), names,
        tokens=tokens.to(states.device), members=members.to(states.device), grid=token_grid(states),
    )  # fmt: skip


def _kernel(algo: Any) -> TransitionKernel:
    level = float(algo.noise_level)
    kernels = {"sde": FlowSDE, "cps": CPS}
    return DanceSDE(eta=level) if algo.sde_type == "dance_sde" else kernels[algo.sde_type](noise_level=level)


def _reward_context(rewards: Tensor, labels: Sequence[str]) -> Any:
    """Whole groups of rewards; of their rollouts an estimator sees nothing."""
    num = len(rewards)
    trajectory = Trajectory(
        latents=rewards.new_zeros(num, 2, 1, 2, 2),
        sigmas=rewards.new_tensor([1.0, 0.0]),
        log_probs=rewards.new_zeros(num, 1, 2, 2),
        stochastic=torch.zeros(1, dtype=torch.bool, device=rewards.device),
        kernel=FlowSDE(),  # never consulted: there is no stochastic step
        conditioning=Conditioning(tensors={}, rows=torch.arange(num, device=rewards.device)),
        group_size=prompt_groups(labels),
    )
    return _credit_context(trajectory, rewards, labels)


def _credit_context(trajectory: Trajectory, rewards: Tensor, texts: Sequence[str]) -> Any:
    valid = torch.isfinite(rewards)
    return credit_context(
        trajectory=trajectory,
        rewards=Rewards(values=torch.where(valid, rewards, 0)[:, None], valid=valid),
        texts=texts,
        metadata=[{} for _ in texts],
        keys=torch.arange(len(texts)),
        seed=0,
        iteration=0,
    )
