# %% [markdown]
# # Your own credit
#
# Credit lives in [rollout, step, height, width] and is mask x weight x advantage. We write an allocation in space, look at
# it, check the law that every allocation obeys, and ask the question that a claim about maps must answer: does it find the
# place that was judged, and does its shuffled copy not?

# %%
import attrs
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import interpolate

from rlt2i import (
    SD3,
    SDE,
    Algorithm,
    Allocation,
    CellsReward,
    CellsTask,
    ClippedSurrogate,
    GroupRelative,
    Needs,
    Product,
    Shuffled,
    TextAttention,
)
from rlt2i.engine import Engine
from rlt2i.evaluation.localisation import area_under_roc
from rlt2i.samplers.rollout import CLEAN_PREDICTIONS
from rlt2i.tasks.base import as_prompts
from rlt2i.tasks.cells.prompts import CellsPrompt

# %% [markdown]
# The idea: where the policy changes its mind most between two steps, something is being decided. The clean prediction of
# every step is one of the things that a rollout can record; asking for it is all that `needs` does.


# %%
@attrs.frozen(kw_only=True)
class ChangeOfMind(Allocation):
    """More credit where the clean prediction moves most from one step to the next."""

    mix: float = 0.5

    @property
    def needs(self):
        return Needs(captures={CLEAN_PREDICTIONS})

    def weight(self, context):
        clean = context.trajectory.captures[CLEAN_PREDICTIONS]  # [B, T, C, H, W]
        moved = (clean[:, 1:] - clean[:, :-1]).square().mean(dim=2)
        moved = torch.cat([moved, moved[:, -1:]], dim=1)  # the last step has no next one
        places = interpolate(moved, size=context.token_grid, mode="area")
        mean = places.mean(dim=(2, 3), keepdim=True).clamp_min(1e-12)
        return 1 - self.mix + self.mix * places / mean


# %% [markdown]
# One batch from the embedded cells world: only the cell that the prompt names is judged, so we know where credit belongs.


# %%
def collect(allocation):
    algorithm = Algorithm(
        policy=SD3(path="embedded:cells"),
        sampler=SDE(num_steps=10, window=(0, 3)),
        reward=CellsReward(),
        credit=Product(advantage=GroupRelative(), allocations=(allocation,)),
        objective=ClippedSurrogate(clip_range=2e-3, ratio="location"),
    ).load()
    engine = Engine(algorithm=algorithm, image_size=32, rollout_batch_size=48, seed=0, share_initial_noise=True)
    prompts = as_prompts(CellsTask().train_prompts(seed=0, start=0, count=6), group_size=8, start=0)
    return engine.collect(prompts, iteration=0).experience, prompts


maps = {
    "change of mind": ChangeOfMind(mix=1.0),
    "shuffled": Shuffled(allocation=ChangeOfMind(mix=1.0)),
    "STAR": TextAttention(direction="image_to_text", blocks="2", mix=1.0, blur=0.5, floor=0.02, ceiling=8.0, doubt=0),
}
collected = {name: collect(allocation) for name, allocation in maps.items()}

# %% [markdown]
# The law: a weight has mean one over the axes that it resolves, so a map moves emphasis and not the learning rate.

# %%
for name, (experience, _) in collected.items():
    weight = experience.credit.weight
    assert weight.min() >= 0
    torch.testing.assert_close(weight.mean(dim=(2, 3)), torch.ones(weight.shape[:2]), atol=1e-4, rtol=0)
    print(f"{name:<15} {list(weight.shape)}")

# %% [markdown]
# Does it find the judged cell? The area under the ROC curve is the chance that a judged place gets more weight than
# another one: .5 for a map that knows nothing.

# %%
figure, axes = plt.subplots(1, 3, figsize=(7, 2.6))
for axis, (name, (experience, prompts)) in zip(axes, collected.items(), strict=True):
    weight = experience.credit.weight
    named = [CellsPrompt.from_metadata(meta).named[0].cell for meta in prompts.per_rollout(prompts.metadata)]
    cells = torch.tensor(named)
    side = weight.shape[-1] // 2
    rows, columns = torch.arange(2 * side)[:, None] // side, torch.arange(2 * side)[None] // side
    inside = (rows * 2 + columns)[None] == cells[:, None, None]
    auc = [float(area_under_roc(weight[:, t].flatten(1), inside.flatten(1)).mean()) for t in range(3)]
    print(f"{name:<15} AUC at the first three steps: {', '.join(f'{value:.2f}' for value in auc)}")
    axis.imshow(weight[0, 0], cmap="magma")
    axis.set_title(f"{name}, AUC {auc[0]:.2f}", fontsize=8)
    axis.axis("off")
figure.suptitle(prompts.texts[0])
plt.show()

# %% [markdown]
# Whether a map *helps* is another question, with paired seeds and controls: `rlt2i bench` trains arms that you name in a
# plan ([the credit benchmark](../benchmark.md)). In a recipe: `allocations: [{type: "my_module:ChangeOfMind", mix: 0.7}]`.
