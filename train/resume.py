"""Whether a run may continue from what its work directory holds."""

from typing import Any

RESUME_MODES = ("auto", "must", "never")


def check_mode(mode: str, latest_step: int | None, workdir: str) -> None:
    """Raises ValueError when `mode` does not allow what was found.

    "auto" continues if there is a checkpoint, "must" demands one, "never" refuses to find one.
    """
    if mode not in RESUME_MODES:
        raise ValueError(f"resume={mode!r}: expected one of {', '.join(RESUME_MODES)}")
    if mode == "must" and latest_step is None:
        raise ValueError(
            f"resume=must, but {workdir} holds no committed checkpoint: check --workdir, or use "
            "--resume=auto to start from scratch"
        )
    if mode == "never" and latest_step is not None:
        raise ValueError(
            f"resume=never, but {workdir} holds a checkpoint of step {latest_step}: choose another "
            "--workdir, or use --resume=auto to continue"
        )


def check_same(
    stored: dict[str, Any], given: dict[str, Any], free_to_change: tuple[str, ...]
) -> None:
    """Raises ValueError naming every field that differs between two flat configs.

    free_to_change: beginnings of the names of fields that may differ.
    """
    absent = object()
    changed = [
        f"{name} was {stored.get(name, 'absent')!r}, is {given.get(name, 'absent')!r}"
        for name in sorted(stored.keys() | given.keys())
        if not name.startswith(free_to_change)
        and stored.get(name, absent) != given.get(name, absent)
    ]
    if changed:
        raise ValueError(
            f"the checkpoint is of another configuration: {'; '.join(changed)}. Change it back, or "
            "choose another --workdir"
        )
