"""One engine collects for every algorithm: encode once, roll out in chunks, decode, score, assign credit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import attrs
import torch
from torch import Tensor

from rlt2i.algorithm import Algorithm
from rlt2i.distributed import OtherProcessFailed as OtherProcessFailed
from rlt2i.distributed import because_of
from rlt2i.functional.transfer import on_both
from rlt2i.functional.transitions import euler
from rlt2i.interfaces import (
    CreditContext,
    Policy,
    RewardBatch,
    RewardGradient,
    RewardOutput,
    to_uint8,
)
from rlt2i.rewards.agreement import FailureCounts, with_same_components
from rlt2i.rewards.batching import merge
from rlt2i.rewards.beside import Beside
from rlt2i.rewards.gradient import reward_gradient
from rlt2i.rewards.validity import score_safely
from rlt2i.runs.stopwatch import Stopwatch
from rlt2i.samplers.chunked import rollout, rollout_keys
from rlt2i.samplers.rollout import CLEAN_PREDICTIONS
from rlt2i.seeds import derive_seed, generator
from rlt2i.types import Experience, ImageSize, Prompts, Rewards, Trajectory

Result = TypeVar("Result")


@torch.no_grad()
def decode(policy: Policy, latents: Tensor, *, rollout_batch_size: int) -> Tensor:
    """[N, C, H, W] latents to [N, 3, H', W'] uint8 RGB, contiguous whatever the decoder's memory format.

    Raises:
        ValueError: when the decoder returns NaN or infinity.
    """
    return torch.cat([to_uint8(policy.decode(chunk)).contiguous() for chunk in latents.split(rollout_batch_size)])


@attrs.frozen(kw_only=True, eq=False)
class Collected:
    """A rollout batch: what the learner learns from, and what the log wants to see.

    Attributes:
        experience: of N = P x G rollouts.
        prompts: P of them, and G.
        images: [N, 3, H, W] uint8 RGB.
        scores: of the images.
        tally: of everything that the reward was shown for this batch on this process, intermediate images included.
    """

    experience: Experience
    prompts: Prompts
    images: Tensor
    scores: RewardOutput
    tally: FailureCounts


@attrs.frozen(kw_only=True)
class Engine:
    """Collects experience.

    Attributes:
        algorithm: with its policy loaded.
        image_size: in pixels, unless `collect` is asked for another.
        rollout_batch_size: rollouts per forward pass; for speed and memory. Draws do not depend on it, rounding does:
            see `TrainConfig`.
        seed: of the run.
        share_initial_noise: whether a group starts from the same noise, so that its rollouts differ by what was done
            rather than by where they began.
        device: where rollouts run.
        gather, rank: for batch-wide statistics over several processes.
    """

    algorithm: Algorithm
    image_size: ImageSize
    rollout_batch_size: int
    seed: int
    share_initial_noise: bool = False
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=torch.device)
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    rank: int = 0

    @property
    def policy(self) -> Policy:
        assert isinstance(self.algorithm.policy, Policy), "load the algorithm first"
        return self.algorithm.policy

    def collect(
        self, prompts: Prompts, *, iteration: int, watch: Stopwatch | None = None, image_size: ImageSize | None = None
    ) -> Collected:
        """Roll out, score and assign credit for P prompts x G rollouts.

        Args:
            prompts: whole groups.
            iteration: number of this rollout batch; windows may slide with it.
            image_size: of this batch; default `self.image_size`.

        Raises:
            ValueError: when latents or images are not finite.
            OtherProcessFailed: when that happened elsewhere.
        """
        watch, tally = watch or Stopwatch(device=self.device), FailureCounts()
        size = image_size or self.image_size
        with torch.no_grad():
            trajectory, images, scores, predicted = self.raise_on_all(
                lambda: self._judged_rollouts(prompts, size, iteration, watch, tally)
            )
            rewards = self._rewards(trajectory, scores, predicted)
            with watch("credit"):
                keys = on_both(
                    torch.tensor([derive_seed(*key) for key in rollout_keys(prompts, self.seed)]), self.device
                )
                grid = self.policy.token_grid(size)
                context = self._context(prompts, trajectory, rewards, images, grid, iteration, keys, tally)
                credit = self.algorithm.credit.assign(context)
        groups = on_both(torch.tensor(prompts.per_rollout(prompts.draws)), self.device)
        experience = Experience(
            trajectory=trajectory,
            rewards=rewards,
            credit=credit,
            prompts=prompts.ungrouped(),
            token_grid=grid,
            keys=keys,
            groups=groups,
        )
        return Collected(experience=experience, prompts=prompts, images=images, scores=scores, tally=tally)

    def raise_on_all(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, once no process has failed at it: credit waits for every process.

        Raises:
            OtherProcessFailed: when only others have; the error itself where it happened.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        with because_of(error):
            failed = bool(self.gather(torch.tensor([error is not None], device=self.device)).any())
        if failed:
            raise error or OtherProcessFailed("another process failed to collect this batch; see its message.")
        return result  # type: ignore[return-value]  # there was no error

    def _judged_rollouts(
        self, prompts: Prompts, size: ImageSize, iteration: int, watch: Stopwatch, tally: FailureCounts
    ) -> tuple[Trajectory, Tensor, RewardOutput, list[RewardOutput]]:
        """Rollouts, their images, the scores of those, and of the clean predictions that the credit asked for.

        One chunk is judged and the next one decoded while a third one is rolled out; what is left when the last one is
        finished is waited for under "reward".
        """
        workers = max(1, self.algorithm.reward.concurrency)
        with (
            Beside[_Piece](workers=workers, ahead=1, device=self.device) as scoring,
            Beside[None](ahead=1, device=self.device) as decoding,
        ):
            judging = _Judging(self, prompts, watch, decoding=decoding, scoring=scoring)
            with watch("rollout", prompts.num_rollouts):
                trajectory = rollout(
                    self.policy,
                    self.algorithm.sampler,
                    prompts,
                    seed=self.seed,
                    image_size=size,
                    rollout_batch_size=self.rollout_batch_size,
                    captures=self.algorithm.captures,
                    share_initial_noise=self.share_initial_noise,
                    iteration=iteration,
                    device=self.device,
                    advance=watch.advance,
                    finished=judging.add,
                )
            with watch("reward"):
                decoding.results()
                pieces = scoring.results()
        final, *predicted = (
            merge([(piece.rows, piece.outputs[i]) for piece in pieces], prompts.num_rollouts)
            for i in range(len(pieces[0].outputs))
        )
        for output in (final, *predicted):
            tally.add(output)
        return trajectory, torch.cat([piece.images for piece in pieces]), final, predicted

    def images(self, latents: Tensor) -> Tensor:
        """[N, C, H, W] latents to [N, 3, H', W'] uint8 RGB."""
        return decode(self.policy, latents, rollout_batch_size=self.rollout_batch_size)

    def score(
        self, images: Tensor, prompts: Prompts, rows: Sequence[int], want: frozenset[str] = frozenset()
    ) -> RewardOutput:
        """Score the images of some rollouts. What the reward cannot judge is invalid, whatever goes wrong in it."""
        texts, metadata = prompts.per_rollout(prompts.texts), prompts.per_rollout(prompts.metadata)
        keys = rollout_keys(prompts, self.seed)
        batch = RewardBatch(
            images=images,
            prompts=[texts[i] for i in rows],
            metadata=[metadata[i] for i in rows],
            groups=torch.tensor([i // prompts.group_size for i in rows]),
            ids=["/".join(map(str, keys[i])) for i in rows],
        )
        return score_safely(self.algorithm.reward, batch, want)

    def _rewards(self, trajectory: Trajectory, final: RewardOutput, predicted: list[RewardOutput]) -> Rewards:
        """The scores of a batch, with the same terms on every process.

        A rollout is valid where all of its images were judged.
        """
        count, want = len(final.valid), self.algorithm.reward_wants
        terms = with_same_components(final.components, count, self.gather, self.device)
        maps, regions = final.maps, final.regions
        if not final.valid.any():  # nothing was judged, so nothing has a place; credit that looks there sees a blank
            maps = torch.zeros(count, 1, 1) if maps is None and "maps" in want else maps
            regions = [()] * count if regions is None and "regions" in want else regions
        outputs = (*predicted, final)
        return Rewards(
            values=on_both(torch.stack([output.scores.float() for output in outputs], dim=1), self.device),
            valid=on_both(torch.stack([output.valid for output in outputs]).all(dim=0), self.device),
            terms={name: term.to(self.device) for name, term in terms.items()},
            scored_steps=(*self.algorithm.credit.scored_steps(trajectory.num_steps), trajectory.num_steps),
            maps=None if maps is None else maps.to(self.device),
            regions=None if regions is None else tuple(tuple(r) for r in regions),
        )

    def _context(
        self,
        prompts: Prompts,
        trajectory: Trajectory,
        rewards: Rewards,
        images: Tensor,
        grid: tuple[int, int],
        iteration: int,
        keys: Tensor,
        tally: FailureCounts,
    ) -> CreditContext:
        texts, metadata = prompts.per_rollout(prompts.texts), prompts.per_rollout(prompts.metadata)
        each = prompts.ungrouped()

        def gradient(latents: Tensor, rollouts: Tensor) -> RewardGradient:
            requested = each.take(rollouts.tolist())
            return reward_gradient(
                self.policy, self.algorithm.reward, latents, requested, rollout_batch_size=self.rollout_batch_size
            )

        def score(latents: Tensor, rollouts: Tensor) -> RewardOutput:
            rows = rollouts.tolist()
            batch = RewardBatch(
                images=self.images(latents), prompts=[texts[i] for i in rows], metadata=[metadata[i] for i in rows]
            )
            output = score_safely(self.algorithm.reward, batch)
            tally.add(output)
            return output

        def complete(latents: Tensor, step: int, rollouts: Tensor) -> Tensor:
            size = self.rollout_batch_size
            chunks = zip(latents.split(size), rollouts.split(size), strict=True)
            return torch.cat([complete_chunk(part, step, rows) for part, rows in chunks])

        def complete_chunk(latents: Tensor, step: int, rollouts: Tensor) -> Tensor:
            conditioning = trajectory.conditioning.take(rollouts)
            for i in range(step, trajectory.num_steps):
                sigma, sigma_next = (level.expand(len(latents)) for level in trajectory.sigmas[i : i + 2])
                velocity = self.policy.velocity(latents, sigma, conditioning)
                latents = euler(latents, velocity, sigma, sigma_next).mean
            return latents

        return CreditContext(
            prompts=prompts,
            trajectory=trajectory,
            rewards=rewards,
            token_grid=grid,
            images=images,
            iteration=iteration,
            keys=keys,
            generator=generator(self.seed, "credit", iteration),
            score=score,
            reward_gradient=gradient,
            complete=complete,
            gather=self.gather,
            rank=self.rank,
        )


@attrs.frozen(kw_only=True, eq=False)
class _Piece:
    """Some rollouts, decoded and judged: what the reward said of the images, then of the clean predictions."""

    rows: range
    images: Tensor
    outputs: list[RewardOutput]


@attrs.define(eq=False)
class _Judging:
    """Hands chunks of rollouts in for decoding and judging, in whole groups where the reward compares them.

    Attributes:
        decoding: one chunk at a time, so that one decoder's activations are there.
        scoring: what was decoded, in the same order.
    """

    engine: Engine
    prompts: Prompts
    watch: Stopwatch
    decoding: Beside[None] = attrs.field(kw_only=True)
    scoring: Beside[_Piece] = attrs.field(kw_only=True)
    _kept: list[Trajectory] = attrs.field(factory=list, init=False)
    _first: int = attrs.field(default=0, init=False)

    def add(self, rows: range, chunk: Trajectory) -> None:
        """A chunk that was rolled out; what belongs to a group that is not whole yet waits for the next one."""
        self._kept.append(chunk)
        whole = self.engine.algorithm.reward.scope == "group"
        if whole and rows.stop % self.prompts.group_size and rows.stop < self.prompts.num_rollouts:
            return
        chunks, self._kept = self._kept, []
        judged = range(self._first, rows.stop)
        self._first = rows.stop
        self.decoding.hand_in(lambda: self._decode(judged, chunks))

    @torch.no_grad()
    def _decode(self, rows: range, chunks: list[Trajectory]) -> None:
        steps = self.engine.algorithm.credit.scored_steps(chunks[0].num_steps)
        with self.watch.work("decode"):
            final = self._images([chunk.clean_latents for chunk in chunks])
            predicted = [self._images([chunk.captures[CLEAN_PREDICTIONS][:, s] for chunk in chunks]) for s in steps]
        self.scoring.hand_in(lambda: self._judge(rows, final, predicted))

    @torch.no_grad()
    def _judge(self, rows: range, final: Tensor, predicted: list[Tensor]) -> _Piece:
        engine = self.engine
        with self.watch.work("reward"):
            outputs = [engine.score(final, self.prompts, rows, want=engine.algorithm.reward_wants)]
            outputs += [engine.score(images, self.prompts, rows) for images in predicted]
        return _Piece(rows=rows, images=final, outputs=outputs)

    def _images(self, latents: list[Tensor]) -> Tensor:
        return torch.cat([self.engine.images(part) for part in latents])
