"""Attribute matching of PS3.4 C.2.2.2, written from the standard and not from `app.dicomweb`.

What a search in SQL finds on either database is held against this.
"""

import unicodedata
from collections.abc import Iterable

from pydicom.datadict import dictionary_VR

FOLDED = ("PatientName", "ReferringPhysicianName", "StudyDescription")
"""Compared without case (C.2.2.2.1), and whatever way accents are written."""


def matches(keyword: str, wanted: str, values: Iterable[str]) -> bool:
    """Does any of an attribute's values match? One that is absent is the empty value."""
    held = list(values) or [""]
    vr = dictionary_VR(keyword)
    if not wanted:
        return True
    if vr == "UI":
        return any(each in wanted.replace("\\", ",").split(",") for each in held)
    if vr in ("DA", "TM"):
        return any(_within(wanted, each) for each in held if each)
    if keyword in FOLDED:
        return any(_like(_folded(wanted), _folded(each)) for each in held)
    return any(_like(wanted, each) for each in held)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold().rstrip("^ ")


def _within(wanted: str, value: str) -> bool:
    """Range matching (C.2.2.2.5). Less precision stands for the whole time in it."""
    first, dash, last = wanted.partition("-")
    last = last if dash else first
    first, last, value = (each.replace(".", "") for each in (first, last, value))
    return first.ljust(12, "0") <= value.ljust(12, "0") <= (last or "9").ljust(12, "9")


def _like(pattern: str, text: str) -> bool:
    """Wildcards (C.2.2.2.4): by the lengths of the text that the pattern so far can have eaten."""
    eaten = {0}
    for each in pattern:
        if each == "*":
            eaten = set(range(min(eaten), len(text) + 1))
        else:
            eaten = {n + 1 for n in eaten if n < len(text) and each in ("?", text[n])}
        if not eaten:
            return False
    return len(text) in eaten
