"""The sampler that reads: its states are the forward process of the images, its verdict that of the file."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from PIL import Image

from rlt2i.algorithm import Algorithm
from rlt2i.captures import PREFERENCE
from rlt2i.credit.algebra import Product
from rlt2i.credit.recorded_preference import RecordedPreference
from rlt2i.credit.text_attention import TextAttention
from rlt2i.functional.advantages import recorded_preference
from rlt2i.interfaces import Policy, RewardBatch, RewardOutput, RolloutRequest
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.diffusion_dpo import DiffusionDPO
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.recorded import Recorded, read_image
from rlt2i.seeds import RolloutNoise
from rlt2i.types import Conditioning
from tests.helpers.build import collect, toy_algorithm, toy_engine
from tests.helpers.toy import CAPTURE, SIDE, QuadrantBrightness, ToyPolicy, ToySpec
from tests.helpers.toy_pairs import toy_pairs

PREFERRED = Product(advantage=RecordedPreference())


def request(**fields: object) -> RolloutRequest:
    pairs = toy_pairs().train_prompts(seed=0, start=0, count=2)
    defaults: dict[str, object] = {
        "noise": RolloutNoise([0, 1, 2, 3], [4, 5, 6, 7]),
        "captures": frozenset(),
        "image_size": SIDE,
        "group_size": 2,
        "metadata": [p.metadata for p in pairs for _ in range(2)],
    }
    return RolloutRequest(**(defaults | fields))  # type: ignore[arg-type]


def four(policy: ToyPolicy) -> Conditioning:
    return Conditioning(tensors={"none": torch.zeros(2, 1)}, rows=torch.tensor([0, 0, 1, 1]))


def test_clean_latents_are_the_images_winner_first():
    policy, asked = ToyPolicy(), request()
    trajectory = Recorded(num_steps=4).rollout(policy, four(policy), asked)
    images = (policy.decode(trajectory.clean_latents) * 255).round().to(torch.uint8)
    for i, row in enumerate(asked.metadata):
        assert torch.equal(images[i], read_image(row[("winner", "loser")[i % 2]], SIDE))
    assert not trajectory.stochastic.any()
    assert trajectory.log_probs.abs().sum() == 0


def test_states_are_the_forward_process_of_each_image():
    policy, asked = ToyPolicy(), request()
    trajectory = Recorded(num_steps=4).rollout(policy, four(policy), asked)
    noise = asked.noise.initial((3, SIDE, SIDE))
    assert torch.equal(trajectory.latents[:, 0], noise)
    middle = 0.5 * trajectory.clean_latents + 0.5 * noise  # sigma 1/2 is step 2 of 4 even ones
    torch.testing.assert_close(trajectory.latents[:, 2], middle)


def test_captures_are_those_of_the_policy_at_these_states():
    policy = ToyPolicy()
    names = frozenset({CAPTURE, PREFERENCE, "clean_predictions"})
    trajectory = Recorded(num_steps=3).rollout(policy, four(policy), request(captures=names))
    assert trajectory.captures[PREFERENCE].tolist() == [[1.0] * 3, [-1.0] * 3] * 2
    state, sigma = trajectory.latents[:, 1], trajectory.sigmas[1]
    velocity, expected = policy.velocity_with_captures(state, sigma.expand(4), four(policy), frozenset({CAPTURE}))
    torch.testing.assert_close(trajectory.captures[CAPTURE][:, 1], expected[CAPTURE])
    torch.testing.assert_close(trajectory.captures["clean_predictions"][:, 1], state - sigma * velocity)


def test_chunks_do_not_change_what_is_read():
    algorithm = toy_algorithm(DiffusionDPO(), sampler=Recorded(num_steps=4), credit=PREFERRED)
    whole = collect(toy_engine(algorithm), prompts=3, group_size=2).experience.trajectory
    parts = collect(toy_engine(algorithm, rollout_batch_size=3), prompts=3, group_size=2).experience.trajectory
    assert torch.equal(whole.latents, parts.latents)
    assert torch.equal(whole.captures[PREFERENCE], parts.captures[PREFERENCE])


def test_maps_come_from_the_policy_that_learns():
    credit = Product(advantage=RecordedPreference(), allocations=(TextAttention(blocks="0", doubt=0.0),))
    algorithm = toy_algorithm(DiffusionDPO(), sampler=Recorded(num_steps=4), credit=credit)
    found = collect(toy_engine(algorithm), prompts=3, group_size=2).experience.credit
    assert found.weight.shape == (6, 4, 4, 4)
    assert found.weight.std() > 0
    assert found.advantage.flatten().tolist() == [1.0, -1.0] * 3


# ------------------------------------------------------------------------------------------------------------ verdict


def test_a_verdict_by_hand():
    verdict = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert recorded_preference(verdict, 2).tolist() == [1, -1, 1, -1]
    valid = torch.tensor([True, True, True, False])
    assert recorded_preference(verdict, 2, valid=valid).tolist() == [1, -1, 0, 0]


@attrs.frozen(kw_only=True)
class Inverted(QuadrantBrightness):
    """Scores the losers higher and cannot judge the second image of the batch."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        return attrs.evolve(output, scores=1 - output.scores, valid=torch.arange(len(output.scores)) != 1)


def test_the_reward_decides_nothing_but_validity():
    algorithm = toy_algorithm(DiffusionDPO(), sampler=Recorded(num_steps=4), credit=PREFERRED, reward=Inverted())
    found = collect(toy_engine(algorithm), prompts=3, group_size=2).experience
    assert found.credit.advantage.flatten().tolist() == [0, 0, 1, -1, 1, -1]
    assert (found.rewards.final[2::2] < found.rewards.final[3::2]).all()


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_other_groups_than_pairs_are_refused(group_size: int):
    algorithm = Algorithm(
        policy=ToySpec(), sampler=Recorded(), reward=QuadrantBrightness(), credit=PREFERRED, objective=DiffusionDPO()
    )
    with pytest.raises(ValueError, match=r"Recorded reads pairs.*Use group_size=2"):
        algorithm.check_group_size(group_size)
    algorithm.check_group_size(2)


def test_a_preference_needs_pairs_and_a_likelihood_needs_a_rollout():
    with pytest.raises(ValueError, match=r"RecordedPreference needs the captures.*Use the sampler Recorded"):
        toy_algorithm(DiffusionDPO(), sampler=ODE(), credit=PREFERRED)
    with pytest.raises(ValueError, match="needs log-probabilities, but Recorded is deterministic"):
        toy_algorithm(ClippedSurrogate(), sampler=Recorded(), credit=PREFERRED)


def test_prompts_without_images_are_refused():
    policy = ToyPolicy()
    with pytest.raises(ValueError, match=r"carries no 'winner' image, only nothing. Use a task of pairs"):
        Recorded().rollout(policy, four(policy), request(metadata=[{}] * 4))
    with pytest.raises(ValueError, match=r"only \['prompt'\]"):
        Recorded().rollout(policy, four(policy), request(metadata=[{"prompt": "x"}] * 4))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"a\.png: is no image that can be read"):
        read_image(tmp_path / "a.png", SIDE)
    Image.fromarray(np.zeros((4, SIDE, 3), dtype=np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: 8 x 4 pixels, expected 8 x 8"):
        read_image(tmp_path / "b.png", SIDE)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    Image.fromarray(np.full((SIDE, SIDE), 7, dtype=np.uint8)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png", SIDE).unique().tolist() == [7]
    assert read_image(tmp_path / "grey.png", SIDE).shape == (3, SIDE, SIDE)


def test_a_policy_without_an_encoder_says_so():
    with pytest.raises(ValueError, match=r"ToyPolicy cannot turn images into latents. Use a sampler that denoises"):
        Policy.encode_images(ToyPolicy(), torch.zeros(1, 3, SIDE, SIDE))
