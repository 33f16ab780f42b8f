"""Laws of captures: that they come, that watching changes nothing, and that a map is a map of that word."""

from __future__ import annotations

from itertools import pairwise

import attrs
import torch
from torch import Tensor

from rlt2i.captures import attention_name, parse_attention_name
from rlt2i.conformance.subject import TEXTS, Subject, distance, require
from rlt2i.types import Prompts

ROUNDING = 1e-4


def _captured(subject: Subject, names: frozenset[str], core: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Captures of the first prompt alone, with these core phrases, of all latents."""
    prompts = Prompts.of(TEXTS[:1])
    if core is not None:
        prompts = attrs.evolve(prompts, core=(core,))
    conditioning = subject.policy.encode(prompts).take(torch.zeros(subject.num_rows, dtype=torch.long))
    with torch.no_grad():
        return subject.policy.velocity_with_captures(subject.latents, subject.sigma, conditioning, names)[1]


def captures_come(subject: Subject) -> str:
    """velocity_with_captures records every name that it is asked for, and no other."""
    names = subject.some_names
    if not names:
        return "offers none"
    with torch.no_grad():
        captures = subject.policy.velocity_with_captures(subject.latents, subject.sigma, subject.conditioning, names)[1]
    require(
        set(captures) == names,
        f"missing captures: of {sorted(names)} asked for, {sorted(names - set(captures)) or 'none'} did not come"
        + (f", and {sorted(set(captures) - names)[:3]} came unasked" if set(captures) - names else "")
        + ". What the spec offers must be recorded in every pass that asks.",
    )
    return f"{len(names)} names"


def watching(subject: Subject) -> None:
    """The velocity is the same bit for bit whether it is watched or not, with gradient and without."""
    for grad in (False, True):
        plain = subject.velocity(grad=grad)
        with torch.set_grad_enabled(grad):
            watched, _ = subject.policy.velocity_with_captures(
                subject.latents, subject.sigma, subject.conditioning, subject.some_names
            )
        require(
            torch.equal(plain, watched),
            f"velocity changes by {distance(watched, plain):.1e} (relative) when captures are recorded, "
            f"{'with' if grad else 'without'} gradient: the rollout is watched and the update is not, so the ratio "
            "would be wrong. Let one kernel serve both.",
        )


def form_of_maps(subject: Subject) -> str:
    """A map is [N, concepts, h, w] float32 on the token grid: finite shares of attention from 0 to 1."""
    if not subject.attention_names:
        return "no attention maps"
    names, largest = subject.some_names, 0.0
    for size in subject.sizes:
        grid = subject.policy.token_grid(size)
        latents = subject.noise(size)
        with torch.no_grad():
            _, captures = subject.policy.velocity_with_captures(latents, subject.sigma, subject.conditioning, names)
        for name, maps in captures.items():
            require(
                maps.ndim == 4 and len(maps) == len(latents) and tuple(maps.shape[-2:]) == grid,
                f"{name} is {list(maps.shape)} at size {size}, expected [{len(latents)}, concepts, {grid[0]}, "
                f"{grid[1]}]: maps lie on token_grid, one per rollout and phrase.",
            )
            require(
                maps.dtype is torch.float32 and not maps.requires_grad,
                f"{name} is {maps.dtype}, requires_grad={maps.requires_grad}; maps are detached float32.",
            )
            require(bool(torch.isfinite(maps).all()), f"{name} holds NaN or infinity.")
            require(bool((maps >= 0).all()), f"{name} reaches {float(maps.min()):.2g}; attention is not negative.")
            image_asks = parse_attention_name(name)[0] == "image_to_text"
            share = maps.sum(1) if image_asks else maps.flatten(2).sum(2)
            largest = max(largest, float(share.max()))
            require(
                float(share.max()) <= 1 + ROUNDING,
                f"{name}: {'all phrases at one place' if image_asks else 'all places of one phrase'} have "
                f"{float(share.max()):.3g} of the attention together, and attention sums to one over all that is "
                "attended to. Take the mean over heads, and do not rescale maps.",
            )
    return f"largest share {largest:.3f}"


def maps_repeat(subject: Subject) -> None:
    """The same pass gives the same maps again, and another batch in between changes nothing."""
    first = _captured(subject, subject.some_names)
    with torch.no_grad():
        subject.policy.velocity_with_captures(
            subject.noise(subject.size, 5), subject.sigma, subject.conditioning, subject.some_names
        )
    for name, maps in _captured(subject, subject.some_names).items():
        require(
            torch.equal(maps, first[name]),
            f"{name} differs by {float((maps - first[name]).abs().max()):.1e} when the same pass is recorded again: "
            "state leaks between calls. Start every recording from nothing.",
        )


def maps_of_rows(subject: Subject) -> None:
    """A row's maps are its own: they follow when rows change places."""
    order = torch.tensor([4, 0, 5, 2, 3, 1])[: subject.num_rows]
    names = subject.some_names
    with torch.no_grad():
        _, maps = subject.policy.velocity_with_captures(subject.latents, subject.sigma, subject.conditioning, names)
        _, moved = subject.policy.velocity_with_captures(
            subject.latents[order], subject.sigma[order], subject.conditioning.take(order), names
        )
    for name, moved_maps in moved.items():
        apart = float((moved_maps - maps[name][order]).abs().max())
        require(
            apart < ROUNDING,
            f"{name} differs by {apart:.1e} when rows change places: are maps of one rollout given to another?",
        )


def phrases_add_up(subject: Subject) -> str:
    """Phrases in another order give the maps in that order, and two words together what they give apart."""
    phrases = [span.phrase for span in subject.conditioning.token_spans[0]]
    if not subject.directions or len(phrases) < 2:
        return "no attention maps" if not subject.directions else "too few words are found"
    one, two = next(((a, b) for a, b in pairwise(phrases) if f"{a} {b}" in TEXTS[0]), (phrases[0], phrases[1]))
    names = frozenset(attention_name(direction, "all") for direction in subject.directions)
    apart, turned = _captured(subject, names, (one, two)), _captured(subject, names, (two, one))
    whole = _captured(subject, names, (TEXTS[0], one))
    both = _captured(subject, names, (f"{one} {two}",)) if f"{one} {two}" in TEXTS[0] else {}
    largest = 0.0
    for name in names:
        require(
            torch.allclose(apart[name], turned[name].flip(1), atol=ROUNDING),
            f"{name}: {one!r}, {two!r} and {two!r}, {one!r} do not give the same two maps in two orders. Maps of "
            "phrases come in the order of token_spans.",
        )
        if parse_attention_name(name)[0] == "image_to_text":
            sums = apart[name].sum(1)
            off = float((both.get(name, sums[:, None])[:, 0] - sums).abs().max())
            require(
                off < ROUNDING,
                f"{name}: the map of {f'{one} {two}'!r} is not that of {one!r} plus that of {two!r}, but off by "
                f"{off:.2g}. A phrase has the sum of its words' attention; do not divide a map by its own maximum or "
                "mean.",
            )
            largest = max(largest, float(whole[name][:, 0].max()))
            covered = bool((whole[name][:, 0] >= whole[name][:, 1] - ROUNDING).all())
            require(covered, f"{name}: a word has more attention than the whole prompt that holds it.")
    return f"the whole prompt has at most {largest:.3f} of a place's attention"


def mean_of_blocks(subject: Subject) -> str:
    """The map of all blocks is the mean of the maps of each."""
    worst = 0.0
    for direction in subject.directions:
        selectors = [parse_attention_name(n)[1] for n in subject.attention_names if f"/{direction}/" in n]
        single = [attention_name(direction, s) for s in selectors if s.isdigit()]
        every = attention_name(direction, "all")
        if not single or every not in subject.spec.offers:
            continue
        captures = _captured(subject, frozenset({*single, every}))
        mean = torch.stack([captures[name] for name in single]).mean(0)
        worst = max(worst, float((mean - captures[every]).abs().max()))
    require(
        worst < ROUNDING,
        f"the maps of all blocks differ from the mean of each block's by {worst:.1e}: are blocks recorded in the wrong "
        "order, twice, or not at all?",
    )
    return f"{worst:.1e}"


LAWS = (captures_come, watching, form_of_maps, maps_repeat, maps_of_rows, phrases_add_up, mean_of_blocks)
