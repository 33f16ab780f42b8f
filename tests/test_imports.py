"""The arrows of the architecture, read off the source: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlt2i"

LAYERS = (
    "captures",
    "inputs",
    "config",
    "functional",
    "vision",
    "axes",
    "seeds",
    "types",
    "interfaces",
    "credit",
    "distributed",
    "algorithm",
    "rewards",
    "tasks",
    "recipes",
    "runs",
    "samplers",
    "engine",
    "parameter_sets",
    "report",
    "evaluation",
    "serve",
    "voting",
    "objectives",
    "learner",
    "policies",
    "export",
    "training",
    "rehearsal",
    "conformance",
    "bench",
    "bridges",
    "cli",
    "__main__",
    "__init__",
)
"""From the bottom up. A unit imports from itself and from those before it, never from those after it."""
RANK = {name: rank for rank, name in enumerate(LAYERS)}

ZOO = {"samplers", "credit", "objectives", "rewards", "policies", "tasks"}
ZOO_ARROWS = {("tasks", "rewards")}
"""A task may bring the reward that judges it."""
MODEL_LIBRARIES = {"diffusers", "transformers", "accelerate", "peft"}
FREE_OF_MODELS = {
    "functional",
    "types",
    "axes",
    "seeds",
    "interfaces",
    "algorithm",
    "samplers",
    "credit",
    "objectives",
    "engine",
    "learner",
    "recipes",
    "config",
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def unit(path: Path) -> str:
    """The top-level module or folder that a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import statement, those inside functions included."""
    package = [*path.relative_to(ROOT).with_suffix("").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            if module in {"rlt2i", *(f"rlt2i.{folder}" for folder in ZOO)}:
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_units(path: Path) -> Iterator[tuple[int, str]]:
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] == "rlt2i" and len(parts) > 1 and parts[1] in RANK:
            yield line, parts[1]


def test_every_module_has_a_layer():
    unknown = sorted({unit(path) for path in modules()} - set(RANK))
    assert not unknown, f"say in LAYERS of {Path(__file__).name} where these belong: {unknown}"


def test_arrows_point_one_way():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in modules()
        for line, target in imported_units(path)
        if unit(path) in RANK and RANK[target] > RANK[unit(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_units_share_a_layer():
    assert len(set(LAYERS)) == len(LAYERS)


def test_the_package_does_not_import_its_own_front():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules()
        for line, module in imports(path)
        if unit(path) not in {"__init__", "__main__"}
        and module.startswith("rlt2i.")
        and module.split(".")[1] not in RANK
    ]
    assert not wrong, "\n".join(wrong)


def test_types_are_imported_openly():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} hides {ast.unparse(statement)}"
        for path in modules()
        if unit(path) != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        if "rlt2i" in ast.unparse(statement)
    ]
    assert not wrong, "\n".join(wrong)


def imports_of(units: Collection[str], forbidden: Callable[[str, str], bool]) -> list[str]:
    """Lines that import what (unit, module) is forbidden."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules()
        if unit(path) in units
        for line, module in imports(path)
        if forbidden(unit(path), module)
    ]


def test_functional_imports_nothing_of_ours():
    def of_ours(_: str, module: str) -> bool:
        return module.startswith("rlt2i") and not module.startswith("rlt2i.functional")

    assert not imports_of({"functional"}, of_ours)


def test_folders_of_the_zoo_do_not_import_each_other():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in modules()
        if unit(path) in ZOO
        for line, target in imported_units(path)
        if target in ZOO and target != unit(path) and (unit(path), target) not in ZOO_ARROWS
    ]
    assert not wrong, "\n".join(wrong)


def test_algorithms_know_no_model_library():
    assert not imports_of(FREE_OF_MODELS, lambda _, module: module.split(".")[0] in MODEL_LIBRARIES)


def test_the_library_imports_neither_examples_nor_benchmarks_nor_tests():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules()
        for line, module in imports(path)
        if module.split(".")[0] in {"examples", "benchmarks", "tests"}
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_unpickles():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules()
        for line, module in imports(path)
        if module.split(".")[0] in {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    ]
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "torch.save"}:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {ast.unparse(node.func)}")
    converter = [line for line in wrong if line.startswith("rlt2i/rewards/releases.py") and "torch.load" in line]
    assert len(converter) == 1  # tests/test_no_pickle.py holds it to weights_only=True
    assert wrong == converter, "\n".join(wrong)


def test_the_walker_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "rlt2i" / "credit"
    folder.mkdir(parents=True)
    (folder / "bad.py").write_text(
        "from . import algebra\nfrom ..samplers import sde\n\n"
        "def late():\n    import rlt2i.cli\n    from rlt2i import engine\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "rlt2i")
    assert {target for _, target in imported_units(folder / "bad.py")} == {"credit", "samplers", "cli", "engine"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_fast_and_pulls_in_no_model_library():
    code = (
        "import torch, time, sys; start = time.perf_counter(); import rlt2i; seconds = time.perf_counter() - start;"
        f"print(seconds, sorted({MODEL_LIBRARIES!r} & set(sys.modules)))"
    )
    found = [run_python(code).split(" ", 1) for _ in range(2)]
    assert all(libraries == "[]" for _, libraries in found)
    assert min(float(seconds) for seconds, _ in found) < 0.5


def test_the_words_of_the_domain_pull_in_no_model_library():
    code = (
        "import sys, rlt2i, rlt2i.interfaces, rlt2i.algorithm, rlt2i.engine, rlt2i.learner, rlt2i.recipes.recipe;"
        f"print(sorted({MODEL_LIBRARIES!r} & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


def test_every_public_name_can_be_imported():
    code = (
        "import rlt2i; missing = [name for name in rlt2i.__all__ if not hasattr(rlt2i, name)];"
        "print(missing, set(rlt2i.__all__) <= set(dir(rlt2i)))"
    )
    assert run_python(code) == "[] True"


def test_every_part_is_a_public_name_and_parts_of_algorithms_pull_in_no_model_library():
    kinds = ("Advantage", "Allocation", "Mask", "Objective", "Sampler", "TransitionKernel", "CreditAssigner")
    code = (
        "import sys, rlt2i; from rlt2i.recipes.parts import PARTS;"
        "names = {name for table in PARTS.values() for name in table};"
        f"parts = [getattr(rlt2i, name).__name__ == name for kind in {kinds!r} for name in PARTS[kind]];"
        f"print(names - set(rlt2i.__all__), all(parts), sorted({MODEL_LIBRARIES!r} & set(sys.modules)))"
    )
    assert run_python(code) == "set() True []"


def test_a_star_import_gives_what_is_public():
    assert run_python("from rlt2i import *; print(DiffusionNFT.__name__, load_recipe.__name__)") == (
        "DiffusionNFT load_recipe"
    )


def test_an_unknown_name_is_an_attribute_error():
    import rlt2i

    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = rlt2i.Nonsense


VAGUE = frozenset({"found", "told", "asked", "mine", "seen"})


def test_locals_say_what_they_hold():
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) if name in VAGUE:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert not wrong, "\n".join(wrong)
