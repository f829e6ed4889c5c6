"""Starts a run, and starts it again when it ends in a way that another start can mend."""

import ctypes
import dataclasses
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from batiste.exit_codes import DONE, meaning, retryable
from batiste.train.ledger import last_saved, note

PR_SET_PDEATHSIG = 1  # prctl(2), Linux


def flag_of(command: Sequence[str], name: str) -> str | None:
    """The value of a flag in a list of arguments: --NAME=VALUE or --NAME VALUE; the last counts.

    It may hold spaces and quotes: what the shell has taken apart is never joined again.
    """
    value, arguments = None, iter(command)
    for argument in arguments:
        given, equals, text = argument.partition("=")
        if given in (f"--{name}", f"-{name}"):
            value = text if equals else next(arguments, None)
    return value


@dataclasses.dataclass
class Patience:
    """retries: starts without a new committed step before giving up. wait, longest_wait: seconds
    before the first of them, doubled for each further one. grace: seconds from SIGTERM to SIGKILL.
    """

    retries: int
    wait: float
    longest_wait: float
    grace: float

    def pause(self, failures: int) -> float:
        """Seconds before the start that follows so many in a row without a new step."""
        return min(self.longest_wait, self.wait * 2 ** max(0, failures - 1))


class Supervisor:
    """Runs a command (without its --resume) on a work directory until that need not go on.

    SIGTERM and SIGINT go on to the process that runs; once one has come nothing is started again.
    """

    def __init__(self, command: Sequence[str], workdir: pathlib.Path, patience: Patience):
        self._command, self._workdir, self._patience = command, workdir, patience
        self._asked: signal.Signals | None = None
        self._child: subprocess.Popen | None = None
        self._deadline: float | None = None

    def run(self, resume: str) -> int:
        """Returns the code to exit with. resume: of the first start; with a step, it is "must"."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        failures, step = 0, last_saved(self._workdir)
        while True:
            code = self._start(resume)
            reached = last_saved(self._workdir)
            progress = reached is not None and (step is None or reached > step)
            failures, step = 1 if progress else failures + 1, reached
            says = self._verdict(code, failures, step)
            if says is not None:
                self._say(says)
                return code if code >= 0 else 128 - code
            pause = self._patience.pause(failures)
            self._say(f"{meaning(code)}; step {step} is committed; starting again in {pause:g} s")
            self._sleep(pause)
            if self._asked is not None:
                self._say(f"{self._asked.name}; not starting again")
                return 128 + self._asked
            resume = "auto" if step is None else "must"

    def _verdict(self, code: int, failures: int, step: int | None) -> str | None:
        """Why this is the end, None if it is not."""
        if code == DONE or self._asked is not None:
            return meaning(code)
        if not retryable(code):
            return f"{meaning(code)}; starting it again would not help"
        if failures > self._patience.retries:
            return (f"{meaning(code)}; giving up after {failures} starts without a committed step "
                    f"beyond {step}")
        return None

    def _start(self, resume: str) -> int:
        """Starts the command and waits; its exit code, -n for signal n."""
        self._deadline = None
        # A session of its own: what a terminal sends to all goes through `_forward` alone.
        self._child = subprocess.Popen(
            [*self._command, f"--resume={resume}"], start_new_session=True, preexec_fn=_tie)
        if self._asked is not None:  # It came while the process was being made.
            self._forward(self._asked, None)
        while True:
            try:
                code = self._child.wait(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._say(f"{self._asked.name} was {self._patience.grace:g} s ago; SIGKILL")
                    self._child.kill()
                    self._deadline = None
        step = last_saved(self._workdir)
        note(self._workdir, "exit", pid=self._child.pid, code=code, what=meaning(code), step=step)
        return code

    def _forward(self, number: int, frame) -> None:
        self._asked = signal.Signals(number)
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)
            self._deadline = time.monotonic() + self._patience.grace

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._asked is None and time.monotonic() < until:
            time.sleep(min(0.1, seconds))

    def _say(self, text: str) -> None:
        print(f"supervise: {text}", file=sys.stderr, flush=True)
        note(self._workdir, "supervise", says=text)


def _tie() -> None:
    """In the new process: should the supervisor die, the next must not find it still running."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
