"""JSON and text that nothing on its way takes for anything else.

The edge reads some answers for places to fill in (`<!--# ... -->`), browsers read some for markup.
Neither finds what begins with `<` in what is written here; a JSON parser reads the same text.
"""

import json
import unicodedata
from typing import Any

_JOINERS = (
    "\u200c\u200d"  # letters of Persian and of Indian scripts are joined or kept apart by them
)


def inert_json(value: Any) -> bytes:
    """JSON as UTF-8, compact, every `<` escaped (RFC 8259, section 7)."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # `<` stands only inside of strings; a lone surrogate can't be written as UTF-8.
    return text.replace("<", "\\u003c").encode("utf-8", "backslashreplace")


def visible(text: str) -> str:
    """A value for a line that people read (a terminal, a table): what would end the line, steer the
    terminal, turn the reading direction or not be seen stands there as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if not hidden or character in _JOINERS:
        return character
    return f"\\u{ord(character):04x}"
