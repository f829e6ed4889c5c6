"""The front door: takes an experiment apart and calls the rooms. The command line calls these."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from batiste.assembly import Assembly, assemble
from batiste.configs.experiment import Experiment, flatten, from_dict
from batiste.configs.own_parts import load_own_parts, own_code
from batiste.configs.trusted_code import check_code, remember_code
from batiste.data import Prepared, load_prepared, special_ids
from batiste.data import prepare as prepare_data
from batiste.data.json_files import read_json
from batiste.evaluation import Detection, Perplexity
from batiste.exchange import (
    Export, chat_prompt, export_model, export_stablehlo, import_model, imported,
)
from batiste.fitting import stored_mesh, train_from
from batiste.forecast import check_memory
from batiste.inference import SamplingConfig
from batiste.sharding import (
    MeshConfig, agree, check_connected, check_shared, is_first, restack, together,
)
from batiste.train import (
    FINISHED, Checkpoints, Found, Ledger, arrays_of, check_mode, check_override, check_same,
    compilation_booked, complain, how_to_go_on, last_saved, measured_at_end, why_ended,
    work_directory_lock,
)

CONFIG_FILE = "config.json"
IDENTITY = ("data fingerprint", "tokenizer", "own code")
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


def prepare(
    experiment: Experiment, workdir: str | os.PathLike, break_lock: bool = False
) -> Prepared:
    """Turns raw text into records under `workdir`/data, or finds that this is already done.

    Of several processes the first does it, and the others wait and read what it made.
    break_lock: as for `train`.
    """
    with _lock(workdir, break_lock):
        return _prepare(experiment, workdir)


def _prepare(experiment: Experiment, workdir: str | os.PathLike) -> Prepared:
    experiment.data.validate()

    def make() -> str:
        return str(prepare_data(experiment.data, pathlib.Path(workdir, "data")).directory)

    directory = together("prepare the data", make if is_first() else str, PREPARE_SECONDS)[0]
    read: list[Prepared] = []
    together("read what process 0 prepared",
             lambda: read.append(load_prepared(directory)) or read[0].fingerprint)
    prepared = read[0]
    tokens, special = prepared.tokenizer.vocab_size, special_ids(experiment.data, prepared.tokenizer)
    least = max([tokens - 1, *special.values()]) + 1
    if least > experiment.model.vocab_size:
        more = f" and data.objectives {len(special)} special ones" if special else ""
        raise ValueError(
            f"model.vocab_size={experiment.model.vocab_size}, but the tokenizer has {tokens} tokens"
            f"{more}: set model.vocab_size at least {least}"
        )
    return prepared


def train(
    experiment: Experiment,
    workdir: str | os.PathLike,
    resume: str = "auto",
    resume_override: Sequence[str] = (),
    force: bool = False,
    started: float | None = None,
    break_lock: bool = False,
) -> Result:
    """Prepares, trains, evaluates, samples, and writes it all under `workdir`.

    resume: "auto" continues from the newest checkpoint if there is one, "must" demands one,
    "never" refuses to find one. resume_override: fields (or beginnings of their names), "data" and
    "tokenizer", that may differ from the checkpoint's. force: trains although the memory will not
    suffice. started: the time.monotonic() from which the ledger counts, None for now. break_lock:
    takes the work directory from a process on a machine that gives no sign of life. Raises
    ValueError for a config that cannot run, or that differs from the checkpoint's, or where another
    process writes to the work directory. Several processes all call this alike, after
    `batiste.sharding.connect` or `jax.distributed.initialize`; the first writes. A run that has
    ended, by its steps or its patience, is only said to have.
    """
    with _lock(workdir, break_lock):
        ledger = Ledger(workdir if is_first() else None, started)
        with ledger, compilation_booked(ledger):
            workdir = pathlib.Path(workdir)
            result = _train(experiment, workdir, resume, resume_override, force, ledger)
            ledger.close(result.reason)
        return result


@contextlib.contextmanager
def _lock(workdir: str | os.PathLike, break_lock: bool = False) -> Iterator[None]:
    """Process 0 holds the work directory; all hear of it where it is refused."""
    check_connected()
    with contextlib.ExitStack() as stack:
        def take() -> str:
            stack.enter_context(work_directory_lock(workdir, break_lock))
            return ""

        together(f"hold {workdir}", take if is_first() else str)
        yield


def _train(
    experiment: Experiment, workdir: pathlib.Path, resume: str, resume_override: Sequence[str],
    force: bool, ledger: Ledger,
) -> Result:
    experiment.validate_on(len(jax.devices()))
    flat = flatten(experiment)
    agree({"workdir": str(workdir), "resume": resume, "resume_override": list(resume_override),
           **flat})
    check_override(resume_override, [*flat, *IDENTITY])
    found, stored = _stored(workdir, experiment)
    begun = imported(workdir)
    # Imported weights are something to continue from, unless a checkpoint was lost.
    mode = "auto" if resume == "must" and begun is not None else resume
    check_mode(mode, found, workdir)
    free = (*_free_to_change(experiment), *resume_override)
    changed = [] if found.step is None else check_same(stored["config"], flat, free)
    # Whoever changes what is not free to change, or the texts to write, wants more than to be told.
    if found.step is not None and not any(
            change.startswith(("sample.", *resume_override)) for change in changed):
        ended = _ended(workdir, stored, found.step, flat)
        if ended is not None:
            return ended
    if not force:
        check_memory(experiment)
    check_shared(workdir)
    ledger.enter("data preparation")
    prepared = _prepare(experiment, workdir)
    own = " ".join(f"{path}={code}" for path, code in own_code(experiment).items())
    identity = dict(zip(
        IDENTITY, (prepared.fingerprint, prepared.tokenizer.hash, own or None), strict=True))
    if found.step is not None:
        changed += check_same(stored["data"], identity, resume_override)
    ledger.enter("initialization")
    assembly = assemble(experiment, workdir, prepared, experiment.mesh)
    remember_code(workdir, experiment)
    arrays = arrays_of(assembly.program.abstract_state)
    if found.step is not None:
        check_same(stored["arrays"], arrays)
    if begun is not None:
        begun.check(experiment, assembly.program.abstract_state.params)
    known = last_saved(workdir)
    ledger.begin(**assembly.facts())
    ledger.write("started", step=found.step or 0, passed_over=found.passed_over, changed=changed)
    if found.step is not None and (known is None or known < found.step):
        ledger.write("saved", step=found.step)  # Killed before it was written, or lines are gone.
    if is_first():
        _save_config(experiment, workdir)
    meta = {"validation": [], **stored, "config": flat, "data": identity, "arrays": arrays}
    report = functools.partial(_report, ledger)
    apart = experiment.train.local.steps or 1
    opened = Checkpoints(workdir, experiment.train.checkpoint, report, apart)
    with contextlib.closing(opened) as checkpoints:
        state, reason = train_from(assembly, checkpoints, ledger, meta, found.step)
    step = int(state.step)
    validation = None
    if not reason.startswith("SIG"):
        validation = assembly.finish(state.params, ledger, step=step, tokens=meta["tokens"])
        fields = validation._asdict()
        if validation.detection is not None:
            fields["detection"] = validation.detection._asdict()
        ledger.write(FINISHED, reason=reason, step=step, validation=fields)
    together("finish the run")
    return Result(reason, step, validation)


def _ended(
    workdir: pathlib.Path, stored: dict[str, Any], step: int, config: dict[str, Any]
) -> Result | None:
    """How a run has ended that has nothing left to do, not even its report; None otherwise."""
    reason = why_ended(stored, step, config)
    if reason is None:
        return None

    def read() -> str:
        return json.dumps(measured_at_end(workdir, reason, step))

    fields = json.loads(together("read how the run has ended", read if is_first() else str)[0])
    if fields is None:
        return None
    if is_first():
        print(f"{workdir} has finished after step {step:,}: {how_to_go_on(reason, config)}",
              flush=True)
    detection = fields["detection"]
    return Result(reason, step, Perplexity(**fields | {
        "detection": None if detection is None else Detection(**detection)}))


def evaluate(workdir: str | os.PathLike) -> Perplexity:
    """The perplexity of a trained work directory's newest checkpoint on its validation split."""
    assembly, params = _load(workdir, for_data=True)
    return assembly.measure(params)


def generate(
    workdir: str | os.PathLike,
    prompts: Sequence[str],
    config: SamplingConfig | None = None,
    on_text: Callable[[list[str]], None] | None = None,
    chat: bool = False,
) -> list[str]:
    """Continues each prompt with a trained work directory's newest checkpoint.

    config: None takes the one that the run was configured with. on_text is called, as text comes,
    with what each prompt gained. chat: answers each prompt, by the template that the model was
    imported with; ValueError where there is none.
    """
    asked = [chat_prompt(pathlib.Path(workdir), prompt) for prompt in prompts] if chat else prompts
    assembly, params = _load(workdir)
    config = assembly.experiment.sample if config is None else config
    config.validate()
    agree({"prompts": list(prompts), "chat": chat, **dataclasses.asdict(config)})
    return assembly.write(params, asked, config, on_text)


def import_weights(
    source: str | os.PathLike, workdir: str | os.PathLike, experiment: Experiment | None = None,
    break_lock: bool = False,
) -> Experiment:
    """Makes a work directory of a model in Hugging Face's format: `exchange.import_model`."""
    with _lock(workdir, break_lock):
        experiment = import_model(str(source), str(workdir), experiment)
        _save_config(experiment, pathlib.Path(workdir))
        remember_code(workdir, experiment)
    return experiment


def export_weights(
    workdir: str | os.PathLike, to: str | os.PathLike, family: str | None = None,
    dtype: str | None = None, part: str | None = None,
) -> dict[str, int]:
    """Writes the newest checkpoint as a directory that `transformers` loads: `export_model`.

    part: "generator" or "discriminator" of a run that trains both.
    """
    assembly, params = _load(workdir)
    begun = imported(pathlib.Path(workdir))
    tokenizer = None if begun is not None else assembly.prepared.tokenizer
    given = Export(assembly.experiment.model, params, pathlib.Path(workdir), tokenizer)
    return export_model(given.part(part), str(to), family, dtype)


def export_program(workdir: str | os.PathLike, to: str | os.PathLike) -> int:
    """Writes the newest checkpoint as StableHLO, with its weights: `export_stablehlo`."""
    assembly, params = _load(workdir)
    given = Export(assembly.experiment.model, params, pathlib.Path(workdir), None)
    return export_stablehlo(given, str(to))


def load_experiment(workdir: str | os.PathLike, trust_code: bool = False) -> Experiment:
    """The experiment that a work directory remembers, with its own parts loaded.

    trust_code: remembers that this directory may run the code that it names (docs/extend.md).
    Raises ValueError if there is no config, one that cannot be read, or one that names code which
    was not used with this directory on this machine.
    """
    path = pathlib.Path(workdir, CONFIG_FILE)
    if not path.is_file():
        raise ValueError(
            f"workdir={workdir}: no {CONFIG_FILE} there, so no run; expected the --workdir of a "
            "`batiste train`"
        )
    try:
        experiment = from_dict(Experiment, read_json(path))
    except ValueError as error:
        place = "" if str(error).startswith(str(path)) else f"{path}: "
        raise ValueError(f"{place}{error}") from None
    if trust_code:
        remember_code(workdir, experiment)
    check_code(workdir, experiment)
    load_own_parts(experiment)
    return experiment


def load_model(workdir: str | os.PathLike) -> tuple[Assembly, Any]:
    """A trained or imported work directory's program, and its parameters on all devices here."""
    return _load(workdir)


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
        complain(f"the checkpoint of step {fields['step']} could not be saved: {fields['why']}{again}")


def _load(workdir: str | os.PathLike, for_data: bool = False) -> tuple[Assembly, Any]:
    """Assembly and parameters of the newest checkpoint, replicated over the devices that are here.

    for_data: whether text is to be read, which an imported model has not been prepared for.
    """
    workdir = pathlib.Path(workdir)
    experiment = load_experiment(workdir)
    check_connected()
    agree({"workdir": str(workdir)})
    found, stored = _stored(workdir, experiment)
    begun = imported(workdir)
    untrained = found.step is None and not found.passed_over and last_saved(workdir) is None
    if begun is not None and untrained:
        prepared = prepare(experiment, workdir) if for_data else begun
        assembly = assemble(experiment, workdir, prepared, MeshConfig())
        return assembly, begun.parameters(experiment, assembly.program)
    check_mode("must", found, workdir)
    fingerprint = stored["data"]["data fingerprint"]
    prepared = load_prepared(pathlib.Path(workdir, "data", fingerprint[:12]))
    assembly = assemble(experiment, workdir, prepared, MeshConfig())
    with contextlib.closing(Checkpoints(workdir, experiment.train.checkpoint)) as checkpoints:
        program = assembly.program
        abstract = {"params": program.abstract_state.params}
        params = checkpoints.restore(found.step, abstract)["params"]
    targets = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    return assembly, restack(params, stored_mesh(stored), program.layout, targets)


def _save_config(experiment: Experiment, workdir: pathlib.Path) -> None:
    temporary = workdir / f"{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(experiment), indent=1) + "\n")
    os.replace(temporary, workdir / CONFIG_FILE)
