"""Whether a run has come to its end, by its newest checkpoint and its ledger alone."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from batiste.train.ledger import LEDGER_FILE, read_ledger
from batiste.train.report import REPORT_FILE

FINISHED = "finished"  # The event of a run that was evaluated, and reported, at its end.
# With these as they were, a run ends at the step that its checkpoint says.
OF_LENGTH = ("train.num_steps", "train.stop.flops", "train.batch_size")


def out_of_patience(validation: Sequence[Sequence[float]], patience: int | None) -> bool:
    """Whether the best of the losses [step, loss] is `patience` evaluations old."""
    if patience is None or not validation:
        return False
    best = min(range(len(validation)), key=lambda index: validation[index][1])
    return len(validation) - 1 - best >= patience


def why_ended(meta: dict[str, Any], step: int, config: dict[str, Any]) -> str | None:
    """Why no step follows a checkpoint: "done", "patience", or None where one does.

    Args:
      meta: of the checkpoint.
      step: of the checkpoint.
      config: the flat config to continue with; more steps, or more patience, continue the run.
    """
    if out_of_patience(meta["validation"], config["train.stop.patience"]):
        return "patience"
    last_step = None if config["train.stop.flops"] else config["train.num_steps"]
    if all(meta["config"].get(name) == config[name] for name in OF_LENGTH):
        last_step = meta.get("last_step", last_step)
    return "done" if last_step is not None and step >= last_step else None


def measured_at_end(workdir: str | os.PathLike, reason: str, step: int) -> dict[str, Any] | None:
    """The validation of a run that ended so after `step`; None where its report is to be made."""
    folder = pathlib.Path(workdir)
    if not (folder / LEDGER_FILE).is_file() or not (folder / REPORT_FILE).is_file():
        return None
    for event in reversed(read_ledger(folder)):
        if event["event"] == "decision" and event["action"] == "roll_back":
            return None
        if event["event"] == FINISHED:
            same = (event["reason"], event["step"]) == (reason, step)
            return event["validation"] if same else None
    return None


def how_to_go_on(reason: str, config: dict[str, Any]) -> str:
    """Why a run has ended, and which flags would continue it; config: the flat one."""
    if reason == "patience":
        return ("the validation loss no longer falls; to go on, raise --config.train.stop.patience="
                f"{config['train.stop.patience']}")
    if config["train.stop.flops"] is not None:
        return ("its budget is spent; to go on, raise --config.train.stop.flops="
                f"{config['train.stop.flops']:g}")
    return ("all of its steps are done; to go on, raise --config.train.num_steps="
            f"{config['train.num_steps']}, with --resume_override=train.num_steps")
