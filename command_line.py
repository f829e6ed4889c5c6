"""`batiste VERB --flags`: reads flags, calls main.py, and turns what a person can mend into a line."""

import contextlib
import difflib
import errno
import functools
import os
import pathlib
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence

from absl import flags
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).resolve().parent
USAGE = """usage: batiste VERB [--flags]

  plan      --config=FILE --topology=TPU   memory, time and cost of every mesh, before a run
  prepare   --config=FILE --workdir=DIR    raw text to tokenized records
  train     --config=FILE --workdir=DIR    prepare, train, evaluate, sample; again: continue
  evaluate  --workdir=DIR                  loss, perplexity, bits per byte
  generate  --workdir=DIR --prompt=TEXT    stream text

Several processes of one run each add --distributed (SLURM, Open MPI, Kubernetes, Cloud TPU), or
--coordinator_address=HOST:PORT --num_processes=N --process_id=I; see docs/launch.md.

FILE is a Python file such as configs/quickstart.py; every field of it is a flag, for instance
--config.model.num_layers=8. `batiste VERB --help` lists the flags.
"""
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}
# Where a launcher says how many processes it has started.
LAUNCHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def run(argv: Sequence[str] | None = None) -> None:
    """Runs one command line (default: this process's) and exits with its code."""
    argv = list(sys.argv if argv is None else argv)
    with _one_line_errors():
        verb = argv[1] if len(argv) > 1 else "help"
        if verb in ("help", "--help", "-h", "--helpfull"):
            print(USAGE)
            sys.exit(0 if len(argv) > 1 else 2)
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"verb {verb!r}: expected one of {', '.join(VERBS)}{hint}")
        define, call = VERBS[verb]
        sys.exit(call(_parse(define, [f"batiste {verb}", *argv[2:]])))


def _define_config(values: flags.FlagValues, argv: list[str]) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Python file with get_config; FILE:ARG passes it ARG.",
        flag_values=values, sys_argv=argv,
    )


def _define_prepare(values: flags.FlagValues, argv: list[str]) -> None:
    _define_config(values, argv)
    flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)


def _define_processes(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "distributed", None, "This is one of several processes; take which, and where the others "
        "are, from SLURM, Open MPI, Kubernetes or Cloud TPU.", flag_values=values)
    flags.DEFINE_string("coordinator_address", None, "Where process 0 listens, HOST:PORT, instead "
                        "of --distributed.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "Processes of this run.", 1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", 0, flag_values=values)


def _define_train(values: flags.FlagValues, argv: list[str]) -> None:
    _define_prepare(values, argv)
    _define_processes(values)
    flags.DEFINE_string(
        "resume", "auto", "auto: continue if there is a checkpoint; must: demand one; never: "
        "refuse to find one.", flag_values=values,
    )
    flags.DEFINE_list(
        "resume_override", [], "What may differ from the checkpoint's on purpose: fields of the "
        "config (train.schedule.learning_rate,...), data, tokenizer.", flag_values=values,
    )
    flags.DEFINE_bool("force", False, "Train although the memory will not suffice.",
                      flag_values=values)


def _define_plan(values: flags.FlagValues, argv: list[str]) -> None:
    _define_config(values, argv)
    flags.DEFINE_string("topology", None, "TPUs, such as v5p:4x4x4.", flag_values=values)
    flags.DEFINE_string("gpu", None, "GPUs, such as h200:8.", flag_values=values)
    flags.DEFINE_bool("cpu", False, "The CPU of this machine, measured for 12 seconds.",
                      flag_values=values)
    flags.DEFINE_float("tokens", None, "Token budget; the config's steps, if left out.", 1.0,
                       flag_values=values)
    flags.DEFINE_float("price_per_chip_hour", None, "For the cost of the budget.", 0.0,
                       flag_values=values)
    flags.DEFINE_bool("compile", False, "Compile the best plan for the TPUs and compare.",
                      flag_values=values)
    flags.DEFINE_bool("apply", False, "Print only the overrides of the best plan, to paste.",
                      flag_values=values)


def _define_evaluate(values: flags.FlagValues, argv: list[str]) -> None:
    del argv
    flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)
    _define_processes(values)


def _define_generate(values: flags.FlagValues, argv: list[str]) -> None:
    _define_evaluate(values, argv)
    flags.DEFINE_multi_string("prompt", None, "Text to continue; may be repeated.", flag_values=values)
    flags.DEFINE_float("temperature", None, "0 is greedy.", 0.0, flag_values=values)
    flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens.", 1, flag_values=values)
    flags.DEFINE_float("top_p", None, "Keep the likeliest tokens up to p.", flag_values=values)
    flags.DEFINE_integer("seed", None, "Another seed, another text.", flag_values=values)
    flags.DEFINE_integer("max_tokens", None, "Stop after so many.", 1, flag_values=values)


def _connect(values: flags.FlagValues) -> bool:
    """Joins the other processes, if this is one of several; whether this one is to print."""
    from batiste.sharding import connect, is_first

    by_hand = {name: values[name].value
               for name in ("coordinator_address", "num_processes", "process_id")}
    given = [f"--{name}" for name, value in by_hand.items() if value is not None]
    if given and values.distributed is not None:
        flag = "--distributed" if values.distributed else "--nodistributed"
        raise ValueError(f"{flag} and {given[0]} exclude each other: leave one of them out")
    if given or values.distributed:
        connect(**by_hand)
    elif values.distributed is None:
        for name in LAUNCHER_COUNTS:
            if int(os.environ.get(name, 1)) > 1:
                raise ValueError(
                    f"{name}={os.environ[name]}: a launcher has started several of these; say "
                    "--distributed if they are one run, --nodistributed if each is its own"
                )
    return is_first()


def _prepare(values: flags.FlagValues) -> int:
    from batiste import main

    prepared = main.prepare(_experiment(values), _required(values, "workdir"))
    for split in ("train", "validation"):
        print(f"{split}: {prepared.num_records(split):,} records, {prepared.num_bytes(split):,} bytes")
    print(prepared.directory)
    return 0


def _train(values: flags.FlagValues) -> int:
    from batiste import main

    workdir = _required(values, "workdir")
    if values.config is None:
        experiment = main.load_experiment(workdir)
    else:
        experiment = _experiment(values)
    prints = _connect(values)
    result = main.train(
        experiment, workdir, values.resume, values.resume_override, values.force)
    if result.validation is None:
        if prints:
            print(f"stopped by {result.reason} after step {result.step}, saved; the same command "
                  "continues")
        return EXIT_CODES[result.reason]
    if not prints:
        return 0
    if result.reason == "patience":
        print(f"stopped early after step {result.step}: the validation loss no longer falls")
    _print_perplexity(result.validation)
    report = pathlib.Path(workdir, "report.md")
    samples = re.search(r"^## Samples\n.*?(?=^## )", report.read_text(), re.S | re.M)
    print(f"\n{samples[0]}" if samples else "", f"report: {report}", sep="\n")
    return 0


def _plan(values: flags.FlagValues) -> int:
    from batiste import forecast
    from batiste.planning import Budget, gpu_machine, tpu_machine

    experiment = _experiment(values)
    places = [name for name in ("topology", "gpu", "cpu") if values[name].value]
    if len(places) != 1:
        raise ValueError(f"expected one of --topology, --gpu and --cpu, got {places or 'none'}")
    machine = None
    if not values.cpu:
        machine = tpu_machine(values.topology) if values.topology else gpu_machine(values.gpu)
    tokens, config = values.tokens, experiment.train
    if tokens is None:
        tokens = config.num_steps * config.batch_size * experiment.data.sequence_length
    budget = Budget(tokens, values.price_per_chip_hour)
    print(forecast.plan(experiment, machine, budget, values.compile, values.apply))
    return 0


def _evaluate(values: flags.FlagValues) -> int:
    from batiste import main

    workdir = _required(values, "workdir")
    prints = _connect(values)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # jax takes it, for training alone to ask about.
    result = main.evaluate(workdir)
    if prints:
        _print_perplexity(result)
    return 0


def _generate(values: flags.FlagValues) -> int:
    import dataclasses

    from batiste import main

    workdir = _required(values, "workdir")
    config = main.load_experiment(workdir).sample
    given = {name: values[name].value for name in
             ("temperature", "top_k", "top_p", "seed", "max_tokens") if values[name].present}
    config = dataclasses.replace(config, **given)
    prompts = values.prompt if values.prompt else list(config.prompts)
    say = functools.partial(print, end="", flush=True) if _connect(values) else lambda text: None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # As for `evaluate`.
    if len(prompts) == 1:
        say(prompts[0])
        main.generate(workdir, prompts, config, lambda text: say(text[0]))
        say("\n")
        return 0
    for prompt, text in zip(prompts, main.generate(workdir, prompts, config), strict=True):
        say(f"=== {prompt!r}\n{prompt}{text}\n")
    return 0


VERBS: dict[str, tuple[Callable, Callable]] = {
    "plan": (_define_plan, _plan),
    "prepare": (_define_prepare, _prepare),
    "train": (_define_train, _train),
    "evaluate": (_define_evaluate, _evaluate),
    "generate": (_define_generate, _generate),
}


def _print_perplexity(result) -> None:
    error = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
    print(f"validation: loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
          f"{result.bits_per_byte:.4f}{error} bits per byte, {result.tokens:,} tokens")


def _parse(define: Callable, argv: list[str]) -> flags.FlagValues:
    """Parses flags into values of their own, so that nothing is global and twice is fine."""
    argv = [argv[0], *(_find_config(argument) for argument in argv[1:])]
    argv, absent = _split_none(argv)
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    define(values, argv)
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        names = list(values)
        near = difflib.get_close_matches(error.flagname, names, n=1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise ValueError(f"unknown flag --{error.flagname}{hint} ({argv[0]} --help lists all)") from None
    except (flags.Error, LookupError, AttributeError, TypeError, ValueError, OSError) as error:
        raise ValueError(_explain(error, argv)) from None
    for name, text in absent:
        _set_none(_experiment(values), name, text)
    if values.help:
        print(f"{argv[0]} flags:\n{values.get_help()}")
        sys.exit(0)
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
    return values


def _split_none(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes out --config.NAME=None, which config_flags takes for a number; NAMEs, and as written."""
    found = {argument: re.fullmatch(r"--?config\.([^=]+)=([Nn]one)", argument) for argument in argv}
    rest = [argument for argument in argv if not found[argument]]
    return rest, [match.groups() for match in found.values() if match]


def _set_none(experiment, name: str, text: str) -> None:
    """Makes a field absent, or a word "none" (model.remat has it among its choices).

    Raises ValueError where there is no such field, or it can be neither.
    """
    *path, last = re.findall(r"\w+", name)
    owner = experiment
    try:
        for part in path:
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        hint = typing.get_type_hints(type(owner))[last]
    except (AttributeError, LookupError, TypeError):
        raise ValueError(_unknown_field(name)) from None
    word = hint is str and text == "none"
    if not word and type(None) not in typing.get_args(hint):
        raise ValueError(f"--config.{name}=None: expected a value, this field cannot be absent")
    setattr(owner, last, text if word else None)


def _find_config(argument: str) -> str:
    """Lets --config=configs/x.py be found in the package when not in the current directory."""
    match = re.fullmatch(r"--?config=([^:]+)((?::.*)?)", argument)
    if not match or pathlib.Path(match[1]).is_file():
        return argument
    if (ROOT / match[1]).is_file():
        return f"--config={ROOT / match[1]}{match[2]}"
    known = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")
                   if "def get_config" in path.read_text())
    near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"config={match[1]}: no such file; known are {', '.join(known)}{hint}")


def _explain(error: Exception, argv: list[str]) -> str:
    """What is wrong with an override, with the nearest name that exists or the type expected."""
    from batiste.configs.experiment import Experiment, flatten

    text = " ".join(str(error).split())
    names = list(flatten(Experiment()))
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if not match:
            continue
        if re.sub(r"\[\d+\]", "[0]", match[1]) not in names:
            return _unknown_field(match[1])
        if isinstance(error, IndexError) and "[" in match[1]:
            return f"unknown field --config.{match[1]}: the config has fewer sources than that"
    wrong = re.match(r"flag --(config\.[^=]+=.*?): (invalid literal for int|could not convert|"
                     r"\('Non-boolean)", text)
    kinds = {"inv": "a whole number", "cou": "a number", "('N": "true or false"}
    return f"--{wrong[1]}: expected {kinds[wrong[2][:3]]}" if wrong else text


def _unknown_field(name: str) -> str:
    from batiste.configs.experiment import Experiment, flatten

    names = list(flatten(Experiment()))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    last = [known for known in names if known.rsplit(".")[-1] == name.rsplit(".")[-1]]
    hint = f"; did you mean --config.{(last or near)[0]}?" if last or near else ""
    return f"unknown field --config.{name}{hint}"


def _experiment(values: flags.FlagValues):
    from batiste.configs.experiment import Experiment

    _required(values, "config")
    if not isinstance(values.config, Experiment):
        raise ValueError(f"config: get_config must return an Experiment, got {type(values.config)}")
    return values.config


def _required(values: flags.FlagValues, name: str):
    value = values[name].value
    if value is None:
        raise ValueError(f"--{name} is needed (batiste --help shows how)")
    return value


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors that batiste raised on purpose, and those of disks and files, end in one line.

    On purpose: a ValueError that a `raise` of batiste's own raised. Any other is a defect and keeps
    its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(EXIT_CODES["SIGINT"])
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        # A room is one folder deep; what lies deeper is a virtual environment in the clone.
        rooms = pathlib.Path(last.filename).resolve().parents[:2]
        if not (ROOT in rooms and last.line.startswith("raise")):
            raise
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS,
                               errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EFBIG):
            raise
        place = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: {error.strerror}{place}")
