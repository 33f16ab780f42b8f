"""The table of docs/backbones.md, from the classes and from counts at real size.

    python -m benchmarks.backbones_page           # the table, from the classes and the committed counts
    python -m benchmarks.backbones_page --count   # counts anew first, a minute or so a model, on the meta device

Nothing is downloaded: the configurations of published pipelines are part of the package.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from rlt2i.config import load_object
from rlt2i.policies.cost import make_plan
from rlt2i.policies.pretrained import PretrainedSpec
from rlt2i.recipes import list_recipes
from rlt2i.recipes.parts import PARTS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "backbones.md"
COUNTS = ROOT / "benchmarks" / "results" / "backbones.csv"
BLOCK = re.compile(r"(<!-- (table|recipes): python -m benchmarks.backbones_page -->\n).*?(<!-- end -->)", re.DOTALL)
RECIPE = re.compile(r"(flow-grpo|star|nft|dpo)-([a-z0-9.-]+?)-(ocr|pickscore)(-sizes|-24gb)?")
METHODS = {"flow-grpo": "Flow-GRPO", "star": "STAR", "nft": "DiffusionNFT", "dpo": "online DPO"}
PIXELS = (512, 1024)
GIB = 2**30


def published() -> Iterator[PretrainedSpec]:
    """A spec for every pipeline whose configuration ships, trained as the page says."""
    for reference in PARTS["PolicySpec"].values():
        spec = load_object(reference)
        for repository in spec.known:
            yield spec(
                path=repository, lora_rank=32, dtype="bfloat16", gradient_checkpointing=True, text_encoders="disk"
            )


@attrs.frozen(kw_only=True)
class Count:
    """What one sequence of a published model costs.

    Attributes:
        repository: of the hub.
        pixels: side of a square image.
        parameters: of the network.
        forward_tflop: one velocity of one image.
        capture_percent: of it, for recording 20 words in the middle third of the blocks.
        rollout_gib, update_gib: at the peak, one image at a time, text encoders gone.
        encode_gib: at the peak, while a prompt is encoded.
    """

    repository: str
    pixels: int
    parameters: int
    forward_tflop: float
    capture_percent: float
    rollout_gib: float
    update_gib: float
    encode_gib: float


def count(spec: PretrainedSpec, pixels: int) -> Count:
    """Count one model at one size; reads no weight."""
    plan = make_plan(
        spec, image_size=pixels, num_steps=10, trained_steps=1, rollouts_per_iteration=1, micro_batch_size=1,
        rollout_batch_size=1,
    )  # fmt: skip
    return Count(
        repository=spec.path,
        pixels=pixels,
        parameters=plan.parameters,
        forward_tflop=round(plan.forward_flops / 1e12, 3),
        capture_percent=round(100 * plan.capture_share, 4),
        rollout_gib=round(plan.memory["rollout"] / GIB, 1),
        update_gib=round(plan.memory["update"] / GIB, 1),
        encode_gib=round(plan.memory["encode"] / GIB, 1),
    )


def write_counts(counts: Sequence[Count]) -> None:
    """Keep them in benchmarks/results."""
    with COUNTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in attrs.fields(Count)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(attrs.asdict(each) for each in counts)


def read_counts() -> dict[tuple[str, int], Count]:
    """(repository, pixels) -> count."""
    with COUNTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {"repository": str, "pixels": int, "parameters": int}
    counts = [Count(**{name: kinds.get(name, float)(value) for name, value in row.items()}) for row in rows]  # type: ignore[arg-type]
    return {(each.repository, each.pixels): each for each in counts}


def table() -> str:
    """The table of the page."""
    counts = read_counts()
    lines = [
        "| model | `policy.type` | network | blocks with maps, directions | guidance | weights: licence; gate | "
        "update, GiB at 512 / 1024 | while encoding | capture at 1024 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for spec in published():
        small, large = (counts.get((spec.path, pixels)) for pixels in PIXELS)
        blocks = spec.num_blocks(spec.config(spec.network))
        costs = (
            f"{small.update_gib} / {large.update_gib} | {large.encode_gib} GiB | {large.capture_percent} %"
            if small and large
            else "not counted | | "
        )
        size = f"{large.parameters / 1e9:.2f} B" if large else ""
        lines.append(
            f"| `{spec.path}` | `{type(spec).__name__}` | {size} | {blocks}, {_directions(spec)} | {_guidance(spec)} | "
            f"{_licence(spec)} | {costs} |"
        )
    for name, reference in PARTS["PolicySpec"].items():
        spec = load_object(reference)()
        if not spec.known:
            lines.append(
                f"| `{spec.path}` | `{name}` | | {_directions(spec)} | {_guidance(spec)} | {_licence(spec)} | "
                "not counted: its configuration does not ship | | |"
            )
    return "\n".join(lines)


def _directions(spec: PretrainedSpec) -> str:
    return "both" if len(spec.directions) > 1 else spec.directions[0].replace("_", " ")


def _licence(spec: PretrainedSpec) -> str:
    words = spec.licences.get(spec.path, "see its page").replace(", gated", "; gated")
    return words if words.endswith(("gated", "open")) else f"{words}; open"


def _guidance(spec: PretrainedSpec) -> str:
    form = type(spec.guidance).__name__.removesuffix("Guidance").lower()
    over = getattr(spec.guidance, "over", None)
    told = f"{form} over a {over}" if over else form
    neutral = f", none at {spec.guidance.neutral:g}" if spec.guidance.neutral != 1 else ""
    embedded = getattr(spec, "embedded_guidance", None)
    return f"embedded {embedded:g}, or {told}{neutral}" if embedded is not None else told + neutral


def recipes() -> str:
    """The recipes on text rendering and PickScore, by model and method."""
    found: dict[str, dict[str, list[str]]] = {}
    for entry in list_recipes():
        match = RECIPE.fullmatch(entry.name)
        if match and not entry.model.startswith("embedded:"):
            row = found.setdefault(match[2], {method: [] for method in METHODS})
            row[match[1]].append(f"`{entry.name}`: {entry.evidence}")
    lines = ["| model | " + " | ".join(METHODS.values()) + " |", "|---" * (1 + len(METHODS)) + "|"]
    lines += [
        f"| {key} | " + " | ".join("<br>".join(names) for names in row.values()) + " |" for key, row in found.items()
    ]
    return "\n".join(lines)


def composed(page: str) -> str:
    """The page with the tables of today."""
    blocks = {"table": table, "recipes": recipes}
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]()}\n{match[3]}", page)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--count", nargs="*", metavar="REPOSITORY", help="count these anew; without a name, all")
    asked = words.parse_args().count
    if asked is not None:
        if unknown := set(asked) - {spec.path for spec in published()}:
            words.error(f"not among the published models: {', '.join(sorted(unknown))}")
        kept = read_counts() if COUNTS.is_file() else {}
        for spec in published():
            for pixels in PIXELS if not asked or spec.path in asked else ():
                kept[spec.path, pixels] = count(spec, pixels)
                print(kept[spec.path, pixels], flush=True)
                order = [(each.path, side) for each in published() for side in PIXELS]
                write_counts([kept[key] for key in order if key in kept])
    PAGE.write_text(composed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
