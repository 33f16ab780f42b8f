"""What a wheel holds, and what the files around the package promise."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_imports import imports

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PIPELINE = ROOT / "rlt2i" / "tasks" / "shapes" / "pipeline"


def load_release() -> ModuleType:
    """The release script, which lives outside the package."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = load_release()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive and the wheel that is built from it, without network and without touching the tree."""
    return release.build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(archives: tuple[Path, Path]) -> list[str]:
    """The names in the wheel."""
    return zipfile.ZipFile(archives[1]).namelist()


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


def test_the_source_archive_holds_what_belongs_to_the_package(archives: tuple[Path, Path]):
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md", "pyproject.toml"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "rlt2i").rglob("*.py")} <= names
    assert not [name for name in names if name.startswith(("tests/", "runs/", "benchmarks/"))]


def test_the_wheel_says_what_the_project_file_says(archives: tuple[Path, Path]):
    version = release.version_of(ROOT)
    assert release.metadata_problems(archives[1], version) == []
    assert release.metadata_problems(archives[1], "9.9.9")[0] == f"Version is {version!r}, expected '9.9.9'"


@pytest.mark.slow
def test_the_wheel_alone_trains_from_an_empty_directory(archives: tuple[Path, Path]):
    small = ["iterations=1", "prompts_per_iteration=2", "group_size=2", "eval_prompts=6", "eval_steps=2"]
    words = [word for setting in small for word in ("--set", f"train.{setting}")]
    with release.alone(archives[1]) as (python, folder):
        said = release.run([python, "-m", "rlt2i", "train", "star-nft-shapes", *words], folder=folder)
        assert [*folder.glob("runs/*/**/*.safetensors")], said


# ----------------------------------------------------------------------------------------------------------- release


@pytest.mark.parametrize(
    ("heading", "cited", "problems"),
    [
        ("## [1.2.3] - 2026-01-31", "1.2.3", []),
        ("## [Unreleased]", "1.2.3", ["CHANGELOG.md begins with [Unreleased], the code is 1.2.3."]),
        ("## [1.2.2] - 2026-01-31", "1.2.3", ["CHANGELOG.md begins with [1.2.2], the code is 1.2.3."]),
        ("## [1.2.3]", "1.2.3", ["CHANGELOG.md: [1.2.3] has no date."]),
        ("## [1.2.3] - 2026-01-31", "1.2.2", ["CITATION.cff does not say 'version: 1.2.3'"]),
        ("no heading", "1.2", ["CHANGELOG.md begins with [1.2.1], the code", "CITATION.cff does not say"]),
    ],
)
def test_a_release_has_one_version(heading, cited, problems, tmp_path: Path):
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n\n- All.\n\n## [1.2.1] - 2025-12-31\n")
    (tmp_path / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {cited}\n")
    found = release.said_elsewhere(tmp_path, "1.2.3")
    assert len(found) == len(problems)
    assert all(text.startswith(start) for text, start in zip(found, problems, strict=True))


def test_a_release_is_of_a_commit_and_its_tag_is_not_taken(tmp_path: Path):
    def git(*words: str) -> None:
        release.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], folder=tmp_path)

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    assert release.in_git(tmp_path, "1.0.0") == []
    git("tag", "-am", "one", "v1.0.0")
    assert release.in_git(tmp_path, "1.0.0") == []
    (tmp_path / "a").write_text("2")
    assert release.in_git(tmp_path, "1.0.0") == ["uncommitted: a"]
    git("commit", "-qam", "two")
    assert release.in_git(tmp_path, "1.0.0") == ["the tag v1.0.0 exists and names another commit: count the version up"]
    assert release.in_git(tmp_path, "1.0.1") == []


def test_the_citation_file_is_one():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation), "the keys that the format requires"
    assert citation["type"] == "software"
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert citation["version"] == release.version_of(ROOT)
    assert all({"name"} <= set(a) or {"family-names", "given-names"} <= set(a) for a in citation["authors"])


def test_the_security_page_says_where_to_report():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert re.search(r"report a vulnerability in private", text, flags=re.IGNORECASE)
    assert "rlt2i --version" in text


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


@functools.cache
def imported_modules() -> frozenset[tuple[str, str]]:
    """(top-level module, file of the package that imports it)."""
    files = (ROOT / "rlt2i").rglob("*.py")
    return frozenset((m.partition(".")[0], str(p.relative_to(ROOT))) for p in files for _, m in imports(p))


def test_every_declared_dependency_is_imported_or_has_a_reason():
    from packaging.requirements import Requirement

    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    ours = [requirement for name, extra in extras.items() if name not in ("dev", "docs") for requirement in extra]
    named = [*project["dependencies"], *ours]
    names = {Requirement(text).name for text in named}
    found = {module for module, _ in imported_modules()}
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
    undeclared = sorted(
        f for f in imported_modules() if f[0] not in declared | sys.stdlib_module_names | ENGINES | {"rlt2i", ""}
    )
    assert not undeclared


# ------------------------------------------------------------------------------------------------------------- other


def test_the_version_is_said_once():
    import rlt2i

    assert "version" in PYPROJECT["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", rlt2i.__version__)


def test_the_makefile_has_its_targets():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "lint", "pretrain", "release-check", "clean"):
        assert re.search(rf"^{target}:", text, flags=re.MULTILINE), target
