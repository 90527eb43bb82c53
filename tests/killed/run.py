"""Start, work, kill, again; at the end start once more, and compare."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from pydantic import SecretStr

from app.demo.stack import REPOSITORY, OrthancServer, free_port
from app.settings import Settings
from tests.killed.clients import KINDS, Clients
from tests.killed.comparison import Tables, differences
from tests.killed.process import POINTS

START_SECONDS = 60.0
REACH_SECONDS = 4.0  # a chosen point that nobody passes is given up
SETTLE_SECONDS = 60.0
BEFORE = 6  # instances that are in Orthanc before, half of which clients send as well


@dataclass
class Report:
    """What came of it. `differences` is empty where all agrees."""

    kills: int
    seconds: float
    at: Counter[str] = field(default_factory=Counter)  # where it was killed
    answered: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)  # answers with 5xx: why
    cut_off: Counter[str] = field(default_factory=Counter)  # what recovery found
    settle_seconds: float = 0.0
    start_seconds: float = 0.0  # of all starts together
    instances: int = 0
    records: int = 0
    differences: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        def shown(counts: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))

        return [
            f"{self.kills} kills in {self.seconds:.0f} s, {self.start_seconds:.0f} s to start",
            f"settled {self.settle_seconds:.1f} s after the last start",
            f"killed at: {shown(self.at)}",
            f"answered: {shown(self.answered)}",
            f"unanswered: {shown(self.unanswered)}",
            f"answered with an error: {shown(self.errors)}",
            f"cut off: {shown(self.cut_off)}",
            f"{self.instances} instances in Orthanc, {self.records} records",
            f"{len(self.differences)} differences",
            *self.differences[:20],
        ]


class Victims:
    """Starts apps, each of which is to be killed."""

    def __init__(self, port: int, environment: dict[str, str], log: Path) -> None:
        self.port = port
        self._log = log.open("ab")
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.killed.process", str(port)],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def start(self, point: str = "", count: int = 1, mutation: str = "") -> int:
        """The process id of a new app, which may not be listening yet."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        wanted = {"point": point, "count": count, "mutation": mutation}
        self._parent.stdin.write(json.dumps(wanted) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def listening(self) -> bool:
        with socket.socket() as each:
            each.settimeout(1.0)
            return each.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait(10)
        self._parent.stdout.close()
        self._log.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(condition: Any, seconds: float, what: str) -> None:
    """Wait for a condition. Raises TimeoutError with `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        await asyncio.sleep(0.01)  # between two looks


async def kill(victims: Victims, pid: int) -> None:
    if alive(pid):
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(pid), 10.0, "the app did not die")


class Orthancs:
    """Orthanc itself, past the app."""

    def __init__(self, server: OrthancServer) -> None:
        self._client = httpx.Client(
            base_url=server.url,
            auth=(server.username, server.password),
            trust_env=False,
            timeout=30.0,
        )

    def instances(self) -> list[str]:
        found: list[str] = self._client.get("/instances").raise_for_status().json()
        return found

    def store(self, content: bytes) -> str:
        answer = self._client.post("/instances", content=content).raise_for_status()
        return str(answer.json()["ID"])

    def close(self) -> None:
        self._client.close()


@contextmanager
def victims_of(settings: Settings, state: Path) -> Iterator[Victims]:
    values = {name: getattr(settings, name) for name in settings.model_fields_set}
    environment = {
        f"LIGHTBOX_{name.upper()}": value.get_secret_value()
        if isinstance(value, SecretStr)
        else str(value)
        for name, value in values.items()
    }
    victims = Victims(free_port(), environment, state / "killed.log")
    try:
        yield victims
    finally:
        victims.close()


async def run(
    settings: Settings,
    owner_url: str,
    orthanc: OrthancServer,
    state: Path,
    *,
    kills: int,
    seed: int,
    mutation: str = "",
    points: tuple[str, ...] = POINTS,
) -> Report:
    """Kill the app `kills` times on a migrated, empty database, half of them at chosen points."""
    chance = random.Random(seed)
    archive = Orthancs(orthanc)
    begun = time.monotonic()
    report = Report(kills, 0.0)
    try:
        with victims_of(settings, state) as victims:
            clients = Clients(settings, f"http://127.0.0.1:{victims.port}", chance)
            pid = victims.start(mutation=mutation)
            await until(victims.listening, START_SECONDS, "the app does not start")
            await clients.prepare()
            before = []
            for number in range(BEFORE):
                sent = clients.fresh(of_known_study=False)
                before.append(archive.store(sent.content))
                if number % 2:
                    clients.world.known.append(sent)
            await clients.each_once()
            await kill(victims, pid)
            for number in range(kills):
                point = points[number // 2 % len(points)] if number % 2 else ""
                where, seconds = await _once(victims, clients, chance, point, mutation)
                report.at[where] += 1
                report.start_seconds += seconds
            final = time.monotonic()
            pid = victims.start(mutation=mutation)
            await until(victims.listening, START_SECONDS, "the app does not start")
            if mutation != "no-recovery":
                await until(lambda: not _under_way(owner_url), SETTLE_SECONDS, "not settled")
            report.settle_seconds = time.monotonic() - final
            await kill(victims, pid)
        tables, there = Tables(owner_url), archive.instances()
        told = clients.world.told
        report.differences = differences(tables, there, before, told)
        report.answered = Counter(f"{each.kind} {each.status}" for each in told)
        report.errors = Counter(str(each.answer["detail"]) for each in told if each.status >= 500)
        report.unanswered = clients.world.unanswered
        report.cut_off = Counter(
            str(each["detail"].get("found", "its deletion was finished"))
            for each in tables.records
            if each["reason"] == "cut-off"
        )
        report.instances, report.records = len(there), len(tables.records)
        missing = set(KINDS) - {each.kind for each in told}
        report.differences += [f"never answered at all: {each}" for each in missing]
    finally:
        archive.close()
    report.seconds = time.monotonic() - begun
    return report


async def _once(
    victims: Victims, clients: Clients, chance: random.Random, point: str, mutation: str
) -> tuple[str, float]:
    """Start it, let it work, and kill it; where that was, and how long the start took."""
    begun = time.monotonic()
    # There is not much to take back at a start.
    count = 1 if point == "taken-back" else chance.randint(1, 6)
    pid = victims.start(point, count, mutation)
    await until(
        lambda: victims.listening() or not alive(pid), START_SECONDS, "the app does not start"
    )
    started = time.monotonic() - begun
    working = asyncio.create_task(clients.work())
    reached = True
    try:
        if point:
            try:
                await until(lambda: not alive(pid), REACH_SECONDS, point)
            except TimeoutError:
                reached = False
        else:
            await asyncio.sleep(chance.uniform(0.02, 0.8))  # the random moment
    finally:
        await kill(victims, pid)
        await working
    return (point if reached else f"past {point}") or "a random moment", started


def _under_way(owner_url: str) -> int:
    engine = sa.create_engine(owner_url)
    try:
        with engine.connect() as connection:
            return int(connection.scalar(sa.text("SELECT count(*) FROM operation")) or 0)
    finally:
        engine.dispose()
