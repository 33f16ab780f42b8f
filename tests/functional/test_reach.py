"""Formulas are there for parts: every public function of `rlt2i.functional` is reached by one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from rlt2i.recipes.parts import PARTS

ROOT = Path(__file__).resolve().parents[2]
FORMULAS = "rlt2i.functional"
Name = tuple[str, str]
"""(module, name in it)."""


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported(file: Path) -> Iterator[Name]:
    """Every name that a file imports from a module of ours, inside functions as well."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.startswith("rlt2i"):
                yield from ((module, alias.name) for alias in node.names)


def modules_of_parts() -> set[str]:
    """The modules of all registered parts, and what those import, formulas apart."""
    found: set[str] = set()
    waiting = {reference.partition(":")[0] for table in PARTS.values() for reference in table.values()}
    while waiting:
        module = waiting.pop()
        file = file_of(module)
        if module in found or file is None or module.startswith(FORMULAS):
            continue
        found.add(module)
        waiting |= {name for base, alias in imported(file) for name in (base, f"{base}.{alias}")}
    return found


def definitions() -> dict[Name, list[Name]]:
    """What each top-level name of the formulas refers to."""
    table: dict[Name, list[Name]] = {}
    for file in sorted((ROOT / "rlt2i" / "functional").glob("*.py")):
        module = f"{FORMULAS}.{file.stem}"
        elsewhere = {name: (base, name) for base, name in imported(file)}
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = [node] if isinstance(node, ast.FunctionDef | ast.ClassDef) else getattr(node, "targets", [])
            targets = targets or [node.target] if isinstance(node, ast.AnnAssign) else targets
            used = [elsewhere.get(n.id, (module, n.id)) for n in ast.walk(node) if isinstance(n, ast.Name)]
            for target in targets:
                table.setdefault((module, getattr(target, "name", getattr(target, "id", ""))), []).extend(used)
    return table


def reached(starts: set[Name], table: dict[Name, list[Name]]) -> set[Name]:
    found: set[Name] = set()
    waiting = set(starts)
    while waiting:
        name = waiting.pop()
        if name in table and name not in found:
            found.add(name)
            waiting |= set(table[name])
    return found


def test_every_public_formula_is_reached_by_a_part():
    table = definitions()
    starts = {name for module in modules_of_parts() for name in imported(file_of(module)) if name in table}  # type: ignore[arg-type]
    public = {name for name in table if name[1].islower() and not name[1].startswith("_")}
    assert len(public) > 100
    orphans = sorted(".".join(name) for name in public - reached(starts, table))
    assert not orphans, (
        f"{orphans}: no part uses these. Make them usable from a recipe, move what tests compare with to "
        "tests/helpers, or delete them."
    )


def test_the_walk_follows_calls_and_finds_what_nobody_calls():
    a, b, c = ("m", "a"), ("m", "b"), ("m", "c")
    assert reached({a}, {a: [b], b: [b], c: [a]}) == {a, b}
