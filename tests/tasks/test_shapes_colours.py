"""The judge of colours: by hand, on rendered scenes, its gradient, and how it compares with the verifier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlt2i.interfaces import RewardBatch, to_uint8
from rlt2i.tasks.shapes.colours import ShapesColours, area_of, closeness, colour_areas, colour_score
from rlt2i.tasks.shapes.prompts import ShapesPrompt, all_prompts
from rlt2i.tasks.shapes.render import PALETTE_RGB, Scenes, render, sample_scenes
from rlt2i.tasks.shapes.verifier import verify
from rlt2i.tasks.shapes.vocabulary import COLOURS

PROMPTS = all_prompts()


def prompt(text: str) -> ShapesPrompt:
    return next(p for p in PROMPTS if p.text == text)


def score(images: Tensor, prompts: list[ShapesPrompt]) -> Tensor:
    return ShapesColours().score_tensor(images, [p.text for p in prompts], [p.metadata() for p in prompts])


def scenes(prompts: list[ShapesPrompt], seed: int = 0) -> tuple[Scenes, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    layout = sample_scenes(prompts, draw)
    return layout, render(layout, draw)


def test_areas_by_hand():
    # 40 red pixels, 7 blue ones and a half-blue one, which counts as a half, on grey, which counts as nothing.
    image = torch.full((1, 3, 32, 32), 0.8)
    flat = image.view(3, -1)
    flat[:, :40] = PALETTE_RGB[COLOURS.index("red")][:, None]
    flat[:, 40:47] = PALETTE_RGB[COLOURS.index("blue")][:, None]
    flat[:, 47] = 0.5 * PALETTE_RGB[COLOURS.index("blue")] + 0.4
    found = dict(zip(COLOURS, colour_areas(image)[0].tolist(), strict=True))
    assert found["red"] == pytest.approx(40, abs=0.3)
    assert found["blue"] == pytest.approx(7.5, abs=0.3)
    assert found["green"] + found["yellow"] < 0.3


def test_closeness_by_hand():
    wanted = area_of("circle", 1)
    assert wanted == pytest.approx((torch.pi * 3.6**2, torch.pi * 5**2))
    areas = [0.0, wanted.low / 2, wanted.low, wanted.high, 2 * wanted.high]
    assert [float(closeness(torch.tensor(a), wanted)) for a in areas] == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5])


def test_scores_by_hand():
    red, green, blue, yellow = torch.eye(4)
    one = prompt("a red circle")
    assert float(colour_score(60 * red, one)) == 1.0
    # Half of what is coloured was not asked for.
    assert float(colour_score(60 * red + 60 * green, one)) == 0.5
    assert float(colour_score(60 * blue, one)) == 0.0
    # Any colour will do; only the whole area counts.
    assert float(colour_score(30 * blue + 30 * yellow, prompt("a circle"))) == 1.0
    # One of two colours is there.
    both = prompt("a red circle and a blue square")
    assert float(colour_score(60 * red, both)) == 0.5
    assert float(colour_score(60 * red + 50 * blue, both)) == 1.0


def test_right_scenes_score_one_and_wrong_colours_zero():
    _, images = scenes(list(PROMPTS))
    right = score(images, list(PROMPTS))
    assert right.min() > 0.95
    assert right.mean() > 0.995
    named = [p for p in PROMPTS if p.category == "colors"]
    shown = torch.stack([images[PROMPTS.index(p)] for p in named])
    next_colour = dict(zip(COLOURS, (*COLOURS[1:], COLOURS[0]), strict=True))
    others = [
        next(q for q in named if q.objects == ((p.objects[0][0], next_colour[str(p.objects[0][1])]),)) for p in named
    ]
    assert score(shown, others).max() < 0.02


def test_a_scene_scores_more_the_more_of_it_is_there():
    asked = [prompt("a red circle and a blue square")] * 8
    layout, _ = scenes(asked, seed=3)
    previous = torch.full((8,), -1.0)
    for count in (0, 1, 2):
        shape = layout.shape.clone()
        shape[:, count:] = -1
        partial = Scenes(**{name: getattr(layout, name) for name in Scenes.__annotations__} | {"shape": shape})
        found = score(render(partial, torch.Generator().manual_seed(1)), asked)
        assert (found > previous + 0.3).all()
        previous = found


def test_bytes_score_like_floats_up_to_rounding():
    _, images = scenes(list(PROMPTS), seed=1)
    pale = images.lerp(torch.full_like(images, 0.8), 0.45)
    batch = RewardBatch(
        images=to_uint8(pale), prompts=[p.text for p in PROMPTS], metadata=[p.metadata() for p in PROMPTS]
    )
    output = ShapesColours().score(batch)
    assert output.valid.all()
    assert ((output.scores >= 0) & (output.scores <= 1)).all()
    torch.testing.assert_close(output.scores, score(pale, list(PROMPTS)), atol=0.02, rtol=0)


def test_a_step_along_the_gradient_makes_a_faint_scene_better():
    asked = [p for p in PROMPTS if p.category in ("colors", "color_attr")]
    _, images = scenes(asked, seed=2)
    faint = images.lerp(images.mean(dim=1, keepdim=True), 0.5).requires_grad_()
    before = score(faint, asked)
    (gradient,) = torch.autograd.grad(before.sum(), faint)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    after = score((faint + 0.5 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1), asked)
    assert (after > before).all()


def test_finite_differences():
    asked = [prompt("a red circle")]
    _, images = scenes(asked, seed=4)
    faint = images.lerp(images.mean(dim=1, keepdim=True), 0.5).double().requires_grad_()
    (gradient,) = torch.autograd.grad(score(faint, asked).sum(), faint)
    direction = torch.randn(faint.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (score(faint + sign * 1e-5 * direction, asked) for sign in (1, -1))
    assert float((ahead - behind) / 2e-5) == pytest.approx(float((gradient * direction).sum()), rel=1e-3)


def test_images_of_another_world_are_refused():
    with pytest.raises(ValueError, match="32 x 32 canvas"):
        score(torch.zeros(1, 3, 64, 64), [PROMPTS[0]])


def test_it_agrees_with_the_verifier_on_what_the_base_draws():
    from rlt2i.engine import decode
    from rlt2i.policies.sd3 import SD3
    from rlt2i.samplers.chunked import rollout
    from rlt2i.samplers.ode import ODE
    from rlt2i.tasks.base import as_prompts
    from rlt2i.tasks.shapes.task import ShapesTask

    drawn = ShapesTask().eval_prompts(96)
    policy = SD3().load()
    trajectory = rollout(
        policy, ODE(num_steps=10), as_prompts(drawn, group_size=1), seed=0, image_size=32, rollout_batch_size=48
    )
    images = decode(policy, trajectory.clean_latents, rollout_batch_size=48)
    asked = [ShapesPrompt.from_metadata(p.metadata) for p in drawn]
    colours = score(images.float() / 255, asked)
    partial = verify(images.permute(0, 2, 3, 1), asked).partial
    correlation = rank_correlation(colours, partial)
    print(f"rank correlation of ShapesColours with the verifier's partial score: {correlation:.2f}")
    assert correlation > 0.2


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, with average ranks for ties."""

    def ranks(values: Tensor) -> Tensor:
        ordered = values.sort().values
        return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double()

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])
