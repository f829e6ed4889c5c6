"""Compiled programs are kept for the next start, within a bound, and never in the user's way."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from batiste import command_line, compilation_cache
from batiste.verbs import VERBS

NAMES = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size",
         "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> pathlib.Path:
    """A JAX without a cache, and a user's cache folder of the test's own."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.delenv(compilation_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache, "MIN_SECONDS", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def compiled(number: float) -> jax.Array:
    """Compiles a program of this number anew, or takes it from the cache."""
    def program(x):
        return jnp.sin(x) * number + x @ x.T

    return jax.jit(program)(jnp.ones((3, 3)))


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*-cache"))


def test_programs_are_kept_in_the_users_cache_folder(fresh):
    folder = compilation_cache.enable()
    assert folder.parent == fresh / "batiste" / "compiled"
    expected = compiled(2.0)
    (entry,) = (path for path in entries(folder) if "program" in path.name)
    written = entry.stat().st_mtime_ns
    assert (compiled(2.0) == expected).all()
    assert entry.stat().st_mtime_ns == written


def test_a_damaged_entry_is_compiled_again(fresh):
    folder = compilation_cache.enable()
    expected = compiled(3.0)
    for damage in (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], lambda data: b"",
                   lambda data: data[:len(data) // 2]):
        for path in entries(folder):
            path.write_bytes(damage(path.read_bytes()))
        with pytest.warns(UserWarning, match="persistent compilation cache entry"):
            assert (compiled(3.0) == expected).all()


def test_the_least_recently_used_programs_make_room(fresh, monkeypatch):
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 20_000)
    folder = compilation_cache.enable()
    for number in range(8):
        compiled(float(number))
    sizes = [path.stat().st_size for path in entries(folder)]
    assert 0 < len(sizes) < 8 and sum(sizes) <= 20_000


def test_a_cache_that_the_user_configured_stays(fresh):
    jax.config.update("jax_compilation_cache_dir", str(fresh / "mine"))
    jax.config.update("jax_compilation_cache_max_size", -1)
    assert compilation_cache.enable() == fresh / "mine"
    assert jax.config.jax_compilation_cache_max_size == -1 and not (fresh / "batiste").exists()


@pytest.mark.parametrize("value", ["0", "off"])
def test_the_variable_turns_it_off_or_names_another_folder(value, fresh, monkeypatch):
    monkeypatch.setenv(compilation_cache.VARIABLE, value)
    assert compilation_cache.enable() is None and jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv(compilation_cache.VARIABLE, str(fresh / "other"))
    assert compilation_cache.enable() == fresh / "other"


def test_a_folder_that_cannot_be_written_is_said_and_stops_nothing(fresh, capsys):
    (fresh / "batiste").write_text("a file")
    assert compilation_cache.enable() is None
    assert "compiled programs are not kept" in capsys.readouterr().err


def test_every_verb_that_compiles_has_the_flag_and_it_decides(monkeypatch, fresh):
    called = []
    monkeypatch.setattr(compilation_cache, "enable", lambda: called.append(True))
    for verb in ("train", "evaluate", "generate", "tune", "embed"):
        values = flags.FlagValues()
        VERBS[verb].define(values, [verb])
        assert "compilation_cache" in values
    for argument, count in (("--nocompilation_cache", 0), ("--compilation_cache", 1)):
        with pytest.raises(SystemExit):
            command_line.run(["batiste", "evaluate", "--workdir=nowhere", argument])
        assert len(called) == count
