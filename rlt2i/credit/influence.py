"""Influence: redraw the noise of one block of one step, finish the image, and see what becomes of the reward."""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor
from torch.nn.functional import interpolate

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.spatial import relative_weight
from rlt2i.credit.steps import stochastic_steps
from rlt2i.functional.advantages import group_std
from rlt2i.interfaces import CreditContext, Needs
from rlt2i.types import Causality


@attrs.frozen(kw_only=True)
class Influence(Allocation):
    """Mean |R(ODE(x' with a block's noise drawn anew)) - R(ODE(x'))|, by block and step: an intervention, not a proxy.

    A slow yardstick for maps that are cheap. Per rollout and stochastic step t it costs (blocks^2 draws + 1) times
    T - t - 1 network calls, a decoding and a reward: 3 steps of 10 with 4 x 4 blocks are 408 calls against the
    rollout's own 10. Only rollouts of groups whose rewards differ are measured, the others have no advantage to
    allocate. All rollouts share the redrawn noise, so that their differences are not those of the draws. A failed
    reward counts as no change; a step at which no block matters gets the uniform map, and so does a step without noise.

    Attributes:
        blocks: blocks a side.
        draws: redrawn noises per block.
        mix: share of the influence map against the uniform map.
        floor: weight of a block without influence, relative to the strongest.
    """

    causality: Causality = attrs.field(default="action", init=False)

    blocks: int = attrs.field(default=4, validator=validators.ge(2))
    draws: int = attrs.field(default=1, validator=validators.ge(1))
    mix: float = attrs.field(default=0.5, validator=[validators.ge(0.0), validators.le(1.0)])
    floor: float = attrs.field(default=0.02, validator=[validators.gt(0.0), validators.le(1.0)])

    @property
    def needs(self) -> Needs:
        return Needs(groups=True, noise=True, captures={"clean_predictions"})

    def weight(self, context: CreditContext) -> Tensor:
        steps = stochastic_steps(context, of="Influence", because="there is no noise to draw anew")
        trajectory, rewards = context.trajectory, context.rewards
        if min(context.token_grid) < self.blocks:
            raise ValueError(
                f"Influence(blocks={self.blocks}): the image has {context.token_grid[0]} x {context.token_grid[1]} "
                f"tokens. Use blocks <= {min(context.token_grid)}."
            )
        spread = group_std(rewards.final, context.group_size, valid=rewards.valid)
        rows = ((spread > 0).repeat_interleave(context.group_size) & rewards.valid).nonzero()[:, 0]
        maps = trajectory.latents.new_zeros(
            trajectory.num_rollouts, trajectory.num_steps, self.blocks, self.blocks, dtype=torch.float32
        )
        for step in steps if len(rows) else ():
            maps[rows, step] = self._changes(context, step, rows)
        fine = interpolate(maps, size=context.token_grid, mode="nearest")
        return relative_weight(fine, mix=self.mix, floor=self.floor)

    def _changes(self, context: CreditContext, step: int, rows: Tensor) -> Tensor:
        """[N, blocks, blocks] mean absolute change of the reward of the given rollouts."""
        trajectory = context.trajectory
        latents, taken = trajectory.latents[rows, step], trajectory.latents[rows, step + 1]
        sigma, sigma_next = (trajectory.sigmas[i].expand(len(rows)) for i in (step, step + 1))
        # The velocity of the rollout, from its own clean prediction x - sigma v.
        velocity = (latents - trajectory.captures["clean_predictions"][rows, step]) / sigma[:, None, None, None]
        transition = trajectory.transition(latents, velocity, sigma, sigma_next)
        before, could_score = _reward(context, taken, step + 1, rows)
        shape = (self.draws, *latents.shape[1:])
        noise = torch.randn(shape, generator=context.generator).to(latents.device)
        block = _block_of_place(self.blocks, (latents.shape[2], latents.shape[3])).to(latents.device)
        changes = latents.new_zeros(len(rows), self.blocks**2, dtype=torch.float32)
        for index in range(self.blocks**2):
            for draw in noise:
                redrawn = torch.where(block == index, transition.mean + transition.std * draw, taken)
                after, scored = _reward(context, redrawn, step + 1, rows)
                changes[:, index] += torch.where(scored & could_score, (after - before).abs(), 0) / self.draws
        return changes.unflatten(1, (self.blocks, self.blocks))


def _reward(context: CreditContext, latents: Tensor, step: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[N] reward of the completed images, and whether it is valid."""
    output = context.score(context.complete(latents, step, rows), rows)
    return output.scores.to(latents.device).float(), output.valid.to(latents.device)


def _block_of_place(blocks: int, grid: tuple[int, int]) -> Tensor:
    """[H, W] long, the number of the block that each place belongs to."""
    numbers = torch.arange(blocks**2, dtype=torch.float32).view(1, 1, blocks, blocks)
    return interpolate(numbers, size=grid, mode="nearest")[0, 0].long()
