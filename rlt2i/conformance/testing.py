"""The laws as a class for pytest; a test per law."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from rlt2i.conformance.laws import POLICY_LAWS, check_law
from rlt2i.conformance.subject import Subject
from rlt2i.interfaces import PolicySpec
from rlt2i.types import ImageSize


class PolicyConformance:
    """Inherit from it under a name that pytest collects, and say which policy.

        class TestMyPolicy(PolicyConformance):
            spec = MySpec(path="...")

    Attributes:
        spec: of the policy; a class attribute, or a function of no argument that makes it when the tests run.
        size: of images; default the smallest usual one that the policy takes.
        device: where it is loaded.
    """

    spec: ClassVar[Any]
    size: ClassVar[ImageSize | None] = None
    device: ClassVar[str] = "cpu"

    @classmethod
    def subject(cls) -> Subject:
        """Loaded once for all laws."""
        if cls not in _subjects:
            _subjects.clear()  # one policy at a time is in memory
            spec = cls.spec if isinstance(cls.spec, PolicySpec) else cls.spec()
            _subjects[cls] = Subject(spec=spec, device=torch.device(cls.device), asked_size=cls.size)
        return _subjects[cls]


_subjects: dict[type[PolicyConformance], Subject] = {}


def _test_of(name: str) -> Any:
    def test(self: PolicyConformance) -> None:
        mistake = check_law(name, self.subject()).mistake
        assert mistake is None, mistake

    test.__name__ = f"test_{name}"
    test.__doc__ = POLICY_LAWS[name].__doc__
    return test


for _name in POLICY_LAWS:
    setattr(PolicyConformance, f"test_{_name}", _test_of(_name))
