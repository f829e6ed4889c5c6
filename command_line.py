"""`batiste VERB --flags`: reads flags, calls main.py, and turns what a person can mend into a line."""

import contextlib
import difflib
import errno
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from batiste import __version__, compilation_cache, exit_codes
from batiste.completion import script
from batiste.config_overrides import find_file
from batiste.verb_flags import required
from batiste.verbs import VERBS

ROOT = pathlib.Path(__file__).resolve().parent
# What a file in the wrong place means, besides what the system calls it.
PLACES = dict.fromkeys((errno.ENOTDIR, errno.EEXIST), ": a directory is needed there")
EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}  # JAX_PLATFORMS to an extra of setup.py.
USAGE = """usage: batiste VERB [--flags]

{verbs}

Several processes of one run each add --distributed (SLURM, Open MPI, Kubernetes, Cloud TPU), or
--coordinator_address=HOST:PORT --num_processes=N --process_id=I; see docs/launch.md.

FILE is a Python file such as configs/quickstart.py; every field of it is a flag, for instance
--config.model.num_layers=8. `batiste VERB --help` lists the flags, with --config=FILE the fields, too;
`batiste VERB --config=FILE --print_config` prints the whole config; `batiste completion bash` (or
zsh) prints what completes all of these in a shell; `batiste --version` says what is installed.
"""


def run(argv: Sequence[str] | None = None) -> None:
    """Runs one command line (default: this process's) and exits with its code."""
    argv = list(sys.argv if argv is None else argv)
    with _one_line_errors():
        words = 2 if " ".join(argv[1:3]) in VERBS else 1
        verb = " ".join(argv[1:1 + words]) or "help"
        if verb in ("--version", "version"):
            sys.exit(print(_version()))
        if verb == "completion":
            sys.exit(print(script((*argv[2:], "")[0], VERBS), end=""))
        if verb in ("help", "--help", "-h", "--helpfull"):
            lines = [f"  {name:<20}{each.usage:<31}{each.about}" for name, each in VERBS.items()]
            print(USAGE.format(verbs="\n".join(lines)))
            sys.exit(0 if len(argv) > 1 else 2)
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"verb {verb!r}: expected one of {', '.join(VERBS)}{hint}")
        values = _parse(VERBS[verb].define, [f"batiste {verb}", *argv[1 + words:]])
        if "print_config" in values and values.print_config:
            from batiste.config_text import as_python

            command = f"batiste {verb} {shlex.join(argv[1 + words:])}"
            sys.exit(print(as_python(required(values, "config"), command), end=""))
        if "compilation_cache" in values and values.compilation_cache:
            compilation_cache.enable()
        sys.exit(VERBS[verb].call(values))


def _version() -> str:
    """Of Batiste, and of what decides what it computes."""
    others = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax"))
    return f"batiste {__version__} ({', '.join(others)}, Python {platform.python_version()})"


def _parse(define: Callable, argv: list[str]) -> flags.FlagValues:
    """Parses flags into values of their own, so that nothing is global and twice is fine."""
    for argument in argv:
        if not argument.isprintable() and re.search("[\udc80-\udcff]", argument):
            raise ValueError(f"argument {argument!r}: is not UTF-8")
    end = argv.index("--") if "--" in argv else len(argv)
    argv, command = argv[:end], argv[end + 1:]
    argv = [argv[0], *(find_file(argument, ROOT) for argument in _config_joined(argv[1:]))]
    values = _flags(define, argv)
    try:
        positional = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error.flagname, list(values), argv[0])) from None
    except (flags.Error, TypeError, ValueError) as error:
        raise ValueError(_explain(error)) from None
    if values.help:
        print(f"{argv[0]} flags:\n{_flags(define, argv[:1]).get_help('', False)}")
        _print_fields(values)
        sys.exit(0)
    if command and "command" in values:
        values.command = command
        command = []
    if "runs" in values and not command:
        values.runs, positional = [*values.runs, *positional], []
    for argument in (*positional, *command):
        raise ValueError(f"unexpected argument {argument!r}: flags are written --name=value")
    return values


def _flags(define: Callable, argv: list[str]) -> flags.FlagValues:
    """The flags of a verb; what is set of a config at once is taken out of `argv`."""
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    define(values, argv)
    return values


def _config_joined(argv: list[str]) -> list[str]:
    """--config FILE as one argument."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--config", "-config"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _print_fields(values: flags.FlagValues) -> None:
    """Lists the fields of the config that is given, of verbs that take one."""
    if "config" not in values:
        return
    if values.config is None:
        print("\nWith --config=FILE this lists every field of it, with its value, type and text.")
        return
    from batiste.config_text import field_list

    print(field_list(values.config))


def _unknown_flag(name: str, names: Sequence[str], command: str) -> str:
    """The message about a flag that a verb does not have."""
    if name.startswith("config.") and "config" in names:
        return f"--{name} is a field of --config=FILE, which is left out"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean --{near[0]}?" if near else ""
    return f"unknown flag --{name}{hint} ({command} --help lists all)"


def _explain(error: Exception) -> str:
    """What is wrong with a value, with the type that its flag has."""
    text = " ".join(str(error).split())
    wrong = re.match(r"flag --(config\.[^=]+=.*?): (invalid literal for int|could not convert|"
                     r"\('Non-boolean)", text)
    kinds = {"inv": "a whole number", "cou": "a number", "('N": "true or false"}
    return f"--{wrong[1]}: expected {kinds[wrong[2][:3]]}" if wrong else text


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors that batiste raised on purpose, and those of disks and files, end in one line.

    On purpose: a ValueError that a `raise` of batiste's own raised. Any other is a defect, or a
    device's or the network's failure, and keeps its traceback.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output is gone; Python would complain once more when it flushes at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(exit_codes.BROKEN_PIPE)
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
        if ROOT not in rooms or not last.line.startswith("raise"):
            return None
        return _shown("\n".join([*getattr(error, "__notes__", ()), f"error: {error}"]))
    if isinstance(error, (AssertionError, RuntimeError)):
        return _no_backend(error)
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT,
        errno.ENOTDIR, errno.EISDIR, errno.EFBIG, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
    ):
        place = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror}{place}{PLACES.get(error.errno, '')}"
    return None


def _shown(text: str) -> str:
    """Text of an error without the control characters that may come from a file or an argument."""
    if text.replace("\n", "").isprintable():
        return text
    from batiste.data.printable import printable

    return printable(text)


def _no_backend(error: Exception) -> str | None:
    """What is missing where jax has no backend of the kind that JAX_PLATFORMS asks for.

    None where it is another error. Some releases of jax fail an assertion there, without a text.
    """
    frames = traceback.extract_tb(error.__traceback__)
    asked = os.environ.get("JAX_PLATFORMS", "")
    if not asked or not frames[-1].filename.endswith(os.path.join("jax", "_src", "xla_bridge.py")):
        return None
    reason = " ".join(str(error).split("(set JAX_PLATFORMS")[0].split()) or "JAX has no such backend"
    extra = next((EXTRAS[name] for name in asked.split(",") if name in EXTRAS), None)
    install = f"install it with `pip install 'batiste[{extra}]'`, or " if extra else ""
    return (f"error: JAX_PLATFORMS={asked}: {reason}; {install}leave JAX_PLATFORMS out, which takes "
            "what there is")
