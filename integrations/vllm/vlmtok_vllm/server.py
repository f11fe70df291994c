"""vLLM's OpenAI server on loopback, for the length of a ``with`` block."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil
import torch

LIMIT = 600.0
"""Seconds that a server gets to answer; one that compiles for a GPU needs minutes."""

OURS = ("--model", "--host", "--port", "--uds", "--served-model-name")
"""Flags that `Server` sets itself."""

_GRACE = 20.0
_LINES = 20
_ERRORS = 5
_ERROR = re.compile(
    r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception)\b: .+)"
)  # the first one is the cause, far from the end


class ServerError(RuntimeError):
    """The server did not start, or ended by itself; the end of its log is in the message."""


def on_cpu() -> bool:
    """Whether the torch that is installed, and so the engine, computes on the CPU."""
    return not (torch.cuda.is_available() or torch.xpu.is_available())


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings of vLLM's ``LLM(...)`` as flags of its server.

    Args:
        settings: by name, such as `max_model_len`. True and False become ``--name`` and ``--no-name``, mappings and
            lists JSON, None is left out.
    """
    said: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            said.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = json.dumps(value) if isinstance(value, (Mapping, list, tuple)) else str(value)
            said += [f"--{flag}", text]
    return said


def check_flags(more: Sequence[str]) -> None:
    """Checks further flags for the server.

    Raises:
        ValueError: one of them is set by `Server` itself.
    """
    for flag in more:
        if flag.partition("=")[0].replace("_", "-") in OURS:
            raise ValueError(f"{flag} is set already; of the server's flags, {', '.join(OURS)} cannot be given")


def cpu_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what suits the CPU engine where they say nothing: single precision, small blocks, no compiler."""
    return {"dtype": "float32", "block_size": 32, "enforce_eager": True, **settings}


def cpu_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment with what the CPU engine needs in a container, where it says nothing.

    A cache of 1 GiB (by default the engine takes a share of the machine), no binding of threads to cores, one core
    left to the frontend, and the model in the engine's process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    needed = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, cores - 1)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return {**needed, **environment}


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """vLLM's OpenAI server on loopback at a free port.

    Entering starts it and waits until it answers; leaving stops all its processes, after an exception or Ctrl-C too.

    Args:
        model: folder or hub id.
        settings: of the engine, by the names of vLLM's ``LLM(...)``; what `vlmtok_vllm.engine_args` gives fits.
        more: further flags as the server takes them; they win over `settings`.
        limit: seconds that it gets to answer.
        log: file for what it says; without one, a temporary file that goes with it, unless it fails.

    Raises:
        ValueError: `more` has a flag that is set already.

    Attributes:
        model: as given; the name that requests ask for.
        port: of 127.0.0.1.
        command: that starts it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        settings: Mapping[str, Any] | None = None,
        more: Sequence[str] = (),
        *,
        limit: float = LIMIT,
        log: str | os.PathLike[str] | None = None,
    ) -> None:
        check_flags(more)
        self.model = os.fspath(model)
        self.port = free_port()
        self._limit = limit
        self._path = log
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, psutil.Process] = {}
        engine = cpu_settings(settings or {}) if on_cpu() else dict(settings or {})
        where = {"host": "127.0.0.1", "port": self.port, "served_model_name": self.model}
        # The method of a request travels in its mm_processor_kwargs.
        said = flags({"model": self.model, **where, "trust_request_mm_kwargs": True, **engine})
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *said, *more]

    @property
    def url(self) -> str:
        """Of the server, without a path."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        self._log = self._open()  # closed by stop
        environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ}
        if Path(self.model).is_dir():
            environment.setdefault("HF_HUB_OFFLINE", "1")
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=cpu_environment(environment) if on_cpu() else environment,
            start_new_session=True,  # its own group: Ctrl-C reaches us alone, and the group ends as one
        )
        try:
            self._wait()
        except BaseException as problem:
            self.stop()
            self._end_log(isinstance(problem, ServerError))
            raise
        return self

    def _open(self) -> IO[bytes]:
        if self._path is not None:
            return open(self._path, "w+b")
        return tempfile.NamedTemporaryFile(prefix="vllm-", suffix=".log", delete=False)

    def _end_log(self, keep: bool) -> None:
        if self._log is not None and self._path is None and not keep:
            Path(self._log.name).unlink(missing_ok=True)

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        died = self._process is not None and self._process.poll() is not None
        said = self._said()
        self.stop()
        broken = died and (problem is None or isinstance(problem, Exception))
        self._end_log(broken)
        if broken:
            raise ServerError(f"the server ended by itself; {said}") from problem

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + self._limit
        while True:
            code = self._process.poll()
            if code is not None:
                raise ServerError(f"the server ended (exit code {code}) before it answered; {self._said()}")
            if self._answers():
                return
            if time.monotonic() > end:
                raise ServerError(f"the server did not answer within {self._limit:g} seconds; {self._said()}")
            time.sleep(0.25)

    def _answers(self) -> bool:
        try:
            # Without proxies: those of the environment are not for loopback.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _said(self) -> str:
        """Where its log is, the first errors in it, and its last lines."""
        if self._log is None or self._log.closed:
            return "it has no log"
        file = self._log.fileno()
        lines = os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace").splitlines()
        errors = list(dict.fromkeys(found[1] for line in lines if (found := _ERROR.search(line))))
        said = "\n".join([*errors[:_ERRORS], "...", *lines[-_LINES:]])
        return f"its log, {self._log.name}, says:\n{said}"

    def processes(self) -> list[psutil.Process]:
        """Its processes that live, those that left the group too."""
        if self._process is None:
            return []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid)
            self._seen.update((one.pid, one) for one in [family, *family.children(recursive=True)])
        for one in psutil.process_iter():  # a child whose parent died is nobody's child, but in the group still
            with suppress(ProcessLookupError, PermissionError):
                if one.pid not in self._seen and os.getpgid(one.pid) == self._process.pid:
                    self._seen[one.pid] = one
        return [one for one in self._seen.values() if _lives(one)]

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        total = 0
        for one in self.processes():
            with suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
        return total

    def stop(self) -> None:
        """Ends all its processes: asks, and after 20 seconds insists. Once it is stopped, nothing happens."""
        if self._process is None:
            return
        try:
            if self.processes():
                self._process.send_signal(signal.SIGINT)
                if self._await_end(_GRACE):
                    return
        finally:  # also when Ctrl-C comes again
            for one in self.processes():
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            ended = self._await_end(_GRACE)
            if self._log is not None:
                self._log.close()
            if not ended:
                raise ServerError(f"the server did not stop: {[one.pid for one in self.processes()]}")

    def _await_end(self, seconds: float) -> bool:
        assert self._process is not None
        end = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > end:
                return False
            self._process.poll()
            time.sleep(0.1)
        self._process.poll()
        return True


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
