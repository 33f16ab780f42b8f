"""Files that a run leaves for its report: held-out images at fixed seeds, and allocation maps over time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rlt2i.engine import Collected, decode
from rlt2i.evaluation.heldout import Evaluation, Scores
from rlt2i.functional.transitions import clean_prediction
from rlt2i.interfaces import Policy
from rlt2i.runs.files import replace_tensors
from rlt2i.tasks.base import TaskPrompt


def write_evaluation(path: Path, result: Evaluation) -> None:
    """One file per evaluation: `images`, `scores`, `valid`, `component/<name>`, the same for every held-out reward
    below `heldout/<reward>/`, and the prompts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    headline = result.values(result.headline)
    info = {
        "prompts": [p.text for p in result.prompts],
        "categories": [p.category for p in result.prompts],
        "scores": [float(v) for v in headline],
        "notes": list(result.notes),
    }
    tensors = {"images": result.images, "scores": result.scores, "valid": result.valid}
    tensors |= {f"component/{name}": values for name, values in result.components.items()}
    for name, judged in result.heldout.items():
        tensors |= {f"heldout/{name}/scores": judged.scores, f"heldout/{name}/valid": judged.valid}
        tensors |= {f"heldout/{name}/component/{part}": values for part, values in judged.components.items()}
    replace_tensors(path, tensors, metadata={"info": json.dumps(info)})


def read_evaluation(path: Path, prompts: Sequence[TaskPrompt]) -> Evaluation:
    """The evaluation written at `path`.

    Raises:
        ValueError: when it was made with other prompts, so that it cannot be paired with a new one.
    """
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()["info"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if info["prompts"] != [p.text for p in prompts]:
        raise ValueError(
            f"{path}: made with other held-out prompts than this recipe asks for, so gains cannot be paired. Resume "
            "with "
            "the recipe of the run directory."
        )
    return Evaluation(
        prompts=prompts,
        images=tensors["images"],
        scores=tensors["scores"],
        valid=tensors["valid"],
        components=_below("component/", tensors),
        heldout={
            name: Scores(
                scores=tensors[f"heldout/{name}/scores"],
                valid=tensors[f"heldout/{name}/valid"],
                components=_below(f"heldout/{name}/component/", tensors),
            )
            for name in dict.fromkeys(n.split("/")[1] for n in tensors if n.startswith("heldout/"))
        },
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def write_maps(path: Path, collected: Collected, policy: Policy, *, shown: int) -> None:
    """The allocation maps of the best and the worst rollouts of a batch, with what the policy foresaw at each step.

    Args:
        shown: rollouts to keep, half of them good and half bad, of different prompts where possible.
    """
    experience = collected.experience
    order = experience.rewards.final.argsort(descending=True).tolist()
    group_size = collected.prompts.group_size
    chosen = _one_per_group(order, group_size, shown // 2) + _one_per_group(order[::-1], group_size, shown // 2)
    rows = torch.tensor(chosen, device=experience.trajectory.latents.device)
    steps = experience.trajectory.num_steps
    clean = []
    for step in range(steps):
        pairs = experience.step_batch(rows, torch.full_like(rows, step))
        velocity = policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
        latents = clean_prediction(pairs.latents, velocity, pairs.sigma)
        clean.append(decode(policy, latents, rollout_batch_size=len(chosen)).cpu())
    groups = [i // group_size for i in chosen]
    info = {
        "prompts": [collected.prompts.texts[g] for g in groups],
        "core": [list(collected.prompts.core[g]) for g in groups],
        "scores": [float(experience.rewards.final[i]) for i in chosen],
    }
    tensors: dict[str, Tensor] = {
        "weights": experience.credit.take(rows).weight.expand(len(chosen), steps, -1, -1).float(),
        "clean": torch.stack(clean, dim=1),
        "final": collected.images[rows.to(collected.images.device)].cpu(),
        "sigmas": experience.trajectory.sigmas.cpu(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_tensors(path, tensors, metadata={"info": json.dumps(info)})


def _one_per_group(order: Sequence[int], group_size: int, count: int) -> list[int]:
    """The first `count` rollouts in `order` of distinct groups, topped up with repeats where groups are few."""
    chosen: list[int] = []
    for rollout in order:
        if len(chosen) < count and all(rollout // group_size != other // group_size for other in chosen):
            chosen.append(rollout)
    return chosen + [r for r in order if r not in chosen][: count - len(chosen)]
