"""A syslog receiver (RFC 5425) as a process of its own, to be killed.

    python syslog_receiver.py PORT FILE [--cert PEM] [--client-ca PEM] [--die-after N]

Each message becomes a line of FILE, in base64, on the disk before the next one is read. With
`--die-after`, the process kills itself once that many have come, whatever lies unread.
"""

import argparse
import base64
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("file", type=Path)
    parser.add_argument("--cert", type=Path)
    parser.add_argument("--client-ca", type=Path)
    parser.add_argument("--die-after", type=int)
    options = parser.parse_args()
    context = None
    if options.cert is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.cert)
        if options.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(options.client_ca)
    count = 0
    with (
        options.file.open("ab") as out,
        socket.create_server(("127.0.0.1", options.port)) as server,
    ):
        while True:
            connection, _ = server.accept()
            connection.settimeout(10.0)
            try:
                if context is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                for message in messages(connection):
                    out.write(base64.b64encode(message) + b"\n")
                    out.flush()
                    os.fsync(out.fileno())
                    count += 1
                    if count == options.die_after:
                        os.kill(os.getpid(), signal.SIGKILL)
                if isinstance(connection, ssl.SSLSocket):
                    connection = connection.unwrap()
            except OSError as error:
                print(type(error).__name__, error, flush=True)
            finally:
                connection.close()


def messages(connection: socket.socket) -> Iterator[bytes]:
    """Yield each message: octet counting (RFC 5425, 4.3)."""
    buffer = b""
    while True:
        length, space, rest = buffer.partition(b" ")
        if space and len(rest) >= int(length):
            yield rest[: int(length)]
            buffer = rest[int(length) :]
            continue
        chunk = connection.recv(512)
        if not chunk:
            assert not buffer, "half a message"
            return
        buffer += chunk


if __name__ == "__main__":
    main()
