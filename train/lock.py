"""One process at a time writes to a work directory: an advisory lock that names its holder.

The lock is flock(2) on run.lock, which the kernel releases when the holder dies. Some network file
systems know no flock, or keep it to one machine; hence the text of the file (who holds it) and its
time of change, which the holder renews every `BEAT_SECONDS`.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from batiste.data.json_files import read_json
from batiste.train.ledger import boot_id
from batiste.train.lines import complain

LOCK_FILE = "run.lock"
KIND = {"pid": int, "host": str, "boot": str | None, "started": str}  # What is in it.
BEAT_SECONDS = 5.0
# A holder on another machine whose file is unchanged for so long is dead: attributes of files are
# cached for up to 60 s by NFS and by buckets that are mounted.
SILENT_SECONDS = 75.0
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def work_directory_lock(workdir: str | os.PathLike, break_lock: bool = False) -> Iterator[None]:
    """Holds `workdir` until the block ends; makes the directory, and removes it if it stays empty.

    Args:
      workdir: the directory of a run.
      break_lock: takes over from a holder on another machine that gives no sign of life.

    Raises:
      ValueError: another process, or another thread of this one, holds it; the message names it.
    """
    folder = pathlib.Path(workdir)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    descriptor = _acquire(path, break_lock)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(descriptor, ended), name="lock", daemon=True)
    try:
        beat.start()
        yield
    finally:
        ended.set()
        beat.join()
        _release(path, descriptor)
        with contextlib.suppress(OSError):
            for each in made:
                each.rmdir()  # Only an empty one.


def holder_of(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Who holds a work directory, or held it when it died: pid, host, boot, started; or None."""
    path = pathlib.Path(workdir, LOCK_FILE)
    with contextlib.suppress(OSError, ValueError):
        return read_json(path, KIND)
    return None


def _acquire(path: pathlib.Path, break_lock: bool) -> int:
    """The descriptor of the lock file, which is locked and says that this process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = _flock(descriptor)
            holder = holder_of(path.parent)
            if locked is False or (holder is not None and _alive(path, holder, locked)):
                _refuse_or_break(path, holder, locked, break_lock)
            elif locked is None or _is_same_file(path, descriptor):
                _write_holder(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # The file was removed meanwhile, or has just been broken: once more.


def _flock(descriptor: int) -> bool | None:
    """Whether the lock was taken; None where the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _alive(path: pathlib.Path, holder: dict[str, Any], locked: bool | None) -> bool:
    """Whether the process that the text names, though the lock does not show it, is at work.

    On this machine flock alone decides where there is one; elsewhere the file's time of change does.
    """
    if holder["host"] == socket.gethostname():
        if locked or holder["boot"] != boot_id():
            return False
        return pathlib.Path(f"/proc/{holder['pid']}").exists()
    return _beats(path)


def _beats(path: pathlib.Path) -> bool:
    """Whether the file is renewed within `SILENT_SECONDS`; compares no clocks of two machines."""
    before, deadline = _changed(path), time.monotonic() + SILENT_SECONDS
    complain(f"{path} names another machine; looking for up to {SILENT_SECONDS:g} s whether it is "
             "still being renewed")
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if _changed(path) != before:
            return True
    return False


def _changed(path: pathlib.Path) -> int | None:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def _refuse_or_break(
    path: pathlib.Path, holder: dict[str, Any] | None, locked: bool | None, break_lock: bool
) -> None:
    """Raises ValueError that names the holder; with `break_lock` removes the lock of a dead one."""
    who = "another process" if holder is None else (
        f"process {holder['pid']} on {holder['host']} since {holder['started']}")
    elsewhere = holder is not None and holder["host"] != socket.gethostname()
    if break_lock and elsewhere and locked is False and not _beats(path):
        complain(f"{path}: broken; it was held by {who}, which gives no sign of life")
        path.unlink(missing_ok=True)
        return
    hint = "wait for it, end it, or choose another --workdir"
    if elsewhere and break_lock:
        hint = f"--break_lock does not break it: {path.name} is still being renewed; {hint}"
    elif elsewhere:
        hint += "; if that machine is gone, --break_lock"
    raise ValueError(f"workdir={path.parent}: is in use by {who}: {hint}")


def _is_same_file(path: pathlib.Path, descriptor: int) -> bool:
    """Whether the path still names the open file: a holder removes it when it ends."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot_id(),
              "started": started}
    with contextlib.suppress(OSError):  # A full disk: the lock holds without its text.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _release(path: pathlib.Path, descriptor: int) -> None:
    """Removes the file while it is still locked, unless another has broken the lock."""
    with contextlib.suppress(OSError):
        if _is_same_file(path, descriptor):
            path.unlink()
    os.close(descriptor)
