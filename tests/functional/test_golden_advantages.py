"""Golden cases: advantages, preference pairs, step rewards, trees, windows, decays."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlt2i.evaluation.best_worst import best_worst_pairs
from rlt2i.functional import ema
from rlt2i.functional.advantages import best_of_group, gdpo, group_relative_advantage, group_std, reward_weights
from rlt2i.functional.matching import nft_label
from rlt2i.functional.step_credit import balance_turning_points, turning_point_reward, turning_points
from rlt2i.functional.windows import exponential_period, paced, sliding_window
from rlt2i.objectives.dgpo import DGPO
from tests.helpers.golden_cases import Case, golden, group_ids
from tests.helpers.published_advantages import (
    best_worst_signs,
    sum_of_normalised,
    tracked_advantage,
    tree_depth_advantage,
    tree_node_rewards,
    zero_std_ratio,
)
from tests.helpers.published_steps import ema_update


@golden("adv/flow_grpo_tracker/*", "adv/nft_tracker/*")
def test_flow_grpo_tracker(case: Case):
    groups, rewards = group_ids(case["prompts"]), case.tensor("rewards")
    std = "global" if case.get("global_std", True) else "group"
    ours = {
        "grpo": group_relative_advantage(rewards, groups, std=std),
        "adv": group_relative_advantage(rewards, groups, std=std),
        "rwr": reward_weights(rewards),
        "sft": best_of_group(rewards, groups),
        "dpo": best_worst_signs(rewards, groups),
        "avg_group_size": len(rewards) / len(groups.unique()),
    }
    if "rewards_2d" in case:
        ours["grpo_2d"] = group_relative_advantage(case.tensor("rewards_2d"), groups, std=std)
    for key in case.outputs:
        case.expect(key, ours[key])


@golden("adv/ddpo_tracker/*")
def test_ddpo_tracker(case: Case):
    history: dict[str, tuple[float, ...]] = {}
    advantages = []
    for prompts, rewards in case["updates"]:
        values = torch.tensor(rewards, dtype=torch.float64)
        tracked = tracked_advantage(
            values, prompts, history, buffer_size=case["buffer_size"], min_count=case["min_count"]
        )
        history = tracked.history
        advantages.append(tracked.advantage)
    case.expect("adv", torch.stack(advantages))


@golden("adv/flow_grpo/zero_std_ratio")
def test_zero_std_ratio(case: Case):
    groups, rewards = group_ids(case["prompts"]), case.tensor("rewards")
    case.expect("zero_std_ratio", zero_std_ratio(rewards, groups))
    case.expect("mean_group_std", group_std(rewards, groups).mean())


@golden("adv/flow_factory/*")
def test_flow_factory_rewards(case: Case):
    names = list(case["weights"])
    rewards = torch.stack([case.tensor(f"reward_{name}", torch.float64) for name in names], dim=1)
    weights = torch.tensor([case["weights"][name] for name in names], dtype=torch.float64)
    groups = torch.tensor(case["unique_ids"])
    if "/gdpo/" in case.name:
        advantage = gdpo(rewards, weights, groups)
    else:
        std = "global" if case["global_std"] else "group"
        advantage = group_relative_advantage(rewards @ weights, groups, eps=0.0, min_std=1e-6, std=std)
    case.expect("adv", advantage)


@golden("adv/verl/*")
def test_verl_advantage(case: Case):
    std = "global" if case["global_std"] else "group"
    groups = group_ids(case["prompts"])
    case.expect("adv", group_relative_advantage(case.tensor("rewards"), groups, std=std, correction=1))


@golden("adv/verl_nft/*")
def test_nft_labels(case: Case):
    std = "global" if case["global_std"] else "group"
    advantage = group_relative_advantage(case.tensor("rewards"), group_ids(case["prompts"]), std=std, correction=1)
    case.expect("adv", advantage)
    for mode in case.outputs.keys() - {"adv"}:
        case.expect(mode, nft_label(advantage, clip=case["adv_clip_max"], mode=mode))


@golden("dpo/verl/online_pairs")
def test_online_pairs(case: Case):
    pairs = best_worst_pairs(case.tensor("rewards"), group_ids(case["prompts"]))
    indices = torch.stack([pairs.winner, pairs.loser], dim=1).flatten()
    case.expect("indices", indices)
    # verl-omni keeps the tied third group; we name it.
    assert pairs.distinct.tolist() == [True, True, False]


@golden("adv/dance/*")
def test_dance_advantage(case: Case):
    rewards = case.tensor("rewards")
    group = group_relative_advantage(rewards, case["num_generations"], eps=1e-8, correction=1)
    case.expect("group", group)
    case.expect("batch", group_relative_advantage(rewards, len(rewards), eps=1e-8, correction=1))


@golden("adv/mixgrpo/advantage_aggr/*")
def test_sum_of_normalised(case: Case):
    names = list(case["weights"])
    rewards = torch.stack([case.tensor(f"reward_{name}") for name in names], dim=1)
    weights = torch.tensor([case["weights"][name] for name in names])
    for key in case.outputs:
        trim = float(key.removeprefix("advantage_aggr_trim"))
        case.expect(key, sum_of_normalised(rewards, weights, case["num_generations"], trim=trim))


@golden("adv/branchgrpo/*")
def test_tree(case: Case):
    edges = case["edges_log_prob"]
    nodes = sorted({"r", *edges}, key=lambda name: (len(name), name))
    parents = torch.tensor([-1 if name == "r" else nodes.index(name[:-1]) for name in nodes])
    depth = torch.tensor([len(name) - 1 for name in nodes])
    leaves = torch.zeros(len(nodes))
    leaves[depth == depth.max()] = case.tensor("leaf_rewards")
    log_probs = torch.tensor([edges.get(name, 0.0) for name in nodes])
    for kind, expected in case.outputs.items():
        rewards = tree_node_rewards(leaves, parents, log_probs if kind == "prob_weighted" else None)
        advantage = tree_depth_advantage(rewards, depth, torch.zeros_like(depth))
        for name, reward, value in zip(nodes, rewards, advantage, strict=True):
            case.expect(name, reward, within=expected["reward"])
            case.expect(name, value, within=expected["adv"])


@golden("tpgrpo/process_reward/*")
def test_turning_points(case: Case):
    config = case["config"]
    # The file lists the rewards after t steps as [T, B].
    ode, steps, final = case.tensor("R_ode"), case.tensor("R_after_t_sde_steps").T, case.tensor("R_sde")
    points = turning_points(
        ode,
        steps,
        final,
        first=config["apply_first_step_bonus"],
        consistent_first=config["select_first_step_only_from_consistent_trajectory"],
        consistent_later=config["select_inter_step_only_from_consistent_trajectory"],
        any_reversal=config["indicator_wo_delta_global_constraint"],
        positive_only=config["select_only_positive_intermediate_step"],
    )
    if case["global_step"] < config["turn_on_bonus_global_step"]:
        points = torch.zeros_like(points)
    swapped, use_global = config["take_delta_global_as_main"], config["use_delta_global"]
    gain = steps - torch.cat([ode[:, None], steps[:, :-1]], dim=1)
    whole = ((final - ode) if use_global else final)[:, None].expand_as(gain)
    if config["use_balanced_bonus"]:
        points = balance_turning_points(points, gain if swapped else whole)
    bonus = "global" if use_global else "final"
    result = turning_point_reward(
        ode,
        steps,
        final,
        points,
        eta=config["eta"],
        bonus="remaining" if config["use_sde_minus_rt"] else bonus,
        replace=config["drop_original_reward_when_having_bonus"],
        propagate=config["propagate_bonus_to_future_steps"],
    )
    if swapped:  # the outcome as main reward and the gain as bonus: not a form of ours, only their sum
        value = config["eta"] * points * gain
        if config["propagate_bonus_to_future_steps"]:
            value = result.bonus
        main = torch.where(value != 0, 0, whole) if config["drop_original_reward_when_having_bonus"] else whole
        result = result._replace(bonus=value, main=main, reward=main + value)
    case.expect("d", result.gain)
    case.expect("s", result.agreement)
    case.expect("bonus", result.bonus)
    case.expect("main", result.main)
    case.expect("process_rewards", result.reward)


def mixgrpo_period(case: Case) -> int | Callable[[int], int]:
    strategy, first, last = case.get("sample_strategy", "progressive"), case["iters_per_group"], case["max_timesteps"]
    if strategy == "exp_decay":
        threshold, rate = case.get("exp_decay_thre_timestep", 13), case.get("exp_decay_k", 0.1)
        return lambda start: exponential_period(start, first=first, threshold=threshold, rate=rate)
    return paced(first, {"progressive": "constant", "decay": "linear"}[strategy], last=last)  # type: ignore[arg-type]


@golden("window/mixgrpo/*")
def test_sliding_window(case: Case):
    """MixGRPO inserts an empty window before it rolls back (or stays on it); apart from that the windows agree."""
    last = case["max_timesteps"]
    ours = []
    for update in range(case["n_iter"]):
        ours.append(
            sliding_window(
                update,
                num_steps=last + 2,
                last=last,
                width=case["group_size"],
                stride=case["prog_overlap_step"] if case["prog_overlap"] else case["group_size"],
                period=mixgrpo_period(case),
                roll_back=case["roll_back"],
            )
        )
    assert all(ours)
    theirs = [tuple(window) for window in case.expected("windows") if window]
    assert ours[: len(theirs)] == theirs
    if not case["roll_back"]:
        assert set(ours[len(theirs) :]) <= {theirs[-1]}


@golden("decay/nft/*")
def test_nft_decay(case: Case):
    for kind in range(3):
        decays = torch.tensor([ema.nft_old_decay(step, kind) for step in case["steps"]], dtype=torch.float64)
        case.expect(f"type{kind}", decays)


@golden("decay/crd/*")
def test_crd_decay(case: Case):
    for ramp in case.outputs:
        case.expect(ramp, torch.tensor([ema.ramp_decay(step, ramp) for step in case["steps"]], dtype=torch.float64))


@golden("ema/flow_grpo")
def test_flow_grpo_ema(case: Case):
    decays = [ema.power_decay(step, decay=case["decay"], warmup=10) for step in case["steps"]]
    case.expect("decay_at", torch.tensor(decays, dtype=torch.float64))
    for interval in (case["interval"], 1):
        expected = case.outputs[f"ema_interval{interval}"]
        average, seen = torch.zeros(2), []
        for step in range(len(expected) * interval):
            if (step + 1) % interval == 0:
                parameter = torch.tensor([step + 1.0, 1.0])
                average = ema_update(average, parameter, ema.power_decay(step, decay=case["decay"], warmup=10))
                seen.append(average)
        case.expect(f"ema_interval{interval}", torch.stack(seen))


@golden("ema/dgpo_ref")
def test_dgpo_reference(case: Case):
    average, seen = torch.ones(1), []
    for step in case["steps"]:
        average = ema_update(average, torch.tensor([1 + step / 100]), DGPO().old_decay(step))
        seen.append(average)
    case.expect("ema", torch.stack(seen))


@golden("ema/flow_factory/schedules")
def test_flow_factory_decays(case: Case):
    def parse(name: str) -> Callable[[int], float]:
        kind, *fields = name.split("_")
        values: dict[str, float] = {}
        for field in fields:
            if field == "cosine":
                kind = "warmup_cosine"
            elif field[0].isalpha():
                values[field[0]] = float(field[1:])
            else:
                values["d"] = float(field)
        decay, warmup = values["d"], int(values.get("w", 0))
        match kind:
            case "constant":
                return lambda step: ema.constant_decay(step, decay=decay)
            case "power":
                return lambda step: ema.power_decay(step, decay=decay, warmup=warmup)
            case "linear":
                return lambda step: ema.linear_decay(step, decay=decay, initial=values["i"], warmup=warmup)
            case "piecewise":
                flat, rate = int(values["f"]), values["r"]
                return lambda step: ema.piecewise_linear_decay(step, decay=decay, flat=flat, rate=rate)
            case "cosine":
                return lambda step: ema.cosine_decay(step, decay=decay, initial=values["i"], total=int(values["T"]))
            case "warmup_cosine":
                total, initial = int(values["T"]), values["i"]
                return lambda step: ema.warmup_cosine_decay(
                    step, decay=decay, initial=initial, warmup=warmup, total=total
                )
        raise AssertionError(name)

    for name in case.outputs:
        decays: Tensor = torch.tensor([parse(name)(step) for step in case["steps"]], dtype=torch.float64)
        case.expect(name, decays)
