"""Whether a run may continue from what its work directory holds."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from batiste.train.ledger import LEDGER_FILE, last_saved
from batiste.train.manifest import CHECKPOINT_FOLDER, UNFINISHED, Found
from batiste.train.metrics import METRICS_FILE

RESUME_MODES = ("auto", "must", "never")
NAMED_AT_MOST = 8
# What a run writes besides its checkpoints and its ledger.
TRACES = (METRICS_FILE, "tensorboard", "report.md", "report.html", "loss.png", "doctor.md")


def check_mode(mode: str, found: Found, workdir: str | os.PathLike) -> None:
    """Raises ValueError when `mode` does not allow what was found.

    "auto" continues if there is a checkpoint, "must" demands one, "never" refuses to find one.
    Nothing starts from scratch where a step was saved, or where anything else shows that a run was.
    """
    if mode not in RESUME_MODES:
        raise ValueError(f"resume={mode!r}: expected one of {', '.join(RESUME_MODES)}")
    there = found.step if found.step is not None else max(found.passed_over, default=None)
    if mode == "never" and there is not None:
        raise ValueError(
            f"resume=never, but {workdir} holds a checkpoint of step {there}: choose another "
            "--workdir, or use --resume=auto to continue"
        )
    if found.step is not None:
        return
    if found.passed_over:
        raise ValueError(
            f"{workdir} holds no checkpoint that verifies: {'; '.join(found.passed_over.values())}. "
            "Bring the files back, or choose another --workdir to start from scratch"
        )
    saved = last_saved(workdir)
    if saved is not None:
        raise ValueError(
            f"{workdir} holds no checkpoint, but its ledger says that step {saved} was saved: "
            "bring the checkpoints back, or choose another --workdir to start from scratch"
        )
    traces = traces_of_a_run(workdir)
    if traces:
        raise ValueError(
            f"{workdir} holds no checkpoint and no ledger, but a run has left {', '.join(traces)} "
            "there: bring checkpoints/ and ledger.jsonl back; to start from scratch, choose another "
            "--workdir or remove these"
        )
    if mode == "must":
        raise ValueError(
            f"resume=must, but {workdir} holds no committed checkpoint: check --workdir, or use "
            "--resume=auto to start from scratch"
        )


def traces_of_a_run(workdir: str | os.PathLike) -> list[str]:
    """What only a run leaves in its work directory, where its ledger is gone; relative paths.

    With a ledger there are none: a run that died before its first save has left them too.
    """
    folder = pathlib.Path(workdir)
    if (folder / LEDGER_FILE).is_file():
        return []
    found = [name for name in TRACES if (folder / name).exists()]
    found += [str(path.relative_to(folder))
              for pattern in (f"{CHECKPOINT_FOLDER}/*.set_aside_*", f"{CHECKPOINT_FOLDER}/*{UNFINISHED}")
              for path in sorted(folder.glob(pattern))]
    # A config alone may have been copied here to train by it; an import writes one too.
    trained = (folder / "data").is_dir() and not (folder / "imported").is_dir()
    return found + (["config.json"] if trained and (folder / "config.json").exists() else [])


def check_same(
    stored: dict[str, Any], given: dict[str, Any], free_to_change: Sequence[str] = ()
) -> list[str]:
    """Raises ValueError naming what differs between a checkpoint and a run; returns what may.

    free_to_change: beginnings of the names of what may differ.
    """
    absent, changes, allowed = object(), [], []
    for name in sorted(stored.keys() | given.keys()):
        was, now = stored.get(name, absent), given.get(name, absent)
        if was == now:
            continue
        shown = ["absent" if value is absent else repr(value) for value in (was, now)]
        change = f"{name} was {shown[0]}, is {shown[1]}"
        (allowed if name.startswith(tuple(free_to_change)) else changes).append(change)
    if changes:
        more = len(changes) - NAMED_AT_MOST
        rest = f"; and {more} more" if more > 0 else ""
        raise ValueError(
            f"the checkpoint is of another run: {'; '.join(changes[:NAMED_AT_MOST])}{rest}. Change "
            "it back, choose another --workdir, or, if it is meant, name it in --resume_override"
        )
    return allowed


def check_override(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError for a name that begins none of `known`."""
    for name in names:
        if not any(each.startswith(name) for each in known) or not name:
            raise ValueError(
                f"resume_override={name}: expected fields of the config, such as "
                "train.schedule.learning_rate, or data, or tokenizer"
            )


def arrays_of(tree: Any) -> dict[str, str]:
    """Dtype and shape of each array, by its path: what code must expect to read a checkpoint."""
    return {
        f"array {jax.tree_util.keystr(path, simple=True, separator='.')}":
            f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
