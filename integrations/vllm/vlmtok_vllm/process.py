"""Building modules of transformers in a process in which vLLM has taken over their classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import VllmConfig, set_current_vllm_config

_engines: list[VllmConfig] = []


def remember(config: VllmConfig) -> None:
    """An engine runs in this process: its classes of transformers now ask for its configuration when they are built."""
    _engines[:] = [config]


@contextmanager
def building() -> Iterator[None]:
    """Context in which classes of transformers can be built, whether an engine runs in this process or not."""
    if not _engines:
        yield
        return
    with set_current_vllm_config(_engines[0]):
        yield
