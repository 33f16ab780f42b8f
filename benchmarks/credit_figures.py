"""The pictures and the table of docs/credit.md: every allocation on the same images of the shipped base.

    python -m benchmarks.credit_figures      # docs/assets/credit_space.png, credit_time.svg; the table in the page

Half a minute on one core. Three prompts, eight rollouts each; nothing is trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch
from PIL import Image
from torch import Tensor

from rlt2i.algorithm import Algorithm
from rlt2i.credit.algebra import Allocation, Mask, Product
from rlt2i.credit.controls import Inverted, Oracle, Shuffled
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.inverse_dt import InverseDt
from rlt2i.credit.noise_aware import NoiseAware
from rlt2i.credit.proportional_dt import ProportionalDt
from rlt2i.credit.random_subset import RandomSubset
from rlt2i.credit.random_window import RandomWindow
from rlt2i.credit.region_maps import RegionMaps
from rlt2i.credit.relative_l1_chunks import RelativeL1Chunks
from rlt2i.credit.residual_contrast import ResidualContrast
from rlt2i.credit.sliding_window import SlidingWindow
from rlt2i.credit.text_attention import TextAttention
from rlt2i.engine import Engine
from rlt2i.functional.schedules import sd3_sigmas
from rlt2i.interfaces import CreditAssigner, CreditContext, Needs
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.policies.sd3 import SD3
from rlt2i.report.charts import QUIET, SERIES, axes, figure, svg, text
from rlt2i.report.maps import draw_scale, overlay, scale_top
from rlt2i.report.pictures import enlarge, paste, rendered
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.samplers.sde import SDE
from rlt2i.tasks.base import as_prompts
from rlt2i.tasks.shapes.reward import ShapesReward
from rlt2i.tasks.shapes.task import ShapesTask
from rlt2i.tasks.shapes.vocabulary import CANVAS
from rlt2i.training.observations import weight_statistics
from rlt2i.types import Credit

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "credit.md"
PROMPTS = (400, 323, 161)
"""Of the held-out prompts: a red circle and a yellow square; a triangle above a square; three circles."""
GROUP = 8
SHOWN_STEP = 2

ATTENTION = TextAttention(direction="text_to_image", blocks="2", blur=0.5, doubt=0.0)
SPACE: Mapping[str, Allocation] = {
    "TextAttention": ATTENTION,
    "Shuffled(TextAttention)": Shuffled(allocation=ATTENTION),
    "Inverted(TextAttention)": Inverted(allocation=ATTENTION),
    "Oracle": Oracle(),
    "RegionMaps": RegionMaps(),
    "ResidualContrast": ResidualContrast(),
}
TIME: Mapping[str, Allocation] = {
    "NoiseAware": NoiseAware(),
    "InverseDt": InverseDt(),
    "ProportionalDt": ProportionalDt(),
    "RelativeL1Chunks(num_chunks=3)": RelativeL1Chunks(num_chunks=3),
}


@attrs.frozen(kw_only=True)
class Listener(CreditAssigner):
    """Uniform credit that asks for whatever the allocations need, and keeps what it was given."""

    allocations: tuple[Allocation, ...]
    heard: list[CreditContext] = attrs.field(factory=list)

    @property
    def needs(self) -> Needs:
        return Needs.of_all((Needs(groups=True), *(allocation.needs for allocation in self.allocations)))

    def assign(self, context: CreditContext) -> Credit:
        self.heard.append(context)
        return Product(advantage=GroupRelative()).assign(context)


def overheard() -> CreditContext:
    """One rollout batch of the shipped base: noise on the first three of ten steps, shared in a group at the start."""
    listener = Listener(allocations=(*SPACE.values(), *TIME.values()))
    algorithm = Algorithm(
        policy=SD3(path="embedded:shapes"),
        sampler=SDE(num_steps=10, window=(0, 3), kernel=FlowSDE(noise_level=0.9)),
        reward=ShapesReward(rule="exclusive"),
        credit=listener,
        objective=ClippedSurrogate(),
    ).load()
    task = ShapesTask()
    held_out = task.eval_prompts(480)
    prompts = as_prompts([held_out[i] for i in PROMPTS], group_size=GROUP)
    engine = Engine(algorithm=algorithm, image_size=CANVAS, rollout_batch_size=96, seed=0, share_initial_noise=True)
    engine.collect(prompts, iteration=0)
    return listener.heard[0]


def on_sd3_schedule(context: CreditContext) -> CreditContext:
    """The same batch as if its ten steps were SD3's, noisy on all but the last as Flow-GRPO samples."""
    trajectory = context.trajectory
    stochastic = torch.arange(trajectory.num_steps) < trajectory.num_steps - 1
    schedule = attrs.evolve(
        trajectory,
        sigmas=sd3_sigmas(trajectory.num_steps),
        stochastic=stochastic,
        noisy=stochastic.expand(trajectory.num_rollouts, -1),
        kernel=FlowSDE(noise_level=0.7),
    )
    return attrs.evolve(context, trajectory=schedule)


# -------------------------------------------------------------------------------------------------------------- table


def rows(context: CreditContext, sd3: CreditContext) -> list[str]:
    """A row of the table per allocation, and two products."""
    lines = []
    for name, allocation in SPACE.items():
        lines.append(_row(name, "places" + (" and steps" if _steps(allocation, context) else ""), allocation, context))
    for name, allocation in TIME.items():
        lines.append(_row(name, "steps", allocation, sd3))
    both = Product(advantage=GroupRelative(), allocations=(ATTENTION, Oracle())).assign(context)
    lines.append(_figures("TextAttention x Oracle", "places and steps", both.causality, both.weight, context))
    return lines


def _steps(allocation: Allocation, context: CreditContext) -> bool:
    return allocation.weight(context).shape[1] > 1


def _row(name: str, resolves: str, allocation: Allocation, context: CreditContext) -> str:
    return _figures(name, resolves, allocation.causality, allocation.weight(context), context)


def _figures(name: str, resolves: str, causality: str, weight: Tensor, context: CreditContext) -> str:
    stochastic = context.trajectory.stochastic
    trained = weight[:, stochastic] if weight.shape[1] > 1 else weight
    seen = weight_statistics(trained, torch.ones(trained.shape[1], dtype=torch.bool))
    axis = "map" if "map/entropy" in seen else "time"
    entropy, support = (float(seen[f"{axis}/{what}"].mean()) for what in ("entropy", "effective_support"))
    largest = float(seen[f"{axis}/max"].max())
    return f"| `{name}` | {causality} | {resolves} | {entropy:.3f} | {support:.2f} | {largest:.2f} |"


def paged(text: str, lines: Sequence[str]) -> str:
    """The page with the table."""
    start, end = "<!-- table: python -m benchmarks.credit_figures -->\n", "<!-- end of table -->"
    head = [
        "| allocation | causality | resolves | entropy | effective support | maximum |",
        "|---|---|---|---|---|---|",
    ]
    before, rest = text.split(start)
    return f"{before}{start}\n" + "\n".join([*head, *lines]) + f"\n\n{end}{rest.split(end)[1]}"


# -------------------------------------------------------------------------------------------------------------- space


def space(context: CreditContext, side: int = 96) -> Image.Image:
    """Best and worst rollout of each prompt, and every map over them."""
    scores = context.rewards.final.view(-1, GROUP)
    chosen = [(p, int(pick)) for p in range(len(scores)) for pick in (scores[p].argmax(), scores[p].argmin())]
    weights = {name: allocation.weight(context) for name, allocation in SPACE.items()}
    top = scale_top(torch.cat([weight.flatten() for weight in weights.values()]))
    gap, margin, text_height = 8, 14, 34
    names = ["image", *(name.replace("(TextAttention)", "") for name in weights)]
    width = 2 * margin + len(names) * side + (len(names) - 1) * gap
    with figure(width, margin + 26 + len(chosen) * (side + text_height) + 48) as canvas:
        for column, name in enumerate(names):
            text(canvas, margin + column * (side + gap), margin + 11, name, fontsize=11)
        for row, (prompt, member) in enumerate(chosen):
            y = margin + 26 + row * (side + text_height)
            rollout = prompt * GROUP + member
            picture = enlarge(context.images[rollout], side)
            paste(canvas, picture, margin, y)
            for column, weight in enumerate(weights.values(), start=1):
                step = SHOWN_STEP if weight.shape[1] > 1 else 0
                paste(canvas, overlay(picture, weight[rollout, step], top=top), margin + column * (side + gap), y)
            words = f'"{context.prompts.texts[prompt]}", reward {float(context.rewards.final[rollout]):.2f}'
            text(canvas, margin, y + side + 16, words)
        largest = max(float(weight.max()) for weight in weights.values())
        draw_scale(canvas, margin, canvas.get_figheight() * 72 - 40, top, largest=largest)
        return rendered(canvas)


# --------------------------------------------------------------------------------------------------------------- time


def time_strips(context: CreditContext, sd3: CreditContext) -> str:
    """Weights and masks over the steps, as bars; a step that takes no part is an empty frame."""
    trained = sd3.trajectory.stochastic
    strips: list[tuple[str, list[float | None]]] = []
    for name, allocation in TIME.items():
        weight = allocation.weight(sd3)[0, :, 0, 0]
        label = f"{name} of these rollouts" if allocation.causality == "outcome" else name
        strips.append((label, [float(w) if kept else None for w, kept in zip(weight, trained, strict=True)]))
    masks: list[tuple[str, Mask, CreditContext, int]] = [
        (f"SlidingWindow(width=3, period=1), batch {batch}", SlidingWindow(width=3, period=1), batch_of(sd3, batch), 0)
        for batch in (0, 1)
    ]
    masks += [
        (f"RandomWindow(width=3), batch {batch}", RandomWindow(width=3), batch_of(sd3, batch), 0) for batch in (0, 1)
    ]
    masks += [(f"RandomSubset(fraction=0.6), rollout {rollout}", RandomSubset(), sd3, rollout) for rollout in (0, 1)]
    for name, mask, where, rollout in masks:
        kept = mask.mask(where).expand(context.trajectory.num_rollouts, -1, 1, 1)[rollout, :, 0, 0] & trained
        strips.append((name, [1.0 if k else None for k in kept]))
    return _bars(strips, [float(sigma) for sigma in sd3.trajectory.sigmas[:-1]])


def batch_of(context: CreditContext, number: int) -> CreditContext:
    """The same context as rollout batch `number`."""
    return attrs.evolve(context, iteration=number, generator=torch.Generator().manual_seed(number))


def _bars(strips: Sequence[tuple[str, Sequence[float | None]]], sigmas: Sequence[float]) -> str:
    left, cell, tall, row, top = 330, 44, 34, 52, 56
    width, height = left + cell * len(sigmas) + 20, top + row * len(strips) + 8
    highest = max(value for _, strip in strips for value in strip if value is not None)
    with figure(width, height) as canvas:
        title = "Credit over the ten steps of SD3's schedule; mean one over the nine that have noise"
        text(canvas, 8, 20, title, fontsize=14)
        text(canvas, left - 12, 44, "noise level", ha="right", color=QUIET)
        for step, sigma in enumerate(sigmas):
            text(canvas, left + cell * (step + 0.5), 44, f"{sigma:.2f}", ha="center", color=QUIET)
        for place, (name, strip) in enumerate(strips):
            y = top + row * place
            text(canvas, left - 12, y + tall - 2, name, ha="right")
            plot = axes(canvas, left, y, 20, height - y - tall)
            plot.axis("off")
            plot.set_xlim(-0.5, len(sigmas) - 0.5)
            plot.set_ylim(0, highest * 1.5)
            for step, value in enumerate(strip):
                if value is None:  # a step that takes no part
                    plot.bar(step, 0.45, width=0.75, fill=False, edgecolor="#c8c8ce", linestyle="--")
                    continue
                plot.bar(step, value, width=0.75, color=SERIES[0])
                plot.annotate(f"{value:.2f}", (step, value), xytext=(0, 3), textcoords="offset points", ha="center",
                              fontsize=10)  # fmt: skip
        return svg(canvas, "Weights and masks over denoising steps.", standalone=True) + "\n"


def main() -> None:
    """Draw and write."""
    torch.set_num_threads(1)
    context = overheard()
    sd3 = on_sd3_schedule(context)
    with torch.no_grad():
        space(context).save(DOCS / "assets" / "credit_space.png", optimize=True)
        (DOCS / "assets" / "credit_time.svg").write_text(time_strips(context, sd3), encoding="utf-8")
        lines = rows(context, sd3)
    print("\n".join(lines))
    text = PAGE.read_text(encoding="utf-8")
    if re.search(r"benchmarks\.credit_figures -->", text):
        PAGE.write_text(paged(text, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
