from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rlt2i.recipes.parts import PARTS
from rlt2i.rewards.combinators import Affine
from rlt2i.rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from rlt2i.rewards.selftest import case_for, judge_case, main
from rlt2i.rewards.selftest_cases import CASES, drawing_case
from rlt2i.tasks.cells.reward import CellsReward, CornerReward
from rlt2i.tasks.shapes.reward import ShapesReward
from tests.helpers.fake_rewards import Broken, Grey, Needy, output_of, raises
from tests.helpers.tiny_models import save_blip, save_clip, save_detector, save_head, save_hpsv3


@pytest.mark.parametrize(
    "reward",
    [
        JPEGCompressibility(),
        JPEGIncompressibility(),
        Affine(reward=JPEGCompressibility(), scale=-1.0),
        ShapesReward(),
        CellsReward(),
        CornerReward(),
    ],
)
def test_rewards_pass_their_own_case(reward):
    verdict = judge_case(reward, case_for(reward))
    assert verdict.problems == ()
    assert verdict.names[0] == "good"


@pytest.mark.slow
def test_the_ocr_reward_passes_its_case():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    from rlt2i.rewards.ocr import OCRReward

    verdict = judge_case(OCRReward(workers=1), case_for(OCRReward()))
    assert verdict.problems == ()
    assert verdict.scores[0] == 1.0


@pytest.mark.parametrize(
    "name", ["PickScore", "CLIPScore", "HPSv2", "HPSv3", "Aesthetic", "ImageReward", "GenEvalReward"]
)
def test_model_rewards_can_score_their_case(name, tmp_path, capsys):
    """On random weights the order means nothing; that every picture gets a number and a time does."""
    clip, blip, head = save_clip(tmp_path / "clip"), save_blip(tmp_path / "blip"), save_head(tmp_path / "head")
    fields = {
        "PickScore": {"path": clip, "tokenizer": ""},
        "CLIPScore": {"path": clip},
        "HPSv2": {"path": clip, "tokenizer": ""},
        "Aesthetic": {"path": clip, "head": head},
        "ImageReward": {"path": blip, "tokenizer": blip},
    }
    if name == "HPSv3":
        qwen = save_hpsv3(tmp_path / "qwen")
        fields[name] = {"path": qwen, "tokenizer": qwen, "dtype": "float32"}
    if name == "GenEvalReward":
        fields[name] = {"detector": save_detector(tmp_path / "detector"), "colour_model": clip}
    words = [word for field, value in fields[name].items() for word in ("--set", f"{field}='{value}'")]
    main([name, *words], parts=PARTS)
    out = capsys.readouterr().out
    assert "s per image" in out
    assert "was not scored" not in out


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        (Broken(act=lambda batch: output_of([0.0] * len(batch.prompts))), "not less than the good picture's 0"),
        (Broken(act=raises(RuntimeError("no weights"))), "no weights"),
        (Affine(reward=Broken(act=lambda batch: output_of([0.0, 0.5, 0.5]))), "0.5, not less"),
        (Broken(act=lambda batch: output_of([float("nan"), 0.0, 0.0])), "'good' was not scored"),
    ],
)
def test_the_all_zeros_trap_and_its_kin_are_caught(reward, problem):
    verdict = judge_case(reward, drawing_case())
    assert any(problem in found for found in verdict.problems)


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_well_formed(name):
    case = CASES[name]()
    assert case.bad
    for picture in (case.good, *case.bad.values()):
        assert picture.dtype is torch.uint8
        assert picture.shape == case.good.shape
        assert not torch.equal(picture, case.good) or picture is case.good


def test_rewards_that_need_metadata_ask_for_pictures_of_ones_own():
    assert case_for(Grey()).prompt.startswith("a red circle")
    with pytest.raises(ValueError, match=r"needs the metadata \['value'\].*--good FILE"):
        case_for(Needy())


def test_the_command_prints_and_decides(capsys):
    assert main(["JPEGCompressibility", "--set", "quality=80"], parts=PARTS) == 0
    out = capsys.readouterr().out
    assert "s per image" in out
    assert "as it should be" in out
    constant = ["Clip", "--set", "reward=tests.helpers.fake_rewards:Grey", "--set", "low=-2", "--set", "high=-1"]
    assert main(constant, parts=PARTS) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_command_line_leads_there(capsys, monkeypatch):
    from rlt2i.cli import main as cli

    monkeypatch.delenv("RLT2I_REWARD_TOKEN", raising=False)
    assert cli(["reward", "test", "JPEGCompressibility", "--set", "quality=80"]) == 0
    assert cli(["reward", "test", "JPEGCompression"]) == 2
    assert "did you mean 'JPEGCompressibility'" in capsys.readouterr().err
    assert cli(["serve-reward", "JPEGCompressibility", "--host", "0.0.0.0"]) == 2
    assert "RLT2I_REWARD_TOKEN" in capsys.readouterr().err


def test_the_command_takes_pictures_of_ones_own(tmp_path, capsys):
    for name, grey in (("light.png", 250), ("dark.png", 5)):
        Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(tmp_path / name)
    light, dark = str(tmp_path / "light.png"), str(tmp_path / "dark.png")
    assert main(["tests.helpers.fake_rewards:Grey", "--good", light, "--bad", dark]) == 0
    assert main(["tests.helpers.fake_rewards:Grey", "--good", dark, "--bad", light]) == 1
    value = ["tests.helpers.fake_rewards:Needy", "--good", light, "--bad", dark, "--metadata"]
    assert main([*value, '{"value": 1}']) == 1
    for arguments in ([*value, "[1]"], [*value, "{"], ["tests.helpers.fake_rewards:Grey", "--good", light]):
        with pytest.raises(ValueError, match="reward test"):
            main(arguments)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OCRRewards"], "did you mean 'OCRReward'"),
        (["JPEGCompressibility", "--set", "qualify=3"], "quality"),
        (["JPEGCompressibility", "--set", "quality"], "field=value"),
        (["missing.yaml"], "no such file"),
    ],
)
def test_wrong_names_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(arguments, parts=PARTS)


def test_a_reward_can_come_from_a_file(tmp_path, capsys):
    reward = tmp_path / "reward.yaml"
    reward.write_text("type: Affine\nreward: JPEGCompressibility\nscale: 0.5\n", encoding="utf-8")
    assert main([str(reward)], parts=PARTS) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("policy: x\nreward:\n  type: JPEGIncompressibility\n", encoding="utf-8")
    assert main([str(recipe), "--set", "quality=50"], parts=PARTS) == 0
    capsys.readouterr()
