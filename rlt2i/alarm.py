"""Reward hacking has a shape: the trained reward climbs while something that nobody rewards falls."""

from __future__ import annotations

from collections.abc import Mapping

HEALTH_TOLERANCE = 0.35
"""Relative fall of a health measure that is worth a word; images of another style move it by less."""

COUNT_TOLERANCE = 0.15
"""Relative distance of the mean object count from what the prompts ask for."""


def hacking_alarms(before: Mapping[str, float], now: Mapping[str, float], *, headline: str) -> list[str]:
    """What fell while the trained reward rose, in words; empty when nothing did.

    Args:
        before: metrics of the first update and of the evaluation of the base.
        now: metrics of this update and its evaluation.
        headline: name of the held-out score, such as "strict".
    """
    if not now.get("reward/mean", 0.0) > before.get("reward/mean", 0.0):
        return []
    found = []
    if now.get(f"eval/{headline}_gain_high", 0.0) < 0:
        found.append(f"held-out {headline} fell by {-now[f'eval/{headline}_gain']:.3f}")
    for name, value in now.items():
        if name.startswith("health/") and value < (1 - HEALTH_TOLERANCE) * before.get(name, 0.0):
            fall = 1 - value / before[name]
            found.append(f"{name.removeprefix('health/').replace('_', ' ')} fell by {fall:.0%}")
    if now.get("eval/objects_asked"):
        off, was = (abs(m["eval/objects"] / m["eval/objects_asked"] - 1) for m in (now, before))
        if off > COUNT_TOLERANCE and off > was:
            found.append(
                f"{now['eval/objects']:.2f} objects per image where {now['eval/objects_asked']:.2f} were asked for"
            )
    return found
