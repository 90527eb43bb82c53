"""Log lines: one each, that hold nothing they should not, and that nobody can fake."""

import json
import logging
import sqlite3
import sys
import threading
import unicodedata
import warnings
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from app import logs
from app.inert import visible
from tests.loglines import Log, kept_logging

HOSTILE = [
    *("\n", "\r", "\r\n", "\x00", "\x08", "\x1b[2K\x1b[1A", "\x7f", "\x85", "\x9b2K"),
    *("\u200b", "\u200e", "\u200f", "\u2028", "\u2029", "\u2060", "\ufeff", "\ud800"),
    *(chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))),
]


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    with kept_logging():
        yield


@pytest.fixture
def log(untouched_logging: None) -> Log:
    return Log()


ours = logging.getLogger("app.test")
theirs = logging.getLogger("somelibrary.part")


def test_a_line_says_when_who_and_what(log: Log) -> None:
    ours.info("started %s", "well", extra={"port": 8080})
    line = log.line
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "app.test",
        "message": "started well",
        "port": 8080,
    }


def test_a_line_within_a_request_names_it(log: Log) -> None:
    logs.request_id.set("request-1")
    ours.info("one")
    theirs.warning("two")
    assert [line["request_id"] for line in log.lines] == ["request-1"] * 2


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("sign", HOSTILE, ids=ascii)
def test_no_value_breaks_out_of_its_line(
    untouched_logging: None, form: logs.Format, sign: str
) -> None:
    log = Log(form=form)
    faked = f'{sign}2026-01-01T00:00:00 INFO app.test | "faked"'
    ours.info("said %s", faked, extra={"value": faked})
    (line,) = log.text.split("\n")[:-1]
    assert line.isascii()
    assert line.isprintable()
    if form == "json":
        assert json.loads(line)["value"] == faked


def test_text_shows_the_message_last(untouched_logging: None) -> None:
    log = Log(form="text")
    logs.request_id.set("request-1")
    ours.info('x | request_id="faked"', extra={"port": 1})
    assert log.text.endswith(
        'INFO app.test request_id="request-1" port=1 | x | request_id="faked"\n'
    )


# --------------------------------------------------------------- what others say is not repeated


def test_the_words_of_a_library_are_not_repeated(log: Log) -> None:
    theirs.warning("Invalid value for VR PN: 'Zebrowski^Quirina'")
    theirs.error("failed: %s", ValueError("Zebrowski"), extra={"name_of": "Quirina"})
    assert "Zebrowski" not in log.text
    assert "Quirina" not in log.text
    first, second = log.lines
    assert first["logger"] == "somelibrary.part"
    assert first["message"].startswith("a message of test_logs.py:")
    assert second["error"] == [{"type": "builtins.ValueError"}]


@pytest.mark.parametrize("name", ["httpx", "httpcore.http11", "sqlalchemy.engine.Engine", "apple"])
def test_a_library_says_nothing_below_a_warning(untouched_logging: None, name: str) -> None:
    log = Log("DEBUG")
    logging.getLogger(name).info("GET http://orthanc/studies/1.2.840.1")
    assert log.text == ""
    logging.getLogger("app.test").debug("ours")
    assert log.line["message"] == "ours"


def test_a_warning_says_where_and_not_what(log: Log) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = logs._show_warning  # catch_warnings has put its own
        warnings.warn("value 'Zebrowski' is not a UI", stacklevel=1)
    assert "Zebrowski" not in log.text
    assert log.line["message"].startswith("UserWarning at ")


def test_an_error_is_told_by_type_place_and_code(log: Log) -> None:
    engine = sa.create_engine("sqlite://")
    try:
        try:
            with engine.connect() as connection:
                connection.execute(sa.text("SELECT :mrn FROM nowhere"), {"mrn": "MRN-4711"})
        except sa.exc.OperationalError as error:
            raise RuntimeError("patient Zebrowski") from error
    except RuntimeError:
        ours.exception("not done")
    finally:
        engine.dispose()
    assert "MRN-4711" not in log.text
    assert "Zebrowski" not in log.text
    assert "nowhere" not in log.text
    outer, inner, driver = log.line["error"]
    assert outer["type"] == "builtins.RuntimeError"
    assert outer["at"][-1].startswith("test_logs.py:")
    assert inner["type"] == "sqlalchemy.exc.OperationalError"
    assert inner["code"] == driver["code"] == "SQLITE_ERROR"
    assert driver["type"] == f"{sqlite3.__name__}.OperationalError"


def test_of_a_group_and_of_an_os_error(log: Log) -> None:
    disk_full = OSError(28, "No space left", "/spool/Zebrowski.dcm")
    ours.error("x", exc_info=ExceptionGroup("Zebrowski", [disk_full]))
    assert "Zebrowski" not in log.text
    assert log.line["error"][1] == {"type": "builtins.OSError", "code": "ENOSPC"}


def test_an_error_that_causes_itself_ends(log: Log) -> None:
    one, other = ValueError(), KeyError()
    one.__cause__, other.__cause__ = other, one
    ours.error("x", exc_info=one)
    assert len(log.line["error"]) == 2


def test_an_app_that_does_not_start_says_no_more(log: Log) -> None:
    said = (
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1, in connect\n'
        "    raise OperationalError(text)\n"
        "psycopg.OperationalError: connection to user Zebrowski\nQuirina failed\n"
    )
    logging.getLogger("uvicorn.error").error(said)
    assert log.line["message"] == "failed: psycopg.OperationalError"


def test_a_line_that_can_not_be_made_shows_no_arguments(
    log: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    # Past pytest's own handler, which raises.
    (handler,) = [h for h in logging.getLogger().handlers if isinstance(h, logs._Handler)]
    handler.handle(ours.makeRecord(ours.name, 20, __file__, 7, "%d", ("Zebrowski",), None))
    assert "Zebrowski" not in log.text
    assert log.line["message"].endswith("no log line: TypeError at test_logs.py:7")
    assert capsys.readouterr().err == ""


def test_what_nobody_caught_says_its_type_alone(log: Log) -> None:
    def fail() -> None:
        raise ValueError("Zebrowski")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        fail()
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    assert "Zebrowski" not in log.text
    assert [line["error"][0]["type"] for line in log.lines] == ["builtins.ValueError"] * 2


# ----------------------------------------------------------------------------------- the net


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("study 1.2.840.113619.2.55.3 gone", "study <uid> gone"),
        ("2.25.1170557782 is short", "2.25.1170557782 is short"),
        ("Orthanc 1.12.10 at 10.20.30.40:8042", "Orthanc 1.12.10 at 10.20.30.40:8042"),
        ("Zebrowski^Quirina^^Dr", "<name>"),
        ("token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln end", "token <token> end"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer <credential>"),
        ("Authorization: Basic bGlnaHQ6Ym94", "Authorization: Basic <credential>"),
        ("postgresql://app:pass@db/lightbox", "postgresql://<credential>@db/lightbox"),
        ("/viewer?launch=code&ctx=abc", "/viewer?<query>"),
        ("/s/0B_LPCAPWpNL5ZlTbtBmaA/status", "/s/<session>/status"),
        ("whsec_c2VjcmV0", "<credential>"),
    ],
)
def test_the_net_below(log: Log, said: str, written: str) -> None:
    ours.info("%s", said, extra={"value": said})
    assert log.line["message"] == log.line["value"] == written


# ----------------------------------------------------------------- lines of tables and terminals


@pytest.mark.parametrize("sign", HOSTILE, ids=ascii)
def test_what_is_shown_to_people_is_visible(sign: str) -> None:
    shown = visible(f"a{sign}b")
    assert "\\u" in shown
    assert not {unicodedata.category(each) for each in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize("name", ["Jane Doe", "Müller", "山田^太郎", "علی\u200cرضا", "קורן"])
def test_names_stay_as_they_are(name: str) -> None:
    assert visible(name) == name
