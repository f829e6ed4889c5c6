"""What a run will take, before it runs: memory, time, money, and the mesh to choose."""

from batiste.planning.compiled import comparison
from batiste.planning.here import machine_here, measure_cpu
from batiste.planning.memory import Account
from batiste.planning.report import (
    SHOWN, Budget, describe, memory_block, overrides, rejections, table,
)
from batiste.planning.search import fits, reason, remedy_line, search
from batiste.planning.workload import Choice, Machine, Workload, gpu_machine, tpu_machine

__all__ = [
    "Account", "Budget", "Choice", "Machine", "SHOWN", "Workload", "comparison", "describe", "fits",
    "gpu_machine", "machine_here", "measure_cpu", "memory_block", "overrides", "reason",
    "rejections", "remedy_line", "search", "table", "tpu_machine",
]
