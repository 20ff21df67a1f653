"""What is under way, on stderr, and Ctrl-C."""

import os
import subprocess
import sys

import pytest

from tersor._cli_progress import Progress
from tersor.core.context import under_way

CTRL_C = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # some parents have it ignored
before = signal.getsignal(signal.SIGINT)

from tersor._cli_progress import Progress, interruptible
from tersor.core.context import under_way

progress = Progress()
with interruptible(progress.now) as should_stop, under_way(progress, "stage 2 of 3: static"):
    for _ in progress(range(4), "calibrating"):
        pass
    for item in progress(range(4), "racing"):
        if item < 2:
            continue
        assert not should_stop()
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        break
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("stopped")
assert signal.getsignal(signal.SIGINT) is before
"""


def test_ctrl_c_once_says_what_it_waits_for_and_twice_stops() -> None:
    done = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
    assert "waiting for: stage 2 of 3: static, racing: 2 of 4, about 0.0 s left" in done.stderr
    assert "Ctrl-C again stops at once; --resume then goes on from what is saved by now" in (
        done.stderr
    )


def test_a_file_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    with under_way(progress, "stage 1 of 2"):
        assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_what_was_under_way() -> None:
    progress = Progress()

    def fails() -> None:
        with under_way(progress, "stage"):
            for letter in progress("ab", "letters"):
                raise ValueError(letter)

    with pytest.raises(ValueError, match="a"):
        fails()
    assert progress.now() == ""


def test_a_terminal_gets_bars_without_a_thread_and_is_cleared_up() -> None:
    code = (
        "import sys, threading\n"
        "sys.stderr.isatty = lambda: True\n"
        "from tersor._cli_progress import Progress\n"
        "track = Progress()\n"
        "for outer in track(range(2), 'stages'):\n"
        "    for inner in track(iter(range(3)), 'batches', 3):\n"
        "        assert threading.active_count() == 1, threading.enumerate()\n"
        "assert track.live is None and not track.tasks\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TERM": "xterm"}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "batches" in done.stderr
