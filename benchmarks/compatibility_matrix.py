"""Which parts go together: every credit x objective x sampler makes one real update, or is refused with the reason.

    python -m benchmarks.compatibility_matrix      # writes docs/compatibility.md

The update is one optimiser step of the toy policy of the tests; a test holds the page to what this module finds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from rlt2i.algorithm import Algorithm
from rlt2i.config import load_object
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.interfaces import CreditAssigner, Objective, Sampler
from rlt2i.recipes import PARTS
from rlt2i.types import Experience
from tests.build import collect, toy_engine, toy_learner
from tests.toy import QuadrantBrightness, ToySpec

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
STEPS = 6
ATTENTION = TextAttention(blocks="0", entropy_power=0.0)

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "TextAttention": {"blocks": "0", "entropy_power": 0.0},
    "RandomWindowSDE": {"num_steps": STEPS, "width": 2},
    "SlidingSDE": {"num_steps": STEPS, "width": 2},
    "SDE": {"num_steps": STEPS},
    "ODE": {"num_steps": STEPS},
    "DPM2": {"num_steps": STEPS},
}
"""Part -> arguments, where the defaults do not suit the toy policy."""


def _part(kind: str, name: str, **more: Any) -> Any:
    cls = load_object(PARTS[kind][name])
    if "allocation" in attrs.fields_dict(cls):
        more["allocation"] = ATTENTION
    return cls(**OPTIONS.get(name, {}), **more)


def credits() -> dict[str, CreditAssigner]:
    """Every advantage alone, every allocation and mask on the group-relative advantage, and STAR on a dense one."""
    table: dict[str, CreditAssigner] = {n: Product(advantage=_part("Advantage", n)) for n in PARTS["Advantage"]}
    relative = GroupRelative()
    for name in PARTS["Allocation"]:
        table[f"GroupRelative x {name}"] = Product(advantage=relative, allocations=(_part("Allocation", name),))
    for name in PARTS.get("Mask", {}):
        table[f"GroupRelative x {name}"] = Product(advantage=relative, masks=(_part("Mask", name),))
    dense = _part("Advantage", "StepGain")
    table["StepGain x TextAttention"] = Product(advantage=dense, allocations=(ATTENTION,))
    return table


def objectives() -> dict[str, Objective]:
    return {name: _part("Objective", name) for name in PARTS["Objective"]}


def samplers() -> dict[str, Sampler]:
    """Every sampler, and every kernel in the one that takes any."""
    table = {name: _part("Sampler", name) for name in PARTS["Sampler"] if name != "SDE"}
    for name in PARTS["TransitionKernel"]:
        table[f"SDE({name})"] = _part("Sampler", "SDE", kernel=_part("TransitionKernel", name))
    return dict(sorted(table.items()))


@attrs.frozen(kw_only=True)
class Cell:
    """What happened to one combination.

    Attributes:
        refusal: the message it was refused with, or "".
        gradient: norm of the gradient of its update.
    """

    credit: str
    objective: str
    sampler: str
    refusal: str = ""
    gradient: float = math.nan

    @property
    def works(self) -> bool:
        return not self.refusal and math.isfinite(self.gradient) and self.gradient > 0


def compatibility() -> list[Cell]:
    """Every combination. Rollouts are shared by the objectives, since these see nothing else of an algorithm."""
    cells = []
    for sampler_name, sampler in samplers().items():
        for credit_name, credit in credits().items():
            experience: Experience | None = None
            for objective_name, objective in objectives().items():
                where = {"credit": credit_name, "objective": objective_name, "sampler": sampler_name}
                try:
                    algorithm = _algorithm(credit, objective, sampler)
                except ValueError as refused:
                    cells.append(Cell(**where, refusal=str(refused)))
                    continue
                algorithm = algorithm.load()
                if experience is None:
                    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
                metrics = toy_learner(algorithm).learn(experience)
                cells.append(Cell(**where, gradient=float(metrics["grad_norm"])))
    return cells


def _algorithm(credit: CreditAssigner, objective: Objective, sampler: Sampler) -> Algorithm:
    return Algorithm(policy=ToySpec(), sampler=sampler, reward=QuadrantBrightness(), credit=credit, objective=objective)


# -------------------------------------------------------------------------------------------------------------- page


def page(cells: list[Cell]) -> str:
    """The matrix as a page of the documentation."""
    notes: dict[str, int] = {}
    by_place: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        by_place.setdefault((cell.objective, cell.sampler), []).append(cell)
    rows, columns = sorted({c.objective for c in cells}), sorted({c.sampler for c in cells})
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in rows:
        entries = [_entry(by_place[row, column], notes) for column in columns]
        lines.append(f"| **{row}** | {' | '.join(entries)} |")
    names = list(dict.fromkeys(c.credit for c in cells))
    updated, counts = sum(c.works for c in cells), f"{len(names)} x {len(rows)} x {len(columns)} = {len(cells)}"
    return "\n".join(
        [
            "# What goes with what",
            "",
            "Generated by `python -m benchmarks.compatibility_matrix`; a test holds this page to what the code does.",
            "",
            "Every credit below was put under every objective, with rollouts of every sampler, on the toy policy of",
            f"the tests: {counts} combinations. {updated} of them made one optimiser update with a finite gradient",
            f"that is not zero; {len(cells) - updated} were refused when the algorithm was composed, before any weight",
            "was read.",
            "",
            "`all` means that every credit made an update; a number in brackets is the message of a refusal. That a",
            "combination runs does not mean that it makes sense: see the page of the objective.",
            "",
            *lines,
            "",
            "## Refusals",
            "",
            *[f"{number}. {message}" for message, number in notes.items()],
            "",
            "## Credits",
            "",
            *[f"* `{name}`" for name in names],
            "",
        ]
    )


def _entry(cells: list[Cell], notes: dict[str, int]) -> str:
    refused = [cell for cell in cells if cell.refusal]
    marks = sorted({notes.setdefault(cell.refusal, len(notes) + 1) for cell in refused})
    told = " ".join(f"[{mark}]" for mark in marks)
    if len(refused) == len(cells):
        return told
    done = sum(cell.works for cell in cells)
    return "all" if done == len(cells) else f"{done} of {len(cells)} {told}".strip()


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(compatibility()))
    print(PAGE)
