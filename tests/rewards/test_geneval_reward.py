"""GenEval as a reward: a painted scene with a detector that sees it, and the whole path on tiny random models."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.interfaces import RewardBatch
from rlt2i.rewards import geneval, geneval_colour
from rlt2i.rewards.geneval import GenEvalReward
from rlt2i.rewards.geneval_rules import CLASSES, COLOURS
from rlt2i.rewards.mask2former import Instances
from rlt2i.tasks.geneval.prompts import colour_attribution, counting, position
from tests.helpers.tiny_models import save_clip, save_detector

BIG = 100
"""Logit of something certain."""


class PaintedScenes(torch.nn.Module):
    """A detector for rectangles: (class, x1, y1, x2, y2) in 64 x 64 pixels, for each image of the batch in turn."""

    def __init__(self, *scenes: list[tuple[str, int, int, int, int]]):
        super().__init__()
        self.scenes = list(scenes)

    def forward(self, pixel_values):
        batch, self.scenes = self.scenes[: len(pixel_values)], self.scenes[len(pixel_values) :]
        classes = torch.zeros(len(batch), 4, 81)
        classes[..., 80] = BIG
        masks = torch.full((len(batch), 4, 64, 64), -BIG, dtype=torch.float32)
        for row, scene in enumerate(batch):
            for query, (name, x1, y1, x2, y2) in enumerate(scene):
                classes[row, query, 80] = 0
                classes[row, query, CLASSES.index(name)] = BIG
                masks[row, query, y1:y2, x1:x2] = BIG
        return classes, masks


def painted(monkeypatch, *scenes, colours=()):
    """Images whose content the reward will see as `scenes`; the colours of objects come in the order asked for."""
    answers = list(colours)
    monkeypatch.setattr(geneval, "load_detector", lambda path, device: PaintedScenes(*scenes))
    monkeypatch.setattr(geneval, "load_clip", lambda *args: None)
    monkeypatch.setattr(geneval, "classify_colours", lambda clip, cutouts: [answers.pop(0) for _ in cutouts])


def batch_of(*prompts, side=64):
    return RewardBatch(
        images=torch.zeros(len(prompts), 3, side, side, dtype=torch.uint8),
        prompts=[p.text for p in prompts],
        metadata=[p.metadata for p in prompts],
    )


def test_painted_scenes_are_judged(monkeypatch: pytest.MonkeyPatch):
    cow, dog = ("cow", 0, 0, 16, 16), ("dog", 40, 0, 60, 16)
    prompts = (position("cow", "left of", "dog"), position("dog", "left of", "cow"), counting("cow", 2))
    painted(monkeypatch, [cow, dog], [cow, dog], [cow, dog])
    output = GenEvalReward().score(batch_of(*prompts), frozenset({"regions", "maps"}))
    torch.testing.assert_close(output.scores, torch.tensor([1.0, 2 / 3, 0.5]))
    assert output.components["official"].tolist() == [1.0, 0.0, 0.0]
    assert output.components["objects"].tolist() == [2.0, 2.0, 1.0]
    assert output.valid.all()
    assert output.info is not None
    assert output.info[1] == {"wrong": ["expected dog left of target"]}
    assert output.regions is not None
    assert {(r.label, r.credit) for r in output.regions[1]} == {("cow, right", 1.0), ("dog, wrong place", -1.0)}
    (cow_region,) = output.regions[2]
    assert cow_region.box == (0.0, 0.0, 0.25, 0.25)
    assert output.maps is not None
    # The map marks both objects of the first image, and the cow alone where the dog was not asked for.
    assert output.maps.sum(dim=(1, 2)).tolist() == [16 * 16 + 20 * 16, 16 * 16 + 20 * 16, 16 * 16]


def test_colours_reach_the_object_they_belong_to(monkeypatch: pytest.MonkeyPatch):
    prompt = colour_attribution(("cow", "red"), ("dog", "blue"))
    scene = [("cow", 0, 0, 16, 16), ("dog", 40, 0, 60, 16)]
    painted(monkeypatch, scene, scene, colours=["red", "blue", "red", "green"])
    output = GenEvalReward(rule="strict").score(batch_of(prompt, prompt), frozenset({"regions"}))
    assert output.scores.tolist() == [1.0, 0.0]
    assert output.components["dense"].tolist() == [1.0, 0.75]
    assert output.maps is None
    assert output.regions is not None
    assert [r.label for r in output.regions[1]] == ["red cow, right", "green dog, wrong colour"]


def test_a_detector_without_numbers_is_invalid_and_never_zero(monkeypatch: pytest.MonkeyPatch):
    def broken(path, device):
        return lambda pixel_values: (torch.full((1, 4, 81), torch.nan), torch.zeros(1, 4, 8, 8))

    monkeypatch.setattr(geneval, "load_detector", broken)
    output = GenEvalReward().score(batch_of(counting("cow", 2)), frozenset({"regions", "maps"}))
    assert output.valid.tolist() == [False]
    assert output.scores.isnan().all()
    assert output.info == [{"error": "the detector returned nan or infinity"}]


def test_an_empty_image_scores_zero_and_is_valid(monkeypatch: pytest.MonkeyPatch):
    painted(monkeypatch, [])
    output = GenEvalReward().score(batch_of(counting("cow", 2)), frozenset({"regions", "maps"}))
    assert output.scores.tolist() == [0.0]
    assert output.valid.all()
    assert output.maps is not None
    assert output.maps.sum() == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GenEvalReward:
    root = tmp_path_factory.mktemp("weights")
    detector, clip = save_detector(root / "detector"), save_clip(root / "clip")
    # Random weights are never confident; every object counts.
    return GenEvalReward(detector=str(detector), colour_model=str(clip), threshold=0.0, counting_threshold=0.0)


def test_the_whole_path_on_random_weights(tiny: GenEvalReward, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlt2i.rewards.mask2former.SHORT", 96)  # 800 pixels would take seconds
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8, generator=generator)
    found = tiny.detections(images)[0]
    assert found is not None
    seen = [CLASSES[i] for i in found.labels.unique().tolist()[1:4]]
    prompts = [colour_attribution((seen[0], "red"), (seen[1], "blue")), position(seen[0], "above", seen[2])] * 2
    metadata = [p.metadata for p in prompts]
    batch = RewardBatch(images=images, prompts=[p.text for p in prompts], metadata=metadata)
    want = frozenset({"regions", "maps"})
    output = tiny.score(batch, want)
    assert output.valid.all()
    assert output.components["objects"].sum() > 0
    chunked = attrs.evolve(tiny, rollout_batch_size=3).score(batch, want)
    torch.testing.assert_close(chunked.scores, output.scores)
    order = [2, 3, 0, 1]
    shuffled = tiny.score(attrs.evolve(batch, images=images[order]), want)  # the prompts alternate, so they stay
    torch.testing.assert_close(shuffled.scores, output.scores[order])
    assert output.regions is not None
    assert output.maps is not None
    for regions, marked in zip(output.regions, output.maps, strict=True):
        union = torch.stack([torch.zeros(48, 48, dtype=torch.bool), *(r.mask for r in regions)]).any(0)
        assert torch.equal(marked.bool(), union)
        for region in regions:
            rows, columns = region.mask.any(1).nonzero().flatten(), region.mask.any(0).nonzero().flatten()
            if len(rows):
                edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                assert region.box == tuple(float(edge) / 48 for edge in edges)


def test_the_colour_of_flat_paint_is_read_from_the_mask_alone(tiny: GenEvalReward):
    # What lies outside the mask must not matter, and neither must the other objects of the batch.
    from rlt2i.rewards.clip_family import load_clip

    clip = load_clip(tiny.colour_model, "main", "", "cpu")
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 40, 40), dtype=torch.uint8, generator=generator)
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[8:30, 5:20] = True
    elsewhere = images.clone()
    elsewhere[:, :, ~mask] = 255 - elsewhere[:, :, ~mask]

    def cutouts(pictures):
        return [
            geneval_colour.Cutout(image=image, mask=mask, box=(5.0, 8.0, 20.0, 30.0), name=name)
            for image, name in zip(pictures, ("cow", "dog") * 3, strict=True)
        ]

    with torch.inference_mode():
        colours = geneval_colour.classify_colours(clip, cutouts(images), per_chunk=4)
        assert geneval_colour.classify_colours(clip, cutouts(elsewhere)) == colours
        alone = [geneval_colour.classify_colours(clip, [cutout])[0] for cutout in cutouts(images)]
    assert alone == colours
    assert set(colours) <= set(COLOURS)


def test_detections_of_classes_beyond_coco_are_dropped():
    found = Instances(
        labels=torch.tensor([0, 80]),
        scores=torch.tensor([0.9, 0.9]),
        boxes=torch.zeros(2, 4),
        masks=torch.zeros(2, 2, 2, dtype=torch.bool),
    )
    assert list(geneval.named_detections(found)) == ["person"]


def test_metadata_of_another_task_is_refused():
    batch = RewardBatch(images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8), prompts=["x"], metadata=[{"text": "x"}])
    with pytest.raises(ValueError, match="needs a tag"):
        GenEvalReward().score(batch)
