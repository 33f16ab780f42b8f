"""Carries committed curves over a change of recipe fields' names: new hashes for the same computations.

python -m benchmarks.rekey_curves REVISION [--removed task.image_size=train.image_size ...]

A curve is re-keyed only where nothing but names changed since the revision. The code of that revision resolves the
recipe, every field and default of it, and must give the hash that the curve was committed under; with its fields
renamed as today's classes say (`RENAMED`, `ONCE_FLAT`), that must be today's recipe in every field. Fields that are new
since then have their defaults; fields that were removed because another one says the same are named, and compared. Any
other curve is left alone and named.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import attrs

from rlt2i.config import ConfigError, load_object
from rlt2i.config.build import renamed_fields
from rlt2i.recipes import PARTS, Recipe, load_recipe
from rlt2i.recipes.recipe import recipe_from_mapping

ROOT = Path(__file__).parents[1]
CURVES = Path(__file__).parent / "curves"
RESOLVE = """
import json, sys
from rlt2i.recipes import load_recipe
recipes = [load_recipe(name, [f"train.seed={seed}"]) for name, seed in json.load(sys.stdin)]
print(json.dumps([[recipe.hash, recipe.mapping()] for recipe in recipes]))
"""


def resolved_at(revision: str, runs: list[tuple[str, str]]) -> list[tuple[str, dict[str, Any]]]:
    """Hash and every field of recipes (name, seed), as the code of a revision has them."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", revision, "rlt2i"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE], cwd=folder, input=json.dumps(runs), env={"PYTHONPATH": folder},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return [(digest, mapping) for digest, mapping in json.loads(done.stdout)]


def renamed(value: Any, cls: type | None = None) -> Any:
    """Plain data of a part with its fields called as today's classes call them."""
    if isinstance(value, list):
        return [renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    short = value.get("type")
    if short is not None:
        cls = load_object(next(table[short] for table in PARTS.values() if short in table))
    names = renamed_fields(cls) if cls else {}
    inside = {field.name: field.type for field in attrs.fields(attrs.resolve_types(cls))} if cls else {}
    result: dict[str, Any] = {}
    for key, item in value.items():
        *holders, last = names.get(key, key).split(".")
        place = result
        for holder in holders:
            place = place.setdefault(holder, {})
        field = inside.get(last) if not holders else None
        place[last] = renamed(item, field if attrs.has(field or object) else None)
    return result


def without(mapping: dict[str, Any], removed: dict[str, str]) -> dict[str, Any]:
    """The recipe without each removed field, and the task that evaluates, where the other field says the same."""
    for gone, other in removed.items():
        (part, field), (section, name) = gone.split("."), other.split(".")
        for holder in filter(None, [mapping[part], mapping[part].get("evaluation")]):
            if holder[field] == mapping[section][name]:
                del holder[field]
    return mapping


def same(mapping: dict[str, Any], today: Recipe) -> bool:
    """Whether renamed fields are those of today's recipe, what is said about it apart."""
    try:
        then = recipe_from_mapping(mapping)
    except ConfigError as error:
        print(f"{today.name}: {error}")
        return False
    return attrs.evolve(then, about=today.about, evidence=today.evidence) == today


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="re-key committed curves after a renaming")
    parser.add_argument("revision", help="before the renaming")
    parser.add_argument("--removed", nargs="*", default=[], metavar="GONE=OTHER")
    options = parser.parse_args()
    removed = dict(pair.split("=") for pair in options.removed)
    paths = sorted(CURVES.glob("*.csv"))
    runs = []
    for path in paths:
        with path.open(newline="") as file:
            (run, *others) = {(row["recipe"], row["seed"], row["hash"]) for row in csv.DictReader(file)}
        assert not others, f"{path}: more than one run"
        runs.append(run)
    before = resolved_at(options.revision, [(name, seed) for name, seed, _ in runs])
    left = []
    for path, (name, seed, committed), (digest, mapping) in zip(paths, runs, before, strict=True):
        today = load_recipe(name, [f"train.seed={seed}"])
        if committed == today.hash[:12]:
            continue
        if committed != digest[:12] or not same(renamed(without(mapping, removed), Recipe), today):
            left.append(path.name)
            continue
        path.write_text(path.read_text().replace(f",{committed},", f",{today.hash[:12]},"))
    print(f"{len(paths) - len(left)} of {len(paths)} curves name today's recipes")
    if left:
        raise SystemExit(f"other than names changed, so their hashes stay: {', '.join(left)}")


if __name__ == "__main__":
    main()
