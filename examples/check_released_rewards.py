"""Check every model reward against its released weights: download, verify, convert, score, compare or record.

    python examples/check_released_rewards.py            # all of them: about 45 GB, 35 of them for HPSv3
    python examples/check_released_rewards.py PickScore  # one

Needs the network. What is not recorded yet is written to expectations/<reward>.json; put the file into
rlt2i/rewards/expectations/, and say in docs/rewards.md when and with which versions it was made.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlt2i.recipes import PARTS
from rlt2i.rewards import releases
from rlt2i.rewards.released import FOLDER
from rlt2i.rewards.selftest import main as test_reward
from rlt2i.rewards.weights import weights_home

NEEDS = {
    "PickScore": (),
    "CLIPScore": (),
    "HPSv2": ("hpsv2.1",),
    "HPSv3": ("hpsv3",),
    "Aesthetic": ("aesthetic_sac_logos_ava1_l14",),
    "ImageReward": ("imagereward-v1.0",),
    "GenEvalReward": ("mask2former_swin-s_mmdet",),
}
"""Reward -> weights to convert first."""


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("names", nargs="*", metavar="REWARD", help=f"of {', '.join(NEEDS)}; default: all")
    words.add_argument("--out", type=Path, default=Path("expectations"), help="folder of new expectation files")
    options = words.parse_args()
    if unknown := sorted(set(options.names) - set(NEEDS)):
        words.error(f"unknown: {', '.join(unknown)}")
    wrong = []
    for name in options.names or NEEDS:
        print(f"--- {name}")
        for weights in NEEDS[name]:
            if not (weights_home() / weights).exists():
                releases.main([weights])
        new = [] if (FOLDER / f"{name}.json").is_file() else ["--record", str(options.out / f"{name}.json")]
        # The released weights must also prefer the right picture.
        if test_reward([name, "--released", *new], parts=PARTS) or test_reward([name], parts=PARTS):
            wrong.append(name)
    print(f"wrong: {', '.join(wrong)}" if wrong else "all as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
