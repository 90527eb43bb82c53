"""What is signed about the trail, to be kept where the database's owner can't change it.

A statement says: so many records there were, the last one's hash was this, at that time. It is a
JSON object, one a line; its Ed25519 signature (RFC 8032, base64) is over the JSON of its other
members: sorted, without spaces, in ASCII. `key` is the SHA-256 of the public key's DER (RFC 8410),
as `openssl pkey -pubin -outform DER | sha256sum` shows it. One key signs for one trail.
"""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from app.audit.chain import Head, text_of_time
from app.db import utcnow

Kind = Literal["checkpoint", "purge"]
Keys = Mapping[str, Ed25519PublicKey]


class BadStatement(ValueError):
    """Not a statement, or not one that a key we know has signed. The message says which."""


@dataclass(frozen=True)
class Statement:
    """There were `count` records, and `head` is the `sha256` of the last of them.

    Of kind `purge`: all of these were removed since; `removed` is how many were still there, and
    `after` the `sha256` of the record that the purge's own hangs on. So it holds in that place
    alone: signed for a purge that failed, it says nothing. A checkpoint has no `after`.
    """

    kind: Kind
    count: int
    head: str
    removed: int
    at: str
    key: str
    after: str = ""

    @property
    def _members(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "after" or value}

    @property
    def signed_text(self) -> bytes:
        return _json(self._members).encode()

    def line(self, signature: bytes) -> str:
        """The statement and its signature as one line of JSON."""
        return _json({**self._members, "signature": base64.b64encode(signature).decode()})


class Signer:
    """Signs statements with one private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.key_id = key_id(key.public_key())

    @classmethod
    def from_file(cls, path: Path) -> "Signer":
        """Raises ValueError with a sentence where there is no Ed25519 private key."""
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error.strerror}.") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} holds no private key in PEM.") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path} holds no Ed25519 key; `python -m app audit key` makes one.")
        return cls(key)

    @property
    def public(self) -> Keys:
        return {self.key_id: self._key.public_key()}

    def checkpoint(self, head: Head) -> str:
        """The line that says where the chain is."""
        return self._sign("checkpoint", head, 0)

    def purge(self, through: Head, removed: int, last: Head) -> str:
        """The line that says that all records up to this one were removed, for the record that
        follows the `last`."""
        return self._sign("purge", through, removed, last.sha256)

    def _sign(self, kind: Kind, head: Head, removed: int, after: str = "") -> str:
        at = text_of_time(utcnow())
        statement = Statement(kind, head.id, head.sha256, removed, at, self.key_id, after)
        return statement.line(self._key.sign(statement.signed_text))


def read_line(line: str) -> Statement:
    """A line's statement; the signature is not looked at. Raises BadStatement."""
    return _parsed(line)[0]


def checked_line(line: str, keys: Keys) -> Statement:
    """A line's statement, if one of these keys has signed it. Raises BadStatement."""
    statement, signature = _parsed(line)
    key = keys.get(statement.key)
    if key is None:
        raise BadStatement(f"it names the key {statement.key[:16]}..., which was not given")
    try:
        key.verify(signature, statement.signed_text)
    except InvalidSignature:
        raise BadStatement("its signature does not hold") from None
    return statement


def checked_file(path: Path, keys: Keys) -> Iterator[Statement]:
    """The statements of a file of lines. Raises BadStatement, naming the line, and OSError."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield checked_line(line, keys)
            except BadStatement as error:
                raise BadStatement(f"line {number} of {path.name}: {error}") from error


def _parsed(line: str) -> tuple[Statement, bytes]:
    try:
        members: dict[str, Any] = dict(json.loads(line))
        signature = base64.b64decode(members.pop("signature"), validate=True)
        statement = Statement(**members)
    except (ValueError, TypeError, KeyError, binascii.Error, RecursionError) as error:
        raise BadStatement("it is no signed statement") from error
    texts = (statement.head, statement.at, statement.key, statement.after)
    if (
        statement.kind not in get_args(Kind)
        or type(statement.count) is not int
        or type(statement.removed) is not int
        or not all(isinstance(each, str) for each in texts)
    ):
        raise BadStatement("it is no signed statement")
    return statement, signature


def key_id(key: Ed25519PublicKey) -> str:
    """The SHA-256 of the public key's DER, in hexadecimal."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def read_public_key(path: Path) -> Keys:
    """Raises ValueError with a sentence where there is no Ed25519 public key in PEM."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} holds no public key in PEM.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"{path} holds no Ed25519 key.")
    return {key_id(key): key}


def make_key(path: Path) -> str:
    """Make a private key in a new file that only its owner can read; the public key in PEM.

    Raises OSError, FileExistsError too: a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def _json(members: Mapping[str, Any]) -> str:
    return json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
