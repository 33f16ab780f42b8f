"""Whose checkpoint it is: what of a recipe decides the weights, and what may differ between a run and its sequel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlt2i.config import recipe_hash, to_mapping
from rlt2i.interfaces import Policy
from rlt2i.recipes.parts import PARTS
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.checkpoint import Checkpoint, CheckpointError
from rlt2i.runs.identity import file_fields

# What may differ between a run and its continuation: how long it is and what is recorded of it.
_RECORDED = (
    "iterations",
    "eval_every",
    "eval_prompts",
    "eval_steps",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
    "max_invalid_share",
)
# How much is computed at once: the same mathematics, rounded otherwise.
_ROUNDING = ("rollout_batch_size", "micro_batch_size", "sharding")
_ROUNDING_OF_POLICY = ("gradient_checkpointing", "compile", "reuse_negative")
_NOT_WEIGHTS = (*_ROUNDING_OF_POLICY, "dtype")

_STATE: Mapping[str, type] = {
    "iteration": int,
    "optimizer_step": int,
    "optimizer": dict,
    "recipe": str,
    "start": str,
}


def continuity(recipe: Recipe) -> str:
    """SHA-256 of everything in a recipe that decides the weights after a given number of iterations.

    The content of files is none of it: that is compared by itself (`runs.identity`), and their names are not content.
    """
    mapping = recipe.mapping()
    mapping.pop("heldout", None)
    mapping["train"] = {k: v for k, v in mapping["train"].items() if k not in (*_RECORDED, *_ROUNDING)}
    for name in ("curriculum", "merge_adapter"):  # runs from before there were such fields had none
        if not mapping["train"][name]:
            del mapping["train"][name]
    mapping["policy"] = {k: v for k, v in mapping["policy"].items() if k not in _ROUNDING_OF_POLICY}
    for field in file_fields(recipe):
        _blank(mapping, field)
    return recipe_hash(_without_places(mapping))


def policy_identity(recipe: Recipe) -> str:
    """SHA-256 of what decides which weights a policy has, and how they are named."""
    mapping = to_mapping(recipe.policy, parts=PARTS)
    return recipe_hash(_without_places({"policy": {k: v for k, v in mapping.items() if k not in _NOT_WEIGHTS}}))


def rounding(recipe: Recipe) -> dict[str, Any]:
    """The settings that change how much is computed at once."""
    mapping = recipe.mapping()
    return {
        **{f"train.{k}": mapping["train"][k] for k in _ROUNDING},
        **{f"policy.{k}": mapping["policy"][k] for k in _ROUNDING_OF_POLICY if k in mapping["policy"]},
    }


def changed_rounding(state: Mapping[str, Any], recipe: Recipe) -> str:
    """A line for the user where a run goes on with other batch sizes than it was saved under; else empty."""
    before, now = state.get("rounding") or {}, rounding(recipe)
    words = [f"{k} {before[k]} -> {v}" for k, v in now.items() if k in before and before[k] != v]
    return f"note: {', '.join(words)}: the continuation is no longer bit for bit that of the run" if words else ""


def check_state(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The state of a checkpoint of training, with every key that a continuation needs.

    Raises:
        CheckpointError: naming what is missing or of another kind.
    """
    for key, kind in _STATE.items():
        value = checkpoint.state.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(
                f"{checkpoint.path / 'state.json'}: {key!r} is {value!r}, expected {kind.__name__}; it was not written "
                "by a run of this version, or altered since. Resume from another checkpoint."
            )
    for name in ("online", "optimizer"):
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: holds no {name}.safetensors. Resume from another checkpoint.")
    return checkpoint.state


def check_recipe(checkpoint: Checkpoint, recipe: Recipe, start: str) -> None:
    """Refuse to continue a run with other starting weights, or with a recipe that would turn it into something else.

    Args:
        start: identity of the starting weights at hand.

    Raises:
        CheckpointError: saying which of the two it is.
    """
    for key, now in (("start", start), ("recipe", continuity(recipe))):
        was = str(checkpoint.state[key])
        if was != now:
            what = "starting weights" if key == "start" else "recipe"
            raise CheckpointError(
                f"{checkpoint.path}: saved with another {what} ({was[:12]}, now {now[:12]}), so the run would not "
                "continue but turn into something else. Resume with the recipe.yaml of the run directory, or start a "
                "new run."
            )


def check_policy(checkpoint: Checkpoint, recipe: Recipe, policy: Policy) -> None:
    """Refuse weights that are not of this policy.

    Raises:
        CheckpointError: when names or shapes differ, or the weights were trained from another policy.
    """
    was, now = checkpoint.state.get("policy"), policy_identity(recipe)
    if was is not None and was != now:
        raise CheckpointError(
            f"{checkpoint.path}: trained from another policy than that of {recipe.name!r} ({str(was)[:12]}, now "
            f"{now[:12]}). Name the run that it belongs to: {checkpoint.path.parent}"
        )
    for name in ("online", "ema"):
        if name in checkpoint.tensors:
            check_shapes(checkpoint, name, policy)


def check_shapes(checkpoint: Checkpoint, name: str, policy: Policy) -> None:
    """Refuse a parameter set whose names or shapes are not those of the policy; nothing is broadcast.

    Raises:
        CheckpointError: naming the first parameter that does not fit.
    """
    saved = {key: list(value.shape) for key, value in checkpoint.tensors[name].items()}
    wanted = {key: list(value.shape) for key, value in policy.trainable_parameters().items()}
    odd = [key for key in dict.fromkeys((*wanted, *saved)) if saved.get(key) != wanted.get(key)]
    if odd:
        raise CheckpointError(
            f"{checkpoint.path / name}.safetensors: {odd[0]} is {saved.get(odd[0], 'missing')} there and "
            f"{wanted.get(odd[0], 'missing')} in the policy, so these are weights of another one. Name the run that "
            "the checkpoint belongs to."
        )


def _blank(mapping: dict[str, Any], field: str) -> None:
    """Replace the value of a dotted field (with [i] for items) by a fixed word."""
    node: Any = mapping
    keys: list[Any] = [int(k) if k.isdigit() else k for k in field.replace("[", ".").replace("]", "").split(".")]
    for key in keys[:-1]:
        node = node[key] if isinstance(key, int) or key in node else {}
    if isinstance(node, list) or keys[-1] in node:
        node[keys[-1]] = "a file"


def _without_places(value: Any) -> Any:
    """A copy in which `type: folder/file.py:Name` says only `file.py:Name`, wherever that lies."""
    if isinstance(value, Mapping):
        return {
            k: f"a file, {v.replace(chr(92), '/').rpartition('/')[2]}"
            if k == "type" and isinstance(v, str) and ".py:" in v
            else _without_places(v)
            for k, v in value.items()
        }
    return [_without_places(item) for item in value] if isinstance(value, list | tuple) else value
