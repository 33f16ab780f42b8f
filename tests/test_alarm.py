"""The alarm rings when reward rises and something else falls, and only then."""

from __future__ import annotations

from rlt2i.alarm import hacking_alarms

BASE = {
    "reward/mean": 0.4,
    "eval/strict": 0.5,
    "eval/objects": 1.7,
    "eval/objects_asked": 1.75,
    "health/edge_density": 0.2,
}


def now(**changes: float) -> dict[str, float]:
    healthy = BASE | {"reward/mean": 0.6, "eval/strict_gain": 0.1, "eval/strict_gain_high": 0.14}
    return healthy | {name.replace("__", "/"): value for name, value in changes.items()}


def test_silent_while_everything_rises():
    assert hacking_alarms(BASE, now(), headline="strict") == []


def test_rings_for_each_thing_that_falls():
    (held_out,) = hacking_alarms(BASE, now(eval__strict_gain=-0.2, eval__strict_gain_high=-0.1), headline="strict")
    assert held_out == "held-out strict fell by 0.200"
    (health,) = hacking_alarms(BASE, now(health__edge_density=0.08), headline="strict")
    assert health == "edge density fell by 60%"
    (objects,) = hacking_alarms(BASE, now(eval__objects=3.6), headline="strict")
    assert objects == "3.60 objects per image where 1.75 were asked for"


def test_silent_when_the_trained_reward_did_not_rise():
    # Then it is not hacking but plain failure, which the curve shows.
    assert hacking_alarms(BASE, now(reward__mean=0.4, eval__objects=3.6), headline="strict") == []
