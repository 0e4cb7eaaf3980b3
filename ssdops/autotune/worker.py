"""A process that tries candidates, so that one that crashes, hangs or corrupts memory takes nothing with it.

Requests go in as lines of JSON on its standard input and answers come back as lines on its standard output. It is started when
it is first needed, killed when it does not answer in time, and started again.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread
from types import TracebackType
from typing import IO, Any

import torch

from ..backends import registry
from .formulas import modules

START_SECONDS = 120.0
"""How long a process may take to start: it imports torch, on a machine that may be busy."""
BOOT = "import sys, json, importlib; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[2]).main()"
"""What it runs: its own sys.path may lack what this process was given."""


class Died(Exception):
    """The process ended, or was killed as it did not answer in time; the message says which."""


@dataclass
class Worker:
    """Answers requests, in a process of its own.

    Attributes:
        module: what has the other side of the protocol, as `main()`.
        device: where candidates run, as torch spells it.
        starts: how many processes there have been.
    """

    module: str
    device: str
    starts: int = 0
    _process: subprocess.Popen[str] | None = None
    _answers: queue.Queue[str | None] = field(default_factory=queue.Queue)
    _complaints: deque[str | None] = field(default_factory=lambda: deque(maxlen=2))
    _listener: Thread | None = None

    def twin(self) -> Worker:
        """Another process for the same, not started yet."""
        return Worker(self.module, self.device)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self, timeout: float = START_SECONDS) -> None:
        """Start the process, if there is none, and wait until it is ready.

        Raises:
            Died: it does not start.
        """
        if self._process is not None:
            return
        self.starts += 1
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps(sys.path), self.module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
        )  # fmt: skip
        self._answers = queue.Queue()
        self._complaints.clear()
        reader = Thread(target=_read, args=(self._process.stdout, self._answers.put), daemon=True)
        self._listener = Thread(target=_read, args=(self._process.stderr, self._complaints.append), daemon=True)
        for thread in (reader, self._listener):
            thread.start()
        hello = {"backends": registry.targets(), "device": self.device, "threads": torch.get_num_threads()}
        answer = self._exchange(hello, timeout)
        if "error" in answer:
            self.kill()
            raise Died(str(answer["error"]))

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a request; a workload comes with the modules of the masks that users registered.

        Raises:
            Died: there is none.
        """
        self.start()
        return self._exchange({**request, "masks": modules(request["workload"]["term"])}, timeout)

    def _exchange(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None  # start() has made it
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=max(timeout, 0.01))
        except queue.Empty:
            self.kill()
            raise Died(f"no answer within {timeout:.3g} s") from None
        except OSError:  # it ended before it was asked
            line = None
        if line is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if self._listener is not None:
                self._listener.join(1)  # the last line is what it ended with, unless its own children keep the pipe open
            said = next((f", {text.strip()}" for text in list(self._complaints) if text), "")
            raise Died(f"the process ended: {_end_of(self.kill())}{said}"[:500])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> int:
        """End the process, if there is one; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.poll() is None:
            process.kill()
        with suppress(subprocess.TimeoutExpired):  # one that the system cannot end is left to it
            process.wait(10)
        with suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        return process.returncode or 0


def _read(pipe: IO[str] | None, put: Callable[[str | None], None]) -> None:
    """Hand on every line that comes through a pipe, then None."""
    assert pipe is not None  # it was asked for
    with pipe:
        for line in pipe:
            put(line)
    put(None)


def _end_of(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    with suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"
