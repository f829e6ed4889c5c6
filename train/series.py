"""A window of the past of some numbers, and how far out the present is."""

import numpy as np

ENOUGH = 16  # Looks before anything is compared with the past.
IN_A_ROW = 4  # Looks that a lasting state must last.
NORMAL = 1.4826  # Standard deviations in a median absolute deviation, where errors are normal.


class Series:
    """The last `window` values of an array; medians and robust z-scores of them."""

    def __init__(self, window: int):
        self._window, self._count = window, 0
        self._ring: np.ndarray | None = None
        self._usual: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return min(self._count, self._window)

    def push(self, values: np.ndarray) -> None:
        """Remembers one more; all have one shape."""
        if self._ring is None:
            self._ring = np.empty((self._window, *np.shape(values)))
        self._ring[self._count % self._window] = values
        self._count += 1
        self._usual = None

    @property
    def usual(self) -> tuple[np.ndarray, np.ndarray]:
        """Median and robust standard deviation of each entry."""
        if self._usual is None:
            past = self._ring[:len(self)]
            median = np.median(past, axis=0)
            self._usual = median, NORMAL * np.median(np.abs(past - median), axis=0)
        return self._usual

    @property
    def median(self) -> np.ndarray:
        """Of each entry."""
        return self.usual[0]

    def z(self, values: np.ndarray, floor: float) -> np.ndarray:
        """Distance from the median in robust standard deviations, each of them at least `floor`."""
        median, deviation = self.usual
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


class Counts:
    """At how many looks something has been so, by name."""

    def __init__(self):
        self._count: dict[str, np.ndarray] = {}

    def add(self, name: str, so: np.ndarray) -> np.ndarray:
        """Counts one more look."""
        self._count[name] = self._count.get(name, np.zeros(so.shape, int)) + so
        return self._count[name]
