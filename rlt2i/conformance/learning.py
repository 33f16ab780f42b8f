"""Laws of what learns: parameters, gradients, loading, checkpointing, guidance, export."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.conformance.subject import Subject, distance, require
from rlt2i.policies.guidance import Guided

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def something_learns(subject: Subject) -> str:
    """There are trainable parameters, kept in float32, and every one of them gets a gradient."""
    with subject.moved() as parameters:
        require(
            parameters, "nothing is trainable: trainable_parameters() is empty. Set lora_rank, or let weights learn."
        )
        wrong = {name: p.dtype for name, p in parameters.items() if p.dtype is not torch.float32}
        require(
            not wrong,
            f"{len(wrong)} parameters are not float32 ({next(iter(wrong.items()), '')}): an update of 1e-4 of a bf16 "
            "weight rounds to nothing. Keep what learns in float32.",
        )
        stuck = [name for name, p in parameters.items() if not p.requires_grad]
        require(not stuck, f"{stuck[:3]} are called trainable and have requires_grad=False.")
        out = subject.velocity(grad=True)
        require(
            out.requires_grad,
            "gradients stop: velocity has no gradient although gradients are on. Is it detached, or computed under "
            "no_grad or inference_mode?",
        )
        gradients = torch.autograd.grad(out.square().mean(), list(parameters.values()), allow_unused=True)
        dead = [n for n, g in zip(parameters, gradients, strict=True) if g is None or not bool(g.abs().sum() > 0)]
        require(
            len(dead) <= len(parameters) // 10,
            f"gradients stop: {len(dead)} of {len(parameters)} parameters get none, such as {dead[:3]}.",
        )
        count = sum(p.numel() for p in parameters.values())
        return f"{count:,} numbers in {len(parameters)} tensors" + (f"; {len(dead)} without effect" if dead else "")


def no_gradient_when_off(subject: Subject) -> None:
    """Under no_grad nothing is kept for a backward pass."""
    require(
        not subject.velocity().requires_grad,
        "velocity carries a gradient under no_grad: a rollout would keep every activation.",
    )


def gradient_of_latents(subject: Subject) -> None:
    """Gradients reach the latents too, for rewards that are differentiated through the rollout."""
    leaf = subject.latents.clone().requires_grad_()
    out = subject.policy.velocity(leaf, subject.sigma, subject.conditioning)
    gradient = torch.autograd.grad(out.square().mean(), leaf, allow_unused=True)[0] if out.requires_grad else None
    require(
        gradient is not None and bool(gradient.abs().sum() > 0),
        "gradients stop between velocity and its latents: ReFL and DRaFT could not learn. Do not detach the latents.",
    )


def loading_again(subject: Subject) -> str:
    """A second policy of the spec starts the same; checkpointing, where there is a choice, changes no bit."""
    spec: Any = subject.spec
    checkpointed = attrs.has(type(spec)) and "gradient_checkpointing" in attrs.fields_dict(type(spec))
    other = (attrs.evolve(spec, gradient_checkpointing=True) if checkpointed else spec).load(subject.device)
    first, second = subject.policy.trainable_parameters(), other.trainable_parameters()
    require(list(first) == list(second), "a second load names its parameters otherwise, or in another order.")
    different = [name for name in first if not torch.equal(first[name], second[name])]
    require(
        not different,
        f"a second load starts elsewhere: {different[:3]}. Draw what is random from a seed of the spec's.",
    )
    conditioning = other.encode(subject.prompts)
    here = subject.velocity(grad=True)
    there = other.velocity(subject.latents, subject.sigma, conditioning)
    what = "with gradient_checkpointing" if checkpointed else "of a second load"
    require(
        torch.equal(here, there),
        f"velocity {what} differs by {distance(there, here):.1e} (relative).",
    )
    gradients = [_gradients(out, parameters) for out, parameters in ((here, first), (there, second))]
    apart = max((distance(a, b) for a, b in zip(*gradients, strict=True)), default=0.0)
    require(
        apart == 0.0,
        f"gradients {what} differ by {apart:.1e} (relative): what is computed again is not what was computed. Is the "
        "attention kernel, autocast or a random number chosen outside of the block?",
    )
    return "with and without checkpointing" if checkpointed else ""


def _gradients(out: Tensor, parameters: dict[str, torch.nn.Parameter]) -> list[Tensor]:
    values = list(parameters.values())
    gradients = torch.autograd.grad(out.square().mean(), values, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, values, strict=True)]


def guidance(subject: Subject) -> None:
    """Under guidance the negative prompt counts, and at the neutral scale it does not."""
    inner = subject.policy.policy if isinstance(subject.policy, Guided) else subject.policy
    plain = Guided(policy=inner, scale=1.0)
    guided = Guided(policy=inner, scale=3.0, negative_prompt="green")
    arguments = subject.latents, subject.sigma
    with torch.no_grad():
        alone = inner.velocity(*arguments, inner.encode(subject.prompts))
        neutral = plain.velocity(*arguments, plain.encode(subject.prompts))
        conditioning = guided.encode(subject.prompts)
        away = guided.velocity(*arguments, conditioning)
    require(torch.equal(alone, neutral), "guidance of scale 1 is not the policy itself.")
    require(
        len(conditioning) == subject.num_rows and away.shape == alone.shape and bool(torch.isfinite(away).all()),
        f"under guidance velocity is {list(away.shape)} for {len(conditioning)} rows; encode_with_negative adds a row "
        "to the tensors that no rollout refers to.",
    )
    require(
        distance(away, alone) > subject.tolerance,
        "guidance changes nothing: the negative prompt is encoded as the prompt, or its row is not used.",
    )


def export(subject: Subject) -> str:
    """What learned is written as safetensors, and nothing as a pickle."""
    with tempfile.TemporaryDirectory() as folder:
        subject.policy.export(Path(folder))
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        pickles = [file.name for file in files if file.suffix in PICKLES]
        require(not pickles, f"export writes {pickles}, which run code when they are read. Write safetensors.")
        names = [str(file.relative_to(folder)) for file in files if file.suffix == ".safetensors"]
        require(names, f"export writes no safetensors file, but {[file.name for file in files] or 'nothing'}.")
        return ", ".join(sorted(names))


LAWS = (something_learns, no_gradient_when_off, gradient_of_latents, loading_again, guidance, export)
