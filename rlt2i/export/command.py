"""`rlt2i export RUN --to ...`: an adapter or a pipeline for other tools, with a card, and onto the hub if asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
from safetensors.torch import save_file

from rlt2i.config import dump_yaml
from rlt2i.config.secrets import redacted
from rlt2i.evaluation.inspection import Weights, find_weights, load_policy
from rlt2i.export.card import Card, Form, write_card
from rlt2i.export.lora import convert
from rlt2i.interfaces import Policy
from rlt2i.policies.guidance import Guided
from rlt2i.policies.lora import exported_lora
from rlt2i.policies.pretrained import PretrainedPolicy
from rlt2i.policies.pretrained.export import export_adapter, network_of
from rlt2i.policies.pretrained.loading import quietly, without_warnings
from rlt2i.policies.pretrained.spec import fetching
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.checkpoint import STATE, CheckpointError
from rlt2i.runs.files import naming_what_fails

Target = Literal["diffusers", "comfyui", "kohya", "merged", "peft"]
TARGETS: tuple[Target, ...] = get_args(Target)
_FORMS: dict[Target, Form] = {
    "diffusers": "adapter",
    "comfyui": "comfyui",
    "kohya": "kohya",
    "merged": "pipeline",
    "peft": "peft",
}


@attrs.frozen(kw_only=True)
class Exported:
    """A finished export.

    Attributes:
        folder: where it is.
        lines: what to tell the user of it.
    """

    folder: Path
    lines: tuple[str, ...]


def export(
    recipe: Recipe,
    to: Target,
    folder: Path,
    *,
    run_dir: Path | None = None,
    checkpoint: Path | None = None,
    weights: Weights = "best",
) -> Exported:
    """Write what a run has learned into a new folder.

    Args:
        recipe: of the run.
        to: whose format.
        folder: to make; must not hold anything.
        run_dir, checkpoint, weights: see `rlt2i.evaluation.inspection.find_weights`.

    Raises:
        ValueError: when the folder is taken, or the format does not suit the run; says which does.
        CheckpointError: when there is nothing to export.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"export --out {folder}: something is there already. Name a new folder.")
    source = find_weights(run_dir=run_dir, checkpoint=checkpoint, weights=weights)
    if source is None:
        raise CheckpointError("export: these are the base weights; name a run, or a --checkpoint.")
    policy = pretrained(
        load_policy(recipe, run_dir=run_dir, checkpoint=checkpoint, weights=weights, device="cpu"), "export"
    )
    spec = policy.spec
    if to != "merged" and spec.lora_rank is None:
        raise ValueError(
            f"export --to {to}: this run trained the whole {spec.network}, so there is no adapter to write. Use --to "
            "merged."
        )
    part = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with naming_what_fails(folder):
            said = _WRITERS[to](policy, part)
        iteration = json.loads((source[0] / STATE).read_text(encoding="utf-8"))["iteration"]
        write_card(part, Card(recipe=recipe, policy=policy, form=_FORMS[to], iteration=iteration, run_dir=run_dir))
        (part / "recipe.yaml").write_text(dump_yaml(redacted(recipe.mapping())), encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(folder=folder, lines=(f"{folder}: {source[1]} weights of {source[0]}", said))


def pretrained(policy: Policy, command: str) -> PretrainedPolicy:
    """The pipeline behind a policy.

    Raises:
        ValueError: when there is none.
    """
    inner = policy.policy if isinstance(policy, Guided) else policy
    if not isinstance(inner, PretrainedPolicy):
        raise ValueError(f"{command}: {type(inner).__name__} is no pipeline of diffusers, so no other tool loads it.")
    return inner


def _diffusers(policy: PretrainedPolicy, folder: Path) -> str:
    export_adapter(policy.spec, policy.pipe, folder)
    weights, _ = exported_lora(policy.network)
    modules = {name.rpartition(".lora_")[0] for name in weights}
    there = {name for name, _ in policy.network.named_modules()}
    return _matched(len(modules & there), len(modules), "pytorch_lora_weights.safetensors")


def _peft(policy: PretrainedPolicy, folder: Path) -> str:
    weights, metadata = exported_lora(policy.network)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in metadata.items()}
    config |= {"base_model_name_or_path": policy.spec.path, "inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return _matched(len(weights) // 2, len(weights) // 2, "adapter_model.safetensors")


def _tool(tool: Literal["comfyui", "kohya"]) -> Callable[[PretrainedPolicy, Path], str]:
    def write(policy: PretrainedPolicy, folder: Path) -> str:
        converted = convert(exported_lora(policy.network)[0], policy.network, tool)
        name = f"{tool}_lora.safetensors"
        save_file(dict(converted.tensors), folder / name, metadata={"format": "pt"})
        return f"{name}: {converted.summary()}"

    return write


def _merged(policy: PretrainedPolicy, folder: Path) -> str:
    """The stock pipeline, whole, in one precision, with the trained network in it."""
    import diffusers

    spec = policy.spec
    network = network_of(spec, policy.pipe)
    if network.dtype != spec.compute_dtype:
        network = network.to(spec.compute_dtype)
    options: dict[str, Any] = {spec.network: network, "dtype": spec.compute_dtype}
    absent = {name: None for name, value in spec.components().items() if value is None}
    with quietly(), fetching(spec):
        pipe = getattr(diffusers, spec.pipeline).from_pretrained(
            spec.source, revision=spec.revision, **options, **absent, use_safetensors=True
        )
    with quietly(), without_warnings():
        pipe.save_pretrained(folder, safe_serialization=True)
    return f"{spec.pipeline} with {sum(p.numel() for p in network.parameters()):,} parameters in {spec.network}"


def _matched(known: int, saved: int, name: str) -> str:
    return f"{name}: {known} of {saved} layers matched, {saved - known} unmatched"


_WRITERS: dict[Target, Callable[[PretrainedPolicy, Path], str]] = {
    "diffusers": _diffusers,
    "comfyui": _tool("comfyui"),
    "kohya": _tool("kohya"),
    "merged": _merged,
    "peft": _peft,
}
