"""Flags that several verbs of the command line have, and what they ask for."""

import os

from absl import flags

from batiste import config_overrides, exit_codes

# Where a launcher says how many processes it has started.
LAUNCHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def define_config(values: flags.FlagValues, argv: list[str]) -> None:
    """--config and every field of it; what is set at once is taken out of `argv`."""
    config_overrides.define(values, argv)


def define_workdir(values: flags.FlagValues) -> None:
    """--workdir."""
    flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)


def define_written_workdir(values: flags.FlagValues) -> None:
    """--workdir of a verb that writes to it, and --break_lock."""
    define_workdir(values)
    flags.DEFINE_bool(
        "break_lock", False, "Take the work directory from a process on another machine that gives "
        "no sign of life.", flag_values=values)


def define_trust(values: flags.FlagValues) -> None:
    """--trust_code, of verbs that read a work directory."""
    flags.DEFINE_bool(
        "trust_code", False, "Run the code that the directory's config names, now and later, as "
        "long as it does not change (docs/extend.md).", flag_values=values)


def trust(values: flags.FlagValues, name: str = "workdir") -> str:
    """The work directory that flag `name` gives, whose code is trusted from here on if asked."""
    from batiste import main

    workdir = required(values, name)
    if values.trust_code:
        main.load_experiment(workdir, trust_code=True)
    return workdir


def define_compilation_cache(values: flags.FlagValues) -> None:
    """--compilation_cache, of verbs that compile what they run."""
    flags.DEFINE_bool(
        "compilation_cache", True, "Keep compiled programs in the user's cache folder for the next "
        "start (compilation_cache.py).", flag_values=values)


def define_processes(values: flags.FlagValues) -> None:
    """What says which of several processes this is."""
    flags.DEFINE_bool(
        "distributed", None, "This is one of several processes; take which, and where the others "
        "are, from SLURM, Open MPI, Kubernetes or Cloud TPU.", flag_values=values)
    flags.DEFINE_string("coordinator_address", None, "Where process 0 listens, HOST:PORT, instead "
                        "of --distributed.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "Processes of this run.", 1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", 0, flag_values=values)


def connect_processes(values: flags.FlagValues) -> bool:
    """Joins the other processes, if this is one of several; whether this one is to print."""
    from batiste.sharding import connect, is_first

    by_hand = {name: values[name].value
               for name in ("coordinator_address", "num_processes", "process_id")}
    given = [f"--{name}" for name, value in by_hand.items() if value is not None]
    if given and values.distributed is not None:
        flag = "--distributed" if values.distributed else "--nodistributed"
        raise ValueError(f"{flag} and {given[0]} exclude each other: leave one of them out")
    if given or values.distributed:
        connect(**by_hand, lost_code=exit_codes.LOST_PEER)
    elif values.distributed is None:
        for name in LAUNCHER_COUNTS:
            if int(os.environ.get(name, 1)) > 1:
                raise ValueError(
                    f"{name}={os.environ[name]}: a launcher has started several of these; say "
                    "--distributed if they are one run, --nodistributed if each is its own"
                )
    return is_first()


def given_experiment(values: flags.FlagValues):
    """The experiment that --config makes; ValueError where it makes none."""
    from batiste.configs.experiment import Experiment

    required(values, "config")
    if not isinstance(values.config, Experiment):
        raise ValueError(f"config: get_config must return an Experiment, got {type(values.config)}")
    return values.config


def required(values: flags.FlagValues, name: str):
    """The value of a flag; ValueError where it is left out."""
    value = values[name].value
    if value is None:
        raise ValueError(f"--{name} is needed (batiste --help shows how)")
    return value
