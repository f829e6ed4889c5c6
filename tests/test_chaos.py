"""The short form of benchmarks/chaos.py: every drill once, and nothing is lost."""

import pathlib
import random
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import chaos
from drills import DRILLS, STEPS_PER_KILL, Run

pytestmark = pytest.mark.slow


def test_every_drill_once_and_no_loss_no_example_and_no_committed_step_is_lost():
    steps = STEPS_PER_KILL * len(DRILLS)
    with chaos.scene(steps) as folder:
        calm, run = Run(folder, "calm", 1), Run(folder, "run", 1)
        calm.start()
        assert not any(calm.wait()), (folder / "output.txt").read_text()[-2000:]
        done = chaos.torment(folder, run, len(DRILLS), random.Random(3))
        assert len(done) == len(DRILLS)
        chaos.compare(run, calm, steps)
