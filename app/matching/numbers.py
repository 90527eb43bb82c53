"""Identifiers and dates: what is one and the same, and what is a slip away from it. Symmetric."""

import unicodedata
from datetime import date

from rapidfuzz.distance import OSA

from app.dicom import parse_date

LONGEST_IDENTIFIER = 64  # LO (PS3.5 6.2); a longer one is compared, but not searched for slips
_SHORTEST = 4  # characters; of a shorter number every other is a slip away
_CUT_AT = 16  # SH
_SPOKEN_FOR_NONE = frozenset({date(1901, 1, 1), date(1911, 11, 11), date(9999, 12, 31)})


def clean(text: str) -> str:
    """An identifier without its padding, as `app.dicom` reads it. Case counts."""
    return text.rstrip("\0 ").strip(" ")


def another_notation(a: str, b: str) -> bool:
    """One number, written in two ways: case, leading zeros, punctuation, a prefix, cut at 16."""
    short, long = sorted((a, b), key=len)
    if not short or len(long) > LONGEST_IDENTIFIER:
        return False
    bare = _bare(short)
    if bare and bare == _bare(long):
        return True
    if len(short) < _SHORTEST:
        return False
    # 21001 is no 1001 with a prefix; A1001 and 2-1001 are.
    prefix = long.removesuffix(short)
    if prefix != long and not prefix[-1:].isdigit():
        return True
    return len(short) == _CUT_AT and long.startswith(short)


def slip(a: str, b: str) -> bool:
    """One character more, less or other, two exchanged, or something added behind a mark."""
    short, long = sorted((a, b), key=len)
    if len(short) < _SHORTEST or len(long) > LONGEST_IDENTIFIER or a == b:
        return False
    if long.startswith(short) and not long[len(short)].isalnum():
        return True
    return OSA.distance(a, b, score_cutoff=1) <= 1


def _bare(text: str) -> str:
    plain = (text if text.isascii() else unicodedata.normalize("NFKC", text)).upper()
    return (plain if plain.isalnum() else "".join(filter(str.isalnum, plain))).lstrip("0")


def read_date(text: str) -> date | None:
    """A DA value; None where it is absent, or no day."""
    try:
        digits = parse_date(text.rstrip("\0 "))
    except ValueError:
        return None
    return date(int(digits[:4]), int(digits[4:6]), int(digits[6:])) if digits else None


def real_birth_date(day: date | None) -> date | None:
    """None for what systems write where they know none: 19000101 and the like."""
    return None if day is None or day.year <= 1900 or day in _SPOKEN_FOR_NONE else day


def date_slip(a: date, b: date) -> bool:
    """A day off, day and month or two digits exchanged, or one digit mistyped."""
    if abs((a - b).days) == 1:
        return True
    if a.year == b.year and (a.month, a.day) == (b.day, b.month):
        return True
    return OSA.distance(_digits(a), _digits(b), score_cutoff=1) == 1


def _digits(day: date) -> str:
    return f"{day.year:04}{day.month:02}{day.day:02}"
