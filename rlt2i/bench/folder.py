"""The folder of a benchmark: what may be killed at any moment, and when a trial in it is finished.

plan.yaml                       the plan
recipes/<arm>.yaml              the recipe of each arm, resolved
base/eval-000000.safetensors    how the common start was judged, computed once for all trials
trials/<arm>-s<seed>/           scores.csv, evaluations.csv, training.csv, timing.csv, log.txt; done.json comes last
trials/<arm>-s<seed>/run/       the run directory, while it trains
scores.csv, evaluations.csv, training.csv, timing.csv    of all finished trials
differences.csv, sentence.txt, curves.svg, differences.svg, index.html    what they come to

All tables but timing.csv are a function of the plan and the machine: killed and resumed, they are the same to the byte.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from rlt2i.bench.plan import Plan, load_plan
from rlt2i.config import ConfigError, dump_yaml, to_mapping
from rlt2i.recipes.recipe import Recipe, load_recipe
from rlt2i.runs.files import NO_LOCKS, replace_text

PLAN, BASE, DONE, LOCK = "plan.yaml", "base", "done.json", "bench.lock"
TABLES = ("scores", "evaluations", "training", "timing")
"""One CSV each, per trial and for all of them."""


@attrs.frozen(kw_only=True)
class BenchFolder:
    """Where a benchmark keeps what it has found.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def base(self) -> Path:
        return self.path / BASE / "eval-000000.safetensors"

    def trial(self, arm: str, seed: int) -> Path:
        return self.path / "trials" / f"{arm}-s{seed}"

    def finished(self, arm: str, seed: int) -> bool:
        return (self.trial(arm, seed) / DONE).is_file()

    def plan(self) -> Plan:
        return load_plan(self.path / PLAN)

    def recipe(self, arm: str, seed: int) -> Recipe:
        """The recipe of one trial, as it was when the benchmark began."""
        return load_recipe(self.path / "recipes" / f"{arm}.yaml", [f"train.seed={seed}"], trusted=False)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from running the same benchmark; the lock goes with the process, however it ends.

        Raises:
            ConfigError: where another process has it. A file system without locks is warned of.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                warnings.warn(
                    f"{self.path}: this file system has no locks, so nothing keeps two processes from running one "
                    "benchmark. Make sure that only one does.",
                    stacklevel=4,
                )
            else:
                os.close(lock)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise ConfigError(
                    f"{self.path}: another process is running this benchmark. Wait, or use --out."
                ) from error
        try:
            yield
        finally:
            os.close(lock)

    def prepare(self, plan: Plan, recipes: Mapping[str, Recipe]) -> None:
        """Write down what is to be run, or see that it is what was begun here.

        Arms and seeds may be added later; an arm that has begun keeps its recipe.

        Raises:
            ConfigError: when an arm is another recipe now.
        """
        (self.path / "recipes").mkdir(parents=True, exist_ok=True)
        for arm, recipe in recipes.items():
            file = self.path / "recipes" / f"{arm}.yaml"
            if not file.exists():
                replace_text(file, recipe.to_yaml())
            elif self.recipe(arm, plan.first_seed).hash != recipe.hash:
                raise ConfigError(
                    f"{self.path}: the arm {arm!r} was begun with another recipe ({file}). Trials of two recipes "
                    "cannot be compared as one: use another --out, or give the changed arm another name."
                )
        replace_text(self.path / PLAN, dump_yaml(to_mapping(plan, typed=False)))

    def take(self, other: BenchFolder, plan: Plan) -> list[tuple[str, int]]:
        """Copy what another benchmark has finished: trials of the same recipe at the same seed, under any arm.

        Two plans share most of their reference arms, and a trial is a function of its recipe. What was computed with
        another version of this package is another trial, which is not seen here.

        Args:
            other: is read, not changed.
            plan: of this folder.

        Returns:
            The trials that were taken, as (arm, seed) of this plan.

        Raises:
            ConfigError: when there is no benchmark, or it ran with another number of threads, whose last bits differ.
        """
        if not (other.path / PLAN).is_file():
            raise ConfigError(
                f"{other.path}: no benchmark to reuse, as it holds no {PLAN}. Give the folder of one (--out)."
            )
        if (threads := other.plan().threads) != plan.threads:
            raise ConfigError(
                f"{other.path}: ran with {threads} threads a trial and this plan asks for {plan.threads}; their "
                f"numbers differ in the last bits, so they are not mixed. --set threads={threads} makes them the same."
            )
        places = {json.loads(done.read_text())["recipe"]: done.parent for done in other.path.glob(f"trials/*/{DONE}")}
        taken = []
        for arm, seed in plan.trials:
            recipe = self.recipe(arm, seed)
            place = places.get(recipe.hash)
            if place is None or self.finished(arm, seed):
                continue
            self.trial(arm, seed).mkdir(parents=True, exist_ok=True)
            tables = {name: _under_arm(place / f"{name}.csv", arm) for name in TABLES}
            facts = {**json.loads((place / DONE).read_text()), "arm": arm, "taken_from": str(place.absolute())}
            finish(self.trial(arm, seed), tables, facts)
            taken.append((arm, seed))
        return taken


def _under_arm(table: Path, arm: str) -> str:
    """A trial's table with another name of its arm."""
    header, *rows = csv.reader(io.StringIO(table.read_text(encoding="utf-8")))
    return csv_text(header, [[arm, *row[1:]] for row in rows])


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as text: floats to six significant digits, one line a row."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)
    return buffer.getvalue()


def gather_tables(folder: BenchFolder, plan: Plan) -> list[tuple[str, int]]:
    """Put the tables of all finished trials together, in the plan's order; returns which trials those are."""
    finished = [trial for trial in plan.trials if folder.finished(*trial)]
    for table in TABLES:
        header, body = "", []
        for trial in finished:
            header, *lines = (folder.trial(*trial) / f"{table}.csv").read_text(encoding="utf-8").splitlines()
            body += lines
        if finished:
            replace_text(folder.path / f"{table}.csv", "\n".join([header, *body]) + "\n")
    return finished


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def finish(folder: Path, tables: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Write a trial's tables and, last of all, that it is finished."""
    for name, text in tables.items():
        replace_text(folder / f"{name}.csv", text)
    replace_text(folder / DONE, json.dumps(facts, indent=1, sort_keys=True) + "\n")
