"""What a wheel holds, and what the files around the package promise."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.test_imports import imports

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PIPELINE = ROOT / "rlt2i" / "tasks" / "shapes" / "pipeline"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel that is built from a copy, without network and without touching the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "rlt2i", source / "rlt2i", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        out,
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("rlt2i-*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_everything_that_the_package_reads(wheel: list[str]):
    data = [
        *ROOT.glob("rlt2i/recipes/library/*.yaml"),
        *ROOT.glob("rlt2i/policies/data/*.json"),
        ROOT / "rlt2i" / "py.typed",
    ]
    data += ROOT.glob("rlt2i/report/templates/*")
    data += [path for path in PIPELINE.rglob("*") if path.is_file()]
    missing = sorted({str(path.relative_to(ROOT)) for path in data} - set(wheel))
    assert not missing
    assert PIPELINE.joinpath("model_index.json").is_file()


def test_the_wheel_holds_every_module_and_nothing_else(wheel: list[str]):
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "rlt2i").rglob("*.py") if "__pycache__" not in p.parts}
    assert modules <= set(wheel)
    assert all(name.startswith(("rlt2i/", "rlt2i-")) for name in wheel)
    assert not [name for name in wheel if name.startswith(("tests/", "benchmarks/", "examples/"))]
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_embedded_pipeline_stays_small():
    size = sum(path.stat().st_size for path in PIPELINE.rglob("*") if path.is_file())
    assert size <= 12 * 2**20


# -------------------------------------------------------------------------------------------------------------- lock


def requirements_without_hashes() -> list[str]:
    """A line for each pinned package, its hashes taken off."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    return [re.sub(r"\s+--hash=\S+", "", line).strip() for line in text.splitlines()]


def test_every_pin_has_its_hashes():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    pinned = [line for line in text.splitlines() if line and line[0] != "#"]
    bare = [line for line in pinned if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", line)]
    assert not bare, f"run python .ci/lock.py: {bare}"


def locked() -> dict[str, str]:
    """Package -> pinned version."""
    lines = requirements_without_hashes()
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^ ;]+)(?: *;.*)?", line) for line in lines if line and line[0] != "#"]
    assert all(pins), "only name==version, with a marker where the platform matters"
    return {re.sub(r"[-_.]+", "-", pin[1]).lower(): pin[2] for pin in pins if pin}


def test_the_lock_pins_every_dependency_within_its_range():
    from packaging.requirements import Requirement

    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for e in ("dev", "tensorboard", "dino", "ocr", "serve") for r in extras[e])]
    pins = locked()
    for text in [*wanted, *PYPROJECT["build-system"]["requires"]]:
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{name} is not in requirements.lock"
        assert requirement.specifier.contains(pins[name]), f"{text} against {name}=={pins[name]}"


def test_the_lock_names_no_index_and_no_path():
    text = "\n".join(requirements_without_hashes())
    assert not re.search(r"https?:|file:|--|@ |\+cpu|\+cu", text.replace("# --", ""))


def test_platform_packages_carry_markers():
    for line in requirements_without_hashes():
        if line.startswith(("nvidia-", "cuda-", "triton")):
            assert "platform_system" in line or "sys_platform" in line, line


NOT_IMPORTED = {
    "onnxruntime": "rapidocr runs on it",
    "tensorboard": "accelerate's trackers import it by name",
    "wandb": "accelerate's trackers import it by name",
    "trackio": "accelerate's trackers import it by name",
}
"""Declared dependency -> why the package does not import it itself."""
SPELT = {"pillow": "PIL", "pyyaml": "yaml", "attrs": "attrs attr"}
"""Name in the index -> names in import statements."""


def test_every_declared_dependency_is_imported_or_has_a_reason():
    from packaging.requirements import Requirement

    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    ours = [requirement for name, extra in extras.items() if name not in ("dev", "docs") for requirement in extra]
    named = [*project["dependencies"], *ours]
    names = {Requirement(text).name for text in named}
    found = {module.partition(".")[0] for path in (ROOT / "rlt2i").rglob("*.py") for _, module in imports(path)}
    unused = {name for name in names if not found & set(SPELT.get(name, name.replace("-", "_")).split())}
    assert unused == set(NOT_IMPORTED) & names, f"imported nowhere: {sorted(unused - set(NOT_IMPORTED))}"


ENGINES = {"unirl"}
"""Engines that a bridge lives inside: who imports the bridge has them, and no extra of ours installs them."""


def test_the_package_imports_only_what_it_declares():
    from packaging.requirements import Requirement

    project = PYPROJECT["project"]
    named = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = [Requirement(text).name for text in named]
    declared = {word for name in names for word in SPELT.get(name, name.replace("-", "_")).split()}
    found = {
        (module.partition(".")[0], str(path.relative_to(ROOT)))
        for path in (ROOT / "rlt2i").rglob("*.py")
        for _, module in imports(path)
    }
    undeclared = sorted(f for f in found if f[0] not in declared | sys.stdlib_module_names | ENGINES | {"rlt2i", ""})
    assert not undeclared


# ------------------------------------------------------------------------------------------------------------- other


def test_the_version_is_said_once():
    import rlt2i

    assert "version" in PYPROJECT["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", rlt2i.__version__)


def test_the_makefile_has_its_targets():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "lint", "pretrain", "clean"):
        assert re.search(rf"^{target}:", text, flags=re.MULTILINE), target
