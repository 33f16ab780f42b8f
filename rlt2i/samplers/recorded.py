"""Images that are already there: a sampler that reads a pair file instead of denoising."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.captures import PREFERENCE
from rlt2i.functional.transfer import to_device
from rlt2i.functional.transitions import clean_prediction
from rlt2i.inputs.imagefiles import ImageFileError, read_picture
from rlt2i.interfaces import Policy, RolloutRequest, Sampler
from rlt2i.samplers.rollout import CLEAN_PREDICTIONS, MOST_STEPS
from rlt2i.types import Conditioning, ImageSize, Trajectory, height_and_width

ROLES: Final = ("winner", "loser")
"""Metadata keys with the files of a pair, in the order of its two rollouts."""


@attrs.frozen(kw_only=True)
class Recorded(Sampler):
    """Rollout 0 of every prompt is the winner of its pair, rollout 1 the loser; no step has a log-probability.

    The clean latents are the autoencoder's mean for the two images. There was no denoising, so the states before them
    are the forward process of each image with one noise of its own, x_sigma = (1 - sigma) x_0 + sigma eps: the states
    that objectives on finished images train at. Captures are what the policy computes at those states.

    It offers the capture "preference", [B, T]: +1 for winners and -1 for losers.

    Attributes:
        num_steps: T, the noise levels at which credit can differ; nothing is denoised.
    """

    num_steps: int = attrs.field(default=10, validator=[validators.ge(1), validators.le(MOST_STEPS)])

    offers = frozenset({CLEAN_PREDICTIONS, PREFERENCE})
    metadata_keys = frozenset(ROLES)
    whole_groups = True

    def stochastic_steps(self, iteration: int) -> tuple[int, ...]:
        return ()

    def check_group_size(self, group_size: int) -> None:
        if group_size != len(ROLES):
            raise ValueError(
                f"group_size={group_size}: Recorded reads pairs, so every prompt has two images, a winner and a loser. "
                "Use group_size=2, or a sampler that denoises, such as ODE()."
            )

    @torch.no_grad()
    def rollout(self, policy: Policy, conditioning: Conditioning, request: RolloutRequest) -> Trajectory:
        self.check_group_size(request.group_size)
        device, num_rollouts = request.noise.device, len(request.noise)
        files = [_file(row, ROLES[i % 2]) for i, row in enumerate(request.metadata)]
        images = torch.stack([read_image(file, request.image_size) for file in files])
        clean = policy.encode_images(to_device(images, device) / 255)
        noise = request.noise.initial(policy.latent_shape(request.image_size))
        sigmas = to_device(policy.sigmas(self.num_steps, request.image_size), device)
        level = sigmas.view(1, -1, 1, 1, 1)
        latents = (1 - level) * clean[:, None] + level * noise[:, None]
        return Trajectory(
            latents=latents,
            sigmas=sigmas,
            log_probs=latents.new_zeros(1, 1, 1, 1).expand(num_rollouts, self.num_steps, *latents.shape[-2:]),
            stochastic=torch.zeros(self.num_steps, dtype=torch.bool, device=device),
            kernel=None,
            conditioning=conditioning,
            group_size=request.group_size,
            captures=_captures(policy, conditioning, request.captures, latents, sigmas),
        )


def read_image(file: Path, image_size: ImageSize) -> Tensor:
    """[3, H, W] uint8 RGB.

    Raises:
        ValueError: naming the file, when it is no image of that size.
    """
    try:
        pixels = torch.from_numpy(read_picture(file)).permute(2, 0, 1)
    except ImageFileError as error:
        raise ValueError(f"{file}: {error}. Replace it, or drop its pair.") from None
    height, width = height_and_width(image_size)
    if tuple(pixels.shape[1:]) != (height, width):
        raise ValueError(
            f"{file}: {pixels.shape[2]} x {pixels.shape[1]} pixels, expected {width} x {height}. "
            "Resize the images of the pair file, or set image_size."
        )
    return pixels


def _file(metadata: object, role: str) -> Path:
    if not isinstance(metadata, dict) or not isinstance(metadata.get(role), str):
        raise ValueError(
            f"Recorded: the prompt carries no {role!r} image, only {sorted(metadata) if metadata else 'nothing'}. "  # type: ignore[call-overload]
            "Use a task of pairs, such as PairFileTask."
        )
    return Path(metadata[role])


def _captures(
    policy: Policy, conditioning: Conditioning, names: frozenset[str], latents: Tensor, sigmas: Tensor
) -> dict[str, Tensor]:
    """name -> [B, T, ...]."""
    num_rollouts, num_steps = latents.shape[0], latents.shape[1] - 1
    captures: dict[str, Tensor] = {}
    if PREFERENCE in names:
        verdict = to_device(torch.tensor([1.0, -1.0], dtype=latents.dtype), latents.device).repeat(num_rollouts // 2)
        captures[PREFERENCE] = verdict[:, None].expand(-1, num_steps)
    requested = names - {PREFERENCE, CLEAN_PREDICTIONS}
    if not names - {PREFERENCE}:
        return captures
    steps: list[dict[str, Tensor]] = []
    for step in range(num_steps):
        state, sigma = latents[:, step], sigmas[step].expand(num_rollouts)
        velocity, captured = policy.velocity_with_captures(state, sigma, conditioning, requested)
        steps.append({**captured, CLEAN_PREDICTIONS: clean_prediction(state, velocity, sigma)})
    return captures | {name: torch.stack([s[name] for s in steps], dim=1) for name in names - {PREFERENCE}}
