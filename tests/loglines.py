"""What a process logs, for tests to read."""

import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from app import logs


@contextmanager
def kept_logging() -> Iterator[None]:
    """What `logs.configure` sets is the process's: given back at the end of the block."""
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in ("app", "uvicorn")]
    before = root.handlers, root.level, [each.level for each in ours]
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning
    try:
        yield
    finally:
        root.handlers, root.level = before[0], before[1]
        for each, level in zip(ours, before[2], strict=True):
            each.setLevel(level)
        sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks
        logs.request_id.set("")


class Log:
    """Everything that is logged from here on, as `serve` would write it."""

    def __init__(self, level: str = "INFO", form: logs.Format = "json") -> None:
        self.stream = io.StringIO()
        logs.configure(level, form, self.stream)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def line(self) -> Any:
        (line,) = self.lines
        return line
