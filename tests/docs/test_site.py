"""The documentation site: every page is reached, links lead somewhere, names in tables exist, tutorials run."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import hooks
from rlt2i.recipes import load_recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))


def navigation() -> set[str]:
    """Every page that mkdocs.yml names."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    entries: list[Any] = [yaml.safe_load(text[text.index("\nnav:") :])["nav"]]
    found = set()
    while entries:
        entry = entries.pop()
        if isinstance(entry, str):
            found.add(entry)
        else:
            entries.extend(entry.values() if isinstance(entry, dict) else entry)
    return found


def test_every_page_is_in_the_navigation():
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | {f"tutorials/{p.name}" for p in TUTORIALS}
    reached = {page for page in pages if not page.startswith("algorithms/") or page == "algorithms/README.md"}
    assert reached == navigation() - {"index.md", "reference/index.md", "CHANGELOG.md"}


def test_links_that_leave_the_pages_lead_to_something():
    for path in hooks.linked():
        assert hooks.place(path)
    assert "benchmarks/curves" in hooks.linked()


def test_a_link_to_a_module_leads_to_its_reference():
    turned = hooks.rewritten("[`DiffusionNFT`](../../rlt2i/objectives/nft.py)", "docs/algorithms/nft.md")
    assert turned == "[`DiffusionNFT`](../reference/rlt2i.objectives.nft.md)"
    assert hooks.rewritten("gain [.1, +.3] and [1](#a)", "docs/a.md") == r"gain \[.1, +.3\] and [1](#a)"


def test_the_reference_lists_every_public_module():
    assert "rlt2i.objectives.nft" in hooks.modules()
    assert all(hooks.first_line(name) for name in hooks.modules())


def test_fields_of_the_page_for_flow_grpo_exist():
    page = (DOCS / "from-flow-grpo.md").read_text(encoding="utf-8")
    known = [load_recipe(name).mapping() for name in ("flow-grpo-sd35-ocr", "flow-grpo-fast-sd35-pickscore")]
    ours = "\n".join(line.split("|")[2] for line in page.splitlines() if line.startswith("| `"))
    named = re.findall(r"`((?:policy|sampler|train|credit|objective)(?:\.\w+)+)(?:[=:][^`]*)?`", ours)
    assert len(named) > 20
    for field in named:
        values: list[Any] = known
        for word in field.split("."):
            values = [value[word] for value in values if isinstance(value, dict) and word in value]
        assert values, f"from-flow-grpo.md names {field}, which no recipe of Flow-GRPO has"


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path))


def shown_plans() -> list[tuple[str, str, list[str]]]:
    """(page, command, lines shown below it) of every plan of the hardware pages whose answer is shown."""
    found = []
    for page in sorted((DOCS / "hardware").glob("*.md")):
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, *shown = entry.splitlines()
                if command.startswith("rlt2i plan ") and shown:
                    found.append((page.stem, command, shown))
    return found


def test_the_hardware_pages_show_what_plans_say():
    assert {page for page, _, _ in shown_plans()} == {"card-24gb", "card-80gb", "eight-cards"}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command", "expected"), shown_plans())
def test_a_plan_of_the_hardware_pages_says_what_the_page_says(
    page: str, command: str, expected: list[str], tmp_path: Path
):
    words = shlex.split(command, comments=True)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "rlt2i", *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    for line in expected:
        assert line in done.stdout, f"{page}: {line!r} is not what the command says:\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path):
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("execute: true", "execute: false")
    config = ROOT / ".mkdocs-test.yml"
    config.write_text(text, encoding="utf-8")
    try:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(tmp_path / "site")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        config.unlink()
    assert done.returncode == 0, done.stderr[-3000:]
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "credit is a first-class object" in home
