"""Laws of what a policy says before it denoises: captures on offer, schedule, sizes, start."""

from __future__ import annotations

import attrs
import torch

from rlt2i.captures import parse_attention_name
from rlt2i.conformance.subject import Subject, require
from rlt2i.interfaces import PolicySpec
from rlt2i.types import height_and_width


def spec_is_data(subject: Subject) -> None:
    """A spec is a frozen attrs class that a recipe file can hold and give back."""
    from rlt2i.config import to_mapping
    from rlt2i.recipes.parts import PARTS
    from rlt2i.recipes.recipe import build_part

    spec = subject.spec
    require(
        attrs.has(type(spec)),
        f"{type(spec).__name__} is no attrs class, so no recipe can name its fields: decorate it with "
        "@attrs.frozen(kw_only=True).",
    )
    again = build_part(PolicySpec, to_mapping(spec, parts=PARTS))  # type: ignore[type-abstract]
    require(again == spec, f"written to YAML and read again it is another one: {again} instead of {spec}.")


def offers(subject: Subject) -> str:
    """Spec and policy offer the same captures, under names that credit can ask for."""
    before, after = subject.spec.offers, subject.policy.offers
    require(
        before == after,
        f"the spec offers {len(before)} captures and the loaded policy {len(after)}; only one of them has "
        f"{sorted(before ^ after)[:3]}. Recipes are checked against the spec: make both the same.",
    )
    for name in subject.attention_names:
        parse_attention_name(name)
    return f"{len(after)} captures; maps {', '.join(subject.directions) or 'none, so no attention credit'}"


def schedule(subject: Subject) -> None:
    """sigmas(T, size) gives T + 1 float32 levels that fall from at most 1 to 0."""
    for num_steps in (1, 4, 10, 28):
        try:
            sigmas = subject.policy.sigmas(num_steps, subject.size)
        except ValueError:
            require(num_steps == 1, f"sigmas({num_steps}) is refused; rollouts of so many steps are usual.")
            continue
        require(
            sigmas.shape == (num_steps + 1,),
            f"sigmas({num_steps}) has shape {list(sigmas.shape)}; T steps have T + 1 levels, the last of them 0. Is "
            "the final 0 missing?",
        )
        require(sigmas.dtype is torch.float32, f"sigmas({num_steps}) is {sigmas.dtype}; levels are float32.")
        require(float(sigmas[-1]) == 0.0, f"sigmas({num_steps}) ends at {float(sigmas[-1]):g}; a rollout ends at 0.")
        falls = bool((sigmas.diff() < 0).all()) and float(sigmas[0]) <= 1.0
        require(
            falls,
            f"sigmas({num_steps}) = {[round(s, 4) for s in sigmas.tolist()][:6]}...: levels fall from at most 1 (pure "
            "noise) to 0; they are no timesteps in thousandths, and time does not run the other way.",
        )


def schedule_is_a_function(subject: Subject) -> None:
    """The schedule depends on its arguments alone, and what it returned may be changed."""
    first = subject.policy.sigmas(7, subject.size)
    kept = first.clone()
    subject.policy.sigmas(3, subject.size)
    require(
        torch.equal(subject.policy.sigmas(7, subject.size), kept),
        "sigmas(7) differs after sigmas(3) was asked for: state leaks between calls. Rollout, update and evaluation "
        "ask in turn; compute the levels anew each time.",
    )
    first += 1
    require(
        torch.equal(subject.policy.sigmas(7, subject.size), kept),
        "sigmas returns a tensor that it goes on using: whoever changes it changes the schedule. Return a clone.",
    )


def sizes(subject: Subject) -> str:
    """A size is (height, width): latents and token grid follow both, and the grid divides the latents."""
    policy = subject.policy
    for size in subject.sizes:
        _, high, wide = policy.latent_shape(size)
        rows, columns = policy.token_grid(size)
        require(
            high % rows == 0 and wide % columns == 0,
            f"size={size}: a token grid of {rows} x {columns} does not divide latents of {high} x {wide}, so a map "
            "could not be laid over the loss.",
        )
    if subject.oblong is None:
        return "takes no size but squares"
    height, width = height_and_width(subject.oblong)
    for name, ask in (("latent_shape", lambda s: policy.latent_shape(s)[1:]), ("token_grid", policy.token_grid)):
        high, wide = ask((height, width))
        require(
            high * width == wide * height,
            f"{name}(({height}, {width})) is {high} x {wide}: one of the sides is ignored. A size is (height, width), "
            "or one number for a square.",
        )
    return f"{subject.size} and {height} x {width}"


def wrong_sizes(subject: Subject) -> None:
    """A size that does not fit is a ValueError that names it."""
    height, width = height_and_width(subject.size)
    for size in (0, -16, (height, 0), (-height, width)):
        try:
            shape = subject.policy.latent_shape(size)
        except ValueError as error:
            named = str(size) in str(error) or all(str(side) in str(error) for side in height_and_width(size))
            require(named, f"size={size} is refused without being named: {error!s}. Say which size, and the nearest.")
        else:
            require(
                False,
                f"size={size} is accepted, with latents of {shape}. Refuse with a ValueError that names the nearest "
                "size that works.",
            )


def start(subject: Subject) -> None:
    """A rollout starts from noise of the first level, shaped as latents, and noise stays as it was."""
    noise = subject.latents.clone()
    sigma = subject.policy.sigmas(4, subject.size)[0].to(subject.device)
    latents = subject.policy.initial_latents(noise, sigma)
    require(
        latents.shape == noise.shape and latents.dtype is torch.float32 and bool(torch.isfinite(latents).all()),
        f"initial_latents gives {list(latents.shape)} {latents.dtype}; expected {list(noise.shape)} float32, finite.",
    )
    require(torch.equal(noise, subject.latents), "initial_latents changes the noise it was given; make a new tensor.")


LAWS = (spec_is_data, offers, schedule, schedule_is_a_function, sizes, wrong_sizes, start)
