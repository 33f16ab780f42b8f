"""The laws of a policy in their order, and what came of them."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import attrs
import torch

from rlt2i.conformance import geometry, images, learning, maps, stock, text, velocity
from rlt2i.conformance.subject import Mistake, Subject
from rlt2i.interfaces import PolicySpec
from rlt2i.types import ImageSize

Law = Callable[[Subject], str | None]
"""Returns a note for the table, or raises Mistake."""

POLICY_LAWS = MappingProxyType(
    {law.__name__: law for module in (geometry, text, velocity, maps, learning, images, stock) for law in module.LAWS}
)
"""Name -> law; the first line of a law's docstring says what it demands."""

_WIDEST = 80
"""Characters of a demand in the table."""


@attrs.frozen(kw_only=True)
class Finding:
    """What came of one law.

    Attributes:
        law: its name.
        demand: what it demands.
        note: a number or a remark, where the law was kept.
        mistake: what is wrong; None where the law was kept.
    """

    law: str
    demand: str
    note: str = ""
    mistake: str | None = None


def find(name: str, law: Callable[[Any], str | None], subject: Any) -> Finding:
    """What came of one law; whatever is raised on the way is the subject's mistake."""
    finding = functools.partial(Finding, law=name, demand=(law.__doc__ or "").strip().splitlines()[0])
    try:
        return finding(note=law(subject) or "")
    except Mistake as mistake:
        return finding(mistake=str(mistake))
    except Exception as error:
        if os.environ.get("RLT2I_DEBUG"):
            traceback.print_exc()
        return finding(mistake=f"raised {type(error).__name__}: {error}")


def check_law(name: str, subject: Subject) -> Finding:
    """One law of a policy."""
    return find(name, POLICY_LAWS[name], subject)


def check_policy(
    spec: PolicySpec,
    *,
    size: ImageSize | None = None,
    device: torch.device | str = "cpu",
    laws: Sequence[str] | None = None,
) -> list[Finding]:
    """Examine a policy.

    Args:
        spec: of the policy; it is loaded.
        size: of images; default the smallest usual one that it takes.
        device: where it is loaded.
        laws: names of POLICY_LAWS; default all.

    Raises:
        ValueError: when it cannot be loaded, or takes no image.
    """
    subject = Subject(spec=spec, device=device, asked_size=size)
    return [check_law(name, subject) for name in (POLICY_LAWS if laws is None else laws)]


def table(findings: Sequence[Finding]) -> str:
    """Text for a terminal; what is wrong comes with what to do."""
    width = max(len(finding.law) for finding in findings)
    lines = []
    for finding in findings:
        verdict = "ok     " if finding.mistake is None else "REFUSED"
        demand = finding.demand if len(finding.demand) <= _WIDEST else f"{finding.demand[: _WIDEST - 3]}..."
        lines.append(f"{verdict}  {finding.law:<{width}}  {finding.note or demand}")
        if finding.mistake is not None:
            lines += [f"         {line}" for line in finding.mistake.splitlines()]
    refused = sum(finding.mistake is not None for finding in findings)
    lines.append(f"{refused} of {len(findings)} laws are broken" if refused else f"all {len(findings)} laws are kept")
    return "\n".join(lines)
