"""The README's figures and sentence, from a run of the demo.

python -m benchmarks.demo_figures runs/star-nft-shapes-...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open

from rlt2i.report.charts import Series, line_chart
from rlt2i.report.maps import draw_maps
from rlt2i.runs.metrics import read_metrics


def curve(run: Path) -> str:
    """Held-out strict score with its interval, and the reward in training."""
    held_out, trained = read_metrics(run, "eval"), read_metrics(run, "train")
    steps = [r["step"] for r in held_out]
    strict = Series(
        label="held-out strict (95 % interval)",
        x=steps,
        y=[r["eval/strict"] for r in held_out],
        low=[r["eval/strict_low"] for r in held_out],
        high=[r["eval/strict_high"] for r in held_out],
    )
    reward = Series(
        label="reward in training", x=[r["step"] for r in trained], y=[r["reward/mean"] for r in trained], faint=False
    )
    return line_chart([strict, reward], title="make demo", y_label="score", standalone=True)


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


def sentence(run: Path) -> str:
    """What the run came to."""
    first, last = read_metrics(run, "eval")[0], read_metrics(run, "eval")[-1]
    seconds = sum(sum(v for k, v in r.items() if k.startswith("seconds/")) for r in read_metrics(run, "train"))
    return (
        f"held-out strict {first['eval/strict']:.3f} -> {last['eval/strict']:.3f} in {last['step']} iterations: paired "
        "gain "
        f"{last['eval/strict_gain']:+.3f} [{last['eval/strict_gain_low']:+.3f}, "
        f"{last['eval/strict_gain_high']:+.3f}] on "
        f"{last['eval/images']:.0f} images; {last['eval/objects']:.2f} objects per image "
        f"(asked for: {last['eval/objects_asked']:.2f}); {seconds + first['seconds/eval']:.0f} s of sampling and "
        "learning"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="figures of the README from a run")
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/assets"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "demo_curve.svg").write_text(curve(options.run))
    maps(options.run, options.out / "demo_maps.png")
    print(sentence(options.run))


if __name__ == "__main__":
    main()
