"""A pipeline draws what the policy made of it draws: sign, time, packing, schedule, text and decoder at once."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from rlt2i.conformance.subject import TEXTS, Subject, require
from rlt2i.functional.transitions import euler
from rlt2i.policies.epsilon import VPPolicy
from rlt2i.policies.pretrained import PretrainedPolicy, PretrainedSpec
from rlt2i.policies.pretrained.autoencoder import on_white
from rlt2i.types import ImageSize, Prompts, height_and_width

STEPS = 2
SEED = 11
ROUNDING = 1e-3


def same_image_as_the_pipeline(subject: Subject) -> str:
    """From the same noise and prompt, the stock pipeline draws the same image, square or not, without guidance."""
    spec = subject.spec
    if not isinstance(spec, PretrainedSpec):
        return "no diffusers pipeline"
    options = spec.drawing()
    if options is None:
        return "not compared: by choice of its spec it samples otherwise than its pipeline"
    if spec.compute_dtype != torch.float32:
        return "compared in float32 only: set dtype=float32"
    policy = attrs.evolve(spec, guidance_scale=spec.guidance.neutral, text_encoders="device").load(subject.device)
    assert isinstance(policy, PretrainedPolicy)
    policy.pipe.set_progress_bar_config(disable=True)
    worst = 0.0
    for size in subject.sizes:
        height, width = height_and_width(size)
        with torch.no_grad(), policy.precision():
            theirs = policy.pipe(
                prompt=TEXTS[0], height=height, width=width, num_inference_steps=STEPS, output_type="pt",
                generator=torch.Generator().manual_seed(SEED), **options,
            )[0]  # fmt: skip
        levels = torch.as_tensor(policy.pipe.scheduler.sigmas).float().cpu().clone()
        theirs = on_white(theirs)
        ours = _drawn(policy, size)
        apart = float((ours - theirs.to(ours)).abs().max())
        if apart > ROUNDING:
            turned = float((_drawn(policy, size, sign=-1) - theirs.to(ours)).abs().max())
            require(
                turned > ROUNDING,
                f"velocity has the wrong sign: with it turned the image is its pipeline's (size {size}). v = eps - x_0 "
                "points from the image to the noise.",
            )
            _name_the_rest(policy, size, apart, levels)
        worst = max(worst, apart)
    return f"largest difference of a pixel {worst:.1e}"


def _drawn(policy: PretrainedPolicy, size: ImageSize, sign: int = 1) -> Tensor:
    """[1, 3, H, W] from the noise that the pipeline draws with SEED."""
    noise = torch.randn(1, *policy.latent_shape(size), generator=torch.Generator().manual_seed(SEED))
    conditioning = policy.encode(Prompts.of(TEXTS[:1]))
    sigmas = policy.sigmas(STEPS, size).to(policy.device)
    latents = policy.initial_latents(noise.to(policy.device), sigmas[0])
    with torch.no_grad():
        for now, then in zip(sigmas[:-1, None], sigmas[1:, None], strict=True):
            out = sign * policy.velocity(latents, now, conditioning)
            latents = euler(latents, out, now, then).mean
        return policy.decode(latents)


def _name_the_rest(policy: PretrainedPolicy, size: ImageSize, apart: float, theirs: Tensor) -> None:
    """Is it the schedule where the images part, or something else?"""
    ours = policy.sigmas(STEPS, size)
    levels = [[round(level, 4) for level in sigmas.tolist()] for sigmas in (ours, theirs)]
    require(
        isinstance(policy, VPPolicy) or theirs.shape != ours.shape or torch.allclose(theirs, ours, atol=1e-5),
        f"the schedule is not its pipeline's at size {size}: {levels[0]} instead of {levels[1]}. Is the shift by image "
        "size or number of steps missing?",
    )
    require(
        False,
        f"its pipeline draws another image of {TEXTS[0]!r} at size {size}: a pixel differs by {apart:.2g}. Compare "
        "time (sigma or 1 - sigma, times 1000 or not), packing, text template, and the decoder's scale and shift.",
    )


LAWS = (same_image_as_the_pipeline,)
