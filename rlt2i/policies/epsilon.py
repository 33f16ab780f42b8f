"""Epsilon- and v-prediction networks as flow policies: a change of variables, and no second code path.

A state of a variance-preserving model is x_vp = alpha x_0 + s eps with alpha^2 + s^2 = 1. Divided by k = alpha + s it
is the flow state x = (1 - sigma) x_0 + sigma eps at sigma = s / k, so

    network(k x, t(sigma)) -> eps_hat or u_hat -> v = eps_hat - x0_hat

is a velocity field like any other: Euler steps on it are DDIM with eta = 0, and the DDIM kernel is DDPO's policy.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from rlt2i.functional.epsilon import (
    Spacing,
    ddim_timesteps,
    epsilon_to_velocity,
    flow_to_vp,
    nearest_timestep,
    scaled_linear_alpha_bars,
    v_prediction_to_velocity,
    vp_sigma,
    vp_sigmas,
)
from rlt2i.interfaces import Policy
from rlt2i.types import Conditioning, ImageSize

Prediction = Literal["epsilon", "v_prediction"]


@attrs.frozen(kw_only=True, eq=False)
class VPSchedule:
    """The noise levels of a variance-preserving model, and what its network predicts.

    Attributes:
        alpha_bars: [M] float32 cumulative products, decreasing.
        prediction: "epsilon", or "v_prediction", u = alpha eps - s x_0.
        spacing, steps_offset: which timesteps a sampler of N steps visits, see `ddim_timesteps`.
    """

    alpha_bars: Tensor
    prediction: Prediction = "epsilon"
    spacing: Spacing = "leading"
    steps_offset: int = 0

    @classmethod
    def from_config(cls, config: dict[str, Any], *, who: str) -> VPSchedule:
        """From a diffusers scheduler_config.json (DDIM, PNDM or DDPM) with "scaled_linear" betas.

        Args:
            who: whose it is, for messages.

        Raises:
            ValueError: for a schedule that the change of variables does not cover.
        """
        defaults: dict[str, Any] = {
            "beta_schedule": "linear",
            "trained_betas": None,
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "rescale_betas_zero_snr": False,
            "clip_sample": False,
            "thresholding": False,
            "use_karras_sigmas": False,
        }
        known = {
            "beta_schedule": ("scaled_linear",),
            "trained_betas": (None,),
            "prediction_type": ("epsilon", "v_prediction"),
            "timestep_spacing": ("leading", "trailing"),
            "rescale_betas_zero_snr": (False,),
            "clip_sample": (False,),
            "thresholding": (False,),
            "use_karras_sigmas": (False, None),
        }
        given = {key: config.get(key, default) for key, default in defaults.items()}
        for key, values in known.items():
            if given[key] not in values:
                raise ValueError(
                    f"{who}: its scheduler says {key}={given[key]!r}; known is {' or '.join(map(repr, values))}. Use a "
                    "pipeline with a scheduler of that kind, or write a policy on rlt2i.policies.epsilon.VPPolicy."
                )
        alpha_bars = scaled_linear_alpha_bars(
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
        )
        return cls(
            alpha_bars=alpha_bars,
            prediction=given["prediction_type"],
            spacing=given["timestep_spacing"],
            steps_offset=config.get("steps_offset", 0),
        )

    def timesteps(self, num_steps: int) -> Tensor:
        """[T] long, decreasing."""
        return ddim_timesteps(
            num_steps,
            num_train_timesteps=len(self.alpha_bars),
            spacing=self.spacing,
            steps_offset=self.steps_offset,
        )

    def sigmas(self, num_steps: int) -> Tensor:
        """[T + 1] float32 flow times of these timesteps, then 0: the last step ends at its clean prediction."""
        return vp_sigmas(self.alpha_bars, self.timesteps(num_steps))

    @property
    def sigma_max(self) -> float:
        """The noisiest level that the network was trained at; below 1."""
        return float(vp_sigma(self.alpha_bars[-1]))


class VPPolicy(Policy):
    """A policy around a network that predicts noise (or u) at its own timesteps.

    A subclass says what the network predicts (`predict`) and supplies text, autoencoder and parameters; schedule, start
    and velocity follow.
    """

    @property
    @abstractmethod
    def schedule(self) -> VPSchedule:
        """Of the network."""

    @abstractmethod
    def predict(self, x_vp: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """[N, C, H, W] what the network says of x_vp [N, C, H, W] at timesteps [N] long; gradients flow."""

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        return self.schedule.sigmas(num_steps)

    def initial_latents(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_vp = noise, as these models are sampled, though a trace alpha x_0 of an image should be in it."""
        return noise * torch.sqrt((1 - sigma) ** 2 + sigma**2)  # noise / k

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """v in float32, whatever the network computes in: x0_hat is ill-conditioned at the noisiest levels.

        Between two timesteps the network is told the nearer one. Above `schedule.sigma_max` it knows nothing.
        """
        x_vp, _ = flow_to_vp(latents, sigma)
        alpha_bars = self.schedule.alpha_bars.to(sigma.device)
        output = self.predict(x_vp, nearest_timestep(sigma, alpha_bars), conditioning).float()
        if self.schedule.prediction == "epsilon":
            return epsilon_to_velocity(latents, output, sigma)
        return v_prediction_to_velocity(latents, output, sigma)
