"""Whether this tree can be released: builds it, checks what was built, and says what to type. It publishes nothing.

python .ci/release.py [--out dist]

Checked are that

* the version of the code is the one of CITATION.cff and of the newest entry of CHANGELOG.md, which has a date;
* the tag v<version> does not exist yet, or names this commit, and nothing is uncommitted;
* a source archive builds, and a wheel builds from the unpacked archive, both without network;
* the metadata say name, version, supported Pythons and licence (twine renders the description, where it is installed);
* the wheel alone, in an empty environment that borrows the libraries of this one, says its version and its recipes.
"""

from __future__ import annotations

import argparse
import contextlib
import email
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
"""A build without isolation: the build requirements are pinned in requirements.lock, so they are here."""


def run(words: Sequence[str | Path], *, folder: Path) -> str:
    """What a command prints.

    Raises:
        RuntimeError: with what it said, when it fails.
    """
    # Without PYTHONPATH, an environment sees what is installed in it and nothing else.
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=folder, env=plain, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def version_of(root: Path) -> str:
    """The version that the code states, read without importing it."""
    text = (root / "rlt2i" / "config" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError("rlt2i/config/version.py states no __version__")
    return found[1]


def said_elsewhere(root: Path, version: str) -> list[str]:
    """What is wrong with the changelog and the citation file."""
    problems = []
    headings = re.findall(r"^## \[([^\]]+)\](.*)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    name, rest = headings[0] if headings else ("nothing", "")
    if name != version:
        problems.append(
            f"CHANGELOG.md begins with [{name}], the code is {version}. Write '## [{version}] - YYYY-MM-DD'"
        )
    elif not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", rest):
        problems.append(f"CHANGELOG.md: [{version}] has no date. Write '## [{version}] - YYYY-MM-DD'")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    if f"\nversion: {version}\n" not in citation:
        problems.append(f"CITATION.cff does not say 'version: {version}'")
    return problems


def in_git(root: Path, version: str) -> list[str]:
    """What is wrong with the repository."""
    problems = []
    if changed := run(["git", "status", "--porcelain"], folder=root).splitlines():
        problems.append(f"uncommitted: {', '.join(line[3:] for line in changed[:5])}")
    head = run(["git", "rev-parse", "HEAD"], folder=root).strip()
    tag = run(["git", "tag", "--list", "--format=%(objectname) %(*objectname)", f"v{version}"], folder=root).split()
    if tag and head not in tag:
        problems.append(f"the tag v{version} exists and names another commit: count the version up")
    return problems


def build(root: Path, out: Path) -> tuple[Path, Path]:
    """(source archive, wheel made of it).

    The archive is built in a copy of what git has, so that stray files of the tree do not get into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        tree, inner = Path(scratch) / "tree", Path(scratch) / "inner"
        tree.mkdir()
        for name in run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], folder=root).split(
            "\0"
        ):
            if name and (root / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                (tree / name).write_bytes((root / name).read_bytes())
        sdist = out / run([sys.executable, "-c", BUILD, "build_sdist", out], folder=tree).split()[-1]
        with tarfile.open(sdist) as archive:
            archive.extractall(inner, filter="data")
        (unpacked,) = inner.iterdir()
        wheel = out / run([sys.executable, "-c", BUILD, "build_wheel", out], folder=unpacked).split()[-1]
    return sdist, wheel


def metadata_problems(wheel: Path, version: str) -> list[str]:
    """What is wrong with what an index would show."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        fields = email.message_from_bytes(archive.read(name))
        strays = [n for n in archive.namelist() if not n.startswith(("rlt2i/", f"rlt2i-{version}.dist-info/"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = {
        "Name": "rlt2i",
        "Version": version,
        "Requires-Python": project["requires-python"],
        "License-Expression": project["license"],
        "Description-Content-Type": "text/markdown",
    }
    problems = [f"{k} is {fields[k]!r}, expected {v!r}" for k, v in expected.items() if fields[k] != v]
    body = fields.get_payload()
    if not isinstance(body, str) or not body.lstrip().startswith("# "):
        problems.append("the description is not the README")
    return problems + ([f"the wheel holds {strays[:3]}"] if strays else [])


@contextlib.contextmanager
def alone(wheel: Path) -> Iterator[tuple[Path, Path]]:
    """(the Python of an empty environment that holds the wheel and borrows its libraries here, an empty directory)."""
    with tempfile.TemporaryDirectory() as scratch:
        environment, empty = Path(scratch) / "environment", Path(scratch) / "empty"
        empty.mkdir()
        venv.create(environment, with_pip=False)
        python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
        run([*pip, wheel], folder=empty)
        # A path in a .pth file adds the libraries, but not what their own .pth files add, such as this very tree.
        own = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder=empty).strip()
        Path(own, "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
        yield python, empty


def installed(wheel: Path, version: str) -> list[str]:
    """What is wrong with the wheel alone in an empty environment, seen from an empty directory."""
    with alone(wheel) as (python, empty):
        said = run([python, "-m", "rlt2i", "--version"], folder=empty)
        recipes = run([python, "-m", "rlt2i", "list"], folder=empty)
    problems = [] if version in said else [f"the installed package says it is {said.strip()}"]
    return problems + (
        [] if "star-nft-shapes" in recipes else ["the installed package lists no recipe star-nft-shapes"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when this tree can be released, 1 when not; prints what is wrong and what comes next."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the archives (default: dist)")
    options = words.parse_args(arguments)
    version = version_of(ROOT)
    problems = said_elsewhere(ROOT, version) + in_git(ROOT, version)
    sdist, wheel = build(ROOT, options.out)
    problems += metadata_problems(wheel, version) + installed(wheel, version)
    if importlib.util.find_spec("twine"):
        print(run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], folder=ROOT), end="")
    else:
        print("twine is not installed: the description was not rendered (pip install twine, and run this again)")
    for path in (sdist, wheel):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    for problem in problems:
        print(f"NOT YET: {problem}")
    if problems:
        return 1
    print(f"ready. Nothing was published; the next steps are yours:\n  git tag -a v{version} -m 'rlt2i {version}'")
    print(f"  git push origin v{version}\n  python -m twine upload {sdist} {wheel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
