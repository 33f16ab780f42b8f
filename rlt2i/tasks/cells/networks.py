"""The pipeline of the cells world: where it is and what it must be able to read and draw."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rlt2i.tasks.cells.vocabulary import CANVAS, WORDS
from rlt2i.tasks.embedded.networks import World

PIPELINE_DIR: Final = Path(__file__).parent / "pipeline"
"""Where the package ships the trained pipeline of this world; it speaks of both grids."""

WORLD: Final = World(words=WORDS, max_tokens=13, canvas=CANVAS)
"""The longest prompt has eleven words: two phrases of five, and "and"."""
