"""Text of others, such as prompts and names, on its way to a page, a terminal or a spreadsheet."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

_BIDIRECTIONAL = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What begins a formula for a spreadsheet, in full width as well."""
_SEPARATORS = ("\t", "\r", "\n")
_SPELT = {code: f"\\u{code:04x}" for code in _BIDIRECTIONAL}


def visible(value: T) -> T:
    """A string with its bidirectional controls spelt out, so that nothing is shown in another order than it stands.

    Anything but a string is returned as it is; markup stays markup.
    """
    return type(value)(value.translate(_SPELT)) if isinstance(value, str) else value


def cell(value: T) -> T | str:
    """A cell of a CSV file: what a spreadsheet would take for a formula is marked as text; numbers stay numbers."""
    formula = isinstance(value, str) and (value[:1] in _SEPARATORS or value.lstrip().startswith(_FORMULA))
    return f"'{visible(value)}" if formula else visible(value)


class VisibleStream:
    """A stream whose text is made `visible`; everything else is the stream's own.

    When the terminal goes away (a closed window, a lost connection) nobody reads any more: no error of the run.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Returns how many characters of `text` were taken: all."""
        with self._unread():
            self._stream.write(visible(text))
        return len(text)

    def flush(self) -> None:
        with self._unread():
            self._stream.flush()

    @contextlib.contextmanager
    def _unread(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # for whatever else writes there

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
