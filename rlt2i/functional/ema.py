"""Decay schedules of averaged parameters, e <- d e + (1 - d) p, by number of optimizer updates."""

import math


def nft_old_decay(step: int, kind: int) -> float:
    """DiffusionNFT's decay of the data-collecting policy (arXiv 2509.16117), applied once per epoch.

        kind 0: 0 (always the newest policy)
        kind 1: min(.001 s, .5)
        kind 2: 0 for s < 75, then min(.0075 (s - 75), .999)

    Args:
        step: s, the number of optimizer updates so far.
        kind: 0, 1 or 2.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in (0, 1, 2):
        raise ValueError(f"kind={kind!r}: DiffusionNFT knows 0 (on policy), 1 (slow) and 2 (flat, then fast).")
    return ramp_decay(step, str(kind))


_RAMPS: dict[str, tuple[int, float, float, float]] = {
    "0": (0, 0.0, 0.0, 0.0),
    "1": (0, 0.0, 0.001, 0.5),
    "2": (75, 0.0, 0.0075, 0.999),
    "3": (0, 1.0, 0.0, 1.0),
    "4": (0, 0.0, 0.02, 0.99),
    "5": (0, 0.0, 0.01, 0.5),
    "6": (0, 0.0, 0.0075, 0.999),
}
_RAMP_NAMES = {"none": "0", "slow": "1", "medium": "2", "offline": "3", "fast": "4", "moderate": "5"}


def ramp_decay(step: int, ramp: str) -> float:
    """CRD's decays (arXiv 2603.14128): flat, then a linear ramp up to a ceiling.

        d(s) = start_value for s < start_step, then min(start_value + slope (s - start_step), end_value)

    Args:
        step: s, the number of optimizer updates so far.
        ramp: "start_step-start_value-slope-end_value" such as "75-0-0.0075-0.999"; "0" to "6"; or a name:
            none, slow, medium, offline, fast, moderate.

    Raises:
        ValueError: for a text that is no ramp.
    """
    preset = _RAMPS.get(_RAMP_NAMES.get(ramp, ramp))
    if preset is None:
        parts = ramp.split("-")
        try:
            start, value, slope, end = (float(part) for part in parts)
        except ValueError:
            raise ValueError(
                f"ramp={ramp!r}: not a decay. Write 'start_step-start_value-slope-end_value', for example "
                f"'75-0-0.0075-0.999', or use one of {sorted(_RAMPS)} or {sorted(_RAMP_NAMES)}."
            ) from None
        preset = (int(start), value, slope, end)
    first, value, slope, end = preset
    return value if step < first else min(value + (step - first) * slope, end)


def constant_decay(step: int, *, decay: float = 0.999) -> float:
    """The same decay at every step; `step` is there so that all schedules are called alike."""
    return _share("decay", decay)


def power_decay(step: int, *, decay: float = 0.999, warmup: int = 10) -> float:
    """min(decay, (1 + s) / (warmup + s)), the warm-up of diffusers and timm; warmup 0 is constant."""
    _share("decay", decay)
    return decay if warmup == 0 else min(decay, (1 + step) / (warmup + step))


def linear_decay(step: int, *, decay: float = 0.999, initial: float = 0.0, warmup: int = 100) -> float:
    """Linear from `initial` at step 0 to `decay` at step `warmup`, then constant."""
    _share("decay", decay)
    _share("initial", initial)
    return decay if step >= warmup else initial + (decay - initial) * (step / warmup)


def piecewise_linear_decay(step: int, *, decay: float = 0.5, flat: int = 0, rate: float = 0.001) -> float:
    """0 for `flat` steps, then growing by `rate` per step up to `decay`."""
    _share("decay", decay)
    return 0.0 if step < flat else min((step - flat) * rate, decay)


def cosine_decay(step: int, *, decay: float = 0.999, initial: float = 0.9, total: int = 1000) -> float:
    """Half a cosine from `initial` at step 0 to `decay` at step `total`, then constant.

    Raises:
        ValueError: for a total below 1.
    """
    _share("decay", decay)
    _share("initial", initial)
    if total < 1:
        raise ValueError(f"total={total}: the cosine needs at least one step.")
    return initial + (decay - initial) * (1 - math.cos(math.pi * min(step / total, 1.0))) / 2


def warmup_cosine_decay(
    step: int, *, decay: float = 0.999, initial: float = 0.9, warmup: int = 100, total: int = 1000
) -> float:
    """Linear from 0 to `initial` over `warmup` steps, then half a cosine to `decay` at step `total`.

    Raises:
        ValueError: unless 0 < warmup < total.
    """
    if not 0 < warmup < total:
        raise ValueError(f"warmup={warmup}, total={total}: the warm-up must be shorter than the whole, and not empty.")
    if step < warmup:
        return _share("initial", initial) * (step / warmup)
    return cosine_decay(step - warmup, decay=decay, initial=initial, total=total - warmup)


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: a decay lies in [0, 1].")
    return value
