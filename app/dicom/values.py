"""DICOM values that Lightbox makes or takes in by hand, each checked once, where it enters.

Every check raises ValueError with a sentence fit for the caller; what it quotes is escaped, so
that a control or bidirectional character can't rewrite the log line or page that shows it.
"""

import hashlib
import re
import unicodedata
import uuid
from dataclasses import dataclass
from datetime import date

# PS3.5 9.1. Legacy leading zeros in a component (1.02.3) are let through: old studies have them.
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_CS = re.compile(r"[A-Z0-9 _]{0,16}")  # PS3.5 6.2, Code String
_DATE = re.compile(r"([0-9]{4})(\.?)([0-9]{2})\2([0-9]{2})")
_QUOTE_AT_MOST = 80


def quoted(text: str) -> str:
    """`text` in double quotes for a message: escaped, and cut to 80 characters."""
    cut = text[:_QUOTE_AT_MOST]
    shown = "".join(
        c if c.isprintable() and c not in '"\\' else c.encode("unicode_escape").decode()
        for c in cut
    )
    return f'"{shown}"' + ("..." if len(text) > _QUOTE_AT_MOST else "")


def hidden_character(text: str) -> str | None:
    """Name the first character of `text` that has no place in an identifier; None if clean.

    Such are controls (PS3.5 6.1.3 allows them in long text only), and what Unicode calls format
    characters, surrogates and line separators: they make two different values look the same.
    """
    for c in text:
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return f"U+{ord(c):04X}"
    return None


def control_character(text: str) -> str | None:
    """Name the first control or direction-changing character of `text`; None if clean.

    Softer than `hidden_character`: names of some languages need joiners (U+200C, U+200D).
    """
    for c in text:
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _BIDI:
            return f"U+{ord(c):04X}"
    return None


_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def parse_uid(text: str) -> str:
    """Return `text` if it is a UID: 1 to 64 digits and dots (PS3.5 9.1). Else ValueError."""
    if len(text) > 64:
        raise ValueError(f"A UID has at most 64 characters, this one has {len(text)}.")
    if not _UID.fullmatch(text):
        raise ValueError(f"{quoted(text)} is not a UID: digits in components joined by dots.")
    return text


def new_uid() -> str:
    """A new UID under 2.25, from a random UUID (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid4().int}"


def parse_short_text(text: str) -> str:
    """Strip and return one SH value, at most 16 characters (PS3.5 6.2); "" if empty."""
    return _line(text, "A short string (SH)", 16)


def parse_text(text: str) -> str:
    """Strip and return one LO value, at most 64 characters (PS3.5 6.2); "" if empty."""
    return _line(text, "A long string (LO)", 64)


def parse_code(text: str) -> str:
    """Strip and return one CS value: 16 of A-Z, 0-9, space and _ (PS3.5 6.2); "" if empty."""
    code = text.strip(" ")
    if not _CS.fullmatch(code):
        raise ValueError(
            f"{quoted(text)} is not a code: at most 16 of A-Z, 0-9, underscore and space."
        )
    return code


def parse_date(text: str) -> str:
    """Return a DA value as YYYYMMDD; "" if empty (PS3.5 6.2). Else ValueError.

    YYYY.MM.DD of ACR-NEMA 2.0 is read too, as PS3.5 6.2 recommends. The day must exist.
    """
    stripped = text.strip(" ")
    if not stripped:
        return ""
    found = _DATE.fullmatch(stripped)
    if not found:
        raise ValueError(f"{quoted(text)} is not a date of the form YYYYMMDD.")
    year, month, day = found[1], found[3], found[4]
    try:
        date(int(year), int(month), int(day))
    except ValueError:
        raise ValueError(f"{quoted(text)} is not a day of the calendar.") from None
    return year + month + day


def person_name(last: str, first: str) -> str:
    """A PN value `Last^First` (PS3.5 6.2.1); either may be empty, not both. Else ValueError."""
    parts = [last.strip(), first.strip()]
    for part in parts:
        if any(c in part for c in "^=\\"):
            raise ValueError(
                f"The name {quoted(part)} must not hold ^, = or \\: DICOM separates by them."
            )
        if control := control_character(part):
            raise ValueError(f"The name {quoted(part)} holds the control character {control}.")
    name = "^".join(parts).rstrip("^")
    if not name:
        raise ValueError("A person's name must not be empty.")
    if len(name) > 64:
        raise ValueError(f"A DICOM name has at most 64 characters, this one has {len(name)}.")
    return name


@dataclass(frozen=True)
class PatientIdentifier:
    """PatientID (0010,0020) with IssuerOfPatientID (0010,0021): both LO, PS3.3 C.7.1.1.

    Spaces around a value are not part of it (PS3.5 6.2). Case counts. An empty issuer means
    that none was said, not that any fits. Raises ValueError for an empty or impossible value.
    """

    value: str
    issuer: str = ""

    def __post_init__(self) -> None:
        value = _line(self.value, "A patient identifier", 64)
        if not value:
            raise ValueError("A patient identifier must not be empty.")
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "issuer", _line(self.issuer, "An issuer of identifiers", 64))

    def __str__(self) -> str:
        return f"{self.value} (issuer {self.issuer})" if self.issuer else self.value


def orthanc_id(*parts: str) -> str:
    """Orthanc's public id: SHA-1 over the parts joined by |, in five groups of 8 hex digits.

    The parts are PatientID, then StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID as far down
    as the wanted level, as stripped text: an absent PatientID is "".
    """
    digest = hashlib.sha1("|".join(parts).encode(), usedforsecurity=False).hexdigest()
    return "-".join(digest[i : i + 8] for i in range(0, 40, 8))


def _line(text: str, what: str, longest: int) -> str:
    value = text.strip(" ")
    if len(value) > longest:
        raise ValueError(f"{what} has at most {longest} characters, this one has {len(value)}.")
    if "\\" in value:
        raise ValueError(f"{what} must not hold a backslash: DICOM separates values by it.")
    if hidden := hidden_character(value):
        raise ValueError(f"{what} must not hold the character {hidden}: {quoted(value)}.")
    return value
