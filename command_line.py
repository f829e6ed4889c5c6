"""`batiste VERB --flags`: reads flags, calls main.py, and turns what a person can mend into a line."""

import contextlib
import difflib
import errno
import pathlib
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from batiste import exit_codes
from batiste.verb_flags import given_config
from batiste.verbs import VERBS

ROOT = pathlib.Path(__file__).resolve().parent
USAGE = """usage: batiste VERB [--flags]

{verbs}

Several processes of one run each add --distributed (SLURM, Open MPI, Kubernetes, Cloud TPU), or
--coordinator_address=HOST:PORT --num_processes=N --process_id=I; see docs/launch.md.

FILE is a Python file such as configs/quickstart.py; every field of it is a flag, for instance
--config.model.num_layers=8. `batiste VERB --help` lists the flags.
"""


def run(argv: Sequence[str] | None = None) -> None:
    """Runs one command line (default: this process's) and exits with its code."""
    argv = list(sys.argv if argv is None else argv)
    with _one_line_errors():
        words = 2 if " ".join(argv[1:3]) in VERBS else 1
        verb = " ".join(argv[1:1 + words]) or "help"
        if verb in ("help", "--help", "-h", "--helpfull"):
            lines = [f"  {name:<20}{each.usage:<31}{each.about}" for name, each in VERBS.items()]
            print(USAGE.format(verbs="\n".join(lines)))
            sys.exit(0 if len(argv) > 1 else 2)
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"verb {verb!r}: expected one of {', '.join(VERBS)}{hint}")
        values = _parse(VERBS[verb].define, [f"batiste {verb}", *argv[1 + words:]])
        sys.exit(VERBS[verb].call(values))


def _parse(define: Callable, argv: list[str]) -> flags.FlagValues:
    """Parses flags into values of their own, so that nothing is global and twice is fine."""
    end = argv.index("--") if "--" in argv else len(argv)
    argv, command = argv[:end], argv[end + 1:]
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
        _set_none(given_config(values), name, text)
    if values.help:
        print(f"{argv[0]} flags:\n{values.get_help()}")
        sys.exit(0)
    if command and "command" in values:
        values.command = command
        command = []
    for argument in (*rest, *command):
        raise ValueError(f"unexpected argument {argument!r}: flags are written --name=value")
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
        raise ValueError(_unknown_field(name, type(experiment))) from None
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
    from batiste.configs.experiment import flatten

    text = " ".join(str(error).split())
    kind = _config_of(argv[0])
    names = list(flatten(kind()))
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if not match:
            continue
        if re.sub(r"\[\d+\]", "[0]", match[1]) not in names:
            return _unknown_field(match[1], kind)
        if isinstance(error, IndexError) and "[" in match[1]:
            return f"unknown field --config.{match[1]}: the config has fewer sources than that"
    wrong = re.match(r"flag --(config\.[^=]+=.*?): (invalid literal for int|could not convert|"
                     r"\('Non-boolean)", text)
    kinds = {"inv": "a whole number", "cou": "a number", "('N": "true or false"}
    return f"--{wrong[1]}: expected {kinds[wrong[2][:3]]}" if wrong else text


def _config_of(command: str) -> type:
    """What the configs of a command ("batiste train") are."""
    if command == "batiste tune":
        from batiste.tasks import TaskConfig

        return TaskConfig
    from batiste.configs.experiment import Experiment

    return Experiment


def _unknown_field(name: str, kind: type) -> str:
    from batiste.configs.experiment import flatten

    names = list(flatten(kind()))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    last = [known for known in names if known.rsplit(".")[-1] == name.rsplit(".")[-1]]
    hint = f"; did you mean --config.{(last or near)[0]}?" if last or near else ""
    return f"unknown field --config.{name}{hint}"


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors that batiste raised on purpose, and those of disks and files, end in one line.

    On purpose: a ValueError that a `raise` of batiste's own raised. Any other is a defect, or a
    device's or the network's failure, and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(exit_codes.INTERRUPTED)
    except Exception as error:
        line = _line(error)
        code = exit_codes.FAILED
        if line is None and exit_codes.transient(error):
            line, code = exit_codes.transient_line(error), exit_codes.UNAVAILABLE
        text = line or traceback.format_exc()
        sharding = sys.modules.get("batiste.sharding")
        if sharding is not None and sharding.leave(code, text):
            sys.exit(code)
        if code != exit_codes.FAILED:
            print(text, file=sys.stderr)
            sys.exit(code)
        if line is None:
            raise
        sys.exit(line)


def _line(error: Exception) -> str | None:
    """What a person can do about it, None where only a programmer can."""
    if isinstance(error, ValueError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        # A room is one folder deep; what lies deeper is a virtual environment in the clone.
        rooms = pathlib.Path(last.filename).resolve().parents[:2]
        return f"error: {error}" if ROOT in rooms and last.line.startswith("raise") else None
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT,
        errno.ENOTDIR, errno.EISDIR, errno.EFBIG,
    ):
        place = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror}{place}"
    return None
