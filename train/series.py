"""A window of the past of some numbers, and how far out the present is."""

import collections

import numpy as np

ENOUGH = 16  # Looks before anything is compared with the past.
NORMAL = 1.4826  # Standard deviations in a median absolute deviation, where errors are normal.


class Series:
    """The last `window` values of an array; medians and robust z-scores of them."""

    def __init__(self, window: int):
        self._values = collections.deque(maxlen=window)

    def __len__(self) -> int:
        return len(self._values)

    def push(self, values: np.ndarray) -> None:
        """Remembers one more; all have one shape."""
        self._values.append(values)

    @property
    def all(self) -> np.ndarray:
        """Everything that is remembered, in one row."""
        return np.concatenate([np.ravel(values) for values in self._values])

    @property
    def median(self) -> np.ndarray:
        """Of each entry."""
        return np.median(np.stack(self._values), axis=0)

    def z(self, values: np.ndarray, floor: float) -> np.ndarray:
        """Distance from the median in robust standard deviations, each of them at least `floor`."""
        past = np.stack(self._values)
        median = np.median(past, axis=0)
        deviation = NORMAL * np.median(np.abs(past - median), axis=0)
        return (values - median) / np.maximum(deviation, floor)


class Runs:
    """How many looks in a row something has been so, by name."""

    def __init__(self):
        self._count: dict[str, np.ndarray] = {}

    def add(self, name: str, so: np.ndarray) -> np.ndarray:
        """Counts one more look; zero where it is not so."""
        before = self._count.get(name, np.zeros(so.shape, int))
        self._count[name] = np.where(so, before + 1, 0)
        return self._count[name]
