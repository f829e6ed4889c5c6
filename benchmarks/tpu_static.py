"""What the TPU compiler says attention kernels cost, ours beside two others; needs no TPU.

    python benchmarks/tpu_static.py [--chip=v6e] [--head_dim=128] [--pass=forward]
    python benchmarks/tpu_static.py --whole
    python benchmarks/tpu_static.py --sweep --chip=v6e --head_dim=128 --pass=forward

Every kernel is compiled for causal self-attention in bf16 by the TPU's own compiler (libtpu), and
the schedule that it writes is read (tpu_schedule.py). The others are jax's splash attention and
tokamax's, each with its best blocks of a few; one that is not installed says so in its row.

The first form prints, for each body of a kernel, cycles for 512 x 512 pairs, hidden ones included,
beside the floor, which is what the body's products take on matrix units that are always busy.

The second adds up whole problems: a grid step's cycles outside of its bodies times the steps, what
only the first and last step of a row run times the rows, and bodies times how often they run. Steps
are all blocks of the grid for jax's splash attention and for the backward pass of tokamax's, the
active blocks for tokamax's forward, and a row of tiles for ours. Memory traffic is taken to be
hidden. What happens around a kernel is left out: transposes for ours, the sum of partial dq for the
others.

The third tries blocks for ours and prints a row for pallas_kernels/tpu_blocks.py.

Others have compared static cycles with published device times: within 5 % for products, about 15 %
for attention forward, and too low by a quarter for attention backward.
"""

import datetime
import importlib.metadata
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable

from absl import app, flags

from batiste.pallas_kernels.tpu_blocks import Blocks, blocks_for
from tpu_problems import (
    EXPERIMENTAL, OURS, SPLASH, TOKAMAX, TOPOLOGIES, Compiled, Problem, compile_problem,
)

WHOLE = flags.DEFINE_bool("whole", False, "Add up whole causal problems instead.")
OURS_ALONE = flags.DEFINE_bool("ours_alone", False, "Leave the other kernels out.")
SWEEP = flags.DEFINE_bool("sweep", False, "Try blocks for ours instead.")
CHIP = flags.DEFINE_multi_enum(
    "chip", None, sorted(TOPOLOGIES), "Chips; v6e by default, and v5e for bodies.")
HEAD_DIM = flags.DEFINE_multi_integer(
    "head_dim", None, "Head dims; 128 by default, and 256 for bodies on v6e.", lower_bound=1)
PASS = flags.DEFINE_multi_enum(
    "pass", ["forward", "backward"], ["forward", "backward"], "Which pass.")

LENGTH, TILE = 4096, 512 * 512
# Queries, keys and keys of one product of a grid step of a splash attention.
CANDIDATES = (
    (512, 512, 512), (1024, 512, 512), (1024, 1024, 512), (1024, 1024, 1024), (2048, 1024, 512),
    (2048, 1024, 1024), (2048, 2048, 512),
)
CAVEAT = (
    "Static cycles were checked by others against published device times (within 5 % for\n"
    "products, about 15 % for attention forward, optimistic by a quarter for backward): they rank\n"
    "variants and are not times."
)


def contestants(backward: bool) -> list[str]:
    """Whose kernels are compared."""
    others = [SPLASH, TOKAMAX] + [EXPERIMENTAL] * (not backward)
    return [OURS] + others * (not OURS_ALONE.value)


def compile_best(
    problem: Problem, candidates: list[tuple[int, ...]], score: Callable[[Compiled], float],
) -> Compiled | str:
    """The problem with the candidate that scores lowest; for ours with the blocks of the table."""
    if problem.contestant == OURS:
        blocks = blocks_for(problem.chip, problem.head_dim, problem.backward)
        return compile_problem(problem._replace(blocks=blocks))
    results = []
    for blocks in candidates:
        results.append(compile_problem(problem._replace(blocks=blocks)))
        if "ModuleNotFoundError" in str(results[-1]):
            break
    right = [result for result in results if isinstance(result, Compiled)]
    return min(right, key=score) if right else results[0]


def tile_cycles(compiled: Compiled) -> float:
    """Cycles for 512 x 512 pairs in the first body, the one without a mask if there is one."""
    body = compiled.kernel.bodies[0]
    return (body.loop or body.section).cycles * scale(compiled)


def scale(compiled: Compiled) -> float:
    """Tiles of 512 x 512 in the blocks or tiles of a step's heads, inverted."""
    pairs = compiled.problem.blocks[0] * compiled.problem.blocks[1]
    return TILE / (pairs * compiled.counts.heads)


def body_rows(compiled: Compiled) -> Iterable[str]:
    """A row of the table for each body."""
    schedule, each = compiled.schedule, scale(compiled)
    for body, visits in zip(compiled.kernel.bodies, compiled.counts.visits, strict=True):
        span = body.loop or body.section
        floor = schedule.floor(span)
        spills = (schedule.total(f"V{kind}", span) * each for kind in ("STORE:SPILL", "LOAD:FILL"))
        yield row(
            compiled.problem.contestant, show(compiled.problem.blocks), visits.body,
            f"{span.cycles * each:,.0f}", f"{floor * each:,.0f}", f"{span.cycles / floor:.2f}",
            f"{schedule.stalled(span) * each:,.0f}", *(f"{count:,.0f}" for count in spills),
            f"{compiled.vmem_bytes / 2**20:.1f}",
        )


def row(*cells: object) -> str:
    """A line of Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def show(blocks: tuple[int, ...]) -> str:
    """Blocks as they are written in a call."""
    return f"({', '.join(map(str, blocks))})"


def cases(whole: bool) -> list[tuple[str, int, bool]]:
    """Chip, head dim and whether backward, for each table."""
    chosen = []
    for chip in CHIP.value or (["v6e"] if whole else ["v6e", "v5e"]):
        dims = HEAD_DIM.value or ([128, 256] if chip == "v6e" and not whole else [128])
        chosen += itertools.product([chip], dims, [name == "backward" for name in PASS.value])
    return chosen


def caption(chip: str, head_dim: int, backward: bool) -> str:
    """What stands over a table."""
    return f"{chip}, head dim {head_dim}, {'backward' if backward else 'forward'}"


def run_bodies() -> None:
    """One table for each case, a row for each body."""
    large = [blocks for blocks in CANDIDATES if min(blocks[:2]) >= 1024]
    for chip, head_dim, backward in cases(False):
        print(f"\n{caption(chip, head_dim, backward)}; counts for 512 x 512 pairs:\n")
        print(row("kernel", "blocks", "body", "cycles", "floor", "× floor", "stalls", "spills",
                  "fills", "VMEM, MiB"))
        print("|" + "---|" * 10)
        for contestant in contestants(backward):
            problem = Problem(contestant, chip, head_dim, LENGTH, backward, ())
            best = compile_best(problem, large, tile_cycles)
            if isinstance(best, str):
                print(row(contestant, "", best, *[""] * 7), flush=True)
            else:
                print("\n".join(body_rows(best)), flush=True)


def run_whole() -> None:
    """One table for each case, a row for each length and kernel."""
    for chip, head_dim, backward in cases(True):
        print(f"\n{caption(chip, head_dim, backward)}; cycles for one head, causal:\n")
        print(row("S", "kernel", "blocks", "steps", "cycles", "for 512 x 512 visible pairs",
                  "× batiste"))
        print("|" + "---|" * 7)
        for length in (1024, 2048, 4096):
            # A block as long as the sequence computes twice what causality leaves.
            fitting = [blocks for blocks in CANDIDATES if max(blocks) <= max(1024, length // 2)]
            ours = None
            for contestant in contestants(backward):
                problem = Problem(contestant, chip, head_dim, length, backward, ())
                best = compile_best(problem, fitting, Compiled.cycles_of_head)
                if isinstance(best, str):
                    print(row(length, contestant, "", "", best, "", ""), flush=True)
                    continue
                cycles = best.cycles_of_head()
                ours = ours or (cycles if contestant == OURS else None)
                pairs = length * (length + 1) / 2
                print(row(
                    length, contestant, show(best.problem.blocks), best.counts.steps,
                    f"{cycles:,}", f"{cycles * TILE / pairs:,.0f}",
                    f"{cycles / ours:.2f}" if ours else "–"), flush=True)


def units(query_tile: int, key_tile: int) -> list[Blocks]:
    """Units and pieces for a tile that the pipeline can work off without a gap."""
    candidates = (
        Blocks(query_tile, key_tile, *rest)
        for rest in itertools.product((128, 256, 512), (256, 512, 1024), (64, 128, 256, 512))
    )

    def count(blocks: Blocks) -> int:
        return (query_tile // blocks.query_unit) * (key_tile // blocks.key_unit)

    return [blocks for blocks in candidates
            if blocks.query_unit <= query_tile and blocks.key_piece <= blocks.key_unit <= key_tile
            and 2 <= count(blocks) <= 32 and count(blocks) % 2 == 0]


def attempt(case: tuple[str, int, bool], candidates: list[Blocks]) -> dict[Blocks, float]:
    """Cycles of those candidates that compile, without a mask; progress goes to stderr."""
    chip, head_dim, backward = case
    cycles = {}
    for index, blocks in enumerate(candidates):
        print(f"\r{index + 1} of {len(candidates)} ", end="", file=sys.stderr, flush=True)
        problem = Problem(OURS, chip, head_dim, LENGTH, backward, blocks, causal=False)
        result = compile_problem(problem)
        if isinstance(result, Compiled):
            cycles[blocks] = tile_cycles(result)
    print(file=sys.stderr)
    return cycles


def run_sweep() -> None:
    """Units and pieces at one tile, then other tiles with the best three."""
    for case in cases(True):
        cycles = attempt(case, units(1024, 1024))
        if not cycles:
            sys.exit(f"No candidate compiles for {caption(*case)}.")
        best = sorted(cycles, key=cycles.get)[:3]
        tiles = set(itertools.product((512, 1024, 2048), repeat=2)) - {(1024, 1024)}
        wider = [Blocks(*tile, *blocks[2:]) for tile in sorted(tiles) for blocks in best]
        cycles |= attempt(case, [blocks for blocks in wider if blocks in units(*blocks[:2])])
        ranked = sorted(cycles, key=cycles.get)
        print(f"\n{caption(*case)}; cycles for 512 x 512 pairs:\n")
        print(row("blocks", "cycles") + "\n|---|---|")
        for blocks in ranked:
            print(row(show(blocks), f"{cycles[blocks]:,.0f}"))
        # Others have no tiles on the diagonal, and mask what causality cuts pair by pair.
        square = next(blocks for blocks in ranked if blocks.query_tile == blocks.key_tile)
        print(f"\nFor tpu_blocks.CHIPS[\"{case[0]}\"]: Blocks{show(square)}", flush=True)


def main(argv: list[str]) -> None:
    """Prints the versions, then what was asked for."""
    if len(argv) > 1:
        sys.exit(f"Unknown arguments: {' '.join(argv[1:])}.")
    if not importlib.util.find_spec("libtpu"):
        sys.exit("This benchmark needs the TPU compiler: pip install libtpu (Linux, x86-64).")
    versions = []
    for package in ("jax", "libtpu", "tokamax"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    print(f"{datetime.date.today()}, {', '.join(versions)}.\n{CAVEAT}", flush=True)
    run = run_sweep if SWEEP.value else run_whole if WHOLE.value else run_bodies
    run()


if __name__ == "__main__":
    app.run(main)
