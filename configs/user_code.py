"""Python files of a person's own: run, with errors that show that person's frames alone."""

import contextlib
import importlib.util
import pathlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from types import ModuleType

import xxhash

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
STANDARD_LIBRARY = pathlib.Path(sysconfig.get_path("stdlib")).resolve()


def module_name(path: str) -> str:
    """What the module of a file is called, wherever it is named from."""
    place = str(pathlib.Path(path).resolve())
    return f"batiste_own_{xxhash.xxh3_64_hexdigest(place.encode())}"


def run_file(what: str, path: str) -> ModuleType:
    """Runs a Python file as a module of a name of its own, which it keeps in `sys.modules`.

    what: the flag or field that names it. Raises ValueError for whatever the file raises.
    """
    name = module_name(path)
    found = importlib.util.spec_from_file_location(name, path)
    before = sys.modules.get(name)
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    try:
        with own_errors(what, path):
            found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    return module


@contextlib.contextmanager
def own_errors(what: str, path: str) -> Iterator[None]:
    """Turns what a person's file raises into a ValueError; its note has the frames of that file.

    Of Batiste's own files a ValueError stays what it is: its message says all.
    """
    file = pathlib.Path(path).resolve()
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) and file.parent.parent == PACKAGE:
            raise ValueError(str(error)) from None
        text = " ".join(str(error).split())
        refused = ValueError(f"{what}={path}: {type(error).__name__}: {text}")
        refused.add_note(_frames(error, file))
        raise refused from None


def _frames(error: BaseException, file: pathlib.Path) -> str:
    """The frames of an error that are neither Batiste's nor a library's, as a traceback has them."""
    if isinstance(error, SyntaxError):
        return "".join(traceback.format_exception_only(error)[:-1]).rstrip("\n")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if _is_own(frame.filename, file)]
    return "".join(traceback.format_list(frames)).rstrip("\n")


def _is_own(name: str, file: pathlib.Path) -> bool:
    if name.startswith("<"):
        return False
    path = pathlib.Path(name).resolve()
    in_package = PACKAGE in path.parents[:2] and (path.parent / "__init__.py").is_file()
    in_library = "site-packages" in path.parts or STANDARD_LIBRARY in path.parents
    return path == file or not (in_package or in_library)
