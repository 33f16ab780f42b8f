"""Loads tests/golden/golden.json: inputs and outputs of the reference implementations, and their tolerances."""

import fnmatch
import functools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FILE = Path(__file__).parents[1] / "golden" / "golden.json"

claims: dict[str, set[str]] = {}
"""Case name -> test functions that claimed it; filled by `golden`."""


class Case:
    """One golden case; `case["x"]` is an input, `case.expect(...)` compares an output.

    Every output must be compared: what a test neither gives to `expect` nor takes from `expected` fails it.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.name: str = record["name"]
        self.outputs: dict[str, Any] = numbers(record["outputs"])
        self.outputs_f64: dict[str, Any] = numbers(record.get("outputs_f64", {}))
        self.compared: set[tuple[int, str]] = set()
        self.dtype = getattr(torch, record["dtype"])

    def __contains__(self, key: str) -> bool:
        return key in self.record["inputs"]

    def __getitem__(self, key: str) -> Any:
        value = self.record["inputs"][key]
        if isinstance(value, dict) and "$ref" in value:
            return _file()["tensors"][value["$ref"]]
        return value

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(self[key], dtype=dtype or self.dtype)

    def expect(self, key: str, actual: Any, *, within: Any = None, tol: str | None = None) -> None:
        """Compare with outputs[key] (or within[key]) at the tolerance of the case (or of the class `tol`)."""
        limits = _file()["meta"]["tolerances"][tol or self.record["tol"]]
        actual = torch.as_tensor(actual)
        expected = torch.tensor(self.expected(key, within=within), dtype=actual.dtype)
        torch.testing.assert_close(
            actual, expected.reshape(actual.shape), **limits, msg=lambda text: f"{self.name}: {key}: {text}"
        )

    def expect_or_nothing(self, key: str, actual: Tensor, *, within: Any = None, tol: str | None = None) -> None:
        """As `expect`, but where the reference divides 0 by 0 ours must be exactly 0: a step without noise."""
        expected = torch.tensor(self.expected(key, within=within), dtype=actual.dtype).reshape(actual.shape)
        defined = torch.isfinite(expected)
        assert (actual[~defined] == 0).all(), f"{self.name}: {key}: not masked where the reference has no value"
        limits = _file()["meta"]["tolerances"][tol or self.record["tol"]]
        torch.testing.assert_close(
            actual[defined], expected[defined], **limits, msg=lambda text: f"{self.name}: {key}: {text}"
        )

    def expected(self, key: str, *, within: Any = None) -> Any:
        """outputs[key] (or within[key]), for a comparison of the test's own."""
        place = self.outputs if within is None else within
        self.compared.add((id(place), key))
        return place[key]

    def left_out(self) -> list[str]:
        """The outputs that nothing was compared with."""

        def leaves(place: dict[str, Any], path: str) -> list[str]:
            found = []
            for key, value in place.items():
                if (id(place), key) in self.compared or value is None:
                    continue
                found += leaves(value, f"{path}/{key}") if isinstance(value, dict) else [f"{path}/{key}"]
            return found

        return leaves(self.outputs, "outputs") + leaves(self.outputs_f64, "outputs_f64")


def numbers(value: Any) -> Any:
    """The outputs with "NaN", "Infinity" and the like, which JSON has no numbers for, as floats."""
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) else value


@cache
def _file() -> dict[str, Any]:
    return json.loads(FILE.read_text())


@cache
def all_cases() -> dict[str, Case]:
    return {record["name"]: Case(record) for record in _file()["cases"]}


def golden(*patterns: str, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrise a test over the cases that match, and claim them."""

    def matches(name: str, globs: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    chosen = [case for name, case in all_cases().items() if matches(name, patterns) and not matches(name, without)]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for case in chosen:
            claims.setdefault(case.name, set()).add(f"{test.__module__}.{test.__name__}")

        @functools.wraps(test)
        def complete(case: Case) -> None:
            case.compared.clear()
            test(case)
            assert case.left_out() == [], f"{case.name}: outputs that no test compares"

        return pytest.mark.parametrize("case", chosen, ids=[case.name for case in chosen])(complete)

    return decorate


def per_sample_mean(maps: Tensor) -> Tensor:
    """[B, H, W] -> [B]: the published numbers are means over all latent coordinates."""
    return maps.flatten(1).mean(dim=1)


def group_ids(names: list[Any]) -> Tensor:
    """Integer group ids in order of first appearance."""
    order = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([order[name] for name in names])
