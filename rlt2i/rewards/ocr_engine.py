"""RapidOCR (PP-OCRv6, Apache-2.0; `pip install 'rlt2i[ocr]'`). Its wheel holds the models: no download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import numpy as np

Point = tuple[float, float]
Quad = tuple[Point, ...]
"""Four corners in pixels, clockwise from the top left of the writing."""

MODELS = ("*_det_*.onnx", "*_rec_*.onnx")
DETECTION_SIDE = 736
"""RapidOCR enlarges images to this to look for text: twice the time for 512 pixels, and no better there."""


@attrs.frozen(kw_only=True)
class Line:
    """One line of writing.

    Attributes:
        text: as recognised; spaces are often missing.
        confidence: of the recogniser, in [0, 1].
        quad: around the line.
        characters: (character, quad) without spaces, in reading order; empty unless asked for.
    """

    text: str
    confidence: float
    quad: Quad
    characters: tuple[tuple[str, Quad], ...] = ()


@attrs.frozen
class Engines:
    """One engine per concurrent reader: an engine changes while it reads, and takes a while to load."""

    _idle: dict[int, list[Any]] = attrs.field(factory=dict)

    @contextmanager
    def engine(self, side: int) -> Iterator[Any]:
        """An engine that nobody else uses, for images whose shorter side is `side` pixels."""
        idle = self._idle.setdefault(min(side, DETECTION_SIDE), [])
        try:
            own = idle.pop()
        except IndexError:
            own = _load(min(side, DETECTION_SIDE))
        yield own
        idle.append(own)  # not after an error: what the engine remembers may be wrong

    def read(self, image: np.ndarray, *, characters: bool) -> tuple[Line, ...]:
        """The lines of an image, from top to bottom.

        Args:
            image: [H, W, 3] uint8 RGB.
            characters: whether to say where each character is.
        """
        with self.engine(min(image.shape[:2])) as engine:
            # RapidOCR takes arrays for BGR, and remembers what a call told it: say everything in every call.
            bgr = np.ascontiguousarray(image[:, :, ::-1])
            result = engine(bgr, return_word_box=characters, return_single_char_box=characters)
        if result.txts is None or result.boxes is None:
            return ()
        placed = list(result.word_results) if characters else []
        lines = []
        for text, confidence, corners in zip(result.txts, result.scores, result.boxes, strict=True):
            quad = _quad(corners)
            letters = _characters(text, quad, placed) if characters else ()
            lines.append(Line(text=text, confidence=float(confidence), quad=quad, characters=letters))
        return tuple(lines)

    def clear(self) -> None:
        """Forget the engines that nobody uses."""
        self._idle.clear()


def _load(side: int) -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.use_cls": False,  # upside-down writing is not what the prompt asked for
            "Global.text_score": 0.0,  # keep every line, as Flow-GRPO does
            "Global.log_level": "error",
            # Without these, ONNX Runtime starts a thread per core of the host and fails on large machines.
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Det.limit_side_len": side,
        }
    )


def _quad(corners: Any) -> Quad:
    return tuple((float(x), float(y)) for x, y in corners)


def _characters(text: str, quad: Quad, placed: list[Any]) -> tuple[tuple[str, Quad], ...]:
    """Where each character of a line is: as RapidOCR says, else in equal parts along the line.

    Args:
        text, quad: of the line.
        placed: RapidOCR's lines of (character, confidence, corners) that are left; lines without any are
            missing.
    """
    letters = "".join(text.split())
    if placed and isinstance(placed[0], list | tuple):
        entries = [entry for entry in placed[0] if isinstance(entry, list | tuple) and len(entry) == 3]
        if "".join(str(entry[0]) for entry in entries) == letters:
            placed.pop(0)
            return tuple((letter, _quad(entry[2])) for letter, entry in zip(letters, entries, strict=True))
    top_left, top_right, bottom_right, bottom_left = quad
    placed_evenly = []
    for i, letter in enumerate(letters):
        start, end = i / len(letters), (i + 1) / len(letters)
        upper = _between(top_left, top_right, start), _between(top_left, top_right, end)
        lower = _between(bottom_left, bottom_right, end), _between(bottom_left, bottom_right, start)
        placed_evenly.append((letter, (*upper, *lower)))
    return tuple(placed_evenly)


def _between(start: Point, end: Point, part: float) -> Point:
    return start[0] + (end[0] - start[0]) * part, start[1] + (end[1] - start[1]) * part


@cache
def engine_fingerprint() -> dict[str, Any]:
    """Versions of the packages and SHA-256 of the models that they ship."""
    import rapidocr

    folder = Path(rapidocr.__file__).parent / "models"
    files = sorted({path for pattern in MODELS for path in folder.glob(pattern)})
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"rapidocr": version("rapidocr"), "onnxruntime": version("onnxruntime"), "models": hashes}
