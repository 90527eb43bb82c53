"""The headers of tus 1.0.0 (https://tus.io), the protocol that files are sent by: core, creation,
creation-with-upload and termination. Pure.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import Unprocessable, UnsupportedMediaType

VERSION = "1.0.0"
CONTENT_TYPE = "application/offset+octet-stream"
EXTENSIONS = "creation,creation-with-upload,termination"

_DIGITS = re.compile(r"[0-9]{1,15}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Announced:
    """A file that is about to be sent: its name, safe to show, its size in bytes, its SHA-256."""

    name: str
    size: int
    sha256: str


def speaks(headers: Mapping[str, str]) -> bool:
    """Does the client speak our version? Else the answer is 412."""
    return headers.get("tus-resumable") == VERSION


def announced(headers: Mapping[str, str]) -> Announced:
    """What a creation says. Raises Unprocessable."""
    size = _number(headers, "Upload-Length")
    metadata = _metadata(headers.get("upload-metadata", ""))
    sha256 = metadata.get("sha256", "")
    if not _SHA256.fullmatch(sha256):
        raise Unprocessable(
            "`Upload-Metadata` must hold `sha256`: the file's SHA-256 in 64 small hexadecimal "
            "digits. By it a file that is sent again is known."
        )
    name = metadata.get("filename", "") or "unnamed"
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return Announced(shown[:255], size, sha256)


def offset(headers: Mapping[str, str]) -> int:
    """Where the bytes of a PATCH begin. Raises Unprocessable, UnsupportedMediaType."""
    if not has_bytes(headers):
        raise UnsupportedMediaType(f"Send the bytes as `Content-Type: {CONTENT_TYPE}`.")
    return _number(headers, "Upload-Offset")


def has_bytes(headers: Mapping[str, str]) -> bool:
    """Does a creation bring bytes along?"""
    return headers.get("content-type", "").strip().lower() == CONTENT_TYPE


def _number(headers: Mapping[str, str], name: str) -> int:
    value = headers.get(name.lower(), "")
    if not _DIGITS.fullmatch(value):
        raise Unprocessable(f"`{name}` must be a number of bytes.")
    return int(value)


def _metadata(header: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in header.split(","):
        key, _, value = pair.strip().partition(" ")
        try:
            found[key] = base64.b64decode(value.strip(), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise Unprocessable(
                "`Upload-Metadata` must be pairs of a name and a value in base64 of UTF-8."
            ) from error
    return found
