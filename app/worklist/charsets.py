"""In which SpecificCharacterSet an entry is written, and whether Orthanc can answer with it.

Orthanc recodes every answer to its `DefaultEncoding`, and drops without a word what that lacks:
a Cyrillic name leaves a Latin-1 Orthanc as `^`. Such an entry must not be served at all.
"""

import unicodedata
from collections.abc import Iterable, Mapping

from app.dicom.charset import Charset
from app.settings import WORKLIST_CHARACTER_SETS

ASCII = "ISO_IR 6"

# Orthanc's names; of those it has besides, it is not known here what they hold: ASCII is safe.
_ORTHANC: Mapping[str, str] = {
    "Utf8": "ISO_IR 192",
    "Latin1": "ISO_IR 100",
    "Latin2": "ISO_IR 101",
    "Latin3": "ISO_IR 109",
    "Latin4": "ISO_IR 110",
    "Latin5": "ISO_IR 148",
    "Cyrillic": "ISO_IR 144",
    "Greek": "ISO_IR 126",
    "Arabic": "ISO_IR 127",
    "Hebrew": "ISO_IR 138",
    "Thai": "ISO_IR 166",
}


def orthanc_answers_in(encoding: str) -> str:
    """The defined term of one of Orthanc's encodings; ASCII's for those we don't know."""
    return _ORTHANC.get(encoding, ASCII)


def composed(text: str) -> str:
    """Accents as one character with their letter (NFC), as the single-byte sets have them. For
    text that people read; an identifier stays as it is."""
    return unicodedata.normalize("NFC", text)


def holds(term: str, texts: Iterable[str]) -> bool:
    """Whether a character set can say all of it."""
    charset = Charset(() if term == ASCII else (term,))
    try:
        for text in texts:
            charset.encode(text, "PN")
    except ValueError:
        return False
    return True


def smallest(texts: Iterable[str]) -> str:
    """The first of `WORKLIST_CHARACTER_SETS` that can say all of it; the last, UTF-8, can."""
    said = [text for text in texts if not text.isascii()]
    return next(term for term in WORKLIST_CHARACTER_SETS if holds(term, said))
