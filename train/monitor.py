"""Watches over a run: statistics to records, records to findings, findings to decisions."""

import collections
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from batiste.train.config import TrainConfig
from batiste.train.decisions import RollBack, decide, decisions_of, lower
from batiste.train.detector import Detector
from batiste.train.findings import Finding
from batiste.train.health import parse_policies
from batiste.train.health_record import health_record, target_record
from batiste.train.health_statistics import HealthStatistics
from batiste.train.ledger import Ledger
from batiste.train.metrics import MetricsWriter, read_all
from batiste.train.thinning import is_thinned

# Steps in a row without an update, before the run gives up; in float16, with a loss scale that can
# be halved no further: halving it is how it is found.
STUCK = 8
LOOK_BACK = 4  # Windows of records that a continued run looks at again.


@dataclasses.dataclass
class Watched:
    """What a Monitor writes to, and knows of the run.

    meta: of the run; its decisions grow. settings: the flat config. note: says a line on the
    terminal. examples: step -> numbers of the records in its batch, by row.
    """

    meta: dict[str, Any]
    ledger: Ledger
    settings: dict[str, Any]
    note: Callable[[str], None]
    examples: Callable[[int], Sequence[int]]


class Monitor:
    """Looks at every `train.health.every`-th step. All processes decide alike: what may decide is
    the same in all of them."""

    def __init__(self, config: TrainConfig, watched: Watched):
        self._config, self._watched = config.health, watched
        self._least_scale = config.loss_scale.minimum
        self._detector = Detector(
            watched.settings, watched.examples, alone=jax.process_count() == 1)
        self._policies = parse_policies(config.health.policies)
        self._waited, self._since, self._skips = 0.0, time.perf_counter(), 0
        self._targets: collections.deque[dict[str, float]] = collections.deque()

    def remember(self, workdir: pathlib.Path, step: int) -> None:
        """Looks at what the run wrote up to a step, so that it goes on as if never interrupted."""
        records = [record for record in read_all(workdir) if record["step"] <= step]
        looks = [record for record in records if record["kind"] == "health"]
        again = looks[-self.look_back(self._config.window):]
        thinned = sum(map(is_thinned, again))
        if thinned:
            self._watched.note(f"health: of {thinned} of the last {len(again)} looks only the loss "
                               "was kept: what is usual is learned anew from those after them")
            again = again[max(place for place, look in enumerate(again) if is_thinned(look)) + 1:]
        first = again[0]["step"] if again else math.inf
        for record in records:
            if record["kind"] == "validation":
                self._detector.observe_validation(record["step"], record["loss"])
            elif record["kind"] == "health" and record["step"] >= first:
                self._detector.observe(record)
            elif record["kind"] == "health":
                self._detector.remember(record)

    @staticmethod
    def look_back(window: int) -> int:
        """How many looks a continued run looks at again."""
        return LOOK_BACK * window

    def inspect(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, of the host, one for each `look` to come; sees what their targets are."""
        for batch in batches:
            self._targets.append(target_record(batch))
            yield batch

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; measures how long the loop waits for them."""
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def look(
        self, writer: MetricsWriter, step: int, statistics: HealthStatistics,
        metrics: dict[str, float],
    ) -> None:
        """Records a step that is done, and acts on what is found.

        Raises RollBack, or ValueError where the policy is to stop.
        """
        now = time.perf_counter()
        seconds, waited = now - self._since, self._waited
        self._since, self._waited = now, 0.0
        targets = self._targets.popleft()
        skipped = bool(metrics.get("skipped"))
        halved = skipped and metrics.get("loss_scale", 0.0) > self._least_scale
        self._skips = self._skips + 1 if skipped and not halved else 0
        if step % self._config.every and not skipped:
            return
        record = health_record(jax.device_get(statistics), metrics, seconds, waited, targets)
        writer.write_health(step, record)
        # float16 finds its loss scale by overflowing now and then, and skips by itself.
        if not ("loss_scale" in metrics and skipped):
            self._act(self._detector.observe({"step": step, **record}))
        if self._skips >= STUCK:
            raise ValueError(
                f"the gradients of {STUCK} steps in a row, up to step {step}, are not finite: lower "
                "train.schedule.learning_rate, or set train.health.policies=not_finite=roll_back"
            )

    def validated(self, step: int, loss: float) -> None:
        """Looks at a validation loss; raises as `look`."""
        self._act(self._detector.observe_validation(step, loss))

    def _act(self, findings: list[Finding]) -> None:
        for finding in findings:
            policy = self._policies[finding.kind]
            known = any((decision.kind, decision.step) == (finding.kind, finding.step)
                        for decision in decisions_of(self._watched.meta))
            self._watched.ledger.write("finding", policy=policy, **finding.event())
            self._watched.note(f"{finding.line()} [{policy}]")
            if policy == "stop":
                raise ValueError(f"{finding.line()} (train.health.policies: {finding.kind}=stop)")
            if policy == "lower" and not known:
                decide(lower(finding), self._watched.meta, self._watched.ledger)
            if policy == "roll_back" and not known:
                raise RollBack(finding)
