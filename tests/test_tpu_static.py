"""Laws of the schedule that benchmarks/tpu_static.py reads, on one product compiled for a v6e."""

import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("libtpu", reason="libtpu exists for Linux on x86-64 only")
FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
ROWS, INNER, COLUMNS, STEPS = 256, 256, 512, 4
PRODUCT = f"""
import functools, sys
sys.path.insert(0, {str(FOLDER)!r})
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from tpu_problems import compile_for

def kernel(a, b, out):
    out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

def product(a, b):
    return pl.pallas_call(
        kernel, grid=({STEPS},), name="one_product",
        in_specs=[pl.BlockSpec(({ROWS}, {INNER}), lambda i: (i, 0)),
                  pl.BlockSpec(({INNER}, {COLUMNS}), lambda i: (0, 0))],
        out_specs=pl.BlockSpec(({ROWS}, {COLUMNS}), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(({STEPS * ROWS}, {COLUMNS}), jnp.float32))(a, b)

bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
compile_for("v6e", product, [bf16(({STEPS * ROWS}, {INNER})), bf16(({INNER}, {COLUMNS}))])
"""


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark's module that reads schedules."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import tpu_schedule
    return tpu_schedule


@pytest.fixture
def schedule(benchmark, tmp_path):
    """What the compiler made of the product."""
    command = [sys.executable, "-c", PRODUCT]
    environment = benchmark.environment(str(tmp_path))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return benchmark.read(str(tmp_path), "one_product")


def test_a_products_schedule_obeys_the_arithmetic(benchmark, schedule, tmp_path):
    whole = schedule.whole
    # One of v6e's two matrix units holds 256 x 256 numbers and takes two rows a cycle.
    occupied = ROWS * (INNER // 256) * (COLUMNS // 256) // 2
    assert schedule.capacity["MATMUL"] == 2
    assert schedule.total("MATMUL", whole) == occupied
    for unit, counts in schedule.occupied.items():
        assert 0 <= counts.min() and counts.max() <= schedule.capacity[unit]
    # Bundles and stalls make up the cycles, and the two files of the compiler agree on which is
    # which: where nothing issues, only matrix units can still be occupied.
    (path,) = tmp_path.glob("*one_product*-01-packed-bundles-post-ra.txt")
    issued = re.findall(r"^ *(?:0x[0-9a-f]+|0) .*\{ .*%", path.read_text(), re.MULTILINE)
    assert 0 < schedule.stalled(whole) == whole.cycles - len(issued)
    for unit in ("VLOAD", "VSTORE", "SALU"):
        assert schedule.occupied[unit].any()
        assert not schedule.occupied[unit][schedule.stalls].any()
    # What leaves a matrix unit is stored once: 8 rows of 128 fp32 at a time.
    assert schedule.total("VSTORE", whole) - schedule.total("VSTORE:SPILL", whole) == (
        ROWS * COLUMNS // (8 * 128))

    (body,) = (kernel := benchmark.dissect(schedule)).bodies
    assert body.loop is None and body.section.cycles >= schedule.floor(body.section) == occupied / 2
    (grid,) = [span for span in schedule.spans if span.is_loop]
    assert kernel.step_cycles + kernel.edge_cycles + body.section.cycles == grid.cycles
    for span in schedule.spans:
        for other in schedule.spans:
            apart = span.stop <= other.start or other.stop <= span.start
            assert apart or span.holds(other) or other.holds(span)
