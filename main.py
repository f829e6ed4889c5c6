"""The front door: takes an experiment apart and calls the rooms. The command line calls these."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from batiste.assembly import Assembly, assemble
from batiste.configs.experiment import Experiment, flatten, from_dict
from batiste.data import Loader, Prepared, load_prepared, position
from batiste.data import prepare as prepare_data
from batiste.evaluation import Perplexity
from batiste.forecast import check_memory
from batiste.inference import SamplingConfig
from batiste.sharding import (
    MeshConfig, Share, agree, check_connected, check_shared, is_first, replicate, restack,
    together,
)
from batiste.train import (
    Checkpoints, Decision, Ledger, MetricsWriter, Monitor, Records, RollBack, Run, Watched,
    check_mode, check_same, decide, decided, decisions_of, faulty_batches, fit, from_checkpoint,
    make_train_step, parse_fault, roll_back, skipped, start_of, steered,
)
from batiste.train.checkpoint import CHECKPOINT_FOLDER
from batiste.train.config import CheckpointConfig

CONFIG_FILE = "config.json"
PREPARE_SECONDS = 2 * 3600  # Longer work than that is for `batiste prepare`, on one machine.
# These change where or how a step is computed and recorded, not what it computes.
FREE_TO_CHANGE = (
    "mesh.", "sample.", "train.checkpoint.", "train.evaluation.", "train.stop.", "model.remat",
    "model.saved", "model.offloaded", "model.scan_unroll", "train.health.", "train.faults",
)


class Result(NamedTuple):
    """How training ended ("done", "patience", "SIGINT", "SIGTERM"), after which step, how good."""

    reason: str
    step: int
    validation: Perplexity | None


def prepare(experiment: Experiment, workdir: str | os.PathLike) -> Prepared:
    """Turns raw text into records under `workdir`/data, or finds that this is already done.

    Of several processes the first does it, and the others wait and read what it made.
    """
    experiment.data.validate()

    def make() -> str:
        return str(prepare_data(experiment.data, pathlib.Path(workdir, "data")).directory)

    directory = together("prepare the data", make if is_first() else str, PREPARE_SECONDS)[0]
    read: list[Prepared] = []
    together("read what process 0 prepared",
             lambda: read.append(load_prepared(directory)) or read[0].fingerprint)
    prepared = read[0]
    if prepared.tokenizer.vocab_size > experiment.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={experiment.model.vocab_size}, but the tokenizer has "
            f"{prepared.tokenizer.vocab_size} tokens: set model.vocab_size at least that high"
        )
    return prepared


def train(
    experiment: Experiment, workdir: str | os.PathLike, resume: str = "auto", force: bool = False
) -> Result:
    """Prepares, trains, evaluates, samples, and writes it all under `workdir`.

    resume: "auto" continues from the newest checkpoint if there is one, "must" demands one,
    "never" refuses to find one. force: trains although the memory will not suffice. Raises
    ValueError for a config that cannot run, or that differs from the checkpoint's. Several processes
    all call this alike, after `batiste.sharding.connect` or `jax.distributed.initialize`; the first
    writes.
    """
    started = time.perf_counter()
    workdir = pathlib.Path(workdir)
    experiment.validate_on(len(jax.devices()))
    check_connected()
    flat = flatten(experiment)
    agree({"workdir": str(workdir), "resume": resume, **flat})
    if not force:
        check_memory(experiment)
    start, stored = _stored(workdir, experiment.train.checkpoint)
    check_mode(resume, start, str(workdir))
    if start is not None:
        check_same(stored["config"], flat, _free_to_change(experiment))
    check_shared(workdir)
    prepared = prepare(experiment, workdir)
    fingerprint = {"fingerprint of the data": prepared.fingerprint}
    if start is not None:
        check_same(stored["data"], fingerprint, ())
    assembly = assemble(experiment, workdir, prepared, experiment.mesh)
    if is_first():
        _save_config(experiment, workdir)
    ledger = Ledger(workdir if is_first() else None)
    ledger.write("phase", name="prepare", seconds=time.perf_counter() - started)
    meta = {"validation": [], **stored, "config": flat, "data": fingerprint}
    with contextlib.closing(Checkpoints(workdir, experiment.train.checkpoint)) as checkpoints:
        state, reason = _fit(assembly, checkpoints, ledger, meta, start)
    step = int(state.step)
    finished = not reason.startswith("SIG")
    validation = assembly.finish(state.params, ledger, step) if finished else None
    together("finish the run")
    return Result(reason, step, validation)


def evaluate(workdir: str | os.PathLike) -> Perplexity:
    """The perplexity of a trained work directory's newest checkpoint on its validation split."""
    assembly, params = _load(workdir)
    return assembly.measure(params)


def generate(
    workdir: str | os.PathLike,
    prompts: Sequence[str],
    config: SamplingConfig | None = None,
    on_text: Callable[[list[str]], None] | None = None,
) -> list[str]:
    """Continues each prompt with a trained work directory's newest checkpoint.

    config: None takes the one that the run was configured with. on_text is called, as text comes,
    with what each prompt gained.
    """
    assembly, params = _load(workdir)
    config = assembly.experiment.sample if config is None else config
    agree({"prompts": list(prompts), **dataclasses.asdict(config)})
    return assembly.write(params, prompts, config, on_text)


def load_experiment(workdir: str | os.PathLike) -> Experiment:
    """The experiment that a work directory remembers; ValueError if it holds none."""
    path = pathlib.Path(workdir, CONFIG_FILE)
    if not path.is_file():
        raise ValueError(
            f"workdir={workdir}: no {CONFIG_FILE} there, so no run; expected the --workdir of a "
            "`batiste train`"
        )
    return from_dict(Experiment, json.loads(path.read_text()))


def _free_to_change(experiment: Experiment) -> tuple[str, ...]:
    """Slices that take local steps have states of their own, so that their number must stay."""
    if experiment.train.local.steps is None:
        return FREE_TO_CHANGE
    axes = tuple(f"mesh.{name}" for name in flatten(experiment.mesh) if name != "slice")
    return (*axes, *(name for name in FREE_TO_CHANGE if name != "mesh."))


def _stored(workdir: pathlib.Path, config: CheckpointConfig) -> tuple[int | None, dict[str, Any]]:
    """The newest committed step, and what was saved beside its arrays; creates nothing."""
    found = (workdir / CHECKPOINT_FOLDER).is_dir()
    agree({f"{workdir / CHECKPOINT_FOLDER} there": found})
    if not found:
        return None, {}
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        step = checkpoints.latest_step
        agree({"the newest checkpoint": step})
        return step, {} if step is None else checkpoints.meta(step)


def _fit(
    assembly: Assembly, checkpoints: Checkpoints, ledger: Ledger, meta: dict[str, Any], start: int | None
) -> tuple[Any, str]:
    """Trains from the checkpoint of step `start`, or from nothing; the state, and why it ended.

    What was decided about the run before holds, also what the checkpoint does not know yet.
    """
    train = assembly.experiment.train
    known, everything = decisions_of(meta), _decided(assembly.workdir)
    meta["decisions"] = [dataclasses.asdict(decision) for decision in everything]
    before, start = start, start_of(start, known, everything)
    if start != before:
        meta = _rewound(checkpoints, meta, start)
    train_step = make_train_step(assembly.program, train, assembly.mesh)
    while True:
        try:
            return _fit_from(assembly, checkpoints, ledger, meta, start, train_step)
        except RollBack as asked:
            checkpoints.wait()
            decision = roll_back(
                asked.finding, checkpoints.steps, decisions_of(meta), train.health.roll_back)
            decide(decision, meta, ledger)
            start = decision.to or None
            meta = _rewound(checkpoints, meta, start)


def _decided(workdir: pathlib.Path) -> list[Decision]:
    """The decisions in the ledger, as the first process reads it."""
    def read() -> str:
        return json.dumps([dataclasses.asdict(decision) for decision in decided(workdir)])

    return decisions_of({"decisions": json.loads(together(
        "read what was decided", read if is_first() else str)[0])})


def _rewound(checkpoints: Checkpoints, meta: dict[str, Any], start: int | None) -> dict[str, Any]:
    """Forgets what was saved after `start`; the meta of a run that continues there."""
    checkpoints.forget_after(start or 0)
    stored = {} if start is None else checkpoints.meta(start)
    return {"validation": [], **stored} | {
        name: meta[name] for name in ("config", "data", "decisions")}


def _fit_from(
    assembly: Assembly, checkpoints: Checkpoints, ledger: Ledger, meta: dict[str, Any],
    start: int | None, train_step: Callable,
) -> tuple[Any, str]:
    """The same, until the monitor asks to go back, which is a RollBack."""
    experiment = assembly.experiment
    if start is None:
        state = assembly.program.initialize()
    else:
        state = checkpoints.restore(start, assembly.program.abstract_state)
        state = from_checkpoint(assembly.program, state, _stored_mesh(checkpoints.meta(start)))
        if is_first():
            print(f"continuing from step {start} of {assembly.workdir}", flush=True)
    ledger.lap("initialize")
    loader = Loader(assembly.prepared, "train", experiment.train.batch_size, experiment.data.seed)
    share = Share(assembly.mesh, experiment.train.batch_size)
    windows = skipped(decisions_of(meta))
    batches = loader.iterate(start or 0, share.rows, windows)
    places = (position(step, windows) for step in itertools.count(start or 0))
    faulty = faulty_batches(
        parse_fault(experiment.train.faults), zip(places, batches),
        assembly.prepared.tokenizer.vocab_size)
    placed = map(share.place, faulty)
    progress, last_step = assembly.progress()
    monitor = None
    if experiment.train.measures:
        monitor = Monitor(experiment.train, Watched(
            meta, ledger, meta["config"], progress.note,
            lambda step: loader.records(position(step - 1, windows))))
        monitor.remember(assembly.workdir, start or 0)
        placed = monitor.watch(placed)
    metrics = MetricsWriter(assembly.workdir if is_first() else None, start or 0)
    if monitor is not None or decisions_of(meta):
        train_step = steered(
            train_step, meta, lambda factor: replicate(assembly.mesh, np.float32(factor)),
            start or 0)
    run = Run(
        train_step=train_step,
        batches=placed,
        evaluate=lambda state: assembly.measure(
            state.params, experiment.train.evaluation.max_batches
        ).loss,
        last_step=last_step,
    )
    try:
        return fit(experiment.train, state, run,
                   Records(checkpoints, metrics, progress, ledger, meta, monitor))
    finally:
        batches.close()
        metrics.close()


def _load(workdir: str | os.PathLike) -> tuple[Assembly, Any]:
    """Assembly and parameters of the newest checkpoint, replicated over the devices that are here."""
    workdir = pathlib.Path(workdir)
    experiment = load_experiment(workdir)
    check_connected()
    agree({"workdir": str(workdir)})
    step, stored = _stored(workdir, experiment.train.checkpoint)
    check_mode("must", step, str(workdir))
    fingerprint = stored["data"]["fingerprint of the data"]
    prepared = load_prepared(pathlib.Path(workdir, "data", fingerprint[:12]))
    assembly = assemble(experiment, workdir, prepared, MeshConfig())
    with contextlib.closing(Checkpoints(workdir, experiment.train.checkpoint)) as checkpoints:
        program = assembly.program
        params = checkpoints.restore_params(step, program.abstract_state.params)
    targets = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    return assembly, restack(params, _stored_mesh(stored), program.layout, targets)


def _stored_mesh(meta: dict[str, Any]) -> MeshConfig:
    """The mesh that a checkpoint was saved on, as far as it decides the order of the layers."""
    config = meta["config"]  # Checkpoints of before there was interleaving lack that field.
    return MeshConfig(stage=config["mesh.stage"], interleave=config.get("mesh.interleave", 1))


def _save_config(experiment: Experiment, workdir: pathlib.Path) -> None:
    temporary = workdir / f"{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(experiment), indent=1) + "\n")
    os.replace(temporary, workdir / CONFIG_FILE)
