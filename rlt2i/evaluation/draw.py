"""One way to draw and judge: the ODE from seeded noise, decoded, and shown to a reward."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from rlt2i.engine import decode
from rlt2i.interfaces import Policy, Reward, RewardBatch, RewardOutput
from rlt2i.rewards.validity import score_safely
from rlt2i.samplers.chunked import rollout
from rlt2i.samplers.ode import ODE
from rlt2i.types import ImageSize, Prompts, Trajectory


@attrs.frozen(kw_only=True, eq=False)
class Judged:
    """N drawn images and what a reward said of them.

    Attributes:
        trajectory: how they were drawn, with the captures asked for.
        batch: [N, 3, H, W] uint8 images with their prompts, as the reward was shown them.
        output: the reward's answer.
    """

    trajectory: Trajectory
    batch: RewardBatch
    output: RewardOutput

    @property
    def images(self) -> Tensor:
        return self.batch.images


@attrs.frozen(kw_only=True)
class Draw:
    """How images are drawn.

    Attributes:
        seed: the noise of an image is a function of (seed, text, draw, index) alone: drawn on the CPU, the same for
            every policy, on every process, in any order.
        num_steps: of the ODE.
        image_size: in pixels.
        rollout_batch_size: per forward pass; changes speed and memory, and the last bits of what networks compute.
        device: where.
    """

    seed: int
    num_steps: int
    image_size: ImageSize
    rollout_batch_size: int
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=torch.device)

    def trajectory(
        self,
        policy: Policy,
        prompts: Prompts,
        *,
        captures: frozenset[str] = frozenset(),
        advance: Callable[[int], None] = lambda count: None,
    ) -> Trajectory:
        """Rollouts of the ODE; `advance` is called with the number of each chunk that is finished."""
        return rollout(
            policy,
            ODE(num_steps=self.num_steps),
            prompts,
            seed=self.seed,
            image_size=self.image_size,
            rollout_batch_size=self.rollout_batch_size,
            captures=captures,
            device=self.device,
            advance=advance,
        )

    def decoded(self, policy: Policy, latents: Tensor) -> Tensor:
        """[N, C, H, W] latents to [N, 3, H', W'] uint8 RGB."""
        return decode(policy, latents, rollout_batch_size=self.rollout_batch_size)

    def images(self, policy: Policy, prompts: Prompts) -> Tensor:
        """[N, 3, H, W] uint8 RGB, one per rollout."""
        return self.decoded(policy, self.trajectory(policy, prompts).clean_latents)

    def judged(
        self,
        policy: Policy,
        reward: Reward,
        prompts: Prompts,
        *,
        want: frozenset[str] = frozenset(),
        captures: frozenset[str] = frozenset(),
        advance: Callable[[int], None] = lambda count: None,
    ) -> Judged:
        """Draw every rollout of the prompts and have the reward score it; what it cannot judge is invalid.

        Args:
            want: of the reward, such as "maps".
            captures: of the policy, recorded on the way.
        """
        trajectory = self.trajectory(policy, prompts, captures=captures, advance=advance)
        batch = RewardBatch.of(self.decoded(policy, trajectory.clean_latents), prompts)
        return Judged(trajectory=trajectory, batch=batch, output=score_safely(reward, batch, want))
