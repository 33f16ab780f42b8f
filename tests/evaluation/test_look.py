"""Base and trained side by side: the right images, from the same noise, with the maps of each, in one safe file."""

from __future__ import annotations

import base64
import io
import re
import shlex
from html import unescape
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from PIL import Image

from rlt2i.cli.grammar import parser
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.evaluation.inspection import drawing, load_policy, map_of
from rlt2i.evaluation.look import look
from rlt2i.report.maps import overlay, scale_top, small_pair
from rlt2i.training.start import train
from rlt2i.types import Prompts
from tests.helpers.toy_recipe import clipped

NASTY = "the upper <b>left</b> & <script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = clipped(iterations=1, eval_prompts=0, eval_every=0)
    folder = tmp_path_factory.mktemp("look") / "run"
    train(recipe, folder)
    return recipe, folder


def pictures(html: str, alt: str) -> list[np.ndarray]:
    """The pixels of embedded images whose description starts so."""
    sources = re.findall(rf'<img src="data:image/png;base64,([^"]+)" alt="{alt}', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB")) for source in sources]


def test_images_and_maps_are_those_of_sample_and_maps(run, tmp_path: Path):
    recipe, folder = run
    out = look(recipe, ["upper left", NASTY], tmp_path / "new" / "look.html", run_dir=folder, seeds=(0, 7))
    html = out.read_text(encoding="utf-8")
    assert html.count("<figure") == 4
    shown, tops = {}, []
    for name, weights in (("base", "base"), ("trained", "ema")):
        policy = load_policy(recipe, run_dir=folder, weights=weights)
        for seed in (0, 7):
            drawn = drawing(recipe, recipe.train.eval_steps, seed).images(policy, Prompts.of(["upper left"]))[0]
            (found,) = pictures(html, f"{name}, seed {seed}: upper left")
            assert np.array_equal(found, drawn.permute(1, 2, 0).numpy())
            shown[name, seed] = found
            tops += [map_of(recipe, policy, text, seed=seed) for text in ("upper left", NASTY)]
        shown[name] = map_of(recipe, policy, "upper left", seed=0)
    assert not np.array_equal(shown["base", 0], shown["trained", 0])
    assert not np.array_equal(shown["base", 0], shown["base", 7])
    top = scale_top(torch.cat([sample.weights.flatten() for sample in tops]))
    weights_shown = pictures(html, "weights at step 0")
    assert len(weights_shown) == 8  # two prompts, two seeds, two policies
    for name, found in zip(("base", "trained"), weights_shown[:2], strict=True):
        image, over = small_pair(shown[name].clean[0], shown[name].weights[0], top=top, side=112)
        assert torch.equal(over, overlay(image, shown[name].weights[0], top=top))
        assert np.array_equal(found, over.permute(1, 2, 0).numpy())


def test_the_page_is_safe_and_in_one_piece(run, tmp_path: Path):
    recipe, folder = run
    html = look(recipe, [NASTY], tmp_path / "look.html", run_dir=folder).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "http" not in html
    assert str(folder) not in html


def test_the_page_says_the_command_that_draws_it(run, tmp_path: Path):
    recipe, folder = run
    html = look(recipe, ["upper left", NASTY], tmp_path / "look.html", run_dir=folder, seeds=(0, 7), num_steps=2)
    (command,) = re.findall("Written by <code>(.*?)</code>", html.read_text(encoding="utf-8"))
    words = shlex.split(unescape(command))
    assert words[1:] == ["look", "run", "--prompt", "upper left", "--prompt", NASTY, "--seed", "0", "7", "--steps", "2"]
    options = parser().parse_args(words[1:])
    assert (options.prompt, options.seed, options.steps) == (["upper left", NASTY], [0, 7], 2)


def test_without_maps_it_says_why(run, tmp_path: Path):
    recipe, folder = run
    flat = attrs.evolve(recipe, credit=Product(advantage=GroupRelative()))
    html = look(flat, ["upper left"], tmp_path / "look.html", run_dir=folder).read_text(encoding="utf-8")
    assert "No maps: the credit of &#39;toy&#39; gives every place the same weight" in html
    assert "weights at step" not in html
    assert html.count("<figure") == 1


def test_a_picture(run, tmp_path: Path):
    recipe, folder = run
    out = look(recipe, ["upper left"], tmp_path / "look.png", run_dir=folder, seeds=(0, 1, 1))
    width, height = Image.open(out).size
    assert height > width  # two rows, although one seed was said twice


def test_there_must_be_trained_weights(run, tmp_path: Path):
    recipe, folder = run
    for trained in ({}, {"run_dir": folder, "weights": "base"}):
        with pytest.raises(ValueError, match="shows trained weights beside the base, and there are none"):
            look(recipe, ["upper left"], tmp_path / "look.html", **trained)
