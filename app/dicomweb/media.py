"""What a client accepts, and what it therefore gets (RFC 9110 12.5.1; PS3.18 8.7). Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from python_multipart.multipart import parse_options_header

from app.errors import NotAcceptable

EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
OCTETS = "application/octet-stream"
DICOM = "application/dicom"
DICOM_JSON = "application/dicom+json"
UNCOMPRESSED = frozenset(
    {
        "1.2.840.10008.1.2",
        "1.2.840.10008.1.2.1",
        "1.2.840.10008.1.2.1.99",
        "1.2.840.10008.1.2.2",
    }
)
IMAGE_TYPES: Mapping[str, str] = {
    # PS3.18 table 8.7.3-2: what frames in a transfer syntax are called
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.4.92": "image/jpx",
    "1.2.840.10008.1.2.4.93": "image/jpx",
    "1.2.840.10008.1.2.4.201": "image/jphc",
    "1.2.840.10008.1.2.4.202": "image/jphc",
    "1.2.840.10008.1.2.4.203": "image/jphc",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
}
VIDEO_TYPES: Mapping[str, str] = {
    # PS3.5 A.4.5 to A.4.9: MPEG-2, MPEG-4 AVC and HEVC
    "1.2.840.10008.1.2.4.100": "video/mpeg",
    "1.2.840.10008.1.2.4.101": "video/mpeg",
    "1.2.840.10008.1.2.4.102": "video/mp4",
    "1.2.840.10008.1.2.4.103": "video/mp4",
    "1.2.840.10008.1.2.4.104": "video/mp4",
    "1.2.840.10008.1.2.4.105": "video/mp4",
    "1.2.840.10008.1.2.4.106": "video/mp4",
    "1.2.840.10008.1.2.4.107": "video/mp4",
    "1.2.840.10008.1.2.4.108": "video/mp4",
}
_RANGE = re.compile(r'(?:[^,"]|"(?:\\.|[^"\\])*")+')
_MOST_RANGES = 64


@dataclass(frozen=True)
class MediaRange:
    """One media range. Of `multipart/related`, `type` is that of the parts, `*/*` if not said."""

    type: str
    multipart: bool
    transfer_syntax: str  # empty: not said; "*": any

    def takes(self, media_type: str) -> bool:
        """Does the range include this type?"""
        main = media_type.partition("/")[0]
        return self.type in ("*/*", f"{main}/*", media_type)


@dataclass(frozen=True)
class Choice:
    """How an answer is sent: its media type, as one body or as parts, and (of frames and files)
    in which transfer syntax; empty where that makes no sense."""

    media_type: str
    multipart: bool = False
    transfer_syntax: str = ""
    transcode: bool = False

    @property
    def part_type(self) -> str:
        """Content-Type of the one body, or of each part."""
        if not self.transfer_syntax:
            return self.media_type
        return f"{self.media_type}; transfer-syntax={self.transfer_syntax}"


@lru_cache(maxsize=512)
def accepted(header: str) -> Sequence[MediaRange]:
    """The ranges of an Accept header, best first; what can't be read in it is left out. Absent
    or empty: anything."""
    if not header.strip():
        return [MediaRange("*/*", False, "")]
    found: list[tuple[float, MediaRange]] = []
    for text in _RANGE.findall(header)[:_MOST_RANGES]:
        name, raw = parse_options_header(text.strip().encode("latin-1", "replace"))
        parameters = {
            key.decode("latin-1").lower(): value.decode("latin-1") for key, value in raw.items()
        }
        quality = _quality(parameters.get("q", "1"))
        if quality <= 0:
            continue
        media_type = name.decode("latin-1").lower()
        multipart = media_type in ("multipart/related", "multipart/*")
        if multipart:
            media_type = parameters.get("type", "*/*").lower()
        found.append(
            (quality, MediaRange(media_type, multipart, parameters.get("transfer-syntax", "")))
        )
    return [each for _, each in sorted(found, key=lambda pair: -pair[0])]


def takes_gzip(header: str) -> bool:
    """Does an Accept-Encoding header name gzip (RFC 9110 12.5.3)?"""
    for text in header.split(","):
        name, parameters = parse_options_header(text.strip().encode("latin-1", "replace"))
        if name.lower() == b"gzip":
            return _quality(parameters.get(b"q", b"1").decode("latin-1")) > 0
    return False


def _quality(text: str) -> float:
    return float(text) if re.fullmatch(r"[01](\.[0-9]{0,3})?", text, re.ASCII) else 0.0


def for_frames(header: str, stored: str) -> Choice:
    """How frames that are stored in the transfer syntax `stored` are sent (PS3.18 8.7.3.3).

    Uncompressed frames are in Explicit VR Little Endian, however their file is written. Raises
    NotAcceptable.
    """
    # Orthanc hands out every uncompressed frame inflated and in little endian. Named big endian,
    # it would be shown as a plausible, wrong picture.
    named = EXPLICIT_LITTLE_ENDIAN if stored in UNCOMPRESSED else stored
    image = IMAGE_TYPES.get(stored)
    for each in accepted(header):
        anything = each.type in ("*/*", "application/*")
        if anything and each.transfer_syntax in ("", "*", named):
            return Choice(OCTETS, each.multipart, named)
        if each.type == OCTETS or anything:
            if each.transfer_syntax in ("*", named):
                return Choice(OCTETS, each.multipart, named)
            if each.transfer_syntax in ("", EXPLICIT_LITTLE_ENDIAN):
                # PS3.18 8.7.3.3.2: octets of which nothing more is said are uncompressed.
                transcode = named != EXPLICIT_LITTLE_ENDIAN
                return Choice(OCTETS, each.multipart, EXPLICIT_LITTLE_ENDIAN, transcode)
        elif image and each.takes(image) and each.transfer_syntax in ("", "*", named):
            return Choice(image, each.multipart, named)
    more = f" and {image}" if image else ""
    raise NotAcceptable(
        f"These frames are stored in the transfer syntax {named}. They are sent as {OCTETS}{more}, "
        "alone or in multipart/related; ask with `transfer-syntax=*` for whatever it is."
    )


def for_files(header: str, stored: Iterable[str], *, one: bool) -> Choice:
    """How DICOM files in these transfer syntaxes are sent: as they are stored. Only `one` may go
    without a multipart envelope. Raises NotAcceptable."""
    syntaxes = set(stored)
    for each in accepted(header):
        if not each.takes(DICOM) or each.transfer_syntax not in ("", "*", *_only(syntaxes)):
            continue
        if each.multipart or each.type in ("*/*", "application/*"):
            return Choice(DICOM, True)
        if one:
            return Choice(DICOM, False, next(iter(syntaxes)))
    raise NotAcceptable(
        'These files are sent as multipart/related; type="application/dicom", one alone also as '
        "application/dicom, each in the transfer syntax it is stored in: ask with "
        "`transfer-syntax=*`."
    )


def _only(syntaxes: set[str]) -> set[str]:
    return syntaxes if len(syntaxes) == 1 else set()


def for_json(header: str) -> None:
    """Raises NotAcceptable where DICOM JSON isn't accepted; there is no XML."""
    for each in accepted(header):
        if not each.multipart and (each.takes(DICOM_JSON) or each.takes("application/json")):
            return
    raise NotAcceptable("This is sent as application/dicom+json; there is no XML here.")


def for_bytes(header: str, media_type: str) -> Choice:
    """How the bytes of an element are sent: alone or as a part; as what they are, or as octets.
    Raises NotAcceptable."""
    for each in accepted(header):
        if each.takes(media_type):
            return Choice(media_type, each.multipart)
        if each.takes(OCTETS):
            return Choice(OCTETS, each.multipart)
    raise NotAcceptable(f"This is sent as {media_type} or {OCTETS}, alone or in multipart/related.")


def for_rendered(header: str, offered: Iterable[str]) -> str:
    """The first of the `offered` types that the best range takes. Raises NotAcceptable."""
    types = list(offered)
    for each in accepted(header):
        if not each.multipart:
            for media_type in types:
                if each.takes(media_type):
                    return media_type
    raise NotAcceptable(f"This is sent as {' or '.join(types)}.")
