"""Atomic questions about a GenEval prompt, in the form of GenEval 2: for judges that answer one question at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rlt2i.tasks.geneval.prompts import NUMBERS

_WORDS: Final = {1: "one", **NUMBERS}
_PAIRS: Final = ("scissors", "skis")


def with_questions(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a prompt with `vqa_list`, pairs of question and right answer, and `skills`, what each asks about.

    Every clause is triples for presence and number, and for its colour and its place where the prompt says them.

    Args:
        metadata: `include`: clauses with class, count and, where said, color and position = [relation, other clause].
    """
    clauses = metadata["include"]
    triples: list[tuple[str, str, str]] = []
    for clause in clauses:
        name, several = clause["class"], _plural(clause["class"])
        number = int(clause["count"])
        subject, verb = (name, "Is") if number == 1 and name not in _PAIRS else (several, "Are")
        triples.append((f"Are there any {several} in the image?", "Yes", "object"))
        triples.append((f"How many {several} are in the image?", _WORDS.get(number, str(number)), "count"))
        if "color" in clause:
            triples.append((f"{verb} the {subject} {clause['color']}?", "Yes", "attribute"))
        if "position" in clause:
            relation, other = clause["position"]
            triples.append((f"{verb} the {subject} {relation} the {clauses[other]['class']}?", "Yes", "position"))
    questions = [[question, answer] for question, answer, _ in triples]
    return {**metadata, "vqa_list": questions, "skills": [skill for *_, skill in triples]}


def _plural(name: str) -> str:
    """Benches, people, scissors: for a judge, so in good English, unlike the prompts of the benchmark."""
    if name in _PAIRS or name in ("broccoli", "sheep"):
        return name
    if name == "person":
        return "people"
    head, _, last = name.rpartition(" ")
    if last == "knife":
        last = "knives"
    elif last == "mouse":
        last = "mice"
    elif last.endswith(("s", "ch", "sh", "x")):
        last += "es"
    else:
        last += "s"
    return f"{head} {last}".strip()
