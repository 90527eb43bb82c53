"""The table as it grows, and docs/performance.md."""

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from app.demo.ohif import viewer_version
from app.demo.stack import find_dicomweb_plugin
from tests.bench.measure import Better, Missing, Result

PAGE = Path(__file__).with_name("page.md")
_NAME = 30
HEADING = (
    f"{'row':{_NAME}} {'direct':>10} {'Lightbox':>10}  {'unit':11} "
    f"{'ratio':>7}  {'from - to':>15}  target"
)


def line(outcome: Result | Missing) -> str:
    """One row for the terminal."""
    if isinstance(outcome, Missing):
        return f"{outcome.name:{_NAME}} not run: {outcome.why}"
    direct, ours = _medians(outcome)
    spread = f"{_short(min(outcome.ratios))} - {_short(max(outcome.ratios))}"
    text = (
        f"{outcome.name:{_NAME}} {direct:>10} {ours:>10}  {outcome.unit:11} "
        f"{_short(outcome.ratio):>7}  {spread:>15}  {_target(outcome)} {_verdict(outcome)}"
    )
    return f"{text}\n{outcome.note}" if outcome.note else text


def _medians(outcome: Result) -> tuple[str, str]:
    return (_short(median(outcome.direct)) if outcome.direct else ""), _short(median(outcome.ours))


def _short(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _target(outcome: Result) -> str:
    sign = "≥" if outcome.better is Better.HIGHER else "≤"
    return f"{sign} {_short(outcome.target)}"


def _verdict(outcome: Result) -> str:
    return "reached" if outcome.reached else "not reached"


@dataclass(frozen=True)
class Clients:
    """What the clients manage against a bare nginx, in frames a second."""

    floor: Sequence[tuple[str, float]]

    @property
    def text(self) -> str:
        return "The clients alone, against a file of a frame's size in a bare nginx: " + "; ".join(
            f"{name}: {value:.0f} frames/s" for name, value in self.floor
        )


def page(
    outcomes: Sequence[Result | Missing],
    clients: Clients,
    *,
    pairs: int,
    database: str,
    command: str,
) -> str:
    """docs/performance.md."""
    rows = ["| what | direct Orthanc | Lightbox | ratio | from - to | target | |"]
    rows.append("|---|---:|---:|---:|---:|---:|---|")
    notes = []
    for each in outcomes:
        if isinstance(each, Missing):
            rows.append(f"| {each.title} | | | | | | not run: {each.why} |")
            continue
        direct, ours = (f"{text} {each.unit}" if text else "" for text in _medians(each))
        spread = f"{_short(min(each.ratios))} - {_short(max(each.ratios))}"
        ratio = _short(each.ratio) if each.direct else ""
        rows.append(
            f"| {each.title} | {direct} | {ours} | {ratio} | {spread} | {_target(each)} "
            f"| {_verdict(each)} |"
        )
        if each.note:
            notes.append(f"### {each.title[0].upper()}{each.title[1:]}\n\n{each.note}\n")
    text = PAGE.read_text(encoding="utf-8").format(
        date=datetime.now(UTC).date().isoformat(),
        machine="\n".join(f"| {name} | {value} |" for name, value in machine()),
        database="SQLite" if database == "sqlite" else "PostgreSQL, durable",
        command=command,
        pairs=pairs,
        rows="\n".join(rows),
        clients=clients.text,
        notes="\n".join(notes),
    )
    return text.rstrip() + "\n"


def machine() -> list[tuple[str, str]]:
    """What was measured on, and with."""
    cpu = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert memory is not None
    plugin = re.search(r"\.so\.(\S+)", find_dicomweb_plugin().resolve().name)
    return [
        ("CPU", f"{cpu[0] if cpu else platform.machine()}, {len(cpu)} cores"),
        ("memory", f"{int(memory[1]) / 2**20:.0f} GiB"),
        ("kernel", f"{platform.system()} {platform.release()}"),
        ("Orthanc", _version(["Orthanc", "--version"])),
        ("DICOMweb plugin", plugin[1] if plugin else "?"),
        ("nginx", _version(["nginx", "-v"])),
        ("Python", platform.python_version()),
        ("OHIF", viewer_version().version),
        ("Chromium", _version(["chromium", "--version"])),
    ]


def _version(command: Sequence[str]) -> str:
    program = shutil.which(command[0], path="/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin")
    if program is None:
        return "not installed"
    told = subprocess.run(
        [program, *command[1:]], capture_output=True, text=True, check=False, timeout=60
    )
    found = re.search(r"\d+(?:\.\d+)+", told.stdout + told.stderr)
    return found[0] if found else "?"
