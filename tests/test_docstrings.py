"""Docstrings say what is there: names under Args and Attributes exist, and where fields are explained, all are."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlt2i"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
CLASSES = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def entries(docstring: str, section: str) -> list[str]:
    """Names that a section explains, `a, b: ...` as two."""
    match = re.search(rf"^{section}:\n((?:    .*\n?|\n)*)", docstring, flags=re.MULTILINE)
    lines = match[1].splitlines() if match else []
    heads = [re.match(r"    ([\w.*]+(?:, [\w.*]+)*)(?: \([^)]*\))?:", line) for line in lines]
    return [name.strip().lstrip("*") for head in heads if head for name in head[1].split(",")]


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    a = node.args
    further = [extra for extra in (a.vararg, a.kwarg) if extra]
    return {argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, *further)}


def bases(node: ast.ClassDef) -> list[ast.ClassDef]:
    """The classes of the package that it is made from, theirs included."""
    direct = [CLASSES[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in CLASSES]
    return [*direct, *(further for base in direct for further in bases(base))]


def members(node: ast.ClassDef) -> set[str]:
    """Fields, methods, what methods assign to self, and the parameters of __init__; those of base classes too."""
    names: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            names.add(child.target.id.lstrip("_"))
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            names.add(child.id)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            names.add(child.attr)
        elif isinstance(child, ast.FunctionDef):
            names |= {child.name} | (parameters(child) if child.name == "__init__" else set())
    return names.union(*(members(base) for base in bases(node)))


def wrong(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, Documented) or not (text := ast.get_docstring(node)):
            continue
        own = members(node) if isinstance(node, ast.ClassDef) else parameters(node)
        for name in (*entries(text, "Args"), *entries(text, "Attributes")):
            if name not in own:
                yield f"{node.name}, line {node.lineno}: {name!r} is not there; it has {', '.join(sorted(own))}"


def test_documented_names_are_in_the_signature():
    faults = {str(path.relative_to(PACKAGE)): list(wrong(tree)) for path, tree in TREES.items()}
    assert not {path: lines for path, lines in faults.items() if lines}


def test_documented_errors_exist():
    known = set(dir(builtins)) | set(CLASSES)
    for path, tree in TREES.items():
        imported = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        for node in ast.walk(tree):
            if isinstance(node, Documented) and (text := ast.get_docstring(node)):
                missing = [e for e in entries(text, "Raises") if "." not in e and e not in known | imported]
                assert not missing, f"{path.name}: {node.name}, line {node.lineno}: no such error: {missing}"


def test_where_fields_are_explained_all_of_them_are():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            if not (own := entries(ast.get_docstring(node) or "", "Attributes")):
                continue
            declared = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
            fields = {ast.unparse(f.target) for f in declared if "ClassVar" not in ast.unparse(f.annotation)}
            elsewhere = {n for base in bases(node) for n in entries(ast.get_docstring(base) or "", "Attributes")}
            methods = {f.name for base in bases(node) for f in base.body if isinstance(f, ast.FunctionDef)}
            missing = {name for name in fields if not name.startswith("_")} - {*own} - elsewhere - methods
            assert not missing, f"{path.name}: {node.name}, line {node.lineno} does not explain {sorted(missing)}"


def test_functions_say_which_errors_they_raise():
    for path, tree in TREES.items():
        for node in tree.body if path.parent.name != "cli" else ():  # commands end in a message
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            raised = [r.exc.func for r in ast.walk(node) if isinstance(r, ast.Raise) and isinstance(r.exc, ast.Call)]
            names = {f.id for f in raised if isinstance(f, ast.Name) and not f.id.startswith("_")} - {"SystemExit"}
            said = re.search(r"\bRaises?\b", ast.get_docstring(node) or "")
            assert said or not names, (
                f"{path.name}: {node.name}, line {node.lineno}, does not say that it raises {names}"
            )


FUNCTION = "def f(a):\n    '''F.\n\n    Args:\n        a, b: two.\n    '''\n"
CLASS = "class C:\n    '''C.\n\n    Attributes:\n        b: one.\n    '''\n    a: int\n"


@pytest.mark.parametrize("source", [FUNCTION, CLASS])
def test_a_name_that_is_not_there_is_found(source: str):
    (fault,) = wrong(ast.parse(source))
    assert "'b' is not there; it has a" in fault
