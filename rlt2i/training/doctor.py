"""`rlt2i doctor`: whether this machine can run a recipe, found out before any weight is read.

Every line is measured or asked, never guessed: where there is no network the line says offline.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from rlt2i.config.version import __version__
from rlt2i.recipes.recipe import Recipe

Verdict = Literal["ok", "note", "broken"]
REPOSITORY = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")
"""A repository of the hub, as it stands in a recipe."""
_PLACES = ("path", "tokenizer", "model", "colour_model", "processor", "revision_of")
_LEAST_DISK = 5 << 30
_EXTRA_OF = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "OCRReward": "ocr",
    "FeatureSaliency": "dino",
    "RayReward": "ray",
    "GenEval2Reward": "serve",
    "RemoteReward": "serve",
    "RubricJudge": "serve",
    "YesNoJudge": "serve",
}
"""A tracker, or the name of a part -> the extra of the package that it needs."""
_MODULES_OF = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "ocr": ("rapidocr", "onnxruntime"),
    "dino": ("timm",),
    "ray": ("ray",),
    "serve": ("starlette", "uvicorn", "httpx"),
}


@attrs.frozen(kw_only=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        name: what was looked at.
        verdict: "broken" makes the command exit with 1; a "note" does not.
        text: what was found.
        way_out: what to do about it; empty where nothing needs doing.
    """

    name: str
    verdict: Verdict
    text: str
    way_out: str = ""


def examine(
    recipes: Iterable[Recipe], *, folder: Path, strict: bool = True, ask_hub: Callable[[str], str] | None = None
) -> list[Finding]:
    """All findings about this machine and these recipes.

    Args:
        recipes: those whose repositories and extras are looked for.
        folder: where runs would be written.
        strict: whether what a recipe lacks is broken; a survey of all that the package ships only notes it.
        ask_hub: repository -> "open", "granted", "gated", "missing" or "offline"; by default the hub itself is asked.
    """
    recipes = list(recipes)
    findings = [_python(), *_versions(), *_devices(), *_disk(folder)]
    lack: Verdict = "broken" if strict else "note"
    findings += list(_extras(recipes, lack))
    findings += list(_repositories(recipes, ask_hub or hub_access, lack))
    return findings


def table(findings: Iterable[Finding]) -> str:
    """The findings as text, the way out below each line that needs one."""
    rows = list(findings)
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.verdict:<6}  {row.name:<{width}}  {row.text}")
        if row.way_out:
            lines.append(f"{'':<6}  {'':<{width}}  -> {row.way_out}")
    broken = sum(row.verdict == "broken" for row in rows)
    lines.append("" if not broken else f"{broken} of {len(rows)} lines need mending.")
    return "\n".join(lines).rstrip()


# --------------------------------------------------------------------------------------------------------- software


def _python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}, rlt2i {__version__}"
    return Finding(name="Python", verdict="ok", text=text)


def _versions() -> Iterator[Finding]:
    """Every package that rlt2i declares, against the declared range."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires("rlt2i") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            name="rlt2i",
            verdict="note",
            text="not installed, run from its sources: versions of its dependencies cannot be compared",
            way_out="pip install -e .",
        )
        return
    wrong = False
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not version or not requirement.specifier.contains(version, prereleases=True):
            wrong = True
            yield Finding(
                name=requirement.name,
                verdict="broken",
                text=f"{version or 'not installed'}, but rlt2i needs {requirement.specifier or 'it'}",
                way_out=f"pip install '{requirement.name}{requirement.specifier}'",
            )
    if not wrong:
        shown = ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers")
        )
        yield Finding(name="dependencies", verdict="ok", text=f"all within their ranges: {shown}")


# ---------------------------------------------------------------------------------------------------------- devices


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        text = f"none: torch {torch.__version__} " + (
            f"is built for CUDA {built}, no driver or no device" if built else "has no CUDA"
        )
        yield Finding(
            name="GPU",
            verdict="note",
            text=text,
            way_out="The embedded recipes (rlt2i list) train on the CPU; recipes of real models need a CUDA device.",
        )
        cores = os.cpu_count() or 1
        yield Finding(name="CPU", verdict="ok", text=f"{cores} cores, torch uses {torch.get_num_threads()} threads")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(
            name=f"GPU {index}",
            verdict="ok",
            text=f"{name}, CUDA {torch.version.cuda}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        )
        yield _kernel(torch.device("cuda", index))


def _kernel(device: Any) -> Finding:
    """The attention kernel that would serve every pass, tried in bfloat16 on heads of 64."""
    import torch

    from rlt2i.policies.attention.kernels import choose_kernel

    try:
        return Finding(
            name="attention", verdict="ok", text=f"{choose_kernel(device, torch.bfloat16, 64)} kernel on {device}"
        )
    except RuntimeError as error:
        return Finding(
            name="attention",
            verdict="broken",
            text=str(error),
            way_out="Maps need a kernel that returns the log-sum-exp: update the driver or torch.",
        )


def _disk(folder: Path) -> Iterator[Finding]:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding(
            name="run folder",
            verdict="broken",
            text=f"{there}: {error.strerror or error}",
            way_out="Name a folder that can be written: rlt2i train ... --run-dir DIR",
        )
        return
    free = shutil.disk_usage(there).free
    yield Finding(
        name="run folder",
        verdict="ok" if free >= _LEAST_DISK else "note",
        text=f"{there} can be written, {free / 2**30:.1f} GiB free",
        way_out="" if free >= _LEAST_DISK else "Checkpoints of a full fine-tune need several times the weights.",
    )


# ---------------------------------------------------------------------------------------------------------- recipes


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every field of plain data, however deep."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), item
            yield from _walk(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item)


def repositories(recipe: Recipe) -> list[str]:
    """The repositories of the hub that a recipe names, its parts' defaults included."""
    paths = [
        value
        for key, value in _walk(recipe.mapping())
        if key in _PLACES and isinstance(value, str) and REPOSITORY.fullmatch(value) and not Path(value).exists()
    ]
    return list(dict.fromkeys(paths))


def extras(recipe: Recipe) -> list[str]:
    """The extras of the package that a recipe needs."""
    named = [value for key, value in _walk(recipe.mapping()) if key == "type" and isinstance(value, str)]
    wanted = [_EXTRA_OF[name] for name in (*named, *recipe.train.trackers) if name in _EXTRA_OF]
    return list(dict.fromkeys(wanted))


def _extras(recipes: Iterable[Recipe], lack: Verdict) -> Iterator[Finding]:
    needed: dict[str, list[str]] = {}
    for recipe in recipes:
        for extra in extras(recipe):
            needed.setdefault(extra, []).append(recipe.name)
    for extra, names in sorted(needed.items()):
        missing = [module for module in _MODULES_OF[extra] if importlib.util.find_spec(module) is None]
        requested = f"asked for by {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        yield Finding(
            name=f"extra {extra}",
            verdict=lack if missing else "ok",
            text=f"{', '.join(missing)} not installed, {requested}" if missing else f"installed, {requested}",
            way_out=f"pip install 'rlt2i[{extra}]'" if missing else "",
        )


def _repositories(recipes: Iterable[Recipe], ask: Callable[[str], str], lack: Verdict) -> Iterator[Finding]:
    named: dict[str, list[str]] = {}
    for recipe in recipes:
        for repository in repositories(recipe):
            named.setdefault(repository, []).append(recipe.name)
    for repository, names in sorted(named.items()):
        answer = ask(repository)
        used = f"named by {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        yield Finding(
            name=repository,
            verdict=_VERDICTS.get(answer, lack),
            text=f"{_ANSWERS[answer]}, {used}",
            way_out=_WAYS_OUT.get(answer, "").format(repository=repository),
        )


_VERDICTS: dict[str, Verdict] = {"open": "ok", "granted": "ok", "cached": "ok", "offline": "note"}
_ANSWERS = {
    "open": "open to everyone",
    "granted": "gated, and this token has access",
    "cached": "offline, but in the cache of this machine",
    "gated": "gated, and this machine has no token with access",
    "missing": "the hub knows no such repository (or it is private)",
    "offline": "not asked: no network",
}
_WAYS_OUT = {
    "gated": "Accept the terms at https://huggingface.co/{repository}, then: hf auth login",
    "missing": "Mend the name in the recipe, or log in: hf auth login",
    "offline": "Run the doctor again with a network, or name a folder: --set policy.path=DIR",
}


def hub_access(repository: str) -> str:
    """What the hub says of a repository to this machine's token."""
    from huggingface_hub import HfApi, auth_check, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        auth_check(repository)
        return "granted" if HfApi().model_info(repository).gated else "open"
    except GatedRepoError:
        return "gated"
    except RepositoryNotFoundError:
        return "missing"
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError):
        files = ("model_index.json", "config.json")
        return (
            "cached" if any(isinstance(try_to_load_from_cache(repository, name), str) for name in files) else "offline"
        )
    except Exception as error:  # the hub's client raises its transport's own errors
        if type(error).__module__.partition(".")[0] in {"httpx", "httpcore", "requests"}:
            return "offline"
        raise
