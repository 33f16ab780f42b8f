"""Arms x seeds, several processes side by side; what is finished is never run again."""

from __future__ import annotations

import queue
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from rlt2i.bench.folder import BenchFolder, gather_tables
from rlt2i.bench.page import write_results
from rlt2i.bench.plan import Plan
from rlt2i.bench.trial import STOPPED, command, environment


class BenchFailed(RuntimeError):
    """Some trials failed; the others are finished and kept."""


def run_bench(
    plan: Plan, path: Path, *, jobs: int = 1, reuse: Sequence[Path] = (), say: Callable[[str], None] = print
) -> str:
    """Run what is missing of a plan and say what all of it comes to.

    Args:
        plan: checked here before anything runs.
        path: the folder; one that holds part of this plan is gone on with.
        jobs: trials side by side, each in a process of its own.
        reuse: folders of other benchmarks, whose finished trials of the same recipes and seeds are taken.
        say: told as trials finish.

    Returns:
        The sentence.

    Raises:
        ConfigError: when arms cannot be paired, or the folder holds another benchmark.
        BenchFailed: when trials failed, after all the others were run.
    """
    folder = BenchFolder(path=path)
    recipes = plan.recipes()
    with folder.held():
        folder.prepare(plan, recipes)
        for other in reuse:
            if taken := folder.take(BenchFolder(path=other), plan):
                say(f"{plan.name}: {len(taken)} trials taken from {other}")
        if not folder.base.is_file():
            say(f"{plan.name}: judging the common start")
            _judge_base(folder, plan)
        waiting = [trial for trial in plan.trials if not folder.finished(*trial)]
        say(f"{plan.name}: {len(plan.trials) - len(waiting)} of {len(plan.trials)} trials are finished")
        failed = _run_all(folder, plan, waiting, jobs, say)
        sentence = write_results(folder.path, plan) if gather_tables(folder, plan) else "No trial is finished."
    if failed:
        raise BenchFailed(
            f"{len(failed)} trials did not finish: {', '.join(f'{arm} seed {seed}' for arm, seed in failed)}. See "
            f"{folder.trial(*failed[0]) / 'log.txt'}; run the same command again to go on."
        )
    return sentence


def _judge_base(folder: BenchFolder, plan: Plan) -> None:
    folder.base.parent.mkdir(exist_ok=True)
    log = folder.base.parent / "log.txt"
    with log.open("w") as stream:
        status = _wait(command(folder, "--base"), plan.threads, stream)
    if status:
        raise BenchFailed(f"the common start could not be judged (exit status {status}); see {log}.")


def _wait(words: Sequence[str], threads: int, stream: IO[str]) -> int:
    """Run a process to its end, holding the pipe that tells it that this process lives."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=stream,
        stderr=subprocess.STDOUT,
        env=environment(threads),
    )
    try:
        return process.wait()
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _run_all(
    folder: BenchFolder, plan: Plan, waiting: Sequence[tuple[str, int]], jobs: int, say: Callable[[str], None]
) -> list[tuple[str, int]]:
    """The trials that failed.

    Raises:
        OSError: when the folder cannot be written to any more, after the trials under way have ended.
    """
    todo: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for trial in waiting:
        todo.put(trial)
    failed: list[tuple[str, int]] = []
    errors: list[Exception] = []
    lock, stop = threading.Lock(), threading.Event()

    def work() -> None:
        try:
            work_off()
        except Exception as error:  # such as a full disk: the main thread says it, once all have come to an end
            errors.append(error)
            stop.set()

    def work_off() -> None:
        while not stop.is_set():
            try:
                arm, seed = todo.get_nowait()
            except queue.Empty:
                return
            place = folder.trial(arm, seed)
            place.mkdir(parents=True, exist_ok=True)
            with (place / "log.txt").open("a") as stream:
                status = _wait(command(folder, arm, str(seed)), plan.threads, stream)
            with lock:
                if status:
                    failed.append((arm, seed))
                    stop.set() if status == STOPPED else None
                else:
                    gather_tables(folder, plan)
                say(f"{plan.name}: {arm} seed {seed}: {'finished' if not status else f'exit status {status}'}")

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(waiting)))]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:  # the trials were interrupted too: each saves where it is
        stop.set()
        for worker in workers:
            worker.join()
        raise
    if errors:
        raise errors[0]
    return failed
