"""Carries committed curves over a change of recipe fields' names: new hashes for the same computations.

python -m benchmarks.rekey_curves [old=new ...] [--removed task.image_size=train.image_size ...]

A curve is re-keyed only where its recipe, written with the old names and with the fields that were removed because
another one says the same, has exactly the hash that the curve was committed under: nothing but names changed. Any other
curve is left alone and named.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from rlt2i.config import recipe_hash, to_mapping
from rlt2i.recipes import PARTS, load_recipe

CURVES = Path(__file__).parent / "curves"


def renamed(value: Any, names: dict[str, str]) -> Any:
    """Every key of plain data under its other name."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(item, names) for key, item in value.items()}
    return [renamed(item, names) for item in value] if isinstance(value, list) else value


def restored(mapping: dict[str, Any], removed: dict[str, str]) -> dict[str, Any]:
    """The recipe with each removed field, and what the task that evaluates has of it, as the other field has it."""
    for gone, other in removed.items():
        (part, field), (section, name) = gone.split("."), other.split(".")
        holders = [mapping[part], mapping[part].get("evaluation")]
        for holder in filter(None, holders):
            holder[field] = mapping[section][name]
    return mapping


def rekey(path: Path, to_old: dict[str, str], removed: dict[str, str]) -> bool:
    """Whether the curve at `path` is that of today's recipe under its old names; if so it gets today's hash."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    (name, seed, committed), *others = {(row["recipe"], row["seed"], row["hash"]) for row in rows}
    assert not others, f"{path}: more than one run"
    recipe = load_recipe(name, [f"train.seed={seed}"])
    mapping = to_mapping(recipe, parts=PARTS, typed=False, hashed=True)
    if committed != recipe_hash(renamed(restored(mapping, removed), to_old))[:12]:
        return committed == recipe.hash[:12]
    text = path.read_text().replace(f",{committed},", f",{recipe.hash[:12]},")
    head, _, body = text.partition("\n")
    path.write_text(f"{head.replace(',update,', ',iteration,')}\n{body}")
    return True


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="re-key committed curves after a renaming")
    parser.add_argument("names", nargs="*", metavar="OLD=NEW")
    parser.add_argument("--removed", nargs="*", default=[], metavar="GONE=OTHER")
    options = parser.parse_args()
    to_old = {new: old for old, new in (name.split("=") for name in options.names)}
    removed = dict(pair.split("=") for pair in options.removed)
    paths = sorted(CURVES.glob("*.csv"))
    left = [path.name for path in paths if not rekey(path, to_old, removed)]
    print(f"{len(paths) - len(left)} of {len(paths)} curves name today's recipes")
    if left:
        raise SystemExit(f"other than names changed, so their hashes stay: {', '.join(left)}")


if __name__ == "__main__":
    main()
