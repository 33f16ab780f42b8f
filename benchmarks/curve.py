"""A run's learning curve as evidence: benchmarks/curves/<recipe>-s<seed>.csv.

python -m benchmarks.curve runs/...
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from rlt2i.recipes import load_recipe
from rlt2i.runs.metrics import read_metrics

COLUMNS = (
    "eval/strict",
    "eval/strict_low",
    "eval/strict_high",
    "eval/strict_gain",
    "eval/strict_gain_low",
    "eval/strict_gain_high",
    "eval/objects",
    "eval/objects_asked",
    "eval/reward",
    "eval/reward_gain",
    "eval/reward_gain_low",
    "eval/reward_gain_high",
    "eval/heldout/shapes",
    "eval/heldout/shapes_gain",
    "eval/heldout/shapes_gain_low",
    "eval/heldout/shapes_gain_high",
    "eval/heldout/shapes/strict",
)
"""Written where a run logs them; the gains of the reward itself where there is no strict score."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="write a run's learning curve")
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/curves"))
    options = parser.parse_args()
    recipe = load_recipe(options.run)
    versions = json.loads((options.run / "versions.json").read_text())
    trained = {r["step"]: r for r in read_metrics(options.run, "train")}
    evaluations = read_metrics(options.run, "eval")
    named = {name for record in evaluations for name in record}
    rows = []
    for record in evaluations:
        row = {"recipe": recipe.name, "hash": recipe.hash[:12], "seed": recipe.train.seed, "iteration": record["step"]}
        row["commit"] = str((versions.get("git") or {}).get("commit", ""))[:12]
        row |= {name: f"{record[name]:.4f}" if name in record else "" for name in COLUMNS if name in named}
        reward = trained.get(record["step"], {}).get("reward/mean")
        row["reward/mean"] = "" if reward is None else f"{reward:.4f}"
        rows.append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{recipe.name}-s{recipe.train.seed}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(path)


if __name__ == "__main__":
    main()
