"""Which code a work directory may run by naming it: what was used with it on this machine before.

The config of a work directory may name a Python file (docs/extend.md). One that came from elsewhere
must not run it unasked. So what a run or an import uses is remembered outside the directory, in the
user's state folder: an empty file for each pair of a directory and the hash of a code.
"""

import hashlib
import os
import pathlib
import sys
from typing import Any

from batiste.configs.own_parts import own_files

# What this process was told to trust, where the state folder cannot be written.
_REMEMBERED: set[str] = set()


def state_folder() -> pathlib.Path:
    """Where programs keep what they remember of a user (XDG base directories)."""
    home = os.environ.get("XDG_STATE_HOME") or pathlib.Path.home() / ".local" / "state"
    return pathlib.Path(home, "batiste", "trusted_code")


def remember_code(workdir: str | os.PathLike, experiment: Any) -> None:
    """Lets verbs that read this work directory run the code that the experiment names now."""
    for mark in _marks(workdir, experiment).values():
        _REMEMBERED.add(mark)
        try:
            state_folder().mkdir(parents=True, exist_ok=True)
            (state_folder() / mark).touch()
        except OSError as error:
            print(f"{state_folder()} cannot be written ({error.strerror}): later commands on "
                  f"{workdir} will ask for --trust_code", file=sys.stderr, flush=True)
            return


def check_code(workdir: str | os.PathLike, experiment: Any) -> None:
    """Raises ValueError for code that this directory was not used with on this machine."""
    for path, mark in _marks(workdir, experiment).items():
        if mark not in _REMEMBERED and not (state_folder() / mark).is_file():
            raise ValueError(
                f"workdir={workdir}: its config.json runs {path}, which was not used with this "
                "directory here, or has changed: read it, then add --trust_code to run it")


def _marks(workdir: str | os.PathLike, experiment: Any) -> dict[str, str]:
    """Of each file that an experiment names and that there is: the pair, as a file name."""
    place = str(pathlib.Path(workdir).resolve()).encode()
    return {
        path: hashlib.sha256(
            place + b"\0" + hashlib.sha256(pathlib.Path(path).read_bytes()).digest()).hexdigest()
        for path in own_files(experiment) if pathlib.Path(path).is_file()
    }
