"""The commands that the pages show, in fences and indented."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[2]
PROGRAM = re.compile(r"(?:\w+=\S+ )*(?:\.venv/bin/)?(rlt2i|torchrun|accelerate|python|make|pip|hf|ssh|srun)\s")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """All that a reader is led to."""
    inside = [path for folder in ("docs", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.md"))]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *inside]


@attrs.frozen(kw_only=True)
class Shown:
    """A command of a page.

    Attributes:
        page: where, relative to the repository.
        text: in one line, without comment and prompt.
    """

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """As a shell splits them; of a script within quotes, without the quote that closes it."""
        text = self.text.replace("""'"$RECIPE"'""", "star-shapes").replace("$RECIPE", "star-shapes")
        return shlex.split(text.rstrip("' &") if text.count("'") % 2 else text)

    @property
    def arguments(self) -> list[str] | None:
        """What follows the word rlt2i; None of another program."""
        words = [word.removeprefix(".venv/bin/") for word in self.words if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "rlt2i":
            return words[1:]
        follows = words.index("-m") + 1 if "-m" in words else 0
        return words[follows + 1 :] if words[follows] == "rlt2i" else None


def code(text: str) -> Iterator[tuple[bool, str]]:
    """(whether a prompt marks what is typed, code) of the blocks of a page that may be a shell's."""
    for language, block in FENCE.findall(text):
        if language in ("", "bash", "sh", "console"):
            yield language == "console", block
    for block in re.findall(r"(?:^    .*\n?)+", FENCE.sub("", text), re.MULTILINE):
        yield False, block


def shown_commands() -> list[Shown]:
    """Every one, in the order of the pages, each text once."""
    found: dict[str, Shown] = {}
    for path in pages():
        for prompted, block in code(path.read_text(encoding="utf-8")):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if prompted and not line.startswith("$ "):
                    continue
                text = re.sub(r"\s+#\s.*$", "", line.strip().removeprefix("$ "))
                if PROGRAM.match(f"{text} "):
                    found.setdefault(text, Shown(page=str(path.relative_to(ROOT)), text=text))
    return list(found.values())
