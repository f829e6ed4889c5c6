"""How the processes of a run find each other."""

import functools
import os
import re
import socket
import sys
import threading
import time

import jax
from jax._src import clusters, distributed  # detection and client have no public door

from batiste.sharding.watch import LEFT_SECONDS, Watch

INITIALIZATION_SECONDS = 300  # Machines of a pod, and containers that are still being pulled.
# A process whose death nobody saw, not even `Watch`, ends the others after this time of silence.
# jax's default is 100.
HEARTBEAT_SECONDS = 60
# Processes end within a second of each other. Where one ends with an error of its own, the others
# are in a collective that it will never join, and are ended after this time. jax's default is 300.
SHUTDOWN_SECONDS = 30
_watch: Watch | None = None  # One process joins one run.


def connect(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    lost_code: int = 1,
) -> None:
    """Joins this process to the others of its run; comes before anything touches a device.

    coordinator_address: HOST:PORT at which process 0 listens. process_id: from 0. All three, or
    none: then jax takes them from SLURM, Open MPI, Kubernetes or Cloud TPU.
    Raises ValueError for what cannot be, where nothing is detected, and where the coordinator does
    not answer. Where another process does not come, this one ends with a line and exit code 1,
    because jax would end it anyway. Where another process dies later, this one ends within seconds,
    with a line that names it and exit code `lost_code`.
    """
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given):
        *given, local_device_ids = _detect()
    elif any(value is None for value in given):
        raise ValueError(
            f"coordinator_address={coordinator_address}, num_processes={num_processes}, process_id="
            f"{process_id}: give all three, or none of them and let the cluster be detected"
        )
    else:
        local_device_ids = None
    address, count, index = given
    if not 0 <= index < count:
        raise ValueError(f"process_id={index}: expected 0 to num_processes-1={count - 1}")
    _await_coordinator(address, index)
    missing = threading.Timer(INITIALIZATION_SECONDS, _give_up, (count, address))
    missing.start()
    try:
        jax.distributed.initialize(
            address, count, index, local_device_ids=local_device_ids,
            cluster_detection_method="deactivate",  # What is given stands.
            initialization_timeout=INITIALIZATION_SECONDS + 30,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    finally:
        missing.cancel()
    if jax.process_count() != count:
        raise ValueError(
            f"num_processes={count}, but the {jax.default_backend()} devices here belong to "
            f"{jax.process_count()} processes: start one process per machine of the cluster, all "
            "with the same flags"
        )
    if count > 1:
        global _watch
        host = address.rpartition(":")[0].strip("[]")
        client = distributed.global_state.client
        _watch = Watch(client, host, index, count, functools.partial(_end, lost_code))


def leave(code: int, text: str) -> bool:
    """Says `text` and takes leave of the other processes; False, and nothing, where there are none.

    For a process that has failed: where the others do not end as well, it ends here, with `code`.
    jax would wait for them, and then end with a code of its own.
    """
    if _watch is None:
        return False
    print(text, file=sys.stderr, flush=True)
    if not _watch.leave(LEFT_SECONDS + 2):
        sys.stdout.flush()
        os._exit(code)
    return True


def _end(code: int, line: str) -> None:
    print(f"error: {line}; so this one ends too, and the same command continues from the last "
          "checkpoint", file=sys.stderr, flush=True)
    os._exit(code)


def _detect() -> tuple[str, int, int, list[int] | None]:
    """Address of the coordinator, processes, this one, and its devices (None: all) by jax."""
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, INITIALIZATION_SECONDS)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"the cluster could not be read: {' '.join(str(error).split())}") from None
    if found[0] is None:
        raise ValueError(
            "no cluster was detected (SLURM's srun, Open MPI, Kubernetes with jax[k8s], Cloud "
            "TPU): give --coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        )
    return found


def _await_coordinator(address: str, index: int) -> None:
    """Refuses in a line what jax answers with a crash: bad address, taken port, nobody there."""
    match = re.fullmatch(r"\[?([^\s/]+?)\]?:(\d{1,5})", address)
    if not match or not 0 < int(match[2]) < 65536:
        raise ValueError(
            f"coordinator_address={address!r}: expected HOST:PORT, as in 10.0.0.1:8476")
    host, port = match[1], int(match[2])
    if index == 0:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
        except OSError as error:
            raise ValueError(
                f"coordinator_address={address}: process 0 cannot listen there ({error.strerror}); "
                "choose another port") from None
        return
    deadline = time.monotonic() + INITIALIZATION_SECONDS
    while True:
        try:
            return socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"coordinator_address={address}: process 0 did not answer within "
                    f"{INITIALIZATION_SECONDS:g} s ({error}); check that it runs, the address and "
                    "the firewall") from None
        time.sleep(0.5)


def _give_up(count: int, address: str) -> None:
    print(f"error: not all of {count} processes came to {address} within {INITIALIZATION_SECONDS:g}"
          " s: check that num_processes of them run, each with its own process_id",
          file=sys.stderr, flush=True)
    os._exit(1)
