"""The command by which a person votes."""

from __future__ import annotations

import argparse

from rlt2i.cli.inspecting import loaded
from rlt2i.inputs.arguments import check_folder


def vote(options: argparse.Namespace) -> None:
    """`rlt2i vote`: a pair file of a person's votes."""
    check_folder(options.folder, str(options.folder))
    from rlt2i.evaluation.inspection import find_weights, load_policy
    from rlt2i.evaluation.pairs import PAIRS
    from rlt2i.voting.command import Ballot
    from rlt2i.voting.command import vote as hold_vote

    recipe, trained = loaded(options)
    source = find_weights(**trained)
    count = hold_vote(
        recipe,
        lambda: load_policy(recipe, **trained),
        options.folder,
        Ballot(
            prompts=options.prompts,
            texts=tuple(options.prompt),
            images=options.images,
            seed=options.seed,
            num_steps=options.steps or recipe.train.eval_steps,
            weights="base" if source is None else f"{source[1]} of {source[0]}",
        ),
        port=options.port,
        say=lambda line: print(line, flush=True),
    )
    print(f"{options.folder / PAIRS}: {count} pairs")
