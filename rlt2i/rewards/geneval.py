"""GenEval as a reward: a detector, the rules, and what each object contributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.interfaces import CODE, Reward, RewardBatch, RewardOutput
from rlt2i.rewards import geneval_rules as rules
from rlt2i.rewards.batching import REASON
from rlt2i.rewards.clip_family import load_clip
from rlt2i.rewards.geneval_colour import Cutout, classify_colours
from rlt2i.rewards.geneval_rules import CLASSES, COUNTING_THRESHOLD, RULES, THRESHOLD, Detection, Objects, Rule
from rlt2i.rewards.mask2former import Instances, detect, load_detector
from rlt2i.rewards.sizes import bytes_of, weights_of
from rlt2i.rewards.weights import full_precision, weights_identity
from rlt2i.types import Region

Colours = dict[tuple[str, int], str]
"""(class, row of the detection) -> colour, of one image."""


@attrs.frozen(kw_only=True)
class GenEvalReward(Reward):
    """Are the objects of the prompt there, as many, in their colours and places? Runs where the images are.

    The score is in [0, 1] for "strict" and "official"; at most 1 for "dense", which falls below 0 when an
    image is crowded with the named class. Components are `dense`, `strict`, `official` and `objects`, how
    many of the named classes were kept. A region is an object of a named class: +1 when right, -1 when
    surplus, in the wrong colour or in the wrong place; a missing object has no place. Maps mark the pixels of
    those objects.

    Attributes:
        rule: "dense" (mean over the prompt's parts), "dense_peers" (the same with the defect of the published
            training code that rewards a wrong place), "strict" (everything exactly) or "official" (the
            benchmark).
        detector: converted Mask2Former weights, by folder or name, or a hub name. The official ones are
            mmdetection's, Apache-2.0. Classes go by index, so any COCO-80 model will do.
        colour_model: CLIP ViT-L/14 of OpenAI, in whose terms GenEval reads colours.
        threshold: detections need a higher confidence.
        counting_threshold: the same for counting prompts.
        rollout_batch_size: images per forward pass of the detector; for memory and speed. Scores change by
            rounding only.
    """

    metadata_keys = frozenset({"tag", "include"})
    offers = frozenset({"maps", "regions"})
    span = (-14.0, 1.0)

    rule: Rule = attrs.field(default="dense", validator=validators.in_(RULES))
    detector: str = "mask2former_swin-s_mmdet"
    colour_model: str = "openai/clip-vit-large-patch14"
    threshold: float = attrs.field(default=THRESHOLD, validator=[validators.ge(0.0), validators.lt(1.0)])
    counting_threshold: float = attrs.field(
        default=COUNTING_THRESHOLD, validator=[validators.ge(0.0), validators.lt(1.0)]
    )
    rollout_batch_size: int = attrs.field(default=8, validator=validators.ge(1))

    def networks(self) -> Mapping[str, int | None]:
        return {path: bytes_of(path) for path in weights_of(self)}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        for metadata in batch.metadata:
            rules.check_prompt(metadata)
        with torch.no_grad(), full_precision(batch.images.device):
            instances = self.detections(batch.images)
            objects = [self._objects(f, m) for f, m in zip(instances, batch.metadata, strict=True)]
            colours = self._colours(batch, instances, objects, everything=bool(want))
        return judge(self.rule, batch, instances, objects, colours, want)

    def detections(self, images: Tensor) -> list[Instances | None]:
        """What the detector sees in each of [B, 3, H, W] images; None where it gave no numbers."""
        model = load_detector(self.detector, str(images.device))
        least = min(self.threshold, self.counting_threshold)
        chunks = images.split(self.rollout_batch_size)
        return [instances for chunk in chunks for instances in detect(model, chunk, threshold=least)]

    def _objects(self, instances: Instances | None, metadata: Mapping[str, Any]) -> Objects:
        return rules.keep_confident(
            {} if instances is None else named_detections(instances),
            metadata["tag"],
            threshold=self.threshold,
            counting_threshold=self.counting_threshold,
        )

    def _colours(
        self,
        batch: RewardBatch,
        instances: Sequence[Instances | None],
        objects: Sequence[Objects],
        *,
        everything: bool,
    ) -> list[Colours]:
        """All objects of the batch whose colour matters go through CLIP together."""
        requested = [
            (row, detection, name)
            for row, metadata in enumerate(batch.metadata)
            for detection, name in rules.needing_colour(objects[row], metadata, everything=everything)
        ]
        colours: list[Colours] = [{} for _ in batch.metadata]
        if requested:
            clip = load_clip(self.colour_model, "main", "", str(batch.images.device))
            cutouts = [
                Cutout(image=batch.images[row], mask=_instances(instances[row]).masks[d.index], box=d.box, name=name)
                for row, d, name in requested
            ]
            for (row, d, name), colour in zip(requested, classify_colours(clip, cutouts), strict=True):
                colours[row][name, d.index] = colour
        return colours

    def fingerprint(self) -> dict[str, Any]:
        import transformers

        fields = attrs.asdict(self, recurse=False)
        return {
            "reward": type(self).__name__,
            **{k: repr(v) for k, v in fields.items() if k != "rollout_batch_size"},
            "detector": weights_identity(self.detector),
            "colour_model": weights_identity(self.colour_model),
            "preprocessing": "1333x800 bilinear without antialiasing, RGB; no NMS; 16 per class; float32",
            "transformers": transformers.__version__,
            "code": CODE,
        }

    def close(self) -> None:
        load_detector.cache_clear()
        load_clip.cache_clear()


def named_detections(instances: Instances) -> dict[str, list[Detection]]:
    """The detector's output by class name; classes beyond COCO's 80 are dropped."""
    named: dict[str, list[Detection]] = {}
    rows = zip(instances.labels.tolist(), instances.scores.tolist(), instances.boxes.tolist(), strict=True)
    for index, (label, confidence, box) in enumerate(rows):
        if label < len(CLASSES):
            x1, y1, x2, y2 = box
            named.setdefault(CLASSES[label], []).append(Detection(box=(x1, y1, x2, y2), score=confidence, index=index))
    return named


def judge(
    rule: Rule,
    batch: RewardBatch,
    instances: Sequence[Instances | None],
    objects: Sequence[Objects],
    colours: Sequence[Colours],
    want: frozenset[str],
) -> RewardOutput:
    """Everything after the models: scores of every rule, regions and maps."""
    verdicts: dict[Rule, list[rules.Verdict]] = {name: [] for name in RULES}
    regions, maps, counts = [], [], []
    for row, metadata in enumerate(batch.metadata):
        observed, image_colours = objects[row], colours[row]

        def colour_of(d: Detection, name: str, known: Colours = image_colours) -> str:
            return known[name, d.index]

        for name in RULES:
            verdicts[name].append(rules.score(name, observed, metadata, colour_of))
        counts.append(sum(len(observed.get(name, ())) for name in {c["class"] for c in metadata["include"]}))
        if want:
            judged = rules.judge_objects(observed, metadata, colour_of, rule)
            masks = [_instances(instances[row]).masks[d.index] for d, _, _ in judged]
            regions.append(_regions(judged, masks, image_colours))
            empty = batch.images.new_zeros(batch.images.shape[-2:], dtype=torch.bool)
            maps.append(torch.stack([empty, *masks]).any(0).float())
    scores = {name: torch.tensor([v.score for v in verdicts[name]]) for name in RULES}
    valid = torch.tensor([f is not None for f in instances], dtype=torch.bool)
    return RewardOutput(
        scores=scores[rule].where(valid, torch.nan),
        valid=valid,
        components={
            **{name: scores[name].where(valid, torch.nan) for name in ("dense", "strict", "official")},
            "objects": torch.tensor(counts, dtype=torch.float32),
        },
        regions=regions if "regions" in want else None,
        maps=torch.stack(maps) if "maps" in want else None,
        info=[
            {"wrong": list(v.reasons)} if f is not None else {REASON: "the detector returned nan or infinity"}
            for f, v in zip(instances, verdicts[rule], strict=True)
        ],
    )


def _regions(
    judged: Sequence[tuple[Detection, str, rules.Judgement]], masks: Sequence[Tensor], colours: Colours
) -> list[Region]:
    regions = []
    for (d, name, judgement), mask in zip(judged, masks, strict=True):
        height, width = mask.shape
        x1, y1, x2, y2 = d.box
        colour = colours.get((name, d.index))
        regions.append(
            Region(
                box=(x1 / width, y1 / height, x2 / width, y2 / height),
                credit=1.0 if judgement == "right" else -1.0,
                label=f"{colour + ' ' if colour else ''}{name}, {judgement}",
                mask=mask.cpu(),
            )
        )
    return regions


def _instances(instances: Instances | None) -> Instances:
    assert instances is not None, "only images with detections hold objects"
    return instances
