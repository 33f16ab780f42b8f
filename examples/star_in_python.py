"""A recipe in Python: the same record as a YAML file gives, with every part at hand.

rlt2i train examples/star_in_python.py:star --set train.iterations=4
"""

from rlt2i import (
    SD3,
    SDE,
    ClippedSurrogate,
    FlowSDE,
    GroupRelative,
    Product,
    Recipe,
    ShapesReward,
    ShapesTask,
    Shuffled,
    TextAttention,
    TrainConfig,
)

MAP = TextAttention(direction="text_to_image", blocks="2", mix=0.5, blur=0.5, doubt=0.0)


def star(allocation=MAP, name: str = "star-in-python") -> Recipe:
    """STAR on the embedded model."""
    return Recipe(
        name=name,
        about="STAR, composed in Python",
        policy=SD3(path="embedded:shapes"),
        sampler=SDE(num_steps=10, window=(0, 3), kernel=FlowSDE(noise_level=0.9)),
        reward=ShapesReward(),
        credit=Product(advantage=GroupRelative(), allocations=(allocation,)),
        objective=ClippedSurrogate(clip_range=2e-3, ratio="location"),
        task=ShapesTask(),
        train=TrainConfig(
            iterations=30,
            prompts_per_iteration=12,
            group_size=16,
            rollout_batch_size=96,
            micro_batch_size=96,
            image_size=32,
            share_initial_noise=True,
            learning_rate=1e-4,
            eval_every=10,
            eval_prompts=480,
            eval_steps=20,
        ),
    )


def placebo() -> Recipe:
    """The control: the same maps, with their locations permuted."""
    return star(Shuffled(allocation=MAP), "placebo-in-python")
