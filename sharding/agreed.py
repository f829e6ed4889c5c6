"""Something that any process may ask for, and that all then do at one and the same step."""

import itertools
import threading
import time

import jax
from jax._src import distributed  # jax's coordination service has no public door

from batiste.sharding.processes import is_first

NEVER = 0
LOOK_SECONDS = 0.05  # How often the first process looks whether all have come.
HEAR_SECONDS = 1  # How often another one looks whether it waits in vain.
_numbers = itertools.count()


class AskedElsewhere(Exception):
    """Another process has asked for it, so that some will never come to where this one waits."""


class Agreed:
    """One such thing, `name` for whoever reads the coordinator's keys.

    Every process makes the same ones in the same order. apart: how many steps processes may be from
    each other. Until it has happened, or is `refused`, each `now` of several
    processes sends a message of a few bytes to the coordinator.
    """

    def __init__(self, name: str, apart: int = 1):
        self._client, self._apart = distributed.global_state.client, apart
        # Whatever a run before has left is another.
        self._place = f"batiste/{name}/{next(_numbers)}"
        self._wanted, self._at = f"{self._place}/wanted", f"{self._place}/at"
        self._step: int | None = None
        self._asked = threading.Event()

    def ask(self) -> None:
        """Asks for it; from any thread."""
        self._asked.set()
        if self._client is not None:
            self._client.key_value_set(self._wanted, "", allow_overwrite=True)

    def refuse(self) -> None:
        """Says that it will not be asked for; by the first process alone, from any thread."""
        if self._client is not None:
            self._client.key_value_set(self._at, str(NEVER), allow_overwrite=True)

    def now(self, step: int) -> bool:
        """Whether it is to be done after this step; every process asks after every step."""
        if self._client is None:
            return self._asked.is_set()
        if self._step is None:
            self._step = self._appointed(step)
        if self._step not in (None, NEVER) and step > self._step:
            raise RuntimeError(f"{self._at}={self._step} was heard of at step {step}, too late")
        return self._step == step

    def meet(self, where: str, seconds: float) -> None:
        """Returns when every process has come here; from any thread, where there are several.

        Raises AskedElsewhere as soon as one asks, TimeoutError after `seconds`.
        """
        place, deadline = f"{self._place}/{where}", time.monotonic() + seconds
        self._client.key_value_set(f"{place}/{jax.process_index()}", "")
        while not self._all_came(place):
            if self._read(self._wanted) is not None:
                raise AskedElsewhere
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all processes came to {place} in {seconds:g} s")

    def _all_came(self, place: str) -> bool:
        """Whether all have; waits a little before it says no."""
        said = f"{place} is complete"  # By the first, so that not every process counts.
        if is_first():
            if len(self._client.key_value_dir_get(place)) < jax.process_count():
                time.sleep(LOOK_SECONDS)
                return False
            self._client.key_value_set(said, "")
            return True
        try:
            self._client.blocking_key_value_get(said, int(1000 * HEAR_SECONDS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return False
            raise
        return True

    def _appointed(self, step: int) -> int | None:
        if is_first() and (self._asked.is_set() or self._read(self._wanted) is not None):
            # Whoever is ahead hears of it one step later, when this process has gone on.
            appointed = step + self._apart + 2
            self._client.key_value_set(self._at, str(appointed), allow_overwrite=True)
            return appointed
        said = self._read(self._at)
        return None if said is None else int(said)

    def _read(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise
