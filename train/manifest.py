"""Which steps of a work directory are committed, and whether their files are what was written.

A step is saved in N.unfinished/, its files are hashed into N.unfinished/manifest.json, and the
directory is renamed to N/: what has a number for a name and no manifest of its own is no step.
"""

import os
import pathlib
import shutil
from typing import NamedTuple

from batiste.data import damage, hash_files, read_signed, write_signed

CHECKPOINT_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
UNFINISHED = ".unfinished"


class Found(NamedTuple):
    """The newest step that verifies (None: no step does), and why each newer one was passed over."""

    step: int | None
    passed_over: dict[int, str]


def commit(unfinished: pathlib.Path, step: int) -> dict[str, int]:
    """Turns `unfinished` into the committed step; returns its number of files and bytes."""
    files = hash_files(unfinished)
    write_signed(unfinished / MANIFEST_FILE, {"step": step, "files": files})
    set_aside(unfinished.parent, step)
    os.rename(unfinished, unfinished.parent / str(step))
    return {"files": len(files), "bytes": sum(size for size, _ in files.values())}


def numbered(folder: pathlib.Path) -> list[int]:
    """The directories that are named like steps and hold something, in ascending order."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    steps = sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
    return [step for step in steps if any((folder / str(step)).iterdir())]


def is_committed(folder: pathlib.Path, step: int) -> bool:
    """Whether a step has its manifest; its files may still be damaged."""
    return not isinstance(_manifest(folder, step), str)


def problem(folder: pathlib.Path, step: int) -> str | None:
    """Why a directory that is named like a step does not verify, or None when every file does."""
    manifest = _manifest(folder, step)
    return manifest if isinstance(manifest, str) else damage(folder / str(step), manifest["files"])


def newest_verified(folder: pathlib.Path) -> Found:
    """Reads every byte of the newest step, and of older ones as long as none verifies."""
    passed_over: dict[int, str] = {}
    for step in reversed(numbered(folder)):
        why = problem(folder, step)
        if why is None:
            return Found(step, passed_over)
        passed_over[step] = why
    return Found(None, passed_over)


def verify_all(workdir: pathlib.Path) -> dict[int, str | None]:
    """What is wrong with each step of a work directory, oldest first; needs no device.

    Raises ValueError where there is nothing to verify.
    """
    folder = pathlib.Path(workdir, CHECKPOINT_FOLDER)
    steps = numbered(folder)
    if not steps:
        raise ValueError(f"workdir={workdir}: no checkpoints there; expected the --workdir of a "
                         "`batiste train`")
    return {step: problem(folder, step) for step in steps}


def set_aside(folder: pathlib.Path, step: int) -> None:
    """Renames what has the name of a step, so that nothing is lost or mistaken."""
    path, count = folder / str(step), 1
    if not path.is_dir() or not any(path.iterdir()):
        return  # A directory may be renamed to the name of an empty one.
    while (target := folder / f"{step}.set_aside_{count}").exists():
        count += 1
    os.rename(path, target)


def sweep(folder: pathlib.Path) -> None:
    """Removes what killed saves and deletions left behind."""
    for path in folder.glob(f"*{UNFINISHED}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove(folder: pathlib.Path, step: int) -> None:
    """Deletes a step; killed in between, it leaves nothing that looks like one."""
    condemned = folder / f"{step}.removed{UNFINISHED}"
    os.rename(folder / str(step), condemned)
    shutil.rmtree(condemned)


def _manifest(folder: pathlib.Path, step: int) -> dict | str:
    """The manifest of a step, or why it has none."""
    path = folder / str(step) / MANIFEST_FILE
    if not path.is_file():
        return f"{path} is missing: a partial or foreign directory"
    manifest = read_signed(path)
    if manifest is None:
        return f"{path} is damaged"
    if manifest.get("step") != step:
        return f"{path} is of step {manifest.get('step')}: a renamed directory"
    return manifest
