"""A step counts only as what was written, whole; a save that fails is noticed, and tried again."""

import _thread
import functools
import os
import pathlib
import resource
import shutil
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste.train import Checkpoints, Found, TrainState
from batiste.train.config import CheckpointConfig
from test_data_prepare import DAMAGES

LOSSES = {5: 3.0, 10: 1.0, 15: 2.0, 20: 4.0, 25: 5.0}


def state_of(step: int) -> TrainState:
    """A small state whose numbers tell the step."""
    params = {"a": jnp.arange(6.0).reshape(2, 3) + step, "b": jnp.full((4,), step, jnp.bfloat16)}
    return TrainState(jnp.int32(step), params, (jnp.ones((5,)) * step,), None)


def save_all(folder: pathlib.Path, config: CheckpointConfig, steps) -> Checkpoints:
    """A work directory where `steps` were saved."""
    checkpoints = Checkpoints(folder, config)
    for step in steps:
        meta = {"validation": [[known, loss] for known, loss in LOSSES.items() if known <= step]}
        checkpoints.save(step, state_of(step), meta)
    checkpoints.finish(step, state_of(step), meta)
    return checkpoints


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> pathlib.Path:
    """A work directory with steps 5 and 10, only to be read."""
    folder = tmp_path_factory.mktemp("two_steps")
    save_all(folder, CheckpointConfig(), (5, 10)).close()
    return folder


def test_damage_to_any_file_is_named_and_the_step_before_is_taken(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.newest_verified() == Found(10, {})
    files = [path for path in (tmp_path / "checkpoints/10").rglob("*") if path.is_file()]
    assert len(files) > 10 and {"manifest.json", "meta.json", "_METADATA"} < {
        path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        for kind, damage in DAMAGES.items():
            if whole or kind == "remove":
                damage(path)
                found = checkpoints.newest_verified()
                assert found.step == 5 and str(path) in found.passed_over[10], (path, kind)
                path.write_bytes(whole)
    assert checkpoints.newest_verified() == Found(10, {})
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state_of(0))
    restored = checkpoints.restore(10, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(10))
    params = checkpoints.restore(5, {"params": abstract.params})["params"]
    jax.tree.map(np.testing.assert_array_equal, params, state_of(5).params)
    checkpoints.close()


def test_what_looks_like_a_step_is_none_and_is_not_lost(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    (folder / "12").mkdir()  # Empty.
    shutil.copytree(folder / "10", folder / "20")  # Renamed.
    (folder / "30").mkdir()
    (folder / "30" / "notes.txt").write_text("foreign")
    shutil.copytree(folder / "10", folder / "40.unfinished")  # Killed while it was saved.
    shutil.copytree(folder / "10", folder / "50")  # Partial.
    (folder / "50" / "manifest.json").unlink()
    (folder / "60").write_text("a file")
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.latest_step == 10
    found = checkpoints.newest_verified()
    assert found.step == 10 and sorted(found.passed_over) == [20, 30, 50]
    assert "is of step 10: a renamed directory" in found.passed_over[20]
    assert "partial or foreign" in found.passed_over[30]
    for step in (12, 20):
        checkpoints.save(step, state_of(step), {})
    checkpoints.finish(20, state_of(20), {})
    assert checkpoints.newest_verified() == Found(20, {})
    assert sorted(path.name for path in folder.iterdir()) == [
        "12", "20", "20.set_aside_1", "30.set_aside_1", "50.set_aside_1", "60"]
    assert (folder / "30.set_aside_1/notes.txt").read_text() == "foreign"
    checkpoints.close()


@pytest.mark.parametrize("config,kept", [
    (CheckpointConfig(keep=1), [25]),
    (CheckpointConfig(keep=2), [20, 25]),
    (CheckpointConfig(keep=1, keep_every=10), [10, 20, 25]),
    (CheckpointConfig(keep=1, keep_best=2), [10, 15, 25]),
])
def test_what_is_kept(config, kept, tmp_path):
    save_all(tmp_path, config, LOSSES).close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept


class Reports(list):
    """What Checkpoints reports, as (event, fields)."""

    def __call__(self, event: str, **fields) -> None:
        self.append((event, fields))


def settled(checkpoints: Checkpoints, reports: Reports) -> bool:
    """Asks as the loop does, until the save under way has ended; whether to save again."""
    before = len(reports)
    for _ in range(1000):
        if checkpoints.failed(step=0):
            return True
        if len(reports) > before:
            return False
        time.sleep(0.01)
    raise AssertionError("neither saved nor failed")


def test_a_full_disk_is_noticed_tried_again_and_survived(tmp_path, capfd):
    """A limit on the size of a file stands for the disk; what the system answers is real."""
    reports = Reports()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(max_failures=3), reports)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints.save(5, state_of(5), {})
    assert not settled(checkpoints, reports)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, limit[1]))
        checkpoints.save(10, state_of(10), {})
        assert settled(checkpoints, reports), "the first failure asks for a second try"
        checkpoints.save(11, state_of(11), {})
        assert not settled(checkpoints, reports), "the second waits for the next save"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [(event, fields["step"]) for event, fields in reports] == [
        ("saved", 5), ("save_failed", 10), ("save_failed", 11)]
    assert "File too large" in reports[-1][1]["why"]
    checkpoints.save(15, state_of(15), {})
    checkpoints.finish(15, state_of(15), {})
    assert checkpoints.newest_verified() == Found(15, {})
    assert sorted(os.listdir(checkpoints.folder)) == ["15", "5"]
    checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_last_save_that_fails_says_why_and_nothing_else(tmp_path, capfd, monkeypatch):
    """TensorStore's writes may end after Orbax has closed its event loop, and would say so."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints.save(5, state_of(5), {})
    checkpoints.wait()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, limit[1]))
        checkpoints.save(10, state_of(10), {})
        with pytest.raises(ValueError, match="step 10 could not be saved: File too large"):
            checkpoints.finish(10, state_of(10), {})
        time.sleep(0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    checkpoints.close()
    assert capfd.readouterr().err == ""
    # Not every time is a write late: so the same call again, from a thread as it is of C++.
    told = []
    hook = sys.unraisablehook
    assert isinstance(hook, functools.partial)
    monkeypatch.setattr(sys, "unraisablehook", functools.partial(hook.func, told.append))
    for text in ("Event loop is closed", "another"):
        _late_write(text)
    assert [str(each.exc_value) for each in told] == ["another"]


def _late_write(text: str) -> None:
    """An exception that nobody can catch, in a thread that Python's threading did not start."""
    done = threading.Event()

    class Dying:
        def __del__(self):
            done.set()
            raise RuntimeError(text)

    _thread.start_new_thread(lambda _: None, (Dying(),))
    assert done.wait(10)


def test_a_directory_that_cannot_be_written_stops_the_run_after_the_failures_allowed(tmp_path):
    reports = Reports()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(max_failures=2), reports)
    checkpoints.save(5, state_of(5), {})
    assert not settled(checkpoints, reports)
    shutil.move(tmp_path / "checkpoints", tmp_path / "elsewhere")
    (tmp_path / "checkpoints").write_text("not a directory")
    checkpoints.save(10, state_of(10), {})
    assert settled(checkpoints, reports)
    checkpoints.save(11, state_of(11), {})
    with pytest.raises(ValueError, match="2 saves in a row failed .*max_failures=2.*Not a directory"):
        settled(checkpoints, reports)
    checkpoints.close()
    assert (tmp_path / "elsewhere" / "5" / "manifest.json").is_file()
