"""A process that evaluates: python -m tests.helpers.suite_draw FOLDER [shard] [images per chunk] [dies after]."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rlt2i.evaluation.suites.evaluate import evaluate_suite
from rlt2i.evaluation.suites.folder import Folder, Shard
from tests.helpers.suite_parts import suite
from tests.helpers.toy_recipe import clipped


def main(out: str, shard: str = "", chunk: str = "8", dies_after: str = "") -> None:
    if dies_after:
        write, written = Folder.write_image, []

        def write_and_die(folder: Folder, name: str, image: object) -> str:
            if len(written) == int(dies_after):
                os.kill(os.getpid(), 9)
            written.append(name)
            return write(folder, name, image)  # type: ignore[arg-type]

        Folder.write_image = write_and_die  # type: ignore[method-assign, assignment]
    evaluate_suite(
        clipped(rollout_batch_size=int(chunk)), suite(), out=Path(out), shard=Shard.parse(shard) if shard else None
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
