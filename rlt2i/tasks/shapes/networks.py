"""The pipeline of the shapes world: where it is and what it must be able to read and draw."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rlt2i.tasks.embedded.networks import World
from rlt2i.tasks.shapes.vocabulary import CANVAS, WORDS

PIPELINE_DIR: Final = Path(__file__).parent / "pipeline"
"""Where the package ships the trained pipeline of this world."""

WORLD: Final = World(words=WORDS, max_tokens=10, canvas=CANVAS)
"""The longest prompt has eight words."""
