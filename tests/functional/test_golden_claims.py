"""No golden case may be skipped in silence, and none may be tested by two families that could disagree."""

import importlib
from pathlib import Path

from tests.helpers.golden_cases import all_cases, claims


def test_every_case_is_claimed_by_exactly_one_family():
    for module in sorted(Path(__file__).parent.glob("test_golden_*.py")):
        importlib.import_module(f"tests.functional.{module.stem}")
    owners = {name: claims.get(name, set()) for name in all_cases()}
    assert {name: tests for name, tests in owners.items() if len(tests) != 1} == {}
