"""Draws docs/attention.png and writes the certification table into docs/attention.md.

    python docs/attention_picture.py

Both come from the kernels' own code: the tiles from `tile_kinds`, the pipeline from `looped`, which
is run here with stages that only note that they were called.
"""

import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from batiste.pallas_kernels import AttentionMask, certified
from batiste.pallas_kernels.tiles import DIAGONAL, EMPTY, FULL, PARTIAL, Lengths, tile_kinds
from batiste.pallas_kernels.tpu_pipeline import Stages, Unit, looped

FOLDER = pathlib.Path(__file__).parent
MARKERS = ("<!-- table: begin -->", "<!-- table: end -->")

TILE, TILES = 64, 16
LEGEND = -0.09  # How far below the axes the legends begin.
DOCUMENTS = (384, 250, 290)  # Tokens of each; the rest of the row is padding.
UNITS = [Unit(0, key) for key in range(4)]
KINDS = {
    FULL: ("full: no mask", "#1f5582"),
    DIAGONAL: ("diagonal: shape known when built", "#7fb0d3"),
    PARTIAL: ("partial: masked element by element", "#eda96b"),
    EMPTY: ("empty: never visited", "#f3f3f3"),
}
TILE_COLOURS = ("#a3cfa8", "#cdb8e0")


class Call(NamedTuple):
    """That a stage of the pipeline worked on a unit of a tile in a time step."""

    stage: str
    time: int
    tile: int
    unit: int


def document_tiles() -> np.ndarray:
    """Kinds of the tiles of a causal mask over a row of packed documents."""
    segments = np.zeros((1, TILE * TILES), np.int32)
    segments[0, : sum(DOCUMENTS)] = np.repeat(range(1, len(DOCUMENTS) + 1), DOCUMENTS)
    segments = jnp.asarray(segments)
    mask = AttentionMask(causal=True, query_segments_BT=segments, key_segments_BS=segments)
    return np.asarray(tile_kinds(mask, Lengths(TILE * TILES, TILE * TILES, TILE, TILE)))[0]


def pipeline_calls(num_tiles: int) -> list[Call]:
    """What `looped` calls for so many tiles; a time step ends where the middle stage was called."""
    calls, time = [], 0

    def noting(stage):
        def note(tile, unit, slot):
            nonlocal time
            calls.append(Call(stage, time, int(tile), UNITS.index(unit)))
            # Before the loop stage A is alone in its step.
            time += stage == "B" or len(calls) == 1

        return note

    with jax.disable_jit():
        looped(Stages(*map(noting, "ABC"), lambda: None), lambda index: index, num_tiles, UNITS)
    return calls


def draw_tiles(axes: Axes) -> None:
    """The left half: a square for each tile."""
    kinds = document_tiles()
    for (query, key), kind in np.ndenumerate(kinds):
        axes.add_patch(Rectangle((key, query), 1, 1, facecolor=KINDS[kind][1], edgecolor="white"))
    for edge in np.cumsum(DOCUMENTS) / TILE:
        for line in (axes.axhline, axes.axvline):
            line(edge, color="#555555", linewidth=0.7, linestyle=(0, (3, 3)))
    axes.set(xlim=(0, TILES), ylim=(TILES, 0), aspect="equal", xticks=[], yticks=[])
    axes.set_xlabel("keys", fontsize=9)
    axes.set_ylabel("queries", fontsize=9)
    axes.set_title("Tiles of a causal mask over three packed documents", fontsize=10)
    axes.spines[:].set_visible(False)
    patches = [
        Patch(facecolor=colour, edgecolor="#bbbbbb", label=f"{label} ({(kinds == kind).sum()})")
        for kind, (label, colour) in KINDS.items()
    ]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, LEGEND), ncols=2,
                frameon=False, fontsize=8)


def draw_pipeline(axes: Axes) -> None:
    """The right half: a row for each stage, a column for each step."""
    calls = pipeline_calls(len(TILE_COLOURS))
    seen = set()
    for call in calls:
        # The first C finds zeros in its slot, and the last A is made for a tile that is not there.
        idle = (call.stage, call.tile, call.unit) in seen or (call.stage == "C" and call.time < 2)
        seen.add((call.stage, call.tile, call.unit) if not idle else None)
        colour = "white" if idle else TILE_COLOURS[call.tile]
        axes.add_patch(Rectangle(
            (call.time, "ABC".index(call.stage)), 0.94, 0.86, facecolor=colour,
            edgecolor="#bbbbbb" if idle else colour, hatch="////" if idle else None, linewidth=0.5))
        if not idle:
            axes.text(call.time + 0.47, "ABC".index(call.stage) + 0.43, f"{call.stage}{call.unit}",
                      ha="center", va="center", fontsize=8)
    for tile in range(len(TILE_COLOURS)):
        start = 1 + tile * len(UNITS)
        axes.plot([start, start + len(UNITS) - 0.06], [3.08, 3.08], color="#555555", linewidth=0.8)
        axes.text(start + len(UNITS) / 2, 3.38, f"loop body, tile {tile}", ha="center", va="center",
                  fontsize=8)
    steps = 1 + max(call.time for call in calls)
    axes.set(xlim=(-0.1, steps + 0.1), ylim=(3.75, 0), xticks=[])
    axes.set_yticks([0.43, 1.43, 2.43], ["A  matrix units\nscores", "B  vector units\nsoftmax",
                                         "C  matrix units\noutput"], fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("time →", fontsize=9)
    axes.set_title("The pipeline: units 0–3 of two tiles", fontsize=10)
    axes.spines[:].set_visible(False)
    patches = [Patch(facecolor=colour, label=f"tile {tile}") for tile, colour in
               enumerate(TILE_COLOURS)]
    patches.append(Patch(facecolor="white", edgecolor="#bbbbbb", hatch="////",
                         label="computed, without effect"))
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, LEGEND), ncols=3,
                frameon=False, fontsize=8)


def draw(path: pathlib.Path) -> None:
    """Both halves as a PNG."""
    figure = Figure(figsize=(11, 4.4), dpi=130)
    FigureCanvasAgg(figure)
    draw_tiles(figure.add_axes((0.09, 0.2, 0.3, 0.72)))
    draw_pipeline(figure.add_axes((0.55, 0.2, 0.44, 0.72)))
    figure.savefig(path)


def with_table(page: str) -> str:
    """The page with the table as the code has it between its markers."""
    begin, end = map(re.escape, MARKERS)
    table = f"{MARKERS[0]}\n{certified.certification_table()}\n{MARKERS[1]}"
    page, count = re.subn(f"{begin}.*?{end}", lambda _: table, page, flags=re.S)
    assert count == 1, f"expected the markers {MARKERS} once, found them {count} times"
    return page


if __name__ == "__main__":
    draw(FOLDER / "attention.png")
    page = FOLDER / "attention.md"
    page.write_text(with_table(page.read_text()))
