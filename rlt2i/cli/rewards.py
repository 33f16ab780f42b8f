"""Commands of rewards."""

from __future__ import annotations

import argparse


def serve_reward(options: argparse.Namespace) -> int:
    """`rlt2i serve-reward`."""
    from rlt2i.serve.server import main

    return main([options.name, *options.rest])


def reward(options: argparse.Namespace) -> int:
    """`rlt2i reward test` and `rlt2i reward convert`."""
    if options.action == "convert":
        from rlt2i.rewards.releases import main as convert

        convert([options.name, *options.rest])
        return 0
    from rlt2i.recipes.parts import PARTS
    from rlt2i.rewards.selftest import main as test_reward

    return test_reward([options.name, *options.rest], parts=PARTS)
