"""What the doctor finds, and what it only says it could not ask."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from rlt2i.cli import main
from rlt2i.recipes import list_recipes, load_recipe
from rlt2i.training.doctor import Finding, examine, extras, repositories, table


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_recipe_names_the_repositories_of_its_policy_and_of_its_rewards():
    assert repositories(load_recipe("star-sd35-geneval"))[0] == "stabilityai/stable-diffusion-3.5-medium"
    assert "yuvalkirstain/PickScore_v1" in repositories(load_recipe("flow-grpo-sd35-pickscore"))
    assert repositories(load_recipe("star-shapes")) == []


@pytest.mark.parametrize(
    ("answer", "verdict", "says"),
    [
        ("open", "ok", "open to everyone"),
        ("granted", "ok", "has access"),
        ("gated", "broken", "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"),
        ("missing", "broken", "no such repository"),
        ("offline", "note", "not asked"),
    ],
)
def test_what_the_hub_answers(answer: str, verdict: str, says: str, tmp_path: Path):
    findings = examine([load_recipe("star-sd35-geneval")], folder=tmp_path, ask_hub=lambda _: answer)
    found = by_name(findings)["stabilityai/stable-diffusion-3.5-medium"]
    assert found.verdict == verdict
    assert says in table(findings)


def test_a_survey_only_notes_what_single_recipes_lack(tmp_path: Path):
    recipe = load_recipe("star-sd35-geneval")
    survey = examine([recipe], folder=tmp_path, strict=False, ask_hub=lambda _: "gated")
    assert by_name(survey)["stabilityai/stable-diffusion-3.5-medium"].verdict == "note"


def test_a_missing_extra_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = load_recipe("star-shapes", ["train.trackers=[wandb]"])
    assert extras(recipe) == ["wandb"]
    assert "serve" in extras(load_recipe("star-sd35-geneval2"))  # a judge is asked over HTTP
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    found = by_name(examine([recipe], folder=tmp_path))["extra wandb"]
    assert (found.verdict, found.way_out) == ("broken", "pip install 'rlt2i[wandb]'")


def test_a_version_out_of_range_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "peft" else real(name))
    found = by_name(examine([], folder=tmp_path))["peft"]
    assert found.verdict == "broken"
    assert "0.1, but rlt2i needs" in found.text


def test_a_folder_that_cannot_be_written_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    found = by_name(examine([], folder=tmp_path / "not" / "yet"))["run folder"]
    assert found.verdict == "broken"
    assert str(tmp_path) in found.text
    assert "--run-dir" in found.way_out


def test_without_a_network_the_hub_is_not_guessed():
    code = "from rlt2i.training.doctor import hub_access; print(hub_access('nobody/nothing-of-this-name'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "offline"


def test_the_command_exits_by_what_it_finds(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    assert main(["doctor", "star-shapes"]) == 0
    assert "run folder" in capsys.readouterr().out
    monkeypatch.setattr("rlt2i.training.doctor.hub_access", lambda _: "gated")
    assert main(["doctor", "star-sd35-geneval"]) == 1
    assert "lines need mending" in capsys.readouterr().out
    assert main(["doctor"]) == 0  # a survey of everything shipped
    shown = capsys.readouterr().out
    assert "stabilityai/stable-diffusion-3.5-medium" in shown
    assert len(list_recipes()) > 50
