"""Compiled programs are kept in the user's cache folder, so that the next start need not compile."""

import hashlib
import os
import pathlib
import platform
import sys

VARIABLE = "BATISTE_COMPILATION_CACHE"
MAX_BYTES = 4 * 2**30  # Of all of a machine; the least recently used programs make room.
MIN_SECONDS = 1.0  # What compiles faster is compiled again.


def enable() -> pathlib.Path | None:
    """Lets JAX keep compiled programs; returns where, None where it is turned off.

    A cache that is configured through JAX stays as it is. The variable BATISTE_COMPILATION_CACHE
    names another folder, or turns it off with 0. Call it before the first compilation.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return pathlib.Path(jax.config.jax_compilation_cache_dir)
    folder = _folder()
    if folder is None or not jax.config.jax_enable_compilation_cache:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        print(f"compiled programs are not kept: {folder}: {error.strerror}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return folder


def _folder() -> pathlib.Path | None:
    """Where compiled programs go; None where the variable turns it off."""
    asked = os.environ.get(VARIABLE)
    if asked in ("0", "off", "false", "no"):
        return None
    if asked:
        return pathlib.Path(asked)
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home, "batiste", "compiled", _machine())


def _machine() -> str:
    """Names the instructions that this machine has: one home may be shared by different machines."""
    described = pathlib.Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
