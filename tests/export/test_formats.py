"""Every export is loaded by what it is for, and draws the image that the policy draws."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from rlt2i.cli import main
from rlt2i.evaluation.draw import Draw
from rlt2i.evaluation.inspection import load_policy
from rlt2i.export.command import TARGETS, export
from rlt2i.export.hub import push
from rlt2i.policies.flux import Flux
from rlt2i.policies.sd3 import SD3
from rlt2i.policies.tiny import save_tiny
from rlt2i.recipes import Recipe, load_recipe
from rlt2i.runs.checkpoint import latest_checkpoint
from rlt2i.training.start import train
from rlt2i.types import Prompts

TEXT = "a red circle above a blue square"
TINY = {"iterations": 1, "prompts_per_iteration": 2, "group_size": 2, "rollout_batch_size": 4, "micro_batch_size": 4}
TINY |= {"eval_prompts": 6, "eval_steps": 4, "checkpoint_every": 1, "eval_every": 1, "learning_rate": 0.3}


def recipe_of(policy: Any) -> Recipe:
    recipe = load_recipe("jpeg-shapes", [f"train.{name}={value}" for name, value in TINY.items()])
    return attrs.evolve(recipe, policy=policy, train=attrs.evolve(recipe.train, reference=True))


class Runs(dict[str, tuple[Recipe, Path]]):
    """Name -> (recipe, run directory) of one finished iteration, made when it is first asked for."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.home = home

    def tiny(self, name: str, pipeline: str, **options: Any) -> str:
        folder = self.home / name
        return str(folder if folder.is_dir() else save_tiny(pipeline, folder, clip_length=16, **options))

    def spec(self, name: str) -> Any:
        t5 = lambda: self.tiny("t5", "StableDiffusion3Pipeline")
        if name == "adapter":
            return SD3(path=t5(), lora_rank=2, guidance_scale=3.0, max_sequence_length=12)
        if name == "whole":
            return SD3(path=t5(), max_sequence_length=12)
        if name == "without T5":
            return SD3(path=self.tiny("clip", "StableDiffusion3Pipeline", with_t5=False), lora_rank=2)
        if name == "leaving T5 out":
            return SD3(path=t5(), lora_rank=2, text_encoder_3=False, zero_text_tokens=7)
        if name == "flux":
            return Flux(path=self.tiny("flux", "FluxPipeline"), lora_rank=2, max_sequence_length=12)
        return SD3(lora_rank=2 if name == "embedded" else None)

    def __missing__(self, name: str) -> tuple[Recipe, Path]:
        recipe, folder = recipe_of(self.spec(name)), self.home / f"run {name}"
        train(recipe, folder)
        self[name] = recipe, folder
        return self[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("exports"))


def drawn(recipe: Recipe, run: Path) -> tuple[Tensor, Tensor]:
    """([1, C, h, w] initial noise, [H, W, 3] image in 0..255) of `rlt2i sample` for the text."""
    policy = load_policy(recipe, run_dir=run, device="cpu")
    train = recipe.train
    draw = Draw(seed=0, num_steps=train.eval_steps, image_size=train.image_size, rollout_batch_size=1)
    path = draw.trajectory(policy, Prompts.of((TEXT,)))
    return path.latents[:1, 0], draw.decoded(policy, path.clean_latents)[0].permute(1, 2, 0).float()


def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the snippet of a card defines, run in the folder as the card says."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(compile(code, str(folder / "README.md"), "exec"), found)
    assert Path("image.png").stat().st_size > 0
    Path("image.png").unlink()
    return found


def same_image(found: dict[str, Any], recipe: Recipe, run: Path) -> None:
    noise, expected = drawn(recipe, run)
    pipe = found["pipe"]
    pipe.set_progress_bar_config(disable=True)
    if type(pipe).__name__ == "FluxPipeline":
        noise = pipe._pack_latents(noise, *noise.shape)
    image = pipe(TEXT, latents=noise, output_type="np", **found["settings"]).images[0]
    difference = (torch.from_numpy(image).mul(255) - expected).abs()
    assert difference.max() <= 1.01, difference.max()


def exported_with(run: Path) -> Path:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint / "export"


@pytest.mark.parametrize(
    "name",
    [
        "adapter",
        "whole",
        pytest.param("without T5", marks=pytest.mark.slow),
        "leaving T5 out",
        pytest.param("embedded", marks=pytest.mark.slow),
        "embedded, whole",
        "flux",
    ],
)
def test_the_snippet_beside_every_checkpoint_draws_what_sample_draws(name, runs, monkeypatch):
    recipe, run = runs[name]
    same_image(loaded(exported_with(run), monkeypatch), recipe, run)


@pytest.mark.parametrize("name", ["adapter", pytest.param("without T5", marks=pytest.mark.slow), "leaving T5 out"])
def test_a_merged_pipeline_loads_with_plain_from_pretrained(name, runs, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    recipe, run = runs[name]
    folder = export(recipe, "merged", tmp_path / "merged", run_dir=run).folder
    found = loaded(folder, monkeypatch)
    same_image(found, recipe, run)
    if name == "adapter":
        same_image(found | {"pipe": DiffusionPipeline.from_pretrained(folder)}, recipe, run)
    else:  # diffusers asks for the third encoder by name where a pipeline has none; the card says so
        assert "text_encoder_3=None, tokenizer_3=None" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["adapter", pytest.param("flux", marks=pytest.mark.slow)])
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_adapters_load_where_they_belong(to, name, runs, tmp_path, monkeypatch):
    recipe, run = runs[name]
    done = export(recipe, to, tmp_path / to, run_dir=run)
    assert re.search(r": (\d+) of \1 layers matched, 0 unmatched", done.lines[1])
    same_image(loaded(done.folder, monkeypatch), recipe, run)


def test_cards_say_what_was_done(runs):
    recipe, run = runs["adapter"]
    text = (exported_with(run) / "README.md").read_text(encoding="utf-8")
    for words in (recipe.hash, recipe.name, "LoRA of rank 2, after iteration 1 of 1", "guidance scale | 3.0"):
        assert words in text, words
    assert "max sequence length | 12" in text
    assert "| iteration |" in text
    assert "| 1 | " in text
    embedded = (exported_with(runs["embedded, whole"][1]) / "README.md").read_text(encoding="utf-8")
    assert "max_sequence_length=0" in embedded
    asked = recipe.task.train_prompts(seed=0, start=0, count=1)[0].text
    assert f'pipe(prompt="{asked}", ' in embedded  # of the world that the embedded pipeline knows
    assert "sigmas=[1.0, 0.75, 0.5, 0.25]" in embedded
    assert str(Path.cwd()) not in embedded


def test_the_command_prints_what_matched(runs, capsys, monkeypatch, tmp_path):
    _, run = runs["adapter"]
    monkeypatch.chdir(tmp_path)
    for to in TARGETS:
        assert main(["export", str(run), "--to", to, "--out", str(tmp_path / to)]) == 0
        said = capsys.readouterr().out
        assert "online weights of" in said
        assert to == "merged" or "0 unmatched" in said
        assert sorted(tmp_path.glob(".*")) == []
    assert main(["export", str(run), "--to", "peft", "--out", str(tmp_path / "peft")]) == 2
    assert "something is there already" in capsys.readouterr().err
    assert main(["export", str(runs["whole"][1]), "--to", "kohya", "--out", "x"]) == 2
    assert "Use --to merged" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "x").exists()


def test_pushing_without_a_network_keeps_the_export(runs, capsys, tmp_path, monkeypatch):
    _, run = runs["adapter"]
    out = tmp_path / "pushed"
    assert main(["export", str(run), "--to", "diffusers", "--out", str(out), "--push", "me/mine"]) == 2
    said = capsys.readouterr().err
    assert "The export is complete in" in said
    assert "Traceback" not in said
    assert (out / "README.md").is_file()
    assert main(["export", str(run), "--to", "diffusers", "--out", str(tmp_path / "y"), "--push", "mine"]) == 2
    assert not (tmp_path / "y").exists()


def test_a_new_repository_is_private_unless_asked_otherwise(tmp_path, monkeypatch):
    import huggingface_hub

    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *a, **k: asked.append(k["private"]))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **k: asked.append(k["repo_id"]))
    assert push(tmp_path, "me/mine") == "https://huggingface.co/me/mine"
    push(tmp_path, "me/mine", public=True)
    assert asked == [True, "me/mine", False, "me/mine"]
