"""A bridge says which version has what it plugs into."""

from __future__ import annotations

import sys
import types

import pytest

from rlt2i.bridges.versions import extension_points


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An engine of version 0.1.0 whose algorithms have one hook."""

    class StageAlgorithm:
        def prepare_segment(self) -> None: ...

    package, module = types.ModuleType("some_engine"), types.ModuleType("some_engine.base")
    package.__path__, package.__version__ = [], "0.1.0"  # type: ignore[attr-defined]
    module.StageAlgorithm = StageAlgorithm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_engine", package)
    monkeypatch.setitem(sys.modules, "some_engine.base", module)
    return package


def find(module: str, *names: str) -> list[object]:
    return extension_points("some_engine", module, names, since="some_engine 0.2.0 or newer")


def test_what_is_there_is_found(engine):
    algorithm, hook = find("some_engine.base", "StageAlgorithm", "StageAlgorithm.prepare_segment")
    assert hook is algorithm.prepare_segment  # type: ignore[attr-defined]


def test_a_missing_hook_names_both_versions(engine):
    message = (
        r"plugs into some_engine\.base\.StageAlgorithm\.prepare_part, which the installed some_engine 0\.1\.0 lacks\. "
        r"Use some_engine 0\.2\.0 or newer\."
    )
    with pytest.raises(ImportError, match=message):
        find("some_engine.base", "StageAlgorithm", "StageAlgorithm.prepare_part")
    with pytest.raises(ImportError, match=r"plugs into some_engine\.hooks, which the installed some_engine 0\.1\.0"):
        find("some_engine.hooks", "anything")


def test_an_engine_that_is_not_installed():
    with pytest.raises(
        ImportError, match=r"cannot be imported: some_engine is not installed\. Use some_engine 0\.2\.0"
    ):
        find("some_engine.base", "StageAlgorithm")


def test_what_the_engine_itself_misses_is_not_hidden(engine, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import a_library_that_is_not_there\n")
    engine.__path__ = [str(tmp_path)]
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        find("some_engine.broken", "anything")
