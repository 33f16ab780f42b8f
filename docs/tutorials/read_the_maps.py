# %% [markdown]
# # Read the maps
#
# STAR's credit comes from the attention between words and places. Before a long run on a new model, look at which block
# and which direction finds what the words name, at which step, and what the weights become.

# %%
import matplotlib.pyplot as plt
import torch

from rlt2i import load_recipe
from rlt2i.evaluation.draw import Draw
from rlt2i.evaluation.inspection import load_policy
from rlt2i.evaluation.localisation import measure_localisation
from rlt2i.functional.allocation import attention_allocation
from rlt2i.tasks.base import as_prompts

recipe = load_recipe("star-cells")
policy = load_policy(recipe)
prompts = as_prompts(recipe.task.eval_prompts(24), group_size=1)
print(sorted(policy.offers))

# %% [markdown]
# Every block in both directions against the cells that the reward judged: the area under the ROC curve at the first, the
# middle and the last step. .5 is chance. `blocks: auto` in a recipe makes this measurement before training and writes its
# choice into the run's recipe.

# %%
found = measure_localisation(
    policy, recipe.reward, prompts, num_steps=10, image_size=recipe.train.image_size, rollout_batch_size=24, seed=0
)
print(found.table())
print("best:", found.best())

# %% [markdown]
# From the attention to a weight: mixed with uniform credit, sharpened, blurred, bounded, and brought to mean one. The same
# pure function serves every backbone.

# %%
direction, block = found.best()
name = f"attention/{direction}/{block}"
draw = Draw(seed=3, num_steps=10, image_size=recipe.train.image_size, rollout_batch_size=8)
with torch.no_grad():
    trajectory = draw.trajectory(policy, prompts.take(range(3)), captures=frozenset({name}))
    images = draw.decoded(policy, trajectory.clean_latents)
captured = trajectory.captures[name]  # [B, T, core phrases, h, w]
weights = {
    "mix 0.5": attention_allocation(captured, mix=0.5, doubt=0.0),
    "mix 1": attention_allocation(captured, mix=1.0, floor=0.02, ceiling=8.0, doubt=0.0),
    "mix 1, doubt 0.5": attention_allocation(captured, mix=1.0, floor=0.02, ceiling=8.0, doubt=0.5),
}
figure, axes = plt.subplots(3, 1 + len(weights), figsize=(8, 6))
for row in range(3):
    axes[row, 0].imshow(images[row].permute(1, 2, 0), interpolation="nearest")
    axes[row, 0].set_title(prompts.texts[row], fontsize=7)
    for column, (label, weight) in enumerate(weights.items(), start=1):
        axes[row, column].imshow(weight[row, 0], vmin=0, vmax=4, cmap="magma")
        axes[row, column].set_title(f"{label}, step 1", fontsize=7)
for axis in axes.flat:
    axis.axis("off")
plt.show()

# %% [markdown]
# How much room a map leaves: its effective support is the share of places that carry the credit (1 is uniform). For a
# reward that reads only a part `a` of the image, the gain in signal-to-noise that a perfect map allows is 1/a, and a map
# of support s can gain at most 1/s. Training logs it as `map/support`.

# %%
from rlt2i.functional.maps import effective_support

for label, weight in weights.items():
    print(f"{label:<17} support {float(effective_support(weight).mean()):.2f}")

# %% [markdown]
# The pictures of a run: `rlt2i maps RUN --prompt "a red circle above left"` draws the weight of every step over what the
# policy believed the image to be. Maps are weak where words name no place: counts, relations, objects that are not there
# ([what was measured](../benchmark.md)).
