"""Text to bytes and back in a file's SpecificCharacterSet (PS3.5 6.1.2, PS3.3 C.12.1.1.2).

pydicom's own decoding warns and goes on with replacement characters; here nothing is replaced
unasked, and nothing is logged, as what fails to decode is patient data.
"""

import re
from dataclasses import dataclass

from pydicom.charset import (
    CODES_TO_ENCODINGS,
    STAND_ALONE_ENCODINGS,
    encode_string,
    python_encoding,
)

UTF_8 = "ISO_IR 192"
_LATIN_1 = "iso8859"  # what pydicom reads ISO_IR 6 as
_READ_ESCAPES = ("iso2022_jp", "iso2022_jp_2")  # these codecs read escape sequences themselves
_ESCAPE = b"\x1b"
_FRAGMENT = re.compile(rb"^[^\x1b]+|\x1b[^\x1b]*")
# Behind these a code extension ends (PS3.5 6.1.2.5.3); ^ and = only in names.
_TEXT_ENDS = frozenset(b"\r\n\t\f\\")
_NAME_ENDS = frozenset(b"^=\\")
_SPLIT_TEXT = re.compile(r"([\r\n\t\f\\])")
_SPLIT_NAME = re.compile(r"([\^=\\])")
_MISSPELLED = re.compile(r"ISO[^_]IR[ _-]?([0-9]+)")
_MISSPELLED_EXTENSION = re.compile(r"ISO.2022.IR.([0-9]+)")


@dataclass(frozen=True)
class Charset:
    """One SpecificCharacterSet. `terms` are its defined terms, () when absent or empty."""

    terms: tuple[str, ...] = ()

    @classmethod
    def of(cls, raw: bytes) -> "Charset":
        """From the element's value; terms are stripped."""
        text = raw.decode("latin-1").rstrip("\0 ")
        return cls(tuple(term.strip(" ") for term in text.split("\\")) if text else ())

    @property
    def is_default(self) -> bool:
        """ISO_IR 6, that is ASCII, said or unsaid."""
        return all(term in ("", "ISO_IR 6", "ISO 2022 IR 6") for term in self.terms)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The terms that are none."""
        return tuple(term for term in self.terms if _encoding(term) is None)

    def decode(self, raw: bytes, vr: str = "LO") -> str:
        """The text of a value, unstripped. Raises ValueError if the bytes aren't of this set.

        Without a character set, bytes above 127 are read as Latin-1, as Orthanc and pydicom do.
        """
        if raw.isascii() and _ESCAPE not in raw:
            # All sets hold ASCII, but for ISO_IR 13, where \ and ~ are printed as yen and overline.
            return raw.decode("ascii")
        if self.unknown:
            raise ValueError("The character set is unknown.")
        return _decode(raw, self._encodings(), vr)

    def decode_loosely(self, raw: bytes, vr: str = "LO") -> str:
        """As `decode`, with U+FFFD where that fails. For what is shown, not for what identifies."""
        try:
            return self.decode(raw, vr)
        except ValueError:
            return raw.decode("ascii", "replace")

    def encode(self, text: str, vr: str = "LO") -> bytes:
        """The bytes of `text`. Raises ValueError if this set can't hold it."""
        if text.isascii():
            return text.encode("ascii")
        if self.is_default or self.unknown:
            raise ValueError("The character set is ASCII, or unknown.")
        encodings = self._encodings()
        ends = _SPLIT_NAME if vr == "PN" else _SPLIT_TEXT
        encoded = b"".join(_encode(part, encodings) for part in ends.split(text))
        # encode_string takes Latin-1 for ASCII, and knows no escape for some sets.
        strictly = ["ascii" if e == _LATIN_1 else e for e in encodings]
        if _decode(encoded, strictly, vr) != text:
            raise ValueError("The character set lacks a character.")
        return encoded

    def _encodings(self) -> list[str]:
        terms = self.terms or ("",)
        kept = terms[:1]
        if terms[0] not in STAND_ALONE_ENCODINGS:
            kept += tuple(t for t in terms[1:] if t not in STAND_ALONE_ENCODINGS)
        return [_encoding(term) or "ascii" for term in kept]


def _encoding(term: str) -> str | None:
    """Python's name of a defined term; common misspellings are read as what they mean."""
    if term in python_encoding:
        return python_encoding[term]
    if found := _MISSPELLED.fullmatch(term):
        return python_encoding.get(f"ISO_IR {found[1]}")
    if found := _MISSPELLED_EXTENSION.fullmatch(term):
        return python_encoding.get(f"ISO 2022 IR {found[1]}")
    return None


def _decode(raw: bytes, encodings: list[str], vr: str) -> str:
    if _ESCAPE not in raw:
        return raw.decode(encodings[0])
    ends = _NAME_ENDS if vr == "PN" else _TEXT_ENDS
    return "".join(_fragment(part, encodings, ends) for part in _FRAGMENT.findall(raw))


def _encode(part: str, encodings: list[str]) -> bytes:
    """One run of text that is written in one go, escape sequences included."""
    if part.isascii():
        return part.encode("ascii")
    if len(encodings) == 1 and encodings[0] != "shift_jis":
        return part.encode(encodings[0])
    try:
        return bytes(encode_string(part, encodings))
    except Warning:  # it warns before it replaces; the caller's comparison finds the rest
        raise ValueError("The character set lacks a character.") from None


def _fragment(part: bytes, encodings: list[str], ends: frozenset[int]) -> str:
    """The text of one run of bytes that begins with an escape sequence, or is the first."""
    if not part.startswith(_ESCAPE):
        return part.decode(encodings[0])
    length = 4 if part.startswith((b"\x1b$(", b"\x1b$)")) else 3
    encoding = CODES_TO_ENCODINGS.get(part[:length], "")
    if encoding != _LATIN_1 and encoding not in encodings:
        raise ValueError("An escape sequence switches to a set that is not announced.")
    if encoding in _READ_ESCAPES:
        return part.decode(encoding)
    rest = part[length:]
    cut = next((i for i, byte in enumerate(rest) if byte in ends), len(rest))
    return rest[:cut].decode(encoding) + rest[cut:].decode(encodings[0])
