"""Offline preference learning, from a pair file to a trained policy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from PIL import Image

from rlt2i.cli import main
from rlt2i.credit.algebra import Product
from rlt2i.credit.best_of_group import BestOfGroup
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.recorded_preference import RecordedPreference
from rlt2i.evaluation.heldout import evaluate
from rlt2i.evaluation.pairs import make_pairs
from rlt2i.functional.matching import flow_matching_error, noised
from rlt2i.interfaces import CreditAssigner, Objective
from rlt2i.objectives.diffusion_dpo import DiffusionDPO
from rlt2i.objectives.draws import SigmaDraws, shared_noise
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.online_dpo import OnlineDPO
from rlt2i.objectives.sft import WeightedMatching
from rlt2i.recipes import Recipe, load_recipe
from rlt2i.runs.checkpoint import latest_checkpoint, load_checkpoint
from rlt2i.runs.metrics import read_metrics
from rlt2i.samplers.recorded import Recorded
from rlt2i.tasks.base import TaskPrompt
from rlt2i.tasks.pairs import PairFileTask, read_pairs
from rlt2i.tasks.shapes.prompts import ShapesPrompt
from rlt2i.tasks.shapes.render import render, sample_scenes
from rlt2i.tasks.shapes.task import ShapesTask
from rlt2i.training.start import train
from tests.helpers.build import collect, gradients, toy_algorithm, toy_engine, toy_learner
from tests.helpers.toy import SIDE, QuadrantBrightness, ToyPolicy, ToyTask
from tests.helpers.toy_pairs import write_pairs
from tests.helpers.toy_recipe import clipped

PREFERRED = Product(advantage=RecordedPreference())
STEPS = Recorded(num_steps=4)


def offline(objective: Objective, credit: CreditAssigner = PREFERRED):
    algorithm = toy_algorithm(objective, sampler=STEPS, credit=credit)
    return algorithm, collect(toy_engine(algorithm), prompts=3, group_size=2).experience


def test_the_loss_by_hand():
    # beta / 2 times the difference of how much better than the start the winner and the loser are fitted.
    objective = DiffusionDPO(beta=7.0, sigmas=SigmaDraws(count=2))
    algorithm, experience = offline(objective)
    learner, policy = toy_learner(algorithm), algorithm.policy
    with torch.no_grad():
        policy.image.add_(0.2 * torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
    context = learner._context(6, 3, on_policy=True)
    losses = list(objective.losses(policy, experience, context=context))

    groups = experience.groups.unique()
    sigma, _ = objective.sigmas.draw(experience, groups, context=context)
    by_hand = []
    for pair, group in enumerate(groups):
        rows = (experience.groups == group).nonzero()[:, 0]
        clean = experience.trajectory.clean_latents[rows]  # winner, loser
        for draw in range(2):
            level = sigma[pair, draw].expand(2)
            noise = shared_noise(context, group[None], torch.tensor([draw]), (3, SIDE, SIDE), clean.device)
            noise = noise.expand_as(clean)
            state = noised(clean, noise, level)
            rows_of = experience.trajectory.conditioning.take(rows)
            with torch.no_grad():
                mine = flow_matching_error(policy.velocity(state, level, rows_of), clean, noise).mean(dim=(1, 2))
                with learner.sets.use("reference"):
                    start = flow_matching_error(policy.velocity(state, level, rows_of), clean, noise).mean(dim=(1, 2))
            gain = mine - start
            by_hand.append(math.log1p(math.exp(0.5 * 7.0 * float(gain[0] - gain[1]))))
    assert sum(float(loss.value.detach()) for loss in losses) == pytest.approx(sum(by_hand) / 6, rel=1e-4)


def test_the_first_gradient_is_that_of_online_dpo_on_the_same_pairs():
    _, experience = offline(DiffusionDPO())
    found = gradients(toy_learner(toy_algorithm(DiffusionDPO(), sampler=STEPS)), experience)
    expected = gradients(toy_learner(toy_algorithm(OnlineDPO(), sampler=STEPS)), experience)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient)
        assert gradient.abs().sum() > 0


def test_the_anchor_stays_where_training_began():
    algorithm, experience = offline(DiffusionDPO())
    learner = toy_learner(algorithm)
    start = {name: p.detach().clone() for name, p in algorithm.policy.trainable_parameters().items()}
    assert learner.learn(experience)["loss/dpo"] == pytest.approx(math.log(2))
    for _ in range(3):
        metrics = learner.learn(experience)
    assert metrics["loss/dpo"] < math.log(2)
    assert metrics["dpo/accuracy"] > 0.9
    for name, kept in learner.sets.values("reference").items():
        assert torch.equal(kept, start[name])
        assert not torch.equal(kept, algorithm.policy.trainable_parameters()[name])


OBJECTIVES = [
    (DiffusionDPO(), PREFERRED),
    (WeightedMatching(), PREFERRED),
    (WeightedMatching(), Product(advantage=BestOfGroup())),
    (DiffusionNFT(decay=1.0), PREFERRED),
    (DiffusionDPO(), Product(advantage=GroupRelative())),
]


@pytest.mark.parametrize(("objective", "credit"), OBJECTIVES, ids=["dpo", "sft", "sft-best", "nft", "dpo-relabelled"])
def test_recorded_images_teach_without_a_single_sample(objective: Objective, credit: CreditAssigner):
    # The winners are bright in one corner; what is drawn after training is brighter there than what was before.
    algorithm = toy_algorithm(objective, sampler=STEPS, credit=credit)
    engine, learner = toy_engine(algorithm), toy_learner(algorithm, learning_rate=0.05)
    before = drawn(algorithm.policy)
    for update in range(8):
        learner.learn(collect(engine, update=update, prompts=3, group_size=2).experience)
    assert drawn(algorithm.policy) > before + 0.01


def drawn(policy: ToyPolicy) -> float:
    """The toy reward of what the policy draws now."""
    prompts = ToyTask().eval_prompts(12)
    found = evaluate(policy, QuadrantBrightness(), prompts, num_steps=4, seed=0, image_size=SIDE, rollout_batch_size=12)
    return float(found.scores.mean())


# ------------------------------------------------------------------------------------------------------------- a run


def toy_recipe(path: Path, **changes: object) -> Recipe:
    settings = {"group_size": 2, "optimizer_steps_per_iteration": 1, "ema_decay": None, "reference": False, **changes}
    return attrs.evolve(
        clipped(**settings),
        sampler=STEPS,
        credit=PREFERRED,
        objective=DiffusionDPO(),
        task=PairFileTask(pairs=str(path), evaluation=ToyTask()),
    )


def test_a_run_evaluates_fresh_images_and_resumes_bit_for_bit(tmp_path: Path):
    path = write_pairs(tmp_path)
    recipe = toy_recipe(path)
    train(recipe, tmp_path / "whole")
    train(attrs.evolve(recipe, train=attrs.evolve(recipe.train, iterations=2)), tmp_path / "cut")
    train(recipe, tmp_path / "cut", resume="latest")
    whole, cut = (load_checkpoint(latest_checkpoint(tmp_path / name)).tensors for name in ("whole", "cut"))
    assert whole["online"].keys() == cut["online"].keys()
    for name, tensor in whole["online"].items():
        assert torch.equal(tensor, cut["online"][name])
    assert "reference" not in whole  # it is the start, and made again
    evaluations = read_metrics(tmp_path / "whole", "eval")
    assert evaluations[-1]["eval/reward"] > evaluations[0]["eval/reward"]


def test_a_missing_file_or_a_group_that_is_no_pair_is_refused_before_anything_loads(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="rlt2i pairs"):
        train(toy_recipe(tmp_path / "gone.jsonl"), tmp_path / "run")
    with pytest.raises(ValueError, match="Use group_size=2"):
        train(toy_recipe(write_pairs(tmp_path), group_size=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def rendered_pairs(folder: Path, *, count: int) -> None:
    """What `rlt2i pairs` leaves, of drawn shapes: the winner shows the prompt, the loser an empty canvas."""
    (folder / "images").mkdir(parents=True)
    rows, draw = [], torch.Generator().manual_seed(0)
    for i, prompt in enumerate(ShapesTask().train_prompts(seed=0, start=0, count=count)):
        scenes = sample_scenes([ShapesPrompt.from_metadata(prompt.metadata)], draw)
        scene = (255 * render(scenes, draw)[0]).byte().permute(1, 2, 0).numpy()
        files = {"winner": f"images/{i}-winner.png", "loser": f"images/{i}-loser.png"}
        Image.fromarray(scene).save(folder / files["winner"])
        Image.fromarray(np.full_like(scene, scene[0, 0])).save(folder / files["loser"])
        rows.append({**prompt.metadata, "prompt": prompt.text, "core": list(prompt.core), **files})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_shipped_recipe_names_the_command_that_makes_its_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("offline-dpo-shapes")
    with pytest.raises(FileNotFoundError, match="rlt2i pairs RECIPE FOLDER"):
        train(recipe, tmp_path / "run")
    rendered_pairs(Path("pairs/shapes"), count=4)
    small = attrs.evolve(
        recipe.train,
        iterations=1,
        optimizer_steps_per_iteration=1,
        prompts_per_iteration=4,
        eval_prompts=0,
        trackers=(),
    )
    train(attrs.evolve(recipe, train=small), tmp_path / "run")
    (update,) = read_metrics(tmp_path / "run")
    assert update["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)
    assert update["grad_norm"] > 0


# ------------------------------------------------------------------------------------------------------ making pairs


def made(folder: Path, *, prompts: int, **options: object) -> int:
    recipe = clipped(rollout_batch_size=8)
    return make_pairs(recipe, recipe.policy.load(), folder, prompts=prompts, say=lambda _: None, **options)  # type: ignore[arg-type]


def test_pairs_are_the_best_and_the_worst_of_each_prompt(tmp_path: Path):
    assert made(tmp_path, prompts=5, images=4) == 5
    pairs = read_pairs(tmp_path / "pairs.jsonl").pairs
    assert [p.text for p in pairs] == [p.text for p in ToyTask().train_prompts(seed=0, start=0, count=5)]
    assert all(p.metadata["winner_score"] > p.metadata["loser_score"] for p in pairs)
    assert all(p.core == ("corner",) for p in pairs)
    assert json.loads((tmp_path / "settings.json").read_text())["images"] == 4
    assert not list(tmp_path.rglob("*.partial"))


def test_making_pairs_goes_on_where_it_was_cut_off(tmp_path: Path):
    made(tmp_path / "whole", prompts=6)
    made(tmp_path / "cut", prompts=3)
    made(tmp_path / "cut", prompts=6)
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file())
    assert len(files) == 2 + 12
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    with pytest.raises(ValueError, match=r"made with other settings \(seed\)"):
        made(tmp_path / "cut", prompts=6, seed=1)
    with pytest.raises(ValueError, match="Use images >= 2"):
        made(tmp_path / "one", prompts=6, images=1)


def test_the_command_rereads_prompts_with_separators_of_lines(tmp_path: Path):
    @attrs.frozen(kw_only=True)
    class Separated(ToyTask):
        def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
            return [TaskPrompt(text=f"a\u2028b\x85c\x0b{i}") for i in range(start, start + count)]

    recipe = attrs.evolve(clipped(rollout_batch_size=8), task=Separated())
    for prompts in (2, 4):
        make_pairs(recipe, recipe.policy.load(), tmp_path, prompts=prompts, say=lambda _: None)
    assert [p.text[:-1] for p in read_pairs(tmp_path / "pairs.jsonl").pairs] == ["a\u2028b\x85c\x0b"] * 4


def test_the_command_makes_pairs_that_a_recipe_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "pairs"
    command = [
        "pairs",
        "tests.helpers.toy_recipe:clipped",
        str(folder),
        "--prompts",
        "4",
        "--images",
        "2",
        "--steps",
        "2",
    ]
    assert main(command) == 0
    assert f"{folder / 'pairs.jsonl'}: 4 pairs" in capsys.readouterr().out
    train(toy_recipe(folder / "pairs.jsonl", iterations=1, eval_prompts=0), tmp_path / "run")
    assert read_metrics(tmp_path / "run")[0]["grad_norm"] > 0
    assert main([*command, "--seed", "1"]) == 2
    assert "made with other settings (seed)" in capsys.readouterr().err
