"""What losses, rows of the batch and the clock say is wrong."""

import collections
from typing import Any

import numpy as np

from batiste.train.findings import Symptom
from batiste.train.series import ENOUGH, NORMAL, Series

# In 2,000 healthy steps of the quickstart the loss was at most 2.6 robust standard deviations above
# its median, the median row 1.2, and the worst row 3.9 but for one at 14.6, a table of letters that
# occur nowhere else. So rows are a fault where there are several of them.
FAR = 6.0  # Robust standard deviations of the loss.
LEAST = 0.02  # Least standard deviation, of the median.
ROW_FAR, ROWS = 8.0, 3  # Robust standard deviations of a row; so many of them within a window.
BATCH_FAR = 3.0  # Of the median row of a batch, in standard deviations of rows.
SAME = 0.25, 3  # Rows alike: at least so much of the batch, and so many.
BLOCK = 256, 0.1  # Looks of a plateau: at least so many, and so much of the run.
RIGHT = 0.99  # Of the targets.
AGAIN = 2  # Looks in a row at batches that were looked at before.
SURE = 2.0  # Standard errors by which the loss must have fallen.
WORSE = 1.01  # Validation loss over its best.
WAITING, CLOCK, SLOW = 0.5, 32, 3.0  # Share of the time; over so many looks; times the median.


class LossRules:
    """Looks at records in order. window: looks to compare with; total: looks of the whole run.

    next_tokens: whether every target of the run is the token after its input.
    """

    def __init__(self, window: int, total: int, next_tokens: bool = False):
        self._next_tokens = next_tokens
        self._batches, self._again = collections.deque(maxlen=window), 0
        self._loss = Series(window)
        # By look: their number changes with the batch size.
        self._rows: collections.deque[np.ndarray] = collections.deque(maxlen=window)
        self._block = max(BLOCK[0], 4 * window, int(BLOCK[1] * total))
        self._odd = collections.deque(maxlen=window)
        self._losses: list[float] = []
        self._validation: list[tuple[float, float]] = []
        self._since: list[float] = []

    def targets(self, record: dict[str, Any]) -> list[Symptom]:
        """Whether the targets are what is predicted, for objectives of which that is known."""
        shares = record.get("targets") or {}
        if not self._next_tokens or not shares or shares["next"] >= RIGHT:
            return []
        variant = next((name for name in ("same", "after") if shares[name] >= RIGHT), "other")
        evidence = {"targets that are the next token": shares["next"],
                    "that are the token itself": shares["same"],
                    "that are the one after the next": shares["after"]}
        return [Symptom("wrong_targets", evidence, variant=variant)]

    def batch(self, record: dict[str, Any]) -> list[Symptom]:
        """Whether batches come again, in whatever order their rows are."""
        batch = tuple(sorted(record["row_checksum"]))
        since = {each: looks for looks, each in enumerate(reversed(self._batches), start=1)}
        self._again = self._again + 1 if batch in since else 0
        self._batches.append(batch)
        if self._again < AGAIN:
            return []
        evidence = {"looks in a row": self._again, "looks ago": since[batch]}
        return [Symptom("repeated_batch", evidence, rows=tuple(range(min(4, len(batch)))))]

    def rows(self, record: dict[str, Any]) -> list[Symptom]:
        """What the rows of a batch say of the data."""
        loss_B, checksum_B = np.array(record["row_loss"]), record["row_checksum"]
        checksum, count = collections.Counter(checksum_B).most_common(1)[0]
        if count >= max(SAME[0] * len(checksum_B), SAME[1]):
            rows = tuple(row for row, value in enumerate(checksum_B) if value == checksum)
            return [Symptom("data_fault", {"equal rows": count}, rows=rows, variant="repeated")]
        if len(self._rows) < ENOUGH:
            return []
        median, deviation = self._usual_row()
        z_B = (loss_B - median) / deviation
        order = tuple(int(row) for row in np.argsort(-z_B, kind="stable"))
        evidence = {"loss of the worst row": loss_B[order[0]], "median of rows": median,
                    "standard deviations": z_B[order[0]]}
        if np.median(z_B) > BATCH_FAR and len(z_B) > 1:
            evidence["of the median row"] = float(np.median(z_B))
            return [Symptom("data_fault", evidence, rows=order, variant="garbage")]
        rows = tuple(row for row in order if z_B[row] > ROW_FAR)
        self._odd.append(len(rows))
        if rows and sum(self._odd) >= ROWS:
            evidence["such rows in a window"] = sum(self._odd)
            return [Symptom("data_fault", evidence, rows=rows, variant="outlier")]
        return []

    def _usual_row(self) -> tuple[float, float]:
        """Median and robust standard deviation of the rows of a window."""
        past = np.concatenate(self._rows)
        median = float(np.median(past))
        return median, max(NORMAL * float(np.median(np.abs(past - median))), LEAST * median)

    def loss(self, record: dict[str, Any]) -> list[Symptom]:
        """A spike or a plateau; remembers the record for these and for `rows`."""
        loss, found = record["loss"], []
        if len(self._loss) >= ENOUGH:
            median = float(self._loss.median)
            # A window may be calm by chance: batches differ at least as rows drawn at random do.
            by_chance = self._usual_row()[1] / np.sqrt(len(record["row_loss"]))
            z = float(self._loss.z(np.array(loss), max(by_chance, LEAST * median)))
            if z > FAR:
                worst = np.argsort(-np.array(record["row_loss"]), kind="stable")
                evidence = {"loss": loss, "median": median, "standard deviations": z}
                found.append(Symptom("loss_spike", evidence, rows=tuple(map(int, worst[:4]))))
        self._loss.push(np.array(loss))
        self._rows.append(np.array(record["row_loss"]))
        self.remember(loss)
        return found + self._plateau()

    def remember(self, loss: float) -> None:
        """What of a look counts for ever: for plateaus and overfitting."""
        self._losses.append(loss)
        self._since.append(loss)

    def _plateau(self) -> list[Symptom]:
        block = self._block
        if len(self._losses) < 2 * block or len(self._losses) % (block // 4):
            return []
        before, after = (np.array(self._losses[-2 * block:][half]) for half in
                         (slice(0, block), slice(block, None)))
        error = np.hypot(before.std(), after.std()) / np.sqrt(block)
        fall = before.mean() - after.mean()
        if fall > SURE * error:
            return []
        evidence = {"mean loss": after.mean(), "fall": fall, "its standard error": error,
                    "steps looked at": 2 * block}
        return [Symptom("plateau", evidence)]

    def validation(self, loss: float) -> list[Symptom]:
        """What a validation loss says beside the training losses since the one before."""
        train = float(np.mean(self._since)) if self._since else np.nan
        self._since = []
        self._validation.append((loss, train))
        if len(self._validation) < 3:
            return []
        (first, train_first), (second, _), (third, train_third) = self._validation[-3:]
        best = min(loss for loss, _ in self._validation)
        if not (first < second < third and third > WORSE * best and train_third < train_first):
            return []
        evidence = {"validation loss": third, "its best": best, "training loss": train_third}
        return [Symptom("overfitting", evidence)]


class ClockRules:
    """Looks at the seconds of records; says what makes a run slow."""

    def __init__(self, window: int):
        self._seconds, self._window = Series(window), window
        self._recent = collections.deque(maxlen=CLOCK)
        self._slow = 0

    def look(self, record: dict[str, Any]) -> list[Symptom]:
        """Symptoms of a host; the first looks, which compile, are left out."""
        seconds, wait = record["seconds"], record["wait"]
        self._recent.append((seconds, wait))
        found = []
        usual = float(self._seconds.median) if len(self._seconds) >= ENOUGH else np.inf
        self._slow = self._slow + 1 if seconds > SLOW * usual else 0
        total, waited = np.sum(self._recent, axis=0)
        evidence = {"seconds a look": total / len(self._recent), "share waited": waited / total}
        if len(self._recent) == CLOCK and waited > WAITING * total:
            found.append(Symptom("slow_input", evidence, variant="input"))
            self._recent.clear()
        elif self._slow >= CLOCK // 2:
            evidence["usual seconds"] = usual
            found.append(Symptom("slow_input", evidence, variant="host"))
            self._slow, self._seconds = 0, Series(self._window)  # What is usual from here on.
        if not self._slow:
            self._seconds.push(np.array(seconds))
        return found
