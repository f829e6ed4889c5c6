"""What can be held of the GPU attention benchmark without a GPU."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's modules, which import each other by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import attention_gpu
    import attention_gpu_checks
    import attention_gpu_timing
    import attention_gpu_tune
    return attention_gpu, attention_gpu_checks, attention_gpu_timing, attention_gpu_tune


def test_without_a_gpu_it_says_so_in_one_line_and_fails():
    command = [sys.executable, FOLDER / "attention_gpu.py"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "This benchmark needs an NVIDIA GPU; JAX found 'cpu'.\n"


def test_a_row_has_a_cell_for_each_column_whatever_failed(modules):
    main = modules[0]
    case = main.Case(2, 1024, 16, 4, 128, causal=True, backward=False)
    assert case.flops() == 4 * 2 * 16 * 1024**2 * 128 / 2
    assert case._replace(causal=False, backward=True).flops() == 7 * case.flops()
    names = ["batiste", "cuDNN", "flash"]
    columns = main.table_head(names).splitlines()[0].count("|")
    for ours, theirs, ratio in ((0.001, 0.002, "2.00"), ("no | memory", 0.002, "–"),
                                (0.001, "no torch", "–")):
        error = main.reason(RuntimeError(ours)) if isinstance(ours, str) else ours
        row = main.table_row(case, dict(zip(names, (error, theirs, "not here"))))
        assert row.count("|") == columns and row.endswith(f"| {ratio} |")
    assert main.table_row(case, dict.fromkeys(names, 0.001)).endswith("| 9 | 9 | 9 | 1.00 |")


def test_a_program_that_does_not_compile_is_a_line_of_text(modules):
    timing = modules[2]
    shapes = [jax.ShapeDtypeStruct((3,), jnp.float32)]
    jobs = {"good": (jax.jit(lambda x: x + 1), shapes),
            "bad": (jax.jit(lambda x: x + jnp.zeros(2)), shapes)}
    compiled = timing.compile_all(jobs)
    assert timing.measure(timing.jax_builder(compiled["good"], shapes)) > 0
    assert "incompatible" in timing.measure(timing.jax_builder(compiled["bad"], shapes))


def test_a_check_notices_wrong_numbers_nans_and_missing_results(modules):
    check = modules[1].Check("x", None, None, [], 0.1)
    want = (jnp.array([2.0, -jnp.inf]), jnp.array([4.0, 8.0]))
    assert check.error(want, want) == (0.0, True)
    assert check.error((want[0], want[1] + 1), want) == (0.125, True)
    assert not check.error((jnp.array([2.0, 0.0]), want[1]), want)[1]
    assert not check.error((want[0], jnp.array([4.0, jnp.nan])), want)[1]
    assert not check.error(want[:1], want)[1]


@pytest.mark.slow
def test_one_check_one_timing_and_one_candidate_run_interpreted(modules):
    main, checks, timing, tune = modules
    check = checks.make_checks("hopper", rehearse=True)[0]
    got = jax.jit(check.kernel)(*check.arrays)
    error, right = check.error(got, jax.jit(check.want)(*check.arrays))
    assert right and error < check.bound
    case = main.make_cases(rehearse=True)[0]
    program = main.jax_program(main.batiste_attention(case, "hopper", True), case)
    assert timing.measure(lambda: (lambda: program(*map(jnp.ones_like, case.shapes())),
                                   jax.block_until_ready)) > 0
    candidate = tune.make_candidates(rehearse=True)[0]
    assert candidate.kernel == "forward" and len(tune.make_candidates(rehearse=False)) == 108
