"""The front door: takes an experiment apart and calls the rooms. The command line calls these."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from batiste.assembly import Assembly, assemble
from batiste.configs.experiment import Experiment, flatten, from_dict
from batiste.data import Loader, Prepared, load_prepared, position, special_tokens
from batiste.data import prepare as prepare_data
from batiste.evaluation import Perplexity
from batiste.forecast import check_memory
from batiste.inference import SamplingConfig
from batiste.sharding import (
    MeshConfig, Share, agree, check_connected, check_shared, is_first, replicate, restack,
    together,
)
from batiste.train import (
    Checkpoints, Decision, Found, Ledger, MetricsWriter, Monitor, Records, RollBack, Run, Watched,
    arrays_of, check_mode, check_override, check_same, compilation_booked, decide, decided,
    decisions_of, faulty_batches, fit, from_checkpoint, last_saved, make_train_step, parse_fault,
    roll_back, skipped, start_of, steered,
)

CONFIG_FILE = "config.json"
IDENTITY = ("data fingerprint", "tokenizer")
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
    tokens, special = prepared.tokenizer.vocab_size, len(special_tokens(experiment.data))
    if tokens + special > experiment.model.vocab_size:
        more = f" and data.objectives {special} special ones" if special else ""
        raise ValueError(
            f"model.vocab_size={experiment.model.vocab_size}, but the tokenizer has {tokens} tokens"
            f"{more}: set model.vocab_size at least {tokens + special}"
        )
    return prepared


def train(
    experiment: Experiment,
    workdir: str | os.PathLike,
    resume: str = "auto",
    resume_override: Sequence[str] = (),
    force: bool = False,
    started: float | None = None,
) -> Result:
    """Prepares, trains, evaluates, samples, and writes it all under `workdir`.

    resume: "auto" continues from the newest checkpoint if there is one, "must" demands one,
    "never" refuses to find one. resume_override: fields (or beginnings of their names), "data" and
    "tokenizer", that may differ from the checkpoint's. force: trains although the memory will not
    suffice. started: the time.monotonic() from which the ledger counts, None for now. Raises
    ValueError for a config that cannot run, or that differs from the checkpoint's. Several
    processes all call this alike, after `batiste.sharding.connect` or
    `jax.distributed.initialize`; the first writes.
    """
    ledger = Ledger(workdir if is_first() else None, started)
    with ledger, compilation_booked(ledger):
        workdir = pathlib.Path(workdir)
        result = _train(experiment, workdir, resume, resume_override, force, ledger)
        ledger.close(result.reason)
    return result


def _train(
    experiment: Experiment, workdir: pathlib.Path, resume: str, resume_override: Sequence[str],
    force: bool, ledger: Ledger,
) -> Result:
    experiment.validate_on(len(jax.devices()))
    check_connected()
    flat = flatten(experiment)
    agree({"workdir": str(workdir), "resume": resume, "resume_override": list(resume_override),
           **flat})
    check_override(resume_override, [*flat, *IDENTITY])
    if not force:
        check_memory(experiment)
    found, stored = _stored(workdir, experiment)
    check_mode(resume, found, last_saved(workdir), str(workdir))
    free = (*_free_to_change(experiment), *resume_override)
    changed = [] if found.step is None else check_same(stored["config"], flat, free)
    check_shared(workdir)
    ledger.enter("data preparation")
    prepared = prepare(experiment, workdir)
    identity = dict(zip(IDENTITY, (prepared.fingerprint, prepared.tokenizer.hash), strict=True))
    if found.step is not None:
        changed += check_same(stored["data"], identity, resume_override)
    ledger.enter("initialization")
    assembly = assemble(experiment, workdir, prepared, experiment.mesh)
    arrays = arrays_of(assembly.program.abstract_state)
    if found.step is not None:
        check_same(stored["arrays"], arrays)
    if is_first():
        _save_config(experiment, workdir)
    ledger.begin(**assembly.facts())
    ledger.write("started", step=found.step or 0, passed_over=found.passed_over, changed=changed)
    meta = {"validation": [], **stored, "config": flat, "data": identity, "arrays": arrays}
    report = functools.partial(_report, ledger)
    opened = Checkpoints(workdir, experiment.train.checkpoint, report)
    with contextlib.closing(opened) as checkpoints:
        state, reason = _fit(assembly, checkpoints, ledger, meta, found.step)
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


def _stored(workdir: pathlib.Path, experiment: Experiment) -> tuple[Found, dict[str, Any]]:
    """The newest step that verifies, and what was saved beside its arrays; changes nothing."""
    with contextlib.closing(Checkpoints(workdir, experiment.train.checkpoint)) as checkpoints:
        found = checkpoints.newest_verified()
        if found.step is not None and is_first():
            for step, why in found.passed_over.items():
                print(f"step {step} is passed over: {why}", file=sys.stderr, flush=True)
        return found, {} if found.step is None else checkpoints.meta(found.step)


def _report(ledger: Ledger, event: str, **fields: Any) -> None:
    """Writes to the ledger what happens to checkpoints, and says what goes wrong with them."""
    ledger.write(event, **fields)
    if event == "save_failed" and is_first():
        again = "; trying again" if fields["in_a_row"] == 1 else ""
        print(f"the checkpoint of step {fields['step']} could not be saved: {fields['why']}{again}",
              file=sys.stderr, flush=True)


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
                asked.finding, checkpoints.verified(), decisions_of(meta), train.health.roll_back)
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
    """Sets aside what was saved after `start`; the meta of a run that continues there."""
    checkpoints.set_aside_from((start or 0) + 1)
    stored = {} if start is None else checkpoints.meta(start)
    return {"validation": [], **stored} | {
        name: meta[name] for name in ("config", "data", "arrays", "decisions")}


def _fit_from(
    assembly: Assembly, checkpoints: Checkpoints, ledger: Ledger, meta: dict[str, Any],
    start: int | None, train_step: Callable,
) -> tuple[Any, str]:
    """The same, until the monitor asks to go back, which is a RollBack."""
    experiment = assembly.experiment
    if start is None:
        state = assembly.program.initialize()
    else:
        ledger.enter("restore")
        state = checkpoints.restore(start, assembly.program.abstract_state)
        state = from_checkpoint(assembly.program, state, _stored_mesh(checkpoints.meta(start)))
        if is_first():
            print(f"continuing from step {start} of {assembly.workdir}", flush=True)
    ledger.enter("initialization")
    loader = Loader(assembly.prepared, "train", experiment.train.batch_size, experiment.data.seed,
                    assembly.transform)
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
    ledger.write("from", step=start or 0, reached=metrics.reached)
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
    found, stored = _stored(workdir, experiment)
    check_mode("must", found, None, str(workdir))
    fingerprint = stored["data"]["data fingerprint"]
    prepared = load_prepared(pathlib.Path(workdir, "data", fingerprint[:12]))
    assembly = assemble(experiment, workdir, prepared, MeshConfig())
    with contextlib.closing(Checkpoints(workdir, experiment.train.checkpoint)) as checkpoints:
        program = assembly.program
        abstract = {"params": program.abstract_state.params}
        params = checkpoints.restore(found.step, abstract)["params"]
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
