"""GenEval's rules a second time, as definitions instead of a procedure: to be compared with, not to be used."""

from __future__ import annotations

import math
import random

from rlt2i.rewards.geneval_rules import CLASSES, COLOURS, RELATIONS, Detection

DIRECTION = {"left of": (0, -1), "right of": (0, +1), "above": (1, -1), "below": (1, +1)}
"""Axis and sign of where the first object is."""


class Scene:
    """Objects by class, best first, and the colour of each."""

    def __init__(self, objects: dict[str, list[Detection]], colours: dict[int, str]):
        self.objects, self.colours = objects, colours

    def colour_of(self, found: Detection, name: str) -> str:
        return self.colours[found.index]


def holds(relation: str, a: Detection, b: Detection) -> bool:
    """The centres differ in that direction by a tenth of the joint size plus half of their distance."""
    axis, sign = DIRECTION[relation]

    def centre(box, i):
        return (box[i] + box[i + 2]) / 2

    def beyond(i):
        margin = ((a.box[i + 2] - a.box[i]) + (b.box[i + 2] - b.box[i])) / 10
        return abs(centre(a.box, i) - centre(b.box, i)) - margin

    if max(beyond(0), beyond(1)) < 1e-3:
        return False
    distance = math.dist([centre(a.box, 0), centre(a.box, 1)], [centre(b.box, 0), centre(b.box, 1)])
    towards = sign * (centre(a.box, axis) - centre(b.box, axis)) > 0
    return towards and beyond(axis) > distance / 2


class Statement:
    """What is true of a scene under a prompt. `exact` counts for the training score, else the benchmark's reading."""

    def __init__(self, scene: Scene, prompt: dict, exact: bool):
        self.scene, self.prompt, self.exact = scene, prompt, exact
        self.clauses = prompt["include"]

    def looked_at(self, i):
        found = self.scene.objects.get(self.clauses[i]["class"], [])
        return found if self.exact else found[: self.clauses[i]["count"]]

    def number_right(self, i):
        return len(self.looked_at(i)) == self.clauses[i]["count"]

    def coloured(self, i):
        return len([d for d in self.looked_at(i) if self.scene.colours[d.index] == self.clauses[i]["color"]])

    def colour_right(self, i):
        return "color" not in self.clauses[i] or self.coloured(i) == self.clauses[i]["count"]

    def place_right(self, i):
        if "position" not in self.clauses[i]:
            return True
        relation, j = self.clauses[i]["position"]
        return self.fulfilled(j) and not any(
            not holds(relation, a, b) for a in self.looked_at(i) for b in self.looked_at(j)
        )

    def fulfilled(self, i):
        return self.number_right(i) and self.colour_right(i) and self.place_right(i)

    def everything(self):
        wanted = all(self.fulfilled(i) for i in range(len(self.clauses)))
        unwanted = [
            c for c in self.prompt.get("exclude", []) if len(self.scene.objects.get(c["class"], [])) >= c["count"]
        ]
        return wanted and (self.exact or not unwanted)

    def parts(self, i, defect):
        clause, count = self.clauses[i], self.clauses[i]["count"]
        parts = [1 - abs(len(self.looked_at(i)) - count) / count]
        if not self.number_right(i):
            return parts + [0.0] * bool({"color", "position"} & set(clause))
        if "color" in clause:
            parts.append(1 - abs(self.coloured(i) - count) / count)
        if "position" in clause and self.colour_right(i):
            parts.append(float(self.place_right(i)))
            if defect and self.fulfilled(clause["position"][1]) and not self.place_right(i):
                parts.append(1.0)
        return parts

    def mean_of_parts(self, defect=False):
        parts = [part for i in range(len(self.clauses)) for part in self.parts(i, defect)]
        return sum(parts) / len(parts)


def random_case(rng: random.Random) -> tuple[Scene, dict]:
    """A prompt with up to three clauses, and a scene that has a fair chance to satisfy it."""
    names = rng.sample(CLASSES[:40], 3)
    prompt: dict = {"tag": "position", "include": []}
    for number in range(rng.choice([1, 2, 2, 3])):
        clause = {"class": rng.choice(names[: number + 1]), "count": rng.choice([1, 1, 1, 2, 3])}
        if rng.random() < 0.4:
            clause["color"] = rng.choice(COLOURS[:3])
        if number and rng.random() < 0.7:
            clause["position"] = [rng.choice(RELATIONS), rng.randrange(number)]
        prompt["include"].append(clause)
    if rng.random() < 0.3:
        prompt["exclude"] = [{"class": rng.choice(names), "count": rng.choice([1, 2, 3, 4])}]
    objects: dict[str, list[Detection]] = {}
    colours: dict[int, str] = {}
    for name in names:
        wanted = [c for c in prompt["include"] if c["class"] == name]
        usual = wanted[0]["count"] if wanted else 0
        found = []
        for _ in range(max(0, usual + rng.choice([0, 0, 0, 0, -1, 1, 2, 5]))):
            x, y = rng.randrange(0, 400, 20), rng.randrange(0, 400, 20)
            box = (float(x), float(y), float(x + rng.randrange(0, 120, 20)), float(y + rng.randrange(20, 120, 20)))
            liked = wanted[0].get("color") if wanted else None
            colours[len(colours)] = liked if liked and rng.random() < 0.8 else rng.choice(COLOURS[:3])
            found.append(Detection(box=box, score=rng.random(), index=len(colours) - 1))
        if found:
            objects[name] = sorted(found, key=lambda d: -d.score)
    return Scene(objects, colours), prompt
