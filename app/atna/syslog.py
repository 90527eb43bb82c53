"""Syslog over TLS (RFC 5424 messages, RFC 5425 framing and closing), as PS3.15 A.6 has it.

Syslog has no answer that a message was taken. What is written to a connection may lie unread in a
buffer when the receiver dies. So a batch has a connection of its own, and counts as delivered only
once the receiver has read it to its end: it closes its side after ours (RFC 5425, 4.4). A receiver
that dies before resets the connection, and the batch is sent again.

Blocking; `feed` calls it in a thread.
"""

import os
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from app.atna.messages import text_of_time
from app.settings import Settings

# PS3.15 A.6.1: facility 10 (security/authorization), severity 5 (notice).
_PRIORITY = 10 * 8 + 5
_BOM = b"\xef\xbb\xbf"  # RFC 5424, 6.4: the message is UTF-8
_LARGEST_SEQUENCE_ID = 2_147_483_647  # RFC 5424, 7.3.1
TIMEOUT_SECONDS = 5.0


class NotDelivered(Exception):
    """The receiver is not there, is not who it should be, or did not read to the end."""


def syslog_message(record_id: int, at: datetime, host: str, xml: bytes) -> bytes:
    """A syslog message with its length in front (RFC 5425, 4.3). Its `sequenceId` is the
    record's id, by which a message that came twice can be told without reading the XML."""
    sequence = (record_id - 1) % _LARGEST_SEQUENCE_ID + 1
    header = (
        f"<{_PRIORITY}>1 {text_of_time(at)} {host} Lightbox {os.getpid()} DICOM+RFC3881 "
        f'[meta sequenceId="{sequence}"] '
    )
    message = header.encode("ascii", "replace") + _BOM + xml
    return str(len(message)).encode() + b" " + message


@dataclass(frozen=True)
class Receiver:
    """Where the messages go. Without `tls`, to a relay on this machine."""

    host: str
    port: int
    tls: bool = True
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> "Receiver | None":
        """None where no receiver is configured."""
        if settings.syslog_host is None:
            return None
        return cls(
            settings.syslog_host,
            settings.syslog_port,
            settings.syslog_transport == "tls",
            settings.syslog_ca_file,
            settings.syslog_cert_file,
            settings.syslog_key_file,
        )

    def deliver(self, messages: Iterable[bytes]) -> None:
        """Send a batch and wait until it was read. Raises NotDelivered: then any part of it may
        have arrived."""
        try:
            with socket.create_connection((self.host, self.port), TIMEOUT_SECONDS) as plain:
                plain.settimeout(TIMEOUT_SECONDS)
                if not self.tls:
                    plain.sendall(b"".join(messages))
                    plain.shutdown(socket.SHUT_WR)
                    _read_to_end(plain)
                    return
                with self._context().wrap_socket(plain, server_hostname=self.host) as secured:
                    secured.sendall(b"".join(messages))
                    _read_to_end(_closed(secured))
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            raise NotDelivered(f"{type(error).__name__}: {error}") from error

    def _context(self) -> ssl.SSLContext:
        """Read anew for each batch: certificates are replaced while we run."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca_file is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


def _closed(secured: ssl.SSLSocket) -> socket.socket:
    """Our close_notify, and the receiver's, which it sends after all that came before."""
    try:
        return secured.unwrap()
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        # It closed without one: at the end of a connection that it has read, or it would have
        # been reset.
        return secured
    except ssl.SSLError:
        raise
    except OSError as error:
        if error.errno == 0:  # what Python makes of the same
            return secured
        raise


def _read_to_end(connection: socket.socket) -> None:
    """Until the receiver has closed its side. Raises OSError where it was reset."""
    while connection.recv(1024):
        pass
