"""Checkpoints through Orbax: asynchronous, sharded, hashed when written, verified when read."""

import json
import pathlib
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from batiste.sharding import Agreed, AskedElsewhere, is_first, together
from batiste.train import manifest
from batiste.train.config import CheckpointConfig
from batiste.train.manifest import CHECKPOINT_FOLDER, UNFINISHED, Found
from batiste.train.silence import silence_orbax
from batiste.train.state import TrainState

ARRAYS = "state"
META_FILE = "meta.json"
SAVE_SECONDS = 900  # Longer than that a save does not take: its disk or a process hangs.


class Checkpoints:
    """The committed states of a run; only `save` and what follows it change the directory.

    All processes of a run make the same calls, in the same order. report: is called with the name
    and the fields of what happens ("saved", "save_failed"), from a thread too. apart: how many steps
    processes may be from each other.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: CheckpointConfig,
        report: Callable[..., None] = lambda event, **fields: None,
        apart: int = 1,
    ):
        self.folder = pathlib.Path(workdir, CHECKPOINT_FOLDER).absolute()
        self._config, self._report, self._apart = config, report, apart
        self._orbax = self._make_orbax()
        self._opened = False
        self._save: _Save | None = None
        self._failures = 0
        self._leftovers: list[pathlib.Path] = []
        silence_orbax()

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, None if there is none; `newest_verified` reads its files."""
        steps = [step for step in manifest.numbered(self.folder)
                 if manifest.is_committed(self.folder, step)]
        return max(steps, default=None)

    def newest_verified(self) -> Found:
        """The newest step of which every file is what was written; process 0 reads them."""
        found = together(
            "verify the checkpoints",
            lambda: json.dumps(manifest.newest_verified(self.folder)) if is_first() else "",
            SAVE_SECONDS,
        )[0]
        step, passed_over = json.loads(found)
        return Found(step, {int(number): why for number, why in passed_over.items()})

    def verified(self) -> list[int]:
        """All steps of which every file is what was written, ascending; process 0 reads them."""
        def read() -> str:
            return json.dumps([step for step in manifest.numbered(self.folder)
                               if manifest.problem(self.folder, step) is None])

        return json.loads(together(
            "verify all checkpoints", read if is_first() else str, SAVE_SECONDS)[0])

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of a step: config, fingerprint, validation losses."""
        return json.loads((self.folder / str(step) / META_FILE).read_bytes())

    def restore(self, step: int, abstract: Any) -> Any:
        """The arrays of a step, laid out as `abstract` says (shapes, dtypes, shardings).

        abstract: a TrainState, or a dict with some of its fields.
        """
        item = abstract._asdict() if isinstance(abstract, TrainState) else abstract
        restored = self._orbax.restore(self.folder / str(step) / ARRAYS, args=ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=not isinstance(abstract, TrainState),
        ))
        return TrainState(**restored) if isinstance(abstract, TrainState) else restored

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts saving; returns when the arrays are copied and the step may donate them.

        A save before this one that failed is reported, and this one is its second try. Raises
        ValueError after `max_failures` in a row.
        """
        self._settle()
        self._open(step)
        again = Agreed(f"save/{step}", self._apart)
        self._save = _Save(self.folder, step, meta, again)

        def begin() -> str:
            self._save.unfinished.mkdir()
            return ""

        try:
            # What only the first process would find out, all must know before they wait in Orbax.
            together(f"begin the save of step {step}", begin if is_first() else str)
            # In Orbax, processes wait for each other by sums over all devices, fetched implicitly.
            with jax.transfer_guard("allow"):
                self._orbax.save(self._save.unfinished / ARRAYS,
                                 args=ocp.args.PyTreeSave(state._asdict()))
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            self._save.fail(error)
            return
        self._save.begin(self._finish)

    def failed(self, step: int) -> bool:
        """Whether the save under way has failed, so that this step is to be saved instead.

        Asked after every step. Several processes agree on a step soon after the failure. A second
        failure in a row waits for the next save that is due.
        """
        if self._save is None or not self._save.again.now(step):
            return False
        self._settle()
        return self._failures == 1

    def finish(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Returns when the save of the last step is committed; where it fails, tries once more.

        Raises ValueError with the reason when that fails too.
        """
        why = self._settle()
        if why is None:
            return
        self.save(step, state, meta)
        why = self._settle()
        if why is not None:
            raise ValueError(
                f"the checkpoint of step {step} could not be saved: {why}; the newest that was is "
                f"of step {self.latest_step}. Mend that, and the same command continues"
            )

    def wait(self) -> None:
        """Returns when no save is under way; one that failed is reported."""
        self._settle()

    def set_aside_from(self, step: int) -> None:
        """Renames the steps from `step` on, and what is named like one: the run goes another way."""
        def rename() -> str:
            for found in manifest.numbered(self.folder):
                if found >= step or not manifest.is_committed(self.folder, found):
                    manifest.set_aside(self.folder, found)
            return ""

        together("set newer checkpoints aside", rename if is_first() else str)

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        if self._save is not None:
            self._save.join()
        self._orbax.close()

    def _open(self, step: int) -> None:
        """Before the first save: sweeps what killed saves left, sets aside what is no step.

        What is as new as this save was passed over when the run started, because it is damaged.
        """
        if self._opened:
            return
        self._opened = True

        def clean() -> str:
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.sweep(self.folder)
            return ""

        together("open the checkpoints", clean if is_first() else str)
        self.set_aside_from(step)

    def _settle(self) -> str | None:
        """Joins the save under way; returns, and has reported, why it failed in any process."""
        if self._save is None:
            return None
        save = self._save
        try:
            reasons = together("finish the save", save.join, SAVE_SECONDS)
        finally:
            self._save = None
        why = next((f"process {index}: {reason}" if len(reasons) > 1 else reason
                    for index, reason in enumerate(reasons) if reason), None)
        if why is not None:
            self._leftovers.append(save.unfinished)
        if is_first():
            for path in self._leftovers:  # Each time: writes of a failed save may end late.
                shutil.rmtree(path, ignore_errors=True)
        if why is None:
            self._failures = 0
            return None
        # The old one raises what is left of this failure amid the next save, after one barrier and
        # before another, in the processes that it was of.
        self._orbax = self._make_orbax()
        self._failures += 1
        self._report("save_failed", step=save.step, why=why, in_a_row=self._failures)
        limit = self._config.max_failures
        if limit is not None and self._failures >= limit:
            raise ValueError(
                f"{self._failures} saves in a row failed (train.checkpoint.max_failures={limit}), "
                f"the last with: {why}; the newest checkpoint is of step {self.latest_step}"
            )
        return why

    def _make_orbax(self) -> ocp.AsyncCheckpointer:
        return ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(), timeout_secs=SAVE_SECONDS,
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._meet))

    def _meet(self, key: str, timeout_ms: int) -> None:
        """Where Orbax's threads wait for each other: not for a process whose save has failed."""
        if jax.process_count() > 1:
            self._save.again.meet(key, timeout_ms / 1000)

    def _finish(self, save: "_Save") -> None:
        """In the thread of a save: hash, commit, and delete the steps that nothing keeps."""
        self._orbax.wait_until_finished()
        if not is_first():
            return
        written = time.perf_counter()
        (save.unfinished / META_FILE).write_text(save.meta)
        facts = manifest.commit(save.unfinished, save.step)
        now = time.perf_counter()
        self._report("saved", step=save.step, seconds=now - save.started,
                     hash_seconds=now - written, **facts)
        for step in self._stale(save):
            manifest.remove(self.folder, step)

    def _stale(self, save: "_Save") -> list[int]:
        """Committed steps that are neither among the newest, nor at a multiple, nor the best."""
        config, steps = self._config, manifest.numbered(self.folder)
        steps = [step for step in steps if manifest.is_committed(self.folder, step)]
        kept = set(steps[-config.keep:])
        if config.keep_every is not None:
            kept |= {step for step in steps if step % config.keep_every == 0}
        if config.keep_best is not None:
            losses = {step: loss for step, loss in save.validation if step in steps}
            kept |= set(sorted(losses, key=losses.__getitem__)[:config.keep_best])
        return [step for step in steps if step not in kept]


class _Save:
    """One save: what it is of, the thread that commits it, and how it failed."""

    def __init__(self, folder: pathlib.Path, step: int, meta: dict[str, Any], again: Agreed):
        self.step, self.started, self.again = step, time.perf_counter(), again
        self.meta = json.dumps(meta, indent=1) + "\n"  # The loop goes on to change it.
        self.validation = list(meta.get("validation", ()))
        self.unfinished = folder / f"{step}{UNFINISHED}"
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def begin(self, finish: Callable[["_Save"], None]) -> None:
        """Finishes in a thread of its own."""
        def run() -> None:
            try:
                finish(self)
                if is_first():
                    self.again.refuse()
            except Exception as error:
                self.fail(error)

        self._thread = threading.Thread(target=run, name=f"save of step {self.step}")
        self._thread.start()

    def fail(self, error: BaseException) -> None:
        """Remembers why it failed, and asks for another."""
        self.error = error
        self.again.ask()

    def join(self) -> str:
        """Waits for the end; returns why it failed, or nothing."""
        if self._thread is not None:
            self._thread.join(SAVE_SECONDS)
            if self._thread.is_alive():
                self.error = TimeoutError(f"not finished after {SAVE_SECONDS} s")
        # Where another process has failed, that one says why.
        if self.error is None or isinstance(self.error, AskedElsewhere):
            return ""
        return _reason(self.error)


def _reason(error: BaseException) -> str:
    """What the system said, in one line, out of what the layers above it wrapped around it."""
    text = " ".join(str(error).split()) or type(error).__name__
    for known in ("No space left on device", "Disk quota exceeded", "Permission denied",
                  "File too large", "Read-only file system"):
        if known in text:
            return f"{known} ({text[:200]})"
    return text[:400]
