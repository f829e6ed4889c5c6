"""Compiling in parallel and timing, for `attention_gpu.py`; what fails becomes a table's cell."""

import concurrent.futures
import math
import os
import statistics
import time
from collections.abc import Callable

import jax

REPEATS, LEAST_SECONDS, MOST_SECONDS = 30, 0.002, 6.0


def median_seconds(call: Callable, wait: Callable) -> float:
    """Median of 30 turns; a turn is as many calls as take two milliseconds."""
    wait(call())
    start = time.perf_counter()
    wait(call())
    inner = max(1, min(50, math.ceil(LEAST_SECONDS / (time.perf_counter() - start))))
    turns, begin = [], time.perf_counter()
    # The second condition is for shapes so slow that 30 turns would cost the rest of the table.
    while len(turns) < REPEATS and (len(turns) < 3 or time.perf_counter() - begin < MOST_SECONDS):
        start = time.perf_counter()
        for _ in range(inner):
            result = call()
        wait(result)
        turns.append((time.perf_counter() - start) / inner)
    return statistics.median(turns)


def reason(error: BaseException) -> str:
    """One short line that fits a table's cell."""
    text = f"{type(error).__name__}: {error}".replace("|", "/")
    return " ".join(text.split())[:90]


def compile_all(jobs: dict) -> dict:
    """Compiles {name: (jitted function, shapes)} in parallel; an error stands for what failed."""
    def build(job):
        function, shapes = job
        try:
            return function.lower(*shapes).compile()
        except Exception as error:  # Any failure is one row's, and is printed there.
            return error

    with concurrent.futures.ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        return dict(zip(jobs, pool.map(build, jobs.values())))


def measure(build: Callable) -> float | str:
    """Seconds per call, or why not."""
    try:
        return median_seconds(*build())
    except Exception as error:
        return reason(error)


def jax_builder(compiled: object, shapes: list[jax.ShapeDtypeStruct]) -> Callable:
    """What `measure` takes, from what `compile_all` gives: a call on random data and a wait."""
    def build():
        if isinstance(compiled, BaseException):
            raise compiled
        keys = jax.random.split(jax.random.key(0), len(shapes))
        arrays = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes)]
        return lambda: compiled(*arrays), jax.block_until_ready
    return build
