"""Log lines: one each, JSON or text, that hold nothing of a patient and can't be faked.

What a log says is ours to vouch for: messages of `app` and uvicorn are written; of any other
library only which line of it spoke, because its words may quote a value. Of an exception are
written its types, our frames and a code, never its text. What is written is printable ASCII:
whatever a caller or a file may smuggle in (line ends, escape sequences, marks that turn the
reading direction) stands there as an escape. `_redacted` is the net below that, not the rule.
"""

import errno
import json
import logging
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

Format = Literal["json", "text"]

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being answered; empty outside of one."""

logger = logging.getLogger(__name__)

_OURS = ("app", "uvicorn")
_MOST_CAUSES = 5
_MOST_FRAMES = 12
_HERE = Path(__file__).resolve().parents[1]
_RESERVED = {*RESERVED_ATTRS, "message", "asctime", "color_message"}
_TRACEBACK = "Traceback (most recent call last)"
_RAISED = re.compile(r"\n(?:[ ].*\n)+([A-Za-z_][\w.]*)")  # below the indented frames
_SECRET = re.compile(
    r"(?P<token>\beyJ[\w-]{4,}(?:\.[\w-]*)*)"
    r"|(?P<credential>(?<=://)[^/\s@]+(?=@)|(?<=[Bb]earer )\S+|(?<=[Bb]asic )\S+|\bwhsec_\S+)"
    r"|(?P<query>(?<=\?)[^\s'\"?]*=[^\s'\"]*)"
    r"|(?P<session>(?<=/s/)[\w%-]{8,})"
    r"|(?P<uid>\b[0-2](?:\.\d+){4,}\b)"
    r"|(?P<name>[^\s'\"=^]*\^[^\s'\"]*)"
)


def configure(level: str, form: Format, stream: TextIO | None = None) -> None:
    """All lines of this process, from `level` up, to `stream` (standard error). Other libraries
    speak at warnings only, whatever `level`: httpx would name URLs, SQLAlchemy show rows."""
    handler = _Handler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    warnings.showwarning = _show_warning
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def error_of(error: BaseException) -> list[dict[str, Any]]:
    """What may be said of an exception and its causes, outermost first: `type`, `at` (our frames,
    and the one that raised) and, where there is one, a `code` (SQLSTATE, errno)."""
    return [_described(each) for each in _chain(error)]


class JsonLines(JsonFormatter):
    """JSON, an object a line."""

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        log_data.update(_fields(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return ""  # `_fields` has what may be said of it


class TextLines(logging.Formatter):
    """For people: time, level, logger, `name=value` for what else there is, a bar, the message."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        head = [fields.pop(name) for name in ("time", "level", "logger")]
        message = fields.pop("message")
        named = [f"{name}={json.dumps(value, default=str)}" for name, value in fields.items()]
        line = " ".join([*head, *named, "|", message])
        return line.encode("unicode_escape").decode("ascii")


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """The library would print the line's arguments, and where they come from."""
        kind = type(sys.exc_info()[1]).__name__
        where = f"{Path(record.pathname).name}:{record.lineno}"
        try:
            self.stream.write(f'{{"level":"ERROR","message":"no log line: {kind} at {where}"}}\n')
        except (OSError, ValueError):
            return  # there is nobody left to tell


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says, in its order."""
    ours = record.name.partition(".")[0] in _OURS
    fields: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname,
        "logger": record.name,
        "message": _redacted(_said(record)) if ours else _unsaid(record),
    }
    if current := request_id.get():
        fields["request_id"] = current
    if record.name.partition(".")[0] == "app":
        for name, value in record.__dict__.items():
            if name not in _RESERVED:
                fields[name] = _redacted(value) if isinstance(value, str) else value
    if error := _error_in(record, look_in_arguments=not ours):
        fields["error"] = error_of(error)
    return fields


def _said(record: logging.LogRecord) -> str:
    message = record.getMessage().strip()
    if _TRACEBACK in message:  # uvicorn, when the app does not start
        types = _RAISED.findall(message[message.rindex(_TRACEBACK) :])
        return f"failed: {types[0] if types else 'unknown'}"
    return message


def _unsaid(record: logging.LogRecord) -> str:
    return f"a message of {Path(record.pathname).name}:{record.lineno} {record.funcName}"


def _error_in(record: logging.LogRecord, *, look_in_arguments: bool) -> BaseException | None:
    if record.exc_info and record.exc_info[1] is not None:
        return record.exc_info[1]
    if look_in_arguments and isinstance(record.args, tuple):
        return next((each for each in record.args if isinstance(each, BaseException)), None)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, as Python would tell it."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen and len(seen) < _MOST_CAUSES:
        seen.add(id(each))
        yield each
        cause = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        if cause is None and isinstance(each, BaseExceptionGroup):
            cause = each.exceptions[0]
        each = cause


def _described(error: BaseException) -> dict[str, Any]:
    kind = type(error)
    said: dict[str, Any] = {"type": f"{kind.__module__}.{kind.__qualname__}"}
    if code := _code(error):
        said["code"] = code
    frames = list(traceback.walk_tb(error.__traceback__))
    shown = [
        f"{_place(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}"
        for index, (frame, line) in enumerate(frames)
        if index == len(frames) - 1 or _is_ours(frame.f_code.co_filename)
    ]
    if shown:
        said["at"] = shown[-_MOST_FRAMES:]
    return said


def _code(error: BaseException) -> str:
    """SQLSTATE, SQLite's name, or errno; empty if there is none."""
    for each in (error, getattr(error, "orig", None)):
        for name in ("sqlstate", "sqlite_errorname"):
            if isinstance(found := getattr(each, name, None), str):
                return found
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, str(error.errno))
    return ""


def _is_ours(filename: str) -> bool:
    return filename.startswith(f"{_HERE}/app/")


def _place(filename: str) -> str:
    """Below the repository or `site-packages`; elsewhere the file's name."""
    path = Path(filename)
    if _is_ours(filename):
        return str(path.relative_to(_HERE))
    _, _, below = filename.rpartition("site-packages/")
    return below if below != filename else path.name


def _redacted(text: str) -> str:
    return _SECRET.sub(lambda found: f"<{found.lastgroup}>", text)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning's text may quote a value (pydicom's do)."""
    logger.warning("%s at %s:%d", category.__name__, _place(filename), lineno)


def _uncaught(
    kind: type[BaseException], error: BaseException | None, at: TracebackType | None
) -> None:
    if error is None or issubclass(kind, KeyboardInterrupt):
        logger.critical("ended by %s", kind.__name__)
        return
    logger.critical("an error that nobody caught", exc_info=(kind, error, at))
