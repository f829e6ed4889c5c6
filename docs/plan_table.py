"""Compiles training steps for many TPUs and writes what was predicted for them into plan.md.

    python docs/plan_table.py            # compiles what is missing, then writes the table
    python docs/plan_table.py --write    # writes the table from what is there

Each case's answer is kept in plan_table.json, so an interrupted run goes on; each compiles in a
process of its own with a time limit. Predictions are made anew every time.
"""

import dataclasses
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from batiste.models import resolve_attention
from batiste.planning.buffers import is_accepted, read_buffers, writing_to
from batiste.planning.compiled import lower_step
from batiste.planning.memory import GIB, Account
from batiste.planning.search import RESERVE
from batiste.planning.workload import Choice, Workload, tpu_machine
from batiste.sharding import MeshConfig

FOLDER = pathlib.Path(__file__).resolve().parent
ANSWERS = FOLDER / "plan_table.json"
PAGE = FOLDER / "plan.md"
SECONDS = 600


class Case(NamedTuple):
    """A preset on a topology: mesh sizes and ZeRO, remat, batch, accumulation."""

    preset: str
    topology: str
    mesh: dict
    remat: str
    batch: int
    accumulation: int

    def __str__(self) -> str:
        return " ".join((self.preset, self.topology, _mesh(self), self.remat, f"batch={self.batch}",
                         f"accumulation={self.accumulation}"))


CASES = (
    Case("gpt2_124m", "v5e:2x2", {"data": 4, "zero": 1}, "full", 128, 4),
    Case("llama3_8b", "v5p:4x4x4", {"data": 16, "tensor": 4, "zero": 3}, "full", 512, 8),
    Case("llama3_1b", "v5e:4x4", {"data": 4, "stage": 4, "zero": 1, "micro_batches": 8},
         "full", 32, 1),
    Case("llama3_8b", "v6e:8x8", {"data": 16, "context": 4, "zero": 3}, "full", 32, 1),
    Case("mixtral_8x7b", "v5p:4x4x4", {"data": 8, "expert": 8, "zero": 3}, "full", 64, 1),
    Case("llama3_70b", "v5p:8x8x16", {"data": 128, "tensor": 8, "zero": 3}, "full", 512, 2),
    Case("gpt2_124m", "v5e:2x2", {"data": 4, "zero": 1}, "none", 56, 1),
    Case("gpt2_124m", "v6e:2x2", {"data": 4, "zero": 0}, "none", 64, 1),
    Case("gpt2_124m", "v5p:2x2x1", {"data": 2, "context": 2, "zero": 2}, "none", 128, 2),
    Case("gpt2_124m", "tpu7x:2x2x1", {"data": 8, "zero": 3}, "full", 256, 1),
    Case("llama3_1b", "v5e:4x8", {"data": 8, "tensor": 4, "zero": 1}, "full", 32, 2),
    Case("llama3_1b", "v6e:4x4", {"data": 16, "zero": 3}, "full", 128, 4),
    Case("llama3_1b", "v5p:2x2x2", {"data": 4, "tensor": 2, "zero": 3}, "none", 4, 1),
    Case("llama3_1b", "tpu7x:2x2x1", {"data": 8, "zero": 2}, "full", 32, 1),
    Case("llama3_8b", "v5p:4x4x4", {"data": 8, "stage": 4, "tensor": 2, "zero": 1,
         "micro_batches": 8, "interleave": 2}, "full", 128, 1),
    Case("llama3_8b", "v5e:8x16", {"data": 16, "tensor": 8, "zero": 3}, "full", 64, 2),
    Case("llama3_8b", "tpu7x:2x2x4", {"data": 8, "tensor": 4, "zero": 3}, "full", 32, 1),
    Case("llama3_8b", "v5p:8x8x16", {"data": 256, "tensor": 4, "zero": 3}, "full", 1024, 2),
    Case("llama3_70b", "v5p:4x8x8", {"data": 8, "stage": 4, "tensor": 8, "zero": 1,
         "micro_batches": 8}, "full", 64, 1),
    Case("llama3_70b", "v6e:16x16", {"data": 32, "tensor": 8, "zero": 3}, "full", 64, 2),
    Case("llama3_70b", "v5e:16x16", {"data": 32, "tensor": 8, "zero": 3}, "full", 64, 1),
    Case("llama3_70b", "v5p:4x4x4", {"data": 8, "tensor": 8, "zero": 1}, "full", 64, 2),
    Case("mixtral_8x7b", "tpu7x:4x4x4", {"data": 16, "expert": 8, "zero": 3}, "full", 128, 1),
    Case("mixtral_8x7b", "v5p:4x4x4", {"data": 16, "expert": 4, "zero": 3}, "full", 128, 2),
    Case("llama3_8b", "v6e:4x4", {"data": 16, "zero": 3}, "full", 32, 1),
    Case("llama3_8b", "v6e:8x8", {"data": 16, "tensor": 4, "zero": 3}, "dots", 32, 1),
    Case("llama3_1b", "v5e:2x2", {"data": 4, "zero": 3}, "full", 32, 4),
    Case("llama3_8b", "v5e:4x8", {"data": 8, "tensor": 4, "zero": 3}, "full", 64, 2),
    Case("llama3_70b", "tpu7x:4x4x8", {"data": 32, "tensor": 8, "zero": 3}, "full", 128, 2),
    Case("llama3_1b", "v5e:4x4", {"data": 16, "zero": 3}, "full", 16, 1),
    Case("gpt2_124m", "v5e:2x2", {"data": 4, "zero": 1}, "none", 512, 4),
    Case("llama3_70b", "v6e:16x16", {"data": 16, "context": 2, "tensor": 8, "zero": 3}, "full",
         16, 1),
    Case("llama3_8b", "v6e:8x8", {"data": 32, "stage": 2, "zero": 3, "micro_batches": 4}, "full",
         128, 1),
    Case("llama3_8b", "v5e:16x16", {"data": 64, "tensor": 4, "zero": 1}, "full", 128, 2),
    Case("llama3_8b", "v5p:4x4x4", {"data": 64, "zero": 3}, "full", 128, 1),
    Case("mixtral_8x7b", "v5p:4x4x4", {"data": 8, "stage": 2, "expert": 4, "zero": 3,
         "micro_batches": 4}, "full", 128, 1),
    Case("llama3_8b", "v5p:2x2x4", {"stage": 4, "data": 4, "zero": 0, "micro_batches": 4}, "none",
         16, 1),
    Case("llama3_1b", "v5e:2x2", {"data": 4, "zero": 3}, "full", 48, 4),
)


def main() -> None:
    """Asks the compiler for what is missing, and writes the table."""
    if sys.argv[1:2] == ["--case"]:
        compile_case(CASES[int(sys.argv[2])], sys.argv[3])
        return
    answers = json.loads(ANSWERS.read_text()) if ANSWERS.exists() else {}
    for index, case in enumerate(CASES):
        if "peak" in answers.get(str(case), {}) or sys.argv[1:] == ["--write"]:
            continue
        answers[str(case)] = in_a_process(index)
        print(case, answers[str(case)], flush=True)
        ANSWERS.write_text(json.dumps(answers, indent=1) + "\n")
    write(answers)


def in_a_process(index: int) -> dict:
    """The compiler's answer, or that it had none in time.

    Its memory is settled long before its code is: the code is not waited for.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, __file__, "--case", str(index), folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None and not is_accepted(folder):
            if time.monotonic() - started > SECONDS:
                break
            time.sleep(1)
        process.kill()
        process.wait()
        errors.seek(0)
        refused = "exceeds available HBM" in errors.read()
        if refused or is_accepted(folder):
            return {"peak": read_buffers(folder).peak, "refused": refused}
    return {"failed": f"exit code {process.returncode}, {time.monotonic() - started:.0f} s"}


def compile_case(case: Case, folder: str) -> None:
    """Lets the compiler write what it makes of a case into a folder."""
    workload, choice = plan_of(case)
    lower_step(workload, tpu_machine(case.topology), choice).compile(writing_to(folder))


def plan_of(case: Case) -> tuple[Workload, Choice]:
    """The workload with the chip's attention, and the choice."""
    experiment = importlib.import_module(f"batiste.configs.{case.preset}").get_config()
    device = tpu_machine(case.topology).device
    model, _ = resolve_attention(experiment.model, device.kind, case.mesh)
    train = dataclasses.replace(
        experiment.train, batch_size=case.batch, accumulation=case.accumulation
    )
    workload = Workload(model, train, experiment.data.sequence_length)
    return workload, Choice(MeshConfig(**case.mesh), case.remat, case.accumulation)


def write(answers: dict) -> None:
    """Replaces the table in plan.md by one that holds what is known."""
    rows, errors = [], []
    for case in CASES:
        answer = answers.get(str(case))
        if answer is None or "peak" not in answer:
            print("no answer:", case, answer)
            continue
        workload, choice = plan_of(case)
        limit = tpu_machine(case.topology).device.hbm_bytes
        predicted = Account(workload).estimate(choice).total
        errors.append(predicted / answer["peak"] - 1)
        fits = predicted * (1 + RESERVE) <= limit
        if fits and answer["refused"]:
            print("FITS BUT IS REFUSED:", case, predicted / GIB)
        said = " / ".join("yes" if yes else "no" for yes in (fits, not answer["refused"]))
        rows.append(f"| {case.preset} | {case.topology} | {_mesh(case)} | {case.remat} | "
                    f"{case.batch} / {case.accumulation} | {predicted / GIB:.2f} | "
                    f"{answer['peak'] / GIB:.2f} | {errors[-1]:+.1%} | {said} |")
    size = [abs(error) for error in errors]
    head = ("| config | TPU | mesh | remat | batch / accumulation | predicted GiB | compiler GiB | "
            "error | fits |\n|---|---|---|---|---|---|---|---|---|\n")
    total = (f"\n\n{len(rows)} cases: median error "
             f"{statistics.median(size):.1%}, worst {max(size):.1%}.")
    table = head + "\n".join(rows) + total
    print(table)
    if PAGE.exists():
        text = PAGE.read_text()
        begin, end = "<!-- table: begin -->\n", "<!-- table: end -->"
        before, rest = text.split(begin)
        PAGE.write_text(before + begin + table + "\n" + end + rest.split(end)[1])


def _mesh(case: Case) -> str:
    return " ".join(f"{axis}={size}" for axis, size in case.mesh.items())


if __name__ == "__main__":
    main()
