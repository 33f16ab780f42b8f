"""The weights of a saved pipeline."""

from __future__ import annotations

from pathlib import Path


def weights(directory: Path) -> dict[str, bytes]:
    """Every weight file of a pipeline directory, as bytes."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.safetensors")}
    assert len(files) == 4
    return files
