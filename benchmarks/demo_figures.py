"""The README's figures of `make demo`, and the maps of a single run.

python -m benchmarks.demo_figures bench/cells-demo                  # demo_curves, _differences.svg; _images.png
python -m benchmarks.demo_figures --maps runs/star-nft-shapes-...   # demo_maps.png
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rlt2i.bench.folder import BenchFolder
from rlt2i.bench.measures import judged_places
from rlt2i.bench.pictures import outlined
from rlt2i.evaluation.heldout import Evaluation
from rlt2i.report.charts import figure, text
from rlt2i.report.maps import draw_maps
from rlt2i.report.pictures import FAILURE, SUCCESS, paste, rendered, rgb
from rlt2i.runs.artifacts import evaluation_file

PROMPTS = 8
_SIDE, _FRAME, _GAP, _NAMES, _HEAD = 96, 3, 12, 92, 44


def images(folder: BenchFolder, out: Path) -> None:
    """The first held-out prompts, a column each: base and arms from the same noise, framed by their verdict."""
    plan = folder.plan()
    recipe = folder.recipe(plan.reference, plan.first_seed)
    prompts, last = recipe.task.eval_prompts(recipe.train.eval_prompts), recipe.train.iterations
    rows = {"base": Evaluation.read(folder.base, prompts)}
    for arm in plan.arms:
        file = evaluation_file(folder.trial(arm, plan.first_seed) / "run", last)
        if file.is_file():
            rows[plan.label(arm)] = Evaluation.read(file, prompts)
    inside = judged_places(rows["base"], recipe.reward) > 0.5
    step = _SIDE + 2 * _FRAME + _GAP
    with figure(_NAMES + PROMPTS * step, _HEAD + len(rows) * step) as canvas:
        for column in range(PROMPTS):
            words = prompts[column].text.removeprefix("a ").split()
            label = f"{' '.join(words[:2])}\n{' '.join(words[2:])}"
            text(canvas, _NAMES + column * step + step // 2 - 6, 18, label, ha="center", va="center", fontsize=10.5)
        for row, (name, evaluation) in enumerate(rows.items()):
            text(canvas, 4, _HEAD + row * step + step // 2, name.replace(" ", "\n"), va="center", fontsize=12)
            right = evaluation.values(plan.metric) >= 0.999
            for column in range(PROMPTS):
                tile = _framed(outlined(evaluation.images[column], inside[column]), bool(right[column]))
                paste(canvas, tile, _NAMES + column * step, _HEAD + row * step)
        rendered(canvas).save(out, optimize=True)


def _framed(image: Tensor, right: bool) -> Tensor:
    """[3, H, W] with a green or a red border."""
    height, width = image.shape[1:]
    framed = torch.tensor(rgb(SUCCESS if right else FAILURE), dtype=torch.uint8)[:, None, None]
    framed = framed.repeat(1, height + 2 * _FRAME, width + 2 * _FRAME)
    framed[:, _FRAME:-_FRAME, _FRAME:-_FRAME] = image
    return framed


def maps(run: Path, out: Path) -> None:
    """The maps of the best rollout of the last batch that kept them."""
    newest = max((run / "maps").glob("step-*.safetensors"))
    with safe_open(newest, framework="pt") as file:
        info = json.loads(file.metadata()["info"])
        weights, clean, sigmas = (file.get_tensor(n) for n in ("weights", "clean", "sigmas"))
    crowded = [len(core) for core in info["core"]]
    good = [i for i, score in enumerate(info["scores"]) if score >= 0.999] or [0]
    chosen = max(good, key=lambda i: crowded[i])
    draw_maps(clean[chosen], weights[chosen], sigmas.tolist(), info["prompts"][chosen]).save(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="figures of the README")
    parser.add_argument("folder", type=Path, nargs="?", help="of `rlt2i bench cells-demo`")
    parser.add_argument("--maps", type=Path, metavar="RUN", help="a run directory whose maps to draw")
    parser.add_argument("--out", type=Path, default=Path("docs/assets"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.folder:
        for name in ("curves", "differences"):
            shutil.copyfile(options.folder / f"{name}.svg", options.out / f"demo_{name}.svg")
        images(BenchFolder(path=options.folder), options.out / "demo_images.png")
        print((options.folder / "sentence.txt").read_text(encoding="utf-8"))
    if options.maps:
        maps(options.maps, options.out / "demo_maps.png")


if __name__ == "__main__":
    main()
