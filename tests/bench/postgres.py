"""A PostgreSQL as in production: what is committed is on the disk.

The one of the tests (`tests.servers`) is told not to wait for the disk, which would flatter us.
"""

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.engine import URL

from app.demo.stack import LOOPBACK, free_port
from tests.bench.client import NotRun
from tests.servers import (
    PostgresServer,
    _postgres_programs,
    _running,
    _unprivileged,
    _wait_until_it_answers,
)


@contextmanager
def durable_postgres() -> Iterator[PostgresServer]:
    """A fresh cluster with PostgreSQL's own settings, gone at the end."""
    programs = _postgres_programs()
    if programs is None:
        raise NotRun("PostgreSQL is not installed: make setup-test")
    identity = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="lightbox-bench-postgres-"))
    try:
        password, port = secrets.token_urlsafe(18), free_port()
        secret, log, data = folder / "password", folder / "log", folder / "data"
        secret.write_text(password)
        if identity:
            for path in (folder, secret):
                os.chown(path, identity["user"], identity["group"])
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
        subprocess.run(
            [
                programs / "initdb",
                f"--pgdata={data}",
                "--username=postgres",
                f"--pwfile={secret}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-instructions",
            ],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
            **identity,
        )
        secret.unlink()
        command = [str(programs / "postgres"), "-D", str(data)]
        for setting in (
            f"listen_addresses={LOOPBACK}",
            f"port={port}",
            "unix_socket_directories=",
            "max_connections=200",
        ):
            command += ["-c", setting]
        url = URL.create("postgresql+psycopg", "postgres", password, LOOPBACK, port, "postgres")
        with _running(command, cwd=folder, env=environment, log=log, identity=identity) as process:
            admin_url = url.render_as_string(hide_password=False)
            _wait_until_it_answers(process, admin_url, log)
            yield PostgresServer(admin_url)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
