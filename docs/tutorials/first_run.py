# %% [markdown]
# # First run
#
# A run of four iterations on the embedded pipeline: what a recipe is, what a run leaves, and how to use the result. No
# GPU, no download. This page is a Python file with cells; it ran when the site was built.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from rlt2i import load_recipe, train, write_report

# %% [markdown]
# A recipe is a composition of five parts (policy, sampler, reward, credit, objective), a task and the training settings.
# `rlt2i list` shows all that are shipped. Any field can be overridden; here everything is small, so that it takes seconds.

# %%
recipe = load_recipe(
    "star-nft-cells",
    [
        "train.iterations=4",
        "train.prompts_per_iteration=4",
        "train.group_size=8",
        "train.eval_every=2",
        "train.eval_prompts=16",
        "train.eval_steps=10",
        "train.checkpoint_every=2",
    ],
)
for part in (recipe.policy, recipe.sampler, recipe.reward, recipe.objective):
    print(type(part).__name__)
for allocation in recipe.credit.allocations:
    print("credit:", allocation)

# %% [markdown]
# `train` is what `rlt2i train` calls. The directory belongs to the run: killed at any moment, it goes on with
# `train(recipe, folder, resume="latest")`, bit for bit on a CPU.

# %%
folder = Path(tempfile.mkdtemp()) / "run"
train(recipe, folder)
print(sorted(path.name for path in folder.iterdir()))

# %% [markdown]
# Metrics are lines of JSON. Four iterations of 32 images show nothing about learning; a real run takes the recipe's own
# settings (`rlt2i train star-nft-cells --report`).

# %%
from rlt2i.runs.metrics import read_metrics

metrics = read_metrics(folder / "metrics.jsonl")
for line in metrics:
    print(f"iteration {line['iteration']}: reward {line['reward/mean']:.3f}, gradient norm {line['grad_norm']:.3f}")

# %% [markdown]
# Held-out images of the base and of the last iteration, drawn from the same noise:

# %%
from rlt2i.runs.artifacts import evaluation_file, read_evaluation

base, last = (read_evaluation(evaluation_file(folder, iteration)) for iteration in (0, 4))
figure, axes = plt.subplots(2, 6, figsize=(9, 3.4))
for column in range(6):
    for row, evaluation in enumerate((base, last)):
        axes[row, column].imshow(evaluation.tensors["images"][column].permute(1, 2, 0), interpolation="nearest")
        axes[row, column].axis("off")
    axes[0, column].set_title(base.prompts[column], fontsize=7, wrap=True)
figure.suptitle("above: base, below: after 4 iterations")
plt.show()

# %% [markdown]
# The report is one HTML file: curves, what went wrong in images, galleries, the recipe, how to go on.

# %%
report = write_report(folder)
print(report.name, round(report.stat().st_size / 1e6, 1), "MB")

# %% [markdown]
# Use the result from Python: the policy with its trained weights, any prompt, any seed.

# %%
from rlt2i.evaluation.draw import Draw
from rlt2i.evaluation.inspection import load_policy
from rlt2i.types import Prompts

policy = load_policy(recipe, run_dir=folder)
draw = Draw(seed=7, num_steps=10, image_size=recipe.train.image_size, rollout_batch_size=8)
with torch.no_grad():
    images = draw.images(policy, Prompts.of([base.prompts[0]], group_size=6))
figure, axes = plt.subplots(1, 6, figsize=(9, 1.7))
for axis, image in zip(axes, images, strict=True):
    axis.imshow(image.permute(1, 2, 0), interpolation="nearest")
    axis.axis("off")
figure.suptitle(base.prompts[0])
plt.show()
