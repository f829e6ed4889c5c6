"""Laws of every legal experiment, held to random ones (tests/random_configs.py draws and checks).

The seeds are those of the package's version: a new version meets new experiments. `make test` takes
40, and two steps on a mesh, of which each costs two compilations, for every fifth of them; `make
test-long` takes 400 and leaves nothing out.
"""

import hashlib

import jax
import pytest
import random_configs

from batiste import __version__

STEPS_EVERY = 5


def pytest_generate_tests(metafunc):
    """A test for each seed: as many as --random-configs says."""
    first = int(hashlib.sha256(__version__.encode()).hexdigest()[:6], 16)
    count = metafunc.config.getoption("--random-configs")
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(first, first + count))


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing that is compiled here is of use to the next test."""
    yield
    jax.clear_caches()


def test_a_legal_experiment_is_accounted_for_trained_decoded_and_exported(seed, tmp_path, request):
    drawn = random_configs.draw(seed)
    settled = random_configs.settle(drawn, seed)
    random_configs.check_account(settled)
    if request.config.getoption("--random-configs") > 40 or seed % STEPS_EVERY == 0:
        random_configs.check_steps(settled, seed)
    random_configs.check_decoding(settled, seed)
    random_configs.check_exchange(settled, tmp_path)
