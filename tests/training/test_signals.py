"""A stop request is a flag; the second Ctrl-C is not."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rlt2i.runs.checkpoint import latest_checkpoint
from rlt2i.training.signals import GracefulStop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_says_so(number, capfd):
    with GracefulStop() as stop:
        assert (stop.requested, stop.reason) == (False, "")
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.reason) == (True, number.name)
    assert f"{number.name}: stopping after this iteration" in capfd.readouterr().err


def test_second_interrupt_raises_second_termination_does_not():
    with GracefulStop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_are_put_back(fails):
    def mine(*_):
        pass

    before = signal.signal(signal.SIGTERM, mine), signal.getsignal(signal.SIGINT)
    try:
        try:
            with GracefulStop():
                assert signal.getsignal(signal.SIGTERM) is not mine
                if fails:
                    raise KeyError("boom")
        except KeyError:
            assert fails
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_another_thread_is_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def body() -> None:
        with GracefulStop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


_LOOP = """
    import sys, time
    from rlt2i.training.signals import GracefulStop

    done = 0
    with GracefulStop() as stop:
        print("ready", flush=True)
        while not stop.requested:
            time.sleep(0.01)
            done += 1
    print("saved", flush=True)
"""


def test_a_loop_finishes_its_update_and_exits_0():
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_LOOP)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (output, process.returncode) == ("saved\n", 0)
    assert "SIGTERM: stopping after this iteration" in errors


def ends(body: str) -> subprocess.CompletedProcess[str]:
    """A process that does this within a `GracefulStop`."""
    start = "import os, signal, threading, time\nfrom rlt2i.training import signals\nsignals.PATIENCE = 0.2\n"
    script = f"{start}with signals.GracefulStop() as stop:\n{textwrap.indent(textwrap.dedent(body), '    ')}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


_TWICE = (
    "threading.Timer(0.1, lambda: [os.kill(os.getpid(), signal.SIGINT) or time.sleep(0.1) for _ in range(2)]).start()"
)


def test_twice_ends_a_process_that_is_stuck_in_foreign_code():
    done = ends(f"import hashlib\n{_TWICE}\nhashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)")
    assert done.returncode == 130
    assert "stuck in foreign code" in done.stderr


def test_twice_ends_one_that_hangs_in_python_by_an_exception():
    done = ends(
        f"{_TWICE}\ntry:\n    time.sleep(100)\nexcept KeyboardInterrupt:\n    time.sleep(0.5)\n    print('kept')"
    )
    assert (done.returncode, done.stdout) == (0, "kept\n")  # whoever hears of it has the time that he needs


def test_the_third_time_nothing_swallows_it():
    body = """
        for _ in range(3):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
            except BaseException:
                print("swallowed", flush=True)
        print("alive", flush=True)
    """
    done = ends(body)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "swallowed\n")


def test_leaving_ends_the_watching_thread_and_puts_the_descriptor_back():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with GracefulStop():
        (watching,) = [thread for thread in threading.enumerate() if thread.name == "signals"]
    watching.join(10)
    assert not watching.is_alive()
    assert signal.set_wakeup_fd(before) == before


@pytest.mark.slow
def test_a_terminal_that_goes_away_stops_the_run_and_is_no_error(tmp_path):
    words = ["-m", "rlt2i", "train", "tests.helpers.toy_recipe:slow", "--run-dir", str(tmp_path / "run")]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(Path(__file__).parents[2])
        os.execv(sys.executable, [sys.executable, *words])
    while not (tmp_path / "run" / "metrics.jsonl").exists() and os.read(terminal, 1000):
        pass
    os.close(terminal)  # SIGHUP to the run, and nobody reads what it says any more
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert latest_checkpoint(tmp_path / "run") is not None
