"""Hooks of the documentation site: README as its home, a reference page for every module, links that leave docs/.

The pages are written to be read in the repository as well, so they link to sources, curves and tables by relative
path. On the site a link to a module leads to its reference page, one to another Markdown file to a page made of it, and
one to any other file to a copy of it.
"""

from __future__ import annotations

import ast
import functools
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlt2i"
HOME = "README.md"
LINK = re.compile(r"(?P<open>\]\()(?P<path>(?!https?:|mailto:|#)[^)\s#]+)(?P<anchor>#[^)\s]*)?(?P<close>\))")
BRACKET = re.compile(r"\[([-+.\d, ]+)\](?![(\[:])")
"""An interval or the number of a note, which the site would take for a reference to a heading."""
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def modules() -> list[str]:
    """Dotted names of the public modules, packages before what they hold."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return sorted(names, key=lambda name: name.split("."))


def source(module: str) -> Path:
    """The file of a module."""
    folder = ROOT.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def first_line(module: str) -> str:
    """What a module is, by its docstring."""
    text = ast.get_docstring(ast.parse(source(module).read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def index_of_reference() -> str:
    """The page that lists every module."""
    lines = [
        "# Reference",
        "",
        "Every public module, by package. What `from rlt2i import X` finds is listed first.",
        "",
    ]
    for name in modules():
        depth = name.count(".")
        lines.append(f"{'    ' * depth}* [`{name}`]({name}.md): {first_line(name)}")
    return "\n".join(lines) + "\n"


def place(path: str) -> str:
    """Where the site keeps the file or folder of the repository at `path`.

    Raises:
        FileNotFoundError: when there is none.
    """
    full = ROOT / path
    if path == HOME:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if full.suffix == ".py" and PACKAGE in full.parents:
        parts = full.relative_to(ROOT).with_suffix("").parts
        return f"reference/{'.'.join(parts[:-1] if parts[-1] == '__init__' else parts)}.md"
    if full.is_dir():
        return f"files/{path.rstrip('/')}/index.md"
    if full.suffix == ".md":
        return path
    if full.is_file():
        return f"files/{path}"
    raise FileNotFoundError(f"a page links to {path}, which does not exist")


def targets(text: str, page: str) -> Iterator[str]:
    """Paths within the repository that a page's links lead to, without those inside docs/."""
    for match in LINK.finditer(FENCE.sub("", text)):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), match["path"]))
        if not path.startswith("docs/"):
            yield path


def rewritten(text: str, page: str) -> str:
    """The text of the page at `page` in the repository, with links as the site has them."""
    here = posixpath.dirname(place(page))

    def one(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), match["path"]))
        return f"{match['open']}{posixpath.relpath(place(path), here or '.')}{match['anchor'] or ''}{match['close']}"

    return BRACKET.sub(r"\\[\1\\]", LINK.sub(one, text))


@functools.cache
def linked() -> list[str]:
    """What the pages link to outside docs/: Markdown files are pages themselves and are followed."""
    pages = [HOME, "CHANGELOG.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]
    found: dict[str, None] = {}
    while pages:
        page = pages.pop()
        found.setdefault(page)
        for path in targets((ROOT / page).read_text(encoding="utf-8"), page):
            if path not in found:
                found[path] = None
                if path.endswith(".md"):
                    pages.append(path)
    return [path for path in found if not path.startswith("docs/")]


def listing(folder: str) -> str:
    """A page with the files of a folder."""
    names = sorted(path.name for path in (ROOT / folder).iterdir() if path.is_file() and path.name[0] not in "._")
    return "\n".join([f"# {folder}", "", *(f"* [{name}]({name})" for name in names)]) + "\n"


def on_startup(**_: Any) -> None:
    """The kernels that run the tutorials inherit what is set here: no page shows a warning of the builder's machine."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds home, reference and what lies outside docs/."""

    def page(name: str, content: str) -> None:
        files.append(File.generated(config, name, content=content))

    page("reference/index.md", index_of_reference())
    for name in modules():
        page(f"reference/{name}.md", f"::: {name}\n")
    for path in linked():
        where = place(path)
        if where.startswith("reference/"):
            continue
        full = ROOT / path
        if full.is_dir():
            page(where, listing(path))
            for file in sorted(entry for entry in full.iterdir() if entry.is_file() and entry.name[0] not in "._"):
                copy = f"files/{path.rstrip('/')}/{file.name}"
                if files.get_file_from_path(copy) is None:
                    files.append(File.generated(config, copy, abs_src_path=str(file)))
        elif full.suffix == ".md":
            page(where, rewritten(full.read_text(encoding="utf-8"), path))
        elif files.get_file_from_path(where) is None:
            files.append(File.generated(config, where, abs_src_path=str(full)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of a page of docs/."""
    path: Any = page.file.src_uri
    return (
        rewritten(markdown, f"docs/{path}")
        if (ROOT / "docs" / path).suffix == ".md" and (ROOT / "docs" / path).is_file()
        else markdown
    )
