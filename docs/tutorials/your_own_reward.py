# %% [markdown]
# # Your own reward
#
# A reward judges finished images. This one likes green: the middle of each image should be greener than its border. We
# test that it tells good from bad, train on it, and let the map that the reward itself draws say
# where credit goes.

# %%
import attrs
import matplotlib.pyplot as plt
import torch

from rlt2i import (
    SD3,
    SDE,
    Algorithm,
    ClippedSurrogate,
    GroupRelative,
    Oracle,
    Product,
    Reward,
    RewardBatch,
    RewardOutput,
    ShapesTask,
)
from rlt2i.engine import Engine
from rlt2i.learner import Learner
from rlt2i.parameter_sets import ParameterSets
from rlt2i.tasks.base import as_prompts

# %% [markdown]
# `images` are uint8 [B, 3, H, W], always. A reward that cannot judge an image says `valid=False` and never 0. What it
# `offers` beyond scores (here a map of where it looks) may be asked for by a credit.


# %%
@attrs.frozen(kw_only=True)
class GreenMiddle(Reward):
    """Greenness of the middle minus that of the border, in [-1, 1]."""

    offers = frozenset({"maps"})
    span = (-1.0, 1.0)

    def score(self, batch, want=frozenset()):
        images = batch.images.float() / 255
        green = images[:, 1] - (images[:, 0] + images[:, 2]) / 2  # [B, H, W], in [-1, 1]
        height, width = green.shape[1:]
        middle = torch.zeros(height, width, dtype=torch.bool)
        middle[height // 4 : -height // 4, width // 4 : -width // 4] = True
        scores = (green[:, middle].mean(dim=1) - green[:, ~middle].mean(dim=1)) / 2
        return RewardOutput.all_valid(
            scores,
            maps=middle.float().expand(len(scores), -1, -1).clone() if "maps" in want else None,
        )


# %% [markdown]
# Does it tell a good picture from a bad one? (`rlt2i reward test my_module:GreenMiddle --good FILE --bad FILE` does this
# with files of yours.)

# %%
good, bad = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
good[1, 8:24, 8:24] = 255
bad[1, :8] = 255
verdict = GreenMiddle().score(RewardBatch(images=torch.stack([good, bad]), prompts=["", ""], metadata=[{}, {}]))
print(verdict.scores)
assert verdict.scores[0] > verdict.scores[1]

# %% [markdown]
# Train on it. The algorithm is Flow-GRPO with one part more: credit where the reward looks. `Algorithm` refuses parts
# that do not fit before any weight is read; try `Oracle()` with a reward that offers no maps.

# %%
algorithm = Algorithm(
    policy=SD3(path="embedded:shapes"),
    sampler=SDE(num_steps=10, window=(0, 3)),
    reward=GreenMiddle(),
    credit=Product(advantage=GroupRelative(), allocations=(Oracle(mix=0.5),)),
    objective=ClippedSurrogate(clip_range=2e-3, ratio="location"),
).load()
parameters = algorithm.policy.trainable_parameters()
optimizer = torch.optim.AdamW(parameters.values(), lr=3e-4)
for group in optimizer.param_groups:
    group["initial_lr"] = group["lr"]
engine = Engine(algorithm=algorithm, image_size=32, rollout_batch_size=64, seed=0, share_initial_noise=True)
learner = Learner(
    policy=algorithm.policy,
    objective=algorithm.objective,
    reward=algorithm.reward,
    optimizer=optimizer,
    sets=ParameterSets(parameters),
    micro_batch_size=64,
)
rewards = []
for iteration in range(4):
    drawn = ShapesTask().train_prompts(seed=0, start=4 * iteration, count=4)
    batch = engine.collect(as_prompts(drawn, group_size=8, start=4 * iteration), iteration=iteration)
    learner.learn(batch.experience)
    rewards.append(float(batch.scores.scores.mean()))
print([round(value, 4) for value in rewards])

# %% [markdown]
# The credit of the last batch: who did better than its group, where the reward looked.

# %%
credit = batch.experience.credit
figure, axes = plt.subplots(1, 4, figsize=(8, 2.2))
for axis, index in zip(axes, credit.advantage[:, 0, 0, 0].argsort(descending=True)[:4].tolist(), strict=True):
    axis.imshow((credit.weight[index, 0] * credit.advantage[index, 0]).numpy(), vmin=-3, vmax=3, cmap="RdBu_r")
    axis.set_title(f"score {batch.scores.scores[index]:.3f}", fontsize=8)
    axis.axis("off")
plt.show()

# %% [markdown]
# In a recipe: `reward: {type: "my_module:GreenMiddle"}`, or `file.py:GreenMiddle` beside the recipe. Slow rewards can run
# on another machine ([remote rewards](../rewards-remote.md)).
