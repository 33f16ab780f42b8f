"""The code in the documentation runs, and what it defines works in an algorithm."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from pathlib import Path

import attrs
import pytest
import torch

from rlt2i.captures import attention_name
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.reinforce import Reinforce
from rlt2i.policies.lumina2 import Lumina2
from rlt2i.policies.tiny import save_tiny
from rlt2i.samplers.sde import SDE
from rlt2i.types import Prompts
from tests.helpers.build import collect, gradients, learning_curve, toy_algorithm, toy_engine, toy_learner

DOCS = Path(__file__).parents[2] / "docs"


def namespace(page: str) -> dict[str, object]:
    """Everything that the Python blocks of a page define."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert blocks, f"{page} shows no Python"
    defined: dict[str, object] = {"__name__": "docs_page"}
    for block in blocks:
        exec(compile(block, page, "exec"), defined)
    return defined


@pytest.fixture(scope="module")
def extending() -> dict[str, object]:
    return namespace("extending.md")


def test_own_credit_weighs_late_steps_more(extending):
    algorithm = toy_algorithm(ClippedSurrogate(), credit=extending["credit"])
    weight = collect(toy_engine(algorithm)).experience.credit.weight
    assert weight.shape == (1, 6, 1, 1)
    assert weight[0, -1] > weight[0, 0]
    assert abs(float(weight.mean()) - 1) < 1e-6


def test_own_backbone_is_the_one_of_the_package(extending, tmp_path: Path):
    folder = str(save_tiny("Lumina2Pipeline", tmp_path))
    mine, theirs = (spec(path=folder, lora_rank=2).load() for spec in (extending["Lumina"], Lumina2))
    prompts, names = Prompts.of(["a red cat", "two boxes"]), frozenset({attention_name("text_to_image", "all")})
    latents = torch.randn(2, *mine.latent_shape((32, 64)), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.7, 0.3])
    with torch.no_grad():
        ours, maps = mine.velocity_with_captures(latents, sigma, mine.encode(prompts), names)
        velocity, captures = theirs.velocity_with_captures(latents, sigma, theirs.encode(prompts), names)
    torch.testing.assert_close(ours, velocity, atol=1e-5, rtol=1e-5)
    for name in names:
        torch.testing.assert_close(maps[name], captures[name], atol=1e-6, rtol=1e-5)


def test_own_objective_learns(extending):
    algorithm = toy_algorithm(extending["PlainReinforce"]())
    engine, learner = toy_engine(algorithm), toy_learner(algorithm, learning_rate=0.1)
    rewards = []
    for update in range(8):
        batch = collect(engine, update=update)
        assert learner.learn(batch.experience)["grad_norm"] > 0
        rewards.append(float(batch.scores.scores.mean()))
    assert rewards[-1] > rewards[0] + 0.01


def test_own_reward_scores(extending):
    import torch

    from rlt2i.interfaces import RewardBatch

    red = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 255
    batch = RewardBatch(images=red, prompts=["red"], metadata=[{}])
    assert float(extending["Redness"]().score(batch).scores) == 1.0


def test_own_kernel_keeps_the_noise_level_and_trains(extending):
    import torch

    kernel = extending["FreshNoise"](share=0.6)
    # With x0 = 0 and eps = 1 at sigma = 0.8: x' = 0.5 (sqrt(1 - .36) + .6 z), a mean of .4 and a std of .3.
    state, half = torch.full((1, 3, 2, 2), 0.8), torch.tensor([0.5])
    step = kernel.transition(state, torch.ones(1, 3, 2, 2), torch.tensor([0.8]), half, sigma_max=0.9)
    torch.testing.assert_close(step.mean, torch.full((1, 3, 2, 2), 0.4))
    torch.testing.assert_close(step.std.flatten(), torch.tensor([0.3]))
    algorithm = toy_algorithm(ClippedSurrogate(), sampler=SDE(num_steps=6, window=(0, 3), kernel=kernel))
    metrics = toy_learner(algorithm).learn(collect(toy_engine(algorithm)).experience)
    assert metrics["ratio/abs_minus_one_max"] == 0
    assert metrics["grad_norm"] > 0


def test_own_backbone_learns(extending, tmp_path):
    toy = toy_algorithm(ClippedSurrogate())
    algorithm = attrs.evolve(toy, policy=extending["OnePaintingSpec"]()).load()
    rewards = learning_curve(algorithm, updates=8)
    assert rewards[-1] > rewards[0] + 0.01
    algorithm.policy.export(tmp_path)
    assert (tmp_path / "painting.safetensors").exists()


def test_links_between_pages_lead_somewhere():
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_composition_of_the_readme_is_the_recipe_beside_it():
    from rlt2i.recipes import load_recipe

    star = namespace("../README.md")["star"]
    recipe = load_recipe("star-shapes")
    assert star.sampler == recipe.sampler
    assert star.objective == recipe.objective
    assert star.captures == recipe.algorithm().captures


def test_the_commands_of_the_readme_parse():
    from rlt2i.cli import parser
    from rlt2i.recipes import load_recipe

    text = (DOCS.parent / "README.md").read_text()
    commands = [line.split("#")[0].split() for line in text.splitlines() if line.startswith("rlt2i ")]
    assert len(commands) >= 8
    for command in commands:
        words = " ".join(command[1:])
        quoted = re.findall(r'"[^"]*"|\S+', words)
        parser().parse_args([word.strip('"') for word in quoted])
    assert load_recipe("star-shapes", ["credit.mix=0.7"]).credit.allocations[0].mix == 0.7


@pytest.mark.parametrize("function", ["star", "placebo"])
def test_the_python_recipe_of_the_examples_is_one(function):
    from rlt2i.recipes import load_recipe

    recipe = load_recipe(f"examples/star_in_python.py:{function}")
    assert recipe.algorithm().captures == {"attention/text_to_image/2"}


def test_the_credits_of_the_credit_page_are_what_they_say():
    page = namespace("credit.md")
    assert page["uniform"].needs.names == {"groups"}
    assert page["star"].needs.names == {"groups", "attention/text_to_image/2"}
    assert page["placebo"].needs.names == page["star"].needs.names
    assert page["space_and_time"].needs.names == {"groups", "clean_predictions", "attention/text_to_image/2"}


def test_the_objective_of_the_page_reduces_as_the_package_does(extending):
    # The mean over pairs, with a mask that leaves some rollouts more steps than others.
    mine, theirs = extending["PlainReinforce"](), Reinforce()
    experience = collect(toy_engine(toy_algorithm(theirs)), prompts=2, group_size=4).experience
    mask = torch.ones(8, 6, 1, 1, dtype=torch.bool)
    mask[::2, 1:] = False
    experience = attrs.evolve(experience, credit=attrs.evolve(experience.credit, mask=mask))
    expected = gradients(toy_learner(toy_algorithm(theirs)), experience)
    for name, gradient in gradients(toy_learner(toy_algorithm(mine)), experience).items():
        torch.testing.assert_close(gradient, expected[name])


def test_the_loop_of_the_examples_runs():
    source = Path(__file__).parents[2] / "examples" / "minimal_loop.py"
    assert len(source.read_text().splitlines()) <= 80
    assert not {"trainer", "Trainer", "yaml"} & set(re.findall(r"\w+", source.read_text().split('"""')[2]))
    rewards = runpy.run_path(str(source))["main"](iterations=2, prompts=1, group_size=2, num_steps=4)
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)


def test_the_toolkit_has_what_the_objectives_of_the_package_import():
    toolkit = set(importlib.import_module("rlt2i.objectives.toolkit").__all__)
    package = Path(importlib.import_module("rlt2i.objectives").__file__).parent
    shared = ("reduction", "reverse", "forward", "draws")
    for source in package.glob("*.py"):
        if source.stem in {*shared, "toolkit", "preference", "reward_backprop"}:
            continue
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").removeprefix("rlt2i.objectives.") in shared:
                assert {alias.name for alias in node.names} <= toolkit, source.name
