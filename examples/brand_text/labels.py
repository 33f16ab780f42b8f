"""Labels drawn by code, with what the two rewards of the example make of them; no model is involved.

python examples/brand_text/labels.py            # prints the scores
python examples/brand_text/labels.py --out F.png
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from rlt2i.interfaces import Reward, RewardBatch
from rlt2i.recipes import load_recipe

HERE = Path(__file__).parent
GREEN, CREAM, CORAL = (31, 77, 58), (244, 235, 217), (228, 87, 46)
NAVY, PINK, LEMON = (20, 30, 110), (250, 160, 220), (250, 240, 60)
TEXT = "FERN & SALT"
Colours = tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]
LABELS: Mapping[str, tuple[str, Colours]] = {
    "right": (TEXT, (GREEN, CREAM, CORAL)),
    "misspelt": ("FERM & SLAT", (GREEN, CREAM, CORAL)),
    "other colours": (TEXT, (NAVY, PINK, LEMON)),
    "both wrong": ("OCEAN TEA", (NAVY, PINK, LEMON)),
    "one flat colour": ("", (CREAM, CREAM, CREAM)),
}
"""Name -> text, and colours of ground, label and band."""


def draw(text: str, colours: Colours, side: int = 512) -> torch.Tensor:
    """[3, side, side] uint8: a ground, a label on it with a text, and a band below."""
    ground, label, band = colours
    image = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((side * 0.1, side * 0.14, side * 0.9, side * 0.86), side * 0.05, fill=label)
    pen.rectangle((side * 0.1, side * 0.62, side * 0.9, side * 0.74), fill=band)
    pen.text((side / 2, side * 0.38), text, font=ImageFont.load_default(side * 0.11), fill=ground, anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def rewards() -> dict[str, Reward]:
    """Those of the recipe, as it sets them."""
    recipe = load_recipe(HERE / "star-brand-sd35.yaml")
    return {name: reward for name, (reward, _) in recipe.reward.rewards.items()}


def scores(judges: Mapping[str, Reward]) -> dict[str, dict[str, float]]:
    """Label -> reward -> score."""
    images = torch.stack([draw(*label) for label in LABELS.values()])
    prompt = f'a label that says "{TEXT}"'
    batch = RewardBatch(images=images, prompts=[prompt] * len(images), metadata=[{"text": TEXT}] * len(images))
    found = {name: judge.score(batch).scores.tolist() for name, judge in judges.items()}
    return {label: {name: values[i] for name, values in found.items()} for i, label in enumerate(LABELS)}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, metavar="FILE", help="also write the labels beside each other as a PNG")
    options = words.parse_args()
    judges = rewards()
    try:
        found = scores(judges)
    finally:
        for judge in judges.values():
            judge.close()
    print(f"{'label':<16}" + "".join(f"{name:>10}" for name in judges))
    for label, values in found.items():
        print(f"{label:<16}" + "".join(f"{value:>10.2f}" for value in values.values()))
    if options.out:
        row = np.concatenate([draw(*label, 192).permute(1, 2, 0).numpy() for label in LABELS.values()], axis=1)
        Image.fromarray(row).save(options.out)


if __name__ == "__main__":
    main()
