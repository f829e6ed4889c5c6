"""Tasks on top of an encoder: classes, tags, answers in a text, similarity, several at once."""

from batiste.tasks.config import HeadConfig, TaskConfig
from batiste.tasks.embed import Embedder
from batiste.tasks.examples import Example, read_examples
from batiste.tasks.tune import Given, Task, Tuned, tune

__all__ = [
    "Embedder", "Example", "Given", "HeadConfig", "Task", "TaskConfig", "Tuned",
    "read_examples", "tune",
]
