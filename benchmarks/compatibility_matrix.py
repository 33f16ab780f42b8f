"""Which parts go together: every credit x objective x sampler makes one real update, or is refused with the reason.

    python -m benchmarks.compatibility_matrix      # writes docs/compatibility.md

The update is one optimiser step of the toy policy of the tests; a test holds the page to what this module finds.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import torch

from rlt2i.algorithm import Algorithm
from rlt2i.config import load_object
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.interfaces import CreditAssigner, Objective, RewardBatch, RewardOutput, Sampler
from rlt2i.recipes import PARTS
from rlt2i.types import Experience, Region
from tests.helpers.build import collect, toy_engine, toy_learner
from tests.helpers.toy import QuadrantBrightness, ToySpec

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
STEPS = 6
ATTENTION = TextAttention(blocks="0", doubt=0.0)

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "TextAttention": {"blocks": "0", "doubt": 0.0},
    "GDPO": {"weights": {"inside": 1.0, "outside": -0.5}},
    "Influence": {"blocks": 2},
    "RelativeL1Chunks": {"num_chunks": 2},
    "RandomWindow": {"width": 2},
    "SlidingWindow": {"width": 2},
    "RandomWindowSDE": {"num_steps": STEPS, "width": 2},
    "SlidingSDE": {"num_steps": STEPS, "width": 2},
    "SDE": {"num_steps": STEPS},
    "ODE": {"num_steps": STEPS},
    "DPM2": {"num_steps": STEPS},
    "Recorded": {"num_steps": STEPS},
    "BranchSDE": {"num_steps": STEPS, "branches": 2},
    "TreeSDE": {"num_steps": STEPS, "splits": (0, 2, 4)},
}
"""Part -> arguments, where the defaults do not suit the toy policy."""

GROUP_SIZES: Mapping[str, int] = {"BranchSDE": 10, "TreeSDE": 8, "Recorded": 2}
"""Sampler -> rollouts per prompt, where it is not 6: these samplers make one number of them and no other."""


@attrs.frozen(kw_only=True)
class Judged(QuadrantBrightness):
    """The toy reward with everything that a credit may ask for: two terms, and regions with a sign."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        inside = Region(box=(0.0, 0.0, 0.5, 0.5), credit=1.0)
        outside = Region(box=(0.5, 0.0, 1.0, 1.0), credit=-1.0)
        return attrs.evolve(
            output,
            components={"inside": output.scores, "outside": output.scores.square()},
            regions=[[inside, outside] for _ in batch.prompts] if "regions" in want else None,
        )


@cache
def _tiny_transformer() -> str:
    """A folder with a random vision transformer, where FeatureSaliency expects a trained one."""
    import timm
    from timm.models import save_for_hf

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("vit_tiny_patch16_224", **sizes)
    folder = tempfile.mkdtemp()
    save_for_hf(network, folder, model_args=sizes, safe_serialization=True)
    return folder


@cache
def _teacher() -> Path:
    """A file with the weights of another toy policy."""
    policy = ToySpec(seed=1).load()
    with torch.no_grad():
        policy.image.add_(0.1)
    folder = Path(tempfile.mkdtemp())
    policy.export(folder)
    return folder / "toy.safetensors"


def part(kind: str, name: str, **more: Any) -> Any:
    """A registered part, with the arguments of `OPTIONS`."""
    cls = load_object(PARTS[kind][name])
    if "allocation" in attrs.fields_dict(cls):
        more["allocation"] = ATTENTION
    if name == "NormGuard":
        more["objective"] = part("Objective", "DiffusionNFT")
    if name == "OnPolicyDistillation":
        more["teachers"] = {"only": _teacher()}
    if name == "FeatureSaliency":
        more |= {"model": _tiny_transformer(), "resolution": 32}
    return cls(**OPTIONS.get(name, {}), **more)


def credits() -> dict[str, CreditAssigner]:
    """Every advantage alone, every allocation and mask on the group-relative one, STAR on a dense one, and TempFlow."""
    table: dict[str, CreditAssigner] = {n: Product(advantage=part("Advantage", n)) for n in PARTS["Advantage"]}
    relative = GroupRelative()
    for name in PARTS["Allocation"]:
        table[f"GroupRelative x {name}"] = Product(advantage=relative, allocations=(part("Allocation", name),))
    for name in PARTS.get("Mask", {}):
        table[f"GroupRelative x {name}"] = Product(advantage=relative, masks=(part("Mask", name),))
    dense = part("Advantage", "StepGain")
    table["StepGain x TextAttention"] = Product(advantage=dense, allocations=(ATTENTION,))
    tree, noise_aware = part("Advantage", "TreeAdvantage"), part("Allocation", "NoiseAware")
    table["TreeAdvantage x NoiseAware"] = Product(advantage=tree, allocations=(noise_aware,))
    return table


def objectives() -> dict[str, Objective]:
    return {name: part("Objective", name) for name in PARTS["Objective"]}


def samplers() -> dict[str, Sampler]:
    """Every sampler, and every kernel in the one that takes any."""
    table = {name: part("Sampler", name) for name in PARTS["Sampler"] if name != "SDE"}
    for name in PARTS["TransitionKernel"]:
        table[f"SDE({name})"] = part("Sampler", "SDE", kernel=part("TransitionKernel", name))
    return dict(sorted(table.items()))


@attrs.frozen(kw_only=True)
class Cell:
    """What happened to one combination.

    Attributes:
        refusal: the message it was refused with, or "".
        late: whether it was refused only when the first batch was judged.
        gradient: norm of the gradient of its update.
    """

    credit: str
    objective: str
    sampler: str
    refusal: str = ""
    late: bool = False
    gradient: float = math.nan

    @property
    def works(self) -> bool:
        return not self.refusal and math.isfinite(self.gradient) and self.gradient > 0

    @property
    def idle(self) -> bool:
        """Whether it ran and learned nothing."""
        return not self.refusal and self.gradient == 0


def compatibility() -> list[Cell]:
    """Every combination. Rollouts are shared by the objectives, since these see nothing else of an algorithm."""
    cells = []
    for sampler_name, sampler in samplers().items():
        for credit_name, credit in credits().items():
            collected: Experience | ValueError | None = None
            for objective_name, objective in objectives().items():
                where = {"credit": credit_name, "objective": objective_name, "sampler": sampler_name}
                try:
                    algorithm = _algorithm(credit, objective, sampler).load()
                except ValueError as refused:
                    cells.append(Cell(**where, refusal=str(refused)))
                    continue
                if collected is None:
                    collected = _collected(algorithm)
                if isinstance(collected, ValueError):
                    cells.append(Cell(**where, refusal=str(collected), late=True))
                else:
                    metrics = toy_learner(algorithm).learn(collected)
                    cells.append(Cell(**where, gradient=float(metrics["grad_norm"])))
    return cells


def _collected(algorithm: Algorithm) -> Experience | ValueError:
    try:
        group_size = GROUP_SIZES.get(type(algorithm.sampler).__name__, 6)
        algorithm.check_group_size(group_size)
        return collect(toy_engine(algorithm), prompts=3, group_size=group_size).experience
    except ValueError as refused:
        return refused


def _algorithm(credit: CreditAssigner, objective: Objective, sampler: Sampler) -> Algorithm:
    return Algorithm(policy=ToySpec(), sampler=sampler, reward=Judged(), credit=credit, objective=objective)


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
    updated, late, idle = (sum(getattr(c, kind) for c in cells) for kind in ("works", "late", "idle"))
    early = sum(bool(c.refusal) for c in cells) - late
    counts = f"{len(names)} x {len(rows)} x {len(columns)} = {len(cells)}"
    return "\n".join(
        [
            "# What goes with what",
            "",
            "Generated by `python -m benchmarks.compatibility_matrix`; a test holds this page to what the code does.",
            "",
            "Every credit below was put under every objective, with rollouts of every sampler, on the toy policy of",
            f"the tests: {counts} combinations. Of these",
            "",
            f"* {updated} made one optimiser update with a finite gradient that is not zero;",
            f"* {early} were refused when the algorithm was composed, before any weight was read;",
            f"* {late} were refused when the first batch was judged;",
            f"* {idle} ran without any gradient.",
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
    idle = ", ".join(cell.credit for cell in cells if cell.idle)
    told = f"{told} no gradient: {idle}".strip() if idle else told
    done = sum(cell.works for cell in cells)
    return "all" if done == len(cells) else f"{done} of {len(cells)} {told}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(compatibility()))
    print(PAGE)
