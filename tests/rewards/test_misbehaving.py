"""Rewards that misbehave in every way that comes to mind: never a traceback, never a valid 0.0, images as they were."""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.recipes import Recipe
from rlt2i.rewards import isolation
from rlt2i.rewards.combinators import Function
from rlt2i.rewards.isolation import unchanged_process
from rlt2i.rewards.validity import Guarded, score_safely
from rlt2i.runs.metrics import read_metrics
from rlt2i.training.start import train
from rlt2i.types import Region
from tests.helpers import toy_recipe
from tests.helpers.fake_rewards import Broken, Grey, batch_of, output_of
from tests.helpers.toy import QuadrantBrightness

Act = Callable[[RewardBatch], Any]
HALF = [0.5, 0.25]
ALL_VALID = torch.ones(2, dtype=torch.bool)


def saying(scores: Any = None, valid: Any = ALL_VALID, **fields: Any) -> Act:
    return lambda batch: RewardOutput(scores=torch.tensor(HALF) if scores is None else scores, valid=valid, **fields)


def forged(**fields: Any) -> Act:
    """An output whose checks were circumvented."""

    def act(_: RewardBatch) -> Any:
        output = output_of(HALF)
        for name, value in fields.items():
            object.__setattr__(output, name, value)
        return output

    return act


def raising(error: BaseException) -> Act:
    def act(_: RewardBatch) -> Any:
        raise error

    return act


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class NoText(Exception):
    def __str__(self) -> str:
        return 7  # type: ignore[return-value]


class Endless(Exception):
    def __str__(self) -> str:
        return str(self)


class Gone(ImportError):
    __str__ = Mute.__str__


class OfItsOwn(BaseException):
    pass


class Unprintable:
    def __repr__(self) -> str:
        return "\ud800\x1b[31m" + "x" * 10_000


def recursing(batch: RewardBatch) -> Any:
    return recursing(batch)


def running_out(batch: RewardBatch) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


async def late(batch: RewardBatch) -> Any:
    return output_of(HALF)


def one_by_one(batch: RewardBatch) -> Iterator[float]:
    yield from HALF


masked = np.ma.MaskedArray([0.0, 0.25], mask=[True, False])

INVALID: dict[str, tuple[Act, str]] = {
    # What is returned.
    "nothing": (lambda batch: None, "returned NoneType"),
    "a tensor": (lambda batch: torch.tensor(HALF), "returned Tensor"),
    "a list": (lambda batch: HALF, "returned list"),
    "a number": (lambda batch: 0.0, "returned float"),
    "a mapping": (lambda batch: {"scores": HALF}, "returned dict"),
    "the class": (lambda batch: RewardOutput, "returned ABCMeta|returned type"),
    "a generator": (one_by_one, "returned generator"),
    "a coroutine": (lambda batch: asyncio.sleep(0, output_of(HALF)), "returned coroutine"),
    "a future": (lambda batch: asyncio.Future(loop=asyncio.new_event_loop()), "returned .*Future"),
    # Scores.
    "one too few": (saying([0.5], [True]), "1 scores for 2 images"),
    "one too many": (saying([0.0] * 3, [True] * 3), "3 scores for 2 images"),
    "none at all": (saying([], np.zeros(0, bool)), "0 scores for 2 images"),
    "a scalar": (saying(torch.tensor(0.5)), r"got shape \[\]"),
    "a NumPy scalar": (saying(np.float32(0.5)), r"got shape \[\]"),
    "a Python number": (saying(0.0), r"got shape \[\]"),
    "a column": (saying(np.array([[0.5], [0.5]])), r"got shape \[2, 1\]"),
    "a row": (saying(torch.zeros(1, 2)), r"got shape \[1, 2\]"),
    "nested lists of two lengths": (saying([[0.5], [0.5, 0.5]]), "ValueError"),
    "complex": (saying(torch.tensor([0j, 1j])), "complex64"),
    "complex of NumPy": (saying(np.array([0j, 1j])), "complex128"),
    "complex numbers of Python": (saying([0j, 1j]), "complex128"),
    "truth values": (saying(torch.tensor([False, True])), "torch.bool"),
    "truth values of NumPy": (saying(np.array([False, True])), "torch.bool"),
    "strings": (saying(["0.0", "0.5"]), "real numbers"),
    "bytes": (saying([b"0", b"1"]), "real numbers"),
    "one string": (saying("00"), "real numbers"),
    "None": (lambda batch: RewardOutput(scores=None, valid=ALL_VALID), "real numbers"),  # type: ignore[arg-type]
    "None among numbers": (saying([None, 0.5]), "real numbers"),
    "objects": (saying(np.array([object(), object()])), "real numbers"),
    "an object array of numbers": (saying(np.array([0.0, 0.5], dtype=object)), "real numbers"),
    "dates": (saying(np.array(["2024-01-01", "2024-01-02"], dtype="datetime64[D]")), "real numbers"),
    "records": (saying(np.zeros(2, dtype=[("score", float)])), "real numbers"),
    "a masked array": (saying(masked), "real numbers"),
    "integers beyond any float": (saying([10**400, 0]), "real numbers"),
    "a set": (saying({0.0, 0.5}), "real numbers"),
    "scores from a generator": (saying(score for score in HALF), "real numbers"),
    "sparse": (saying(torch.tensor(HALF).to_sparse()), "dense"),
    "without storage": (saying(torch.empty(2, device="meta")), "."),
    "only nan": (saying(torch.full((2,), torch.nan)), "score is nan"),
    "infinite both ways": (saying(torch.tensor([torch.inf, -torch.inf])), "score is"),
    "beyond float32": (saying(np.array([1e300, -1e300])), "score is"),
    "beyond the span": (saying(torch.tensor([1.5, -0.5])), "outside the documented range"),
    "forged to nothing": (forged(scores=None), "NoneType"),
    "forged to text": (forged(scores="00"), "str"),
    # Validity.
    "valid as floats": (saying(valid=torch.ones(2)), "torch.float32, expected torch.bool"),
    "valid as None": (saying(valid=None), "real numbers"),
    "valid as words": (saying(valid=["yes", "no"]), "real numbers"),
    "valid of one": (saying(valid=True), "shape"),
    "nothing valid": (saying([0.0, 0.0], [False, False]), "could not judge"),
    # What comes with them.
    "components as a list": (saying(components=[1, 2]), "AttributeError|components"),
    "components of another length": (saying(components={"x": torch.zeros(3)}), r"shape \[3\], expected \[B\]"),
    "complex components": (saying(components={"x": torch.zeros(2, dtype=torch.complex64)}), "complex64"),
    "components without a name": (saying(components={3: torch.zeros(2)}), "names are texts"),
    "maps of one image": (saying(maps=torch.ones(1, 2, 2)), "shape"),
    "maps without an image axis": (saying(maps=torch.ones(2, 2)), "shape"),
    "maps without places": (saying(maps=torch.ones(2, 0, 4)), "maps of shape"),
    "complex maps": (saying(maps=torch.ones(2, 2, 2, dtype=torch.complex64)), "complex64"),
    "maps that overflow": (saying(maps=torch.full((2, 9, 9), 3e38)), "map is"),
    "maps of nan": (saying(maps=torch.full((2, 2, 2), torch.nan)), "map is"),
    "regions of one image": (saying(regions=[[]]), "1 regions for 2 images"),
    "regions that are boxes": (saying(regions=[[(0, 0, 1, 1)], []]), "no Region"),
    "regions of None": (saying(regions=[None, None]), "NoneType"),
    "info of one image": (saying(info=[{}]), "1 info for 2 images"),
    "info as one mapping": (saying(info={"a": 1, "b": 2}), "info as dict"),
    "info as text": (saying(info="ab"), "info as str"),
    "info as a number": (saying(info=3), "info as int"),
    # What is raised.
    "an error": (raising(RuntimeError("boom")), "RuntimeError: boom"),
    "an error without a text": (raising(RuntimeError()), "RuntimeError"),
    "an error whose text raises": (raising(Mute()), "Mute: .its message cannot be read"),
    "an error whose text is a number": (raising(NoText()), "NoText"),
    "an error whose text never ends": (raising(Endless()), "Endless"),
    "an error with a long text": (raising(ValueError("x" * 50_000_000)), "ValueError: x+"),
    "an error with half a character": (raising(ValueError("\udfff")), r"ValueError: \\udfff"),
    "an error that clears the screen": (raising(ValueError("\x1b[2J\r\nfine")), r"\\x1b\[2J  fine"),
    "an error of a package without words": (raising(Gone()), "Gone"),
    "a secret in an error": (raising(OSError("http://me:s3cret@judge/x")), "<redacted>@judge"),
    "out of memory": (running_out, "OutOfMemoryError: CUDA out of memory"),
    "no memory": (raising(MemoryError()), "MemoryError"),
    "endless recursion": (recursing, "RecursionError"),
    "the end": (raising(SystemExit(0)), "SystemExit: 0"),
    "the end by hand": (lambda batch: sys.exit("done"), "SystemExit: done"),
    "a cancelled task": (raising(asyncio.CancelledError()), "CancelledError"),
    "a generator's end": (raising(GeneratorExit()), "GeneratorExit"),
    "an iterator's end": (raising(StopIteration(0.0)), "StopIteration"),
    "an exception group": (raising(BaseExceptionGroup("two", [OfItsOwn(), ValueError()])), "two"),
    "an exception of its own": (raising(OfItsOwn("odd")), "OfItsOwn: odd"),
    "a time-out": (raising(TimeoutError("judge")), "TimeoutError: judge"),
    "a broken pipe": (raising(BrokenPipeError(32, "Broken pipe")), "BrokenPipeError"),
    "a failed assertion": (raising(AssertionError()), "AssertionError"),
    "a warning as an error": (raising(UserWarning("careful")), "UserWarning: careful"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("fault", INVALID)
def test_what_cannot_be_trusted_is_invalid_and_says_why_once(fault, caplog, capfd):
    act, reason = INVALID[fault]
    batch = batch_of(10, 200)
    output = score_safely(Broken(act=act), batch)
    assert not output.valid.any()
    assert output.scores.isnan().all()
    assert output.info is not None
    for row in output.info:
        assert re.search(reason, row["error"]), row["error"]
        assert len(row["error"]) < 1300
        assert row["error"].isprintable()
        row["error"].encode()
    assert len(caplog.records) == (fault != "nothing valid")
    assert "Traceback" not in caplog.text + capfd.readouterr().err
    assert torch.equal(batch.images, batch_of(10, 200).images)


@pytest.mark.parametrize(
    "scores",
    [
        *(np.array([1, 2], dtype=kind) for kind in "bBhHiIlLqQefdg"),
        *(np.array([1, 2], dtype=kind) for kind in (">f4", ">i8", "<f2")),
        *(torch.tensor([1, 2], dtype=kind) for kind in (torch.int8, torch.int64, torch.uint8, torch.float64)),
        *(torch.tensor([1.0, 2.0], dtype=kind) for kind in (torch.float16, torch.bfloat16)),
        np.array([2.0, 1.0])[::-1],
        np.array([1.0, 9.0, 2.0])[::2],
        torch.tensor([1.0, 2.0], requires_grad=True),
        torch.tensor([[1.0, 7.0], [2.0, 7.0]])[:, 0],
        [1, 2.0],
        (np.float64(1), np.int32(2)),
    ],
    ids=lambda scores: f"{type(scores).__name__}-{getattr(scores, 'dtype', '')}",
)
def test_numbers_of_every_kind_are_taken_as_they_are(scores):
    output = score_safely(Broken(act=saying(scores, np.array([True, True]))), batch_of(1, 2))
    assert output.valid.tolist() == [True, False]  # 2 is outside of [0, 1], for a reward that promises it
    output = score_safely(Function(function=lambda_of(scores)), batch_of(1, 2))
    assert output.scores.tolist() == [1.0, 2.0]
    assert output.scores.dtype is torch.float32
    assert output.valid.all()
    assert not output.scores.requires_grad


SAID: list[Any] = [None]


def lambda_of(scores: Any) -> Any:
    SAID[0] = scores
    return says


def says(images: Any, prompts: Any, metadata: Any) -> Any:
    return SAID[0]


@pytest.mark.parametrize("said", [torch.tensor([0j, 1j]), ["0.0", "1"], [0j, 1], [False, True], "00", 0.0])
def test_a_plain_function_is_held_to_the_same(said):
    output = score_safely(Function(function=lambda_of(said)), batch_of(1, 2))
    assert not output.valid.any()


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([None, None], [{}, {}]),
        (["fine", {"a": 1}], [{"note": "fine"}, {"a": 1}]),
        ([3, ["x"]], [{"note": 3}, {"note": ["x"]}]),
        ([{1: {2}}, {"t": torch.ones(2), "n": np.float32(0.5), "bad": math.nan}], None),
        ([{"text": "\ud800"}, {"o": Unprintable()}], None),
    ],
)
def test_details_become_plain_data_and_leave_the_scores_alone(rows, kept):
    import json

    output = score_safely(Broken(act=saying(info=rows)), batch_of(1, 2))
    assert output.valid.all()
    assert output.scores.tolist() == HALF
    if kept is not None:
        assert output.info == kept
    text = json.dumps(output.info, allow_nan=False)
    text.encode()
    assert len(text) < 3000


def test_details_that_hold_themselves_end():
    endless: dict[str, Any] = {}
    endless["self"] = endless
    assert score_safely(Broken(act=saying(info=[endless, {}])), batch_of(1, 2)).valid.all()


# ----------------------------------------------------------------------------------------------- what it does to others

KEPT: list[Any] = []


def scribbles(batch: RewardBatch) -> RewardOutput:
    batch.images.zero_()
    batch.metadata[0]["count"][0] = 99  # type: ignore[index]
    batch.prompts[0] = "another"  # type: ignore[index]
    return output_of(HALF)


def keeps(batch: RewardBatch) -> RewardOutput:
    output = output_of(HALF, maps=torch.ones(2, 2, 2), components={"x": torch.ones(2)}, info=[{"a": [1]}, {}])
    KEPT[:] = [batch, output]
    return output


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: Guarded(reward=r)])
def test_images_metadata_and_prompts_stay_as_they_were(wrap):
    batch = batch_of(10, 200, metadata=[{"count": [1]}, {}])
    assert score_safely(wrap(Broken(act=scribbles)), batch).valid.all()
    assert torch.equal(batch.images, batch_of(10, 200).images)
    assert batch.metadata[0] == {"count": [1]}
    assert batch.prompts[0] == "grey 10"


def test_what_a_reward_keeps_it_cannot_change_later():
    batch = batch_of(10, 200)
    output = score_safely(Broken(act=keeps), batch)
    seen, said = KEPT
    seen.images.fill_(7)
    for tensor in (said.scores, said.maps, said.components["x"]):
        tensor.fill_(torch.nan)
    said.valid.fill_(False)
    said.info[0]["a"][0] = 0
    assert output.scores.tolist() == HALF
    assert output.valid.all()
    assert output.maps is not None
    assert output.maps.eq(1).all()
    assert output.components["x"].eq(1).all()
    assert output.info is not None
    assert output.info[0] == {"a": [1]}
    assert torch.equal(batch.images, batch_of(10, 200).images)


def enter(manager: Any) -> None:
    KEPT.append(manager)
    manager.__enter__()


def elsewhere() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)


BENDING: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "default device": (lambda: torch.set_default_device("meta"), lambda: torch.empty(1).device.type),
    "gradients": (lambda: torch.set_grad_enabled(not torch.is_grad_enabled()), torch.is_grad_enabled),
    "inference mode": (lambda: enter(torch.inference_mode()), torch.is_inference_mode_enabled),
    "autocast": (lambda: enter(torch.autocast("cpu")), lambda: torch.is_autocast_enabled("cpu")),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
    "deterministic": (
        lambda: torch._C._set_deterministic_algorithms(True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        torch.get_float32_matmul_precision,
    ),
    "NumPy's errors": (lambda: np.seterr(all="raise"), np.geterr),
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "a folder that goes": (elsewhere, os.getcwd),
    "recursion": (lambda: sys.setrecursionlimit(300), sys.getrecursionlimit),
    "output": (lambda: setattr(sys, "stdout", None), lambda: sys.stdout),
    "Ctrl-C": (lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), lambda: signal.getsignal(signal.SIGINT)),
    "SIGTERM": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGTERM)),
    "warnings": (lambda: warnings.simplefilter("error"), lambda: warnings.filters[0]),
}


@pytest.mark.parametrize("what", BENDING)
def test_settings_of_the_process_are_put_back(what, caplog):
    bend, read = BENDING[what]

    def act(_: RewardBatch) -> Any:
        output = output_of(HALF)
        bend()
        return output

    isolation._SAID.clear()
    before = read()
    try:
        with unchanged_process("the test itself"):
            output = score_safely(Broken(act=act), batch_of(1, 2))
            after = read()
    finally:
        KEPT.clear()
    assert after == before == read()
    assert output.scores.tolist() == HALF
    assert what == "inference mode" or "put back" in caplog.text


KEPT_BY_VANDAL: list[torch.Tensor] = []


@attrs.frozen(kw_only=True)
class Vandal(QuadrantBrightness):
    """Judges rightly, and does everything else wrongly."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        for scores in KEPT_BY_VANDAL:  # what it returned earlier is not its own any more
            scores.zero_()
        KEPT_BY_VANDAL.append(output.scores)
        batch.images.fill_(255)
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)
        return attrs.evolve(output, info=[None for _ in output.scores])


TIMED = ("seconds", "beside_seconds", "time", "memory", "images_per", "throughput", "health/seconds")


def clean(vandal: bool) -> Recipe:
    # One chunk: a rollout beside a vandal sees the vandal's default dtype until it is put back.
    recipe = toy_recipe.clipped(iterations=1, rollout_batch_size=16)
    return attrs.evolve(recipe, reward=Vandal()) if vandal else recipe


def test_a_run_with_a_vandal_is_the_run_without(tmp_path):
    for name in (True, False):
        train(clean(name), tmp_path / str(name))
    for phase in ("train", "eval"):
        lines = [read_metrics(tmp_path / str(name), phase) for name in (True, False)]
        for mine, other in zip(*lines, strict=True):
            assert {k: v for k, v in mine.items() if not k.startswith(TIMED)} == {
                k: v for k, v in other.items() if not k.startswith(TIMED)
            }
    files = [
        sorted(p.relative_to(tmp_path / str(n)) for p in (tmp_path / str(n)).rglob("*.png")) for n in (True, False)
    ]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()


def test_an_honest_reward_is_left_alone(caplog):
    output = score_safely(Grey(), batch_of(0, 255), frozenset({"maps", "regions"}))
    assert output.scores.tolist() == [0.0, 255.0]  # a valid zero is one that the reward gave
    assert isinstance(output.regions[0][0], Region)  # type: ignore[index]
    assert not caplog.records
