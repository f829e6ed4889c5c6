"""The mesh config of what is being traced, for the few places that lay arrays out by it."""

import contextlib
import contextvars
from collections.abc import Iterator

from batiste.sharding.config import MeshConfig

_layout = contextvars.ContextVar("layout", default=MeshConfig(data=1))


def layout() -> MeshConfig:
    """What `laid_out` said; outside of it, a mesh of one."""
    return _layout.get()


@contextlib.contextmanager
def laid_out(config: MeshConfig) -> Iterator[None]:
    """Says, while a step is traced, how its arrays are laid out (see MeshConfig)."""
    token = _layout.set(config)
    try:
        yield
    finally:
        _layout.reset(token)
