"""Prints how fast batches are read from prepared records, and how long preparing them takes.

    python benchmarks/data_loader.py

A record costs the same whatever its length, so short records in small batches are the slow corner.
"""

import tempfile
import time

from absl import app, flags

from batiste.data import DataConfig, Loader, prepare

DIRECTORY = flags.DEFINE_string("directory", None, "Where to prepare; a temporary one by default.")
SECONDS = flags.DEFINE_float("seconds", 3.0, "How long to read for each line.")


def tokens_per_second(loader: Loader, tokens_per_batch: int, seconds: float) -> float:
    """Returns the rate of reading ahead, without the first batches, which fill the buffer."""
    stream = loader.iterate(0)
    for _ in range(20):
        next(stream)
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(stream)
        batches += 1
    elapsed = time.perf_counter() - start
    stream.close()
    return batches * tokens_per_batch / elapsed


def main(_) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = DIRECTORY.value or temporary
        for length in (256, 1024):
            start = time.perf_counter()
            prepared = prepare(DataConfig(sequence_length=length), directory)
            print(f"T={length}: prepared or reused in {time.perf_counter() - start:.1f} s")
            for batch_size in (16, 64, 256):
                loader = Loader(prepared, "train", batch_size, seed=0)
                rate = tokens_per_second(loader, batch_size * length, SECONDS.value)
                start = time.perf_counter()
                loader.batch(10**9)
                seek = time.perf_counter() - start
                print(f"  B={batch_size}: {rate / 1e6:.1f} M tokens/s, "
                      f"step 10^9 in {seek * 1e3:.1f} ms")


if __name__ == "__main__":
    app.run(main)
