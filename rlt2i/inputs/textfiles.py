"""Every text file that a user hands in is read here: UTF-8, lines as editors show them, errors that name the place.

`str.splitlines` also cuts at form feeds, U+0085, U+2028 and U+2029, which are part of a text; here a line ends at a
line feed, with or without a carriage return before it.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import attrs

from rlt2i.inputs.typography import is_blank, lone_surrogate

Result = TypeVar("Result")
Rest = ParamSpec("Rest")

_BOM = "\ufeff"
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class TextFileError(ValueError):
    """A text file that cannot be read; the message names the file, the place, the reason and the way out."""


@attrs.frozen
class TextLine:
    """A line that shows something: its text without white space around it, and where it is ("a.txt, line 3")."""

    text: str
    where: str
    number: int


def user_path(path: str | Path) -> Path:
    """A path as the user wrote it, with ~ for the home folder.

    Raises:
        ValueError: for the home of somebody who has none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error} Write the folder out.") from None


def has_suffix(path: str | Path, *suffixes: str) -> bool:
    """Whether a file's name ends in one of the suffixes (".txt"), in capital or small letters."""
    return Path(path).suffix.lower() in suffixes


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        FileNotFoundError: when there is no such file.
        TextFileError: when it is not UTF-8, naming byte, line and the encoding it seems to have; or cannot be opened.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TextFileError(f"{path}: cannot be read ({error.strerror}).") from None
    return decode_text(content, path)


def decode_text(content: bytes, name: str | Path) -> str:
    """The text of the bytes of a file; see `read_text`.

    Raises:
        TextFileError: for bytes that are not UTF-8, or lines that end as on Mac OS 9.
    """
    encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), None)
    if encoding is not None:
        raise _not_utf8(content, 0, name, encoding)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = error.start + (len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0)
        place = min(place, content.index(b"\0")) if b"\0" in content else place
        raise _not_utf8(content, place, name, _likely_encoding(content)) from None
    if "\0" in text:
        raise _not_utf8(content, content.index(b"\0"), name, _likely_encoding(content))
    if "\n" not in text and "\r" in text.strip():
        raise TextFileError(
            f"{name}: its lines end in carriage returns alone, as on Mac OS 9, so all of it would be one line. Convert "
            f"it, for example with: tr '\\r' '\\n' < {name} > new.txt"
        )
    return text


def split_lines(text: str) -> list[str]:
    """The lines of a text, cut at line feeds alone and without the carriage return of Windows."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def numbered_lines(text: str, name: str | Path) -> Iterator[TextLine]:
    """The lines that show something, stripped; a byte order mark within a file (of files put together) is dropped."""
    for number, line in enumerate(split_lines(text), start=1):
        if not is_blank(line):
            yield TextLine(line.strip().lstrip(_BOM).strip(), f"{name}, line {number}", number)


def read_lines(path: Path) -> list[TextLine]:
    """The lines of a file that show something; blank lines do not count.

    Raises:
        FileNotFoundError, TextFileError: see `read_text`.
    """
    return list(numbered_lines(read_text(path), path))


def read_objects(path: Path) -> list[tuple[TextLine, dict[str, Any]]]:
    """The rows of a file with one JSON object per line.

    Raises:
        FileNotFoundError: when there is no such file.
        TextFileError: for a line that is no JSON object, with its number.
    """
    rows = []
    for line in read_lines(path):
        value = parse_json(line.text, line.where)
        if not isinstance(value, dict):
            raise TextFileError(f"{line.where}: expected an object, got {line.text[:80]}.")
        rows.append((line, value))
    return rows


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        TextFileError: when it is not JSON, or holds text that no encoder accepts.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise TextFileError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise TextFileError(f"{where}: not JSON that can be used ({error}).") from None
    refuse_surrogates(value, where)
    return value


def refuse_surrogates(value: Any, where: str) -> None:
    r"""Check that no text anywhere in a value holds half of a surrogate pair ("\ud83d" as a JSON escape).

    Raises:
        TextFileError: naming the place, the text and the character.
    """
    if isinstance(value, str):
        index = lone_surrogate(value)
        if index is not None:
            raise TextFileError(
                f"{where}: {value[:80]!r} holds half of a character (\\u{ord(value[index]):04x}, a lone surrogate), "
                "which cannot be tokenised or saved. Write the whole character, or leave it out."
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            refuse_surrogates(key, where)
            refuse_surrogates(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_surrogates(item, where)


def kept_until_changed(
    read: Callable[Concatenate[Path, Rest], Result],
) -> Callable[Concatenate[Path, Rest], Result]:
    """A reader of a file that keeps its last results, and reads a file again when that has changed."""

    @functools.lru_cache(maxsize=8)
    def kept(path: Path, state: tuple[int, ...], *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        return read(path, *args, **kwargs)

    @functools.wraps(read)
    def current(path: Path, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        if not path.is_file():
            return read(path, *args, **kwargs)  # which says what is wrong
        status = path.stat()
        state = (status.st_mtime_ns, status.st_size, status.st_dev, status.st_ino)
        return kept(path, state, *args, **kwargs)  # type: ignore[arg-type]

    return current


def _not_utf8(content: bytes, position: int, name: str | Path, encoding: str) -> TextFileError:
    line = content.count(b"\n", 0, position) + 1
    looks = f"it looks like {encoding}" if encoding else "it is no text, or of an encoding that cannot be guessed"
    source = {"Windows-1252 (cp1252)": "CP1252"}.get(encoding, encoding if encoding.startswith("UTF") else "ENCODING")
    return TextFileError(
        f"{name}: byte {position} (0x{content[position]:02x}) on line {line} is not UTF-8 text; {looks}. Save it as "
        f"UTF-8, for example with: iconv -f {source} -t UTF-8 {name} > new{Path(name).suffix}"
    )


def _likely_encoding(content: bytes) -> str:
    """A guess for bytes that are not UTF-8 text; empty when there is none."""
    if b"\0" in content:
        return "UTF-16" if 0.3 < content.count(b"\0") / len(content) < 0.7 else ""
    high = sum(byte >= 0x80 for byte in content) / len(content)
    if high > 0.4:
        return "an East Asian or Cyrillic encoding, such as GB18030, Shift JIS or Windows-1251"
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return ""
    return "Windows-1252 (cp1252)"
