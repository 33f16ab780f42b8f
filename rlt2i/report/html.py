"""HTML without a template engine: an element builder that escapes, and the frame of a self-contained page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from rlt2i.report.style import STYLE

_VOID = frozenset({"img", "meta", "br", "hr"})


class Markup(str):
    """Text that is HTML already; every other string is escaped on its way into the page."""

    __slots__ = ()


def h(tag: str, *children: str, **attributes: str | int) -> Markup:
    """An element: `h("p", "1 < 2", cls="note")` is `<p class="note">1 &lt; 2</p>`."""
    written = "".join(f' {k.replace("cls", "class")}="{escape(str(v))}"' for k, v in attributes.items())
    if tag in _VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def join(parts: Iterable[str]) -> Markup:
    """Concatenate; plain strings are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int] = ()) -> Markup:
    """A table; the columns in `numeric` are set flush right, with figures of equal width."""

    def cells(tag: str, values: Sequence[str]) -> Markup:
        return join(h(tag, v, **({"cls": "number"} if i in numeric else {})) for i, v in enumerate(values))

    body = join(h("tr", cells("td", row)) for row in rows)
    return h("div", h("table", h("thead", h("tr", cells("th", head))), h("tbody", body)), cls="scroll-x")


def marked(text: str, phrases: Sequence[str]) -> Markup:
    """The text with the phrases highlighted, wherever they stand as written; longer phrases first."""
    lower = text.lower()
    covered = [False] * len(text)
    for phrase in sorted({p.lower() for p in phrases if p.strip()}, key=len, reverse=True):
        start = lower.find(phrase)
        while start >= 0:
            covered[start : start + len(phrase)] = [True] * len(phrase)
            start = lower.find(phrase, start + len(phrase))
    parts: list[Markup] = []
    begin = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or covered[end] != covered[begin]:
            piece = text[begin:end]
            parts.append(h("mark", piece) if covered[begin] else Markup(escape(piece)))
            begin = end
    return join(parts)


def section(anchor: str, title: str, *children: str) -> Markup:
    """A section with its heading; the contents link to `anchor`."""
    return h("section", h("h2", title), *children, id=anchor)


def missing(what: str, command: str) -> Markup:
    """A gap in the report, and how to fill it."""
    return h("p", what, " ", h("code", command), " makes it.", cls="missing")


def page(title: str, body: Markup) -> str:
    """The whole document: nothing in it points outside."""
    head = join(
        (
            h("meta", charset="utf-8"),
            h("meta", name="viewport", content="width=device-width, initial-scale=1"),
            h("meta", name="color-scheme", content="light dark"),
            h("title", title),
            h("style", Markup(STYLE)),
        )
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{h("main", body)}</body></html>\n'
