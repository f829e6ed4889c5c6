"""Checkpoints through Orbax: asynchronous, sharded, and never latest unless committed.

The place for integrity manifests (hash on commit, verify on restore, fall back) is here.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from batiste.train.config import CheckpointConfig
from batiste.train.state import TrainState

CHECKPOINT_FOLDER = "checkpoints"


class _Manager(ocp.CheckpointManager):
    """Orbax's, without its own questions to jax's preemption service.

    The service answers yes to one number, one above the last that any process asked about. The
    loop asks about 1, 2, 3 and so on (train/stopping.py); Orbax would ask about the step between
    two of them.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """The committed states of a run. Opening sweeps what a killed save left behind.

    All processes of a run make the same calls, in the same order.
    """

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig):
        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(config.keep)]
        if config.keep_every is not None:
            keep.append(policies.EveryNSteps(config.keep_every))
        self._manager = _Manager(
            pathlib.Path(workdir, CHECKPOINT_FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
                # By default an empty directory named like a step counts as a checkpoint.
                atomicity_options=ocp.options.AtomicityOptions(
                    mode=ocp.options.AtomicityMode.COMMIT_FILE
                ),
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The committed steps."""
        return sorted(self._manager.all_steps())

    def forget_after(self, step: int) -> None:
        """Deletes the committed states of later steps."""
        with jax.transfer_guard("allow"):
            for later in [saved for saved in self.steps if saved > step]:
                self._manager.delete(later)

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts saving; returns when the arrays are copied and the step may donate them."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), meta=ocp.args.JsonSave(meta)
        )
        # In Orbax, processes wait for each other by sums over all devices, fetched implicitly.
        with jax.transfer_guard("allow"):
            self._manager.save(step, args=args)

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of a step: config, fingerprint, validation losses."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state of a step, laid out as `abstract_state` says (shapes, dtypes, shardings)."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state._asdict()))
        return TrainState(**self._manager.restore(step, args=args)["state"])

    def restore_params(self, step: int, params: Any) -> Any:
        """Only the parameters of a step, laid out as the abstract `params` say."""
        args = ocp.args.PyTreeRestore(
            item={"params": params},
            restore_args=ocp.checkpoint_utils.construct_restore_args({"params": params}),
            partial_restore=True,
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]["params"]

    def wait(self) -> None:
        """Returns when every save is committed; raises what a failed one met."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        self._manager.close()
