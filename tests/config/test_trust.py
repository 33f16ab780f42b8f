"""Looking at a run directory from elsewhere executes nothing that lies beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from rlt2i.bench.folder import BenchFolder
from rlt2i.cli import main
from rlt2i.config import ConfigError
from rlt2i.config.references import load_object
from rlt2i.config.trust import TRUST, foreign, remember
from rlt2i.recipes import load_recipe
from rlt2i.runs.identity import inputs_of, remember_code
from tests.helpers import toy_recipe

EVIL = """
from pathlib import Path
from typing import Any
Path({mark!r}).write_text("executed")
from tests.helpers.toy import QuadrantBrightness
class Mine(QuadrantBrightness):
    pass
def fine(images, prompts, metadata):
    return [0.5 for _ in images]
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RLT2I_TRUSTED", str(tmp_path / "home" / "trusted"))
    monkeypatch.delenv(TRUST, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run_from_elsewhere(home: Path, reward: object, name: str = "stranger") -> Path:
    """A run directory with code beside its recipe, which nobody here has seen."""
    folder = home / name
    folder.mkdir(exist_ok=True)
    mapping = toy_recipe.clipped(iterations=1).mapping() | {"reward": reward}
    (folder / "recipe.yaml").write_text(json.dumps(mapping))
    (folder / "evil.py").write_text(EVIL.format(mark=str(home / f"{name}.executed")))
    (folder / "metrics.jsonl").write_text("")
    return folder


REFERENCES = {
    "a file beside": {"type": "evil.py:Mine"},
    "a path of the working directory": {"type": "stranger/evil.py:Mine"},
    "a module of the working directory": {"type": "stranger.evil:Mine"},
    "a function beside": {"type": "rlt2i.rewards.combinators:Function", "function": "stranger/evil.py:fine"},
    "a function of a module": {"type": "rlt2i.rewards.combinators:Function", "function": "stranger.evil:fine"},
    "inside another reward": {
        "type": "rlt2i.rewards.validity:Guarded",
        "reward": {"type": "evil.py:Mine"},
    },
}

COMMANDS: list[Any] = [
    ["eval", "stranger"],
    ["eval", "stranger", "--suite", "cells"],
    ["sample", "stranger", "--prompt", "x"],
    ["maps", "stranger", "--prompt", "x"],
    ["pairs", "stranger", "pairs"],
    ["train", "--run-dir", "stranger", "--resume"],
    ["train", "stranger", "--run-dir", "new"],
    ["train", "stranger", "--dry-run"],
    ["doctor", "stranger"],
    pytest.param(["rehearse", "stranger"], marks=pytest.mark.slow),
    pytest.param(["compare", "stranger", "--reference", "cells-nft"], marks=pytest.mark.slow),
    ["report", "stranger"],
    ["look", "stranger", "--prompt", "x"],
    ["vote", "stranger", "votes"],
    ["plan", "stranger"],
    ["plan", "stranger", "--gpu", "24GB"],
    ["plan", "stranger", "--fit", "24GB", "--out", "smaller.yaml"],
    ["check", "stranger"],
    ["check", "stranger", "--tiny"],
    ["check", "policy", "stranger"],
    ["export", "stranger", "--to", "peft"],
    ["export", "stranger", "--to", "merged", "--out", "exported"],
    ["sample", "stranger", "--prompt", "x", "--set", "train.seed=3"],
    ["train", "--run-dir", "stranger", "--resume", "auto"],
    ["reward", "test", "stranger"],
    ["serve-reward", "stranger"],
    ["bench", "probe", "stranger"],
    ["bench", "stranger"],
    ["bench", "cells-nft", "--out", "stranger", "--publish", "published"],
    ["bench", "cells-nft", "--out", "stranger", "--judge"],
    ["bench", "cells-nft", "--out", "stranger", "--power"],
    ["compare", "uniform=stranger", "star=stranger", "--out", "compared"],
]


@pytest.mark.parametrize("reference", REFERENCES)
def test_no_way_to_name_code_executes_it(reference, home):
    run = run_from_elsewhere(home, REFERENCES[reference])
    with pytest.raises(ConfigError, match=r"is not executed.*--trust-code"):
        load_recipe(run)
    assert not (home / "stranger.executed").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_no_command_executes_it(command, home, capsys):
    run_from_elsewhere(home, {"type": "evil.py:Mine"})
    code = main(command)
    said = capsys.readouterr().err
    assert not (home / "stranger.executed").exists()
    assert "Traceback" not in said
    assert code == 0 or len(said.splitlines()) <= 3, said


def test_every_command_that_reads_a_run_is_in_the_table():
    from rlt2i.cli import parser

    words = next(action for action in parser()._actions if action.choices).choices
    tried = {(getattr(command, "values", None) or [command])[0][0] for command in COMMANDS}
    assert set(words) - tried == {"list", "pretrain"}  # which take no run


def test_the_recipes_of_a_benchmark_from_elsewhere_execute_nothing(home):
    run = run_from_elsewhere(home, {"type": "evil.py:Mine"})
    (run / "recipes").mkdir()
    for place in (run / "recipes" / "uniform.yaml", run / "recipes" / "evil.py"):
        place.write_text((run / {".yaml": "recipe.yaml", ".py": "evil.py"}[place.suffix]).read_text())
    with pytest.raises(ConfigError, match="is not executed"):
        BenchFolder(path=run).recipe("uniform", 0)
    assert not (home / "stranger.executed").exists()


def test_the_suite_of_an_evaluation_from_elsewhere_executes_nothing(home, capsys):
    folder = home / "evaluation"
    folder.mkdir()
    (folder / "fingerprint.json").write_text("{}")
    (folder / "evil.py").write_text(EVIL.format(mark=str(home / "suite.executed")))
    (folder / "suite.yaml").write_text(
        "name: x\nprompts: {type: 'evil.py:Mine'}\nrewards: {a: {type: 'evil.py:Mine'}}\n"
    )
    assert main(["eval", "evaluation"]) == 2
    assert not (home / "suite.executed").exists()


def test_the_user_can_say_yes(home, monkeypatch):
    run = run_from_elsewhere(home, {"type": "evil.py:Mine"}, "granted")
    monkeypatch.setenv(TRUST, "1")
    assert type(load_recipe(run).reward).__name__ == "Mine"
    assert (home / "granted.executed").exists()


def test_a_recipe_that_the_user_names_may_name_code_and_its_runs_remember_it(home, monkeypatch):
    run = run_from_elsewhere(home, {"type": "evil.py:Mine"}, "mine")
    (home / "mine.yaml").write_text((run / "recipe.yaml").read_text())
    (home / "evil.py").write_text((run / "evil.py").read_text())
    remember_code(load_recipe(home / "mine.yaml"))
    forget(monkeypatch)
    assert type(load_recipe(run).reward).__name__ == "Mine"
    forget(monkeypatch)
    (run / "evil.py").write_text((run / "evil.py").read_text() + "# and more\n")
    (home / "evil.py").unlink()
    with pytest.raises(ConfigError, match="not executed"):
        load_recipe(run)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    for name in [name for name in sys.modules if name.startswith("rlt2i_file_")]:
        monkeypatch.delitem(sys.modules, name)


def test_what_is_installed_or_imported_is_known(home):
    with foreign(home):
        assert load_object("rlt2i.samplers.sde:SDE")
        assert load_object("yaml:safe_load")
        assert load_object("tests.helpers.toy:QuadrantBrightness")


def test_packages_around_a_module_are_code_too(home):
    (home / "outer").mkdir()
    (home / "outer" / "__init__.py").write_text(EVIL.format(mark=str(home / "outer.executed")))
    (home / "outer" / "inner.py").write_text("x = 1\n")
    remember([home / "outer" / "inner.py"])
    with foreign(home / "stranger"), pytest.raises(ConfigError, match=r"__init__\.py is not executed"):
        load_object("outer.inner:x")
    assert not (home / "outer.executed").exists()


def test_a_home_that_cannot_be_written_forgets(home, monkeypatch):
    (home / "plain").write_text("")
    monkeypatch.setenv("RLT2I_TRUSTED", str(home / "plain" / "trusted"))
    remember([home / "plain"])
    assert (home / "plain").read_text() == ""
    assert not (home / "plain" / "trusted").exists()


def test_the_file_of_a_function_belongs_to_the_run(home):
    from rlt2i.rewards.combinators import Function

    (home / "judge.py").write_text(EVIL.format(mark=str(home / "judge")))
    recipe = attrs.evolve(toy_recipe.clipped(iterations=1), reward=Function(function=f"{home}/judge.py:fine"))
    (entry,) = [value for key, value in inputs_of(recipe).items() if key == "reward.function (judge.py)"]
    assert entry["path"] == str(home / "judge.py")
