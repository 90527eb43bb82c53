"""Names as they are compared: words without case, accents and punctuation, by script.

What a script writes with marks that change the word (voiced kana, Indic vowels) is kept.
"""

import re
import unicodedata
from functools import lru_cache

from anyascii import anyascii

LONGEST_NAME = 512  # characters; PN has 64 a group (PS3.5 6.2). Beyond, it is no name.

_SCRIPTS = (
    (0x0250, "latin"),
    (0x0370, ""),
    (0x0400, "greek"),
    (0x0530, "cyrillic"),
    (0x0590, "armenian"),
    (0x0600, "hebrew"),
    (0x0780, "arabic"),
    (0x1100, "other"),
    (0x1200, "hangul"),
    (0x1E00, "other"),
    (0x1F00, "latin"),
    (0x2000, "greek"),
    (0x3005, "other"),
    (0x3006, "han"),
    (0x3040, "other"),
    (0x3100, "kana"),
    (0x3130, "other"),
    (0x3190, "hangul"),
    (0x3400, "kana"),
    (0xA000, "han"),
    (0xAC00, "other"),
    (0xD7B0, "hangul"),
    (0xF900, "other"),
    (0xFB00, "han"),
    (0x20000, "other"),
    (0x40000, "han"),
)
_BARE = frozenset({"latin", "greek", "cyrillic", "hebrew", "arabic"})
"""Scripts whose marks are accents and vowel points, which some write and others leave out."""
_APOSTROPHES = re.compile("['\u2019\u2018`\u00b4\u02bc\u02b9]")
_WORDS = re.compile("[a-z0-9?]+")
_ARABIC = str.maketrans("\u0629\u0649\u06a9\u06cc", "\u0647\u064a\u0643\u064a", "\u0640")
_KATAKANA = {code: code - 0x60 for code in range(0x30A1, 0x30F7)}
_GERMAN = str.maketrans(
    {"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa", "æ": "ae", "œ": "oe", "ĳ": "ij"}
)


def words(text: str) -> tuple[str, ...]:
    """The words of a component: NFKC, case folded. `?` stands for a character that was lost."""
    if not text:
        return ()
    if text.isascii() and text.isprintable():
        return tuple(
            each for each in _WORDS.findall(_APOSTROPHES.sub("", text).lower()) if each.strip("?")
        )
    text = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text).casefold())
    text = _APOSTROPHES.sub("", unicodedata.normalize("NFC", text))
    kept = []
    for c in text:
        category = unicodedata.category(c)
        if c in "?\ufffd":
            kept.append("?")
        elif category[0] in "LNM" or c == "\u30fc":
            kept.append(c)
        elif category not in ("Cf", "Cs", "Cn", "Co") and (category != "Cc" or c in "\t\n\r"):
            kept.append(" ")
    return tuple(each for each in "".join(kept).split() if each.strip("?"))


def scripts(text: str) -> frozenset[str]:
    """The scripts of a text's letters."""
    if text.isascii():
        return frozenset({"latin"}) if re.search("[a-z]", text) else frozenset()
    return frozenset(_script(c) for c in text if unicodedata.category(c)[0] == "L") - {""}


def _script(c: str) -> str:
    code = ord(c)
    if code < 0x250:
        return "latin"
    return next((name for end, name in _SCRIPTS if code < end), "other")


# Both readings of a word: Müller is Muller, and Mueller.
@lru_cache(maxsize=8192)
def spellings(word: str) -> tuple[str, str]:
    """A word without accents, and as German spells them out; the same twice for most words."""
    if word.isascii():
        return word, word
    if len(found := scripts(word)) == 1 and found <= _BARE:
        german = unicodedata.normalize("NFC", word).translate(_GERMAN)
        return _bare(word, found), _bare(german, found)
    plain = unicodedata.normalize("NFC", word).translate(_KATAKANA)
    return plain, plain


def _bare(word: str, found: frozenset[str]) -> str:
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", word) if unicodedata.category(c) != "Mn"
    )
    if "latin" in found:
        return anyascii(plain).lower()
    return plain.translate(_ARABIC)


@lru_cache(maxsize=8192)
def joined(parts: tuple[str, ...]) -> frozenset[str]:
    """The spellings of words written together; empty for no words."""
    if not parts:
        return frozenset()
    both = [spellings(each) for each in parts]
    return frozenset({"".join(a for a, _ in both), "".join(b for _, b in both)})


def romanized(parts: tuple[str, ...]) -> str:
    """As Latin letters, whatever the script; for hints only."""
    return anyascii("".join(parts)).lower()
