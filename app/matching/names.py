"""Do two person names (PN, PS3.5 6.2.1) name one person? Symmetric; never raises; bounded.

Says no only where it can read both: a name in another script is unknown, not another name.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import product

from rapidfuzz import fuzz
from rapidfuzz.distance import OSA

from app.matching.folding import LONGEST_NAME, joined, romanized, scripts, spellings, words


class Names(Enum):
    """How two names stand to each other, from one person to two."""

    SAME = "same"
    COMMON = "common"  # the same, and that of many: "Baby Girl"
    SWAPPED = "swapped"  # family and given name in each other's place, or in one
    PARTLY = "partly"  # one says less: initials, one of two family names, "Baby Girl"
    FORMER = "former"  # of the names that the patient also has
    TRANSLITERATED = "transliterated"
    UNKNOWN = "unknown"  # absent, a placeholder, or not to be compared
    SIMILAR = "similar"  # a slip of the pen, or a sibling
    OTHER_FAMILY = "other-family"
    OTHER_GIVEN = "other-given"
    OTHER = "other"


def _set(text: str) -> frozenset[str]:
    return frozenset(spellings(each)[0] for each in text.split())


_PLACEHOLDERS = _set(
    "unknown unk unbekannt unbekannte unbekannter anonymous anonym anonymus anonymized anonymised "
    "anonymisiert anon deidentified noname nn notfall notaufnahme emergency trauma polytrauma "
    "inconnu inconnue desconocido desconocida sconosciuto onbekend ukjent okand xx xxx xxxx "
    "неизвестный неизвестная неизвестно неизвестен аноним مجهول 不明 未知 匿名 無名 无名 미상 무명"
)
_FILLERS = _set("patient person male female man woman mann frau m f no name der die das the")
_NEWBORN = _set(
    "baby babyboy babygirl bb bg bebe boy girl newborn neonate infant nb saeugling saugling "
    "neugeborenes neugeborener knabe maedchen madchen twin zwilling triplet drilling "
    "twina twinb babya babyb"
)
_GIRLS = _set("girl babygirl bg female maedchen madchen tochter daughter f w")
_BOYS = _set("boy babyboy male knabe junge sohn son m")
_NUMBERS = {
    "a": "1",
    "b": "2",
    "c": "3",
    "d": "4",
    "one": "1",
    "two": "2",
    "three": "3",
    "i": "1",
    "ii": "2",
    "iii": "3",
    "twina": "1",
    "twinb": "2",
    "babya": "1",
    "babyb": "2",
}
_TITLES = _set("dr drmed prof professor mr mrs ms miss herr frau med dipl ing phd md")
_PARTICLES = _set(
    "von van de der den del della di da do dos das la le les du zu zur zum vom ter ten el al bin "
    "ibn bint af av y und and e"
)
_LETTER_BY_LETTER = frozenset({"latin", "cyrillic", "greek", "kana"})
_GENERATIONS = {
    "jr": "2",
    "junior": "2",
    "sr": "1",
    "senior": "1",
    "2nd": "2",
    "3rd": "3",
    "ii": "2",
    "iii": "3",
    "iv": "4",
}


@dataclass(frozen=True)
class Reading:
    """One component group. All are folded words; `key` is everything, for a quick yes."""

    family: tuple[str, ...]
    given: tuple[str, ...]  # and middle names
    generation: str
    scripts: frozenset[str]
    placeholder: bool
    mark: frozenset[str]  # what tells one placeholder from another: TRAUMA 1

    @property
    def everything(self) -> tuple[str, ...]:
        return self.family + self.given


def read(name: str) -> tuple[Reading, ...]:
    """The component groups of a name that say anything."""
    return _read(name) if len(name) <= LONGEST_NAME else ()


# The same patients are candidates for study after study.
@lru_cache(maxsize=4096)
def _read(name: str) -> tuple[Reading, ...]:
    readings = (_read_group(each) for each in name.split("=")[:3])
    return tuple(each for each in readings if each is not None)


def compare(a: Sequence[Reading], b: Sequence[Reading]) -> Names:
    """Two names by all of their groups that can be compared.

    Where one group agrees and another of the same name does not, it is similar, no more.
    """
    found = {_compare_groups(x, y) for x, y in product(a, b)} - {Names.UNKNOWN}
    if not found:
        return Names.UNKNOWN
    ranked = sorted(found, key=_ORDER.__getitem__)
    best, worst = ranked[0], ranked[-1]
    agree, doubt = _ORDER[best] < _ORDER[Names.UNKNOWN], _ORDER[worst] > _ORDER[Names.UNKNOWN]
    return Names.SIMILAR if agree and doubt else (best if agree else worst)


def compare_all(
    a: Sequence[Reading],
    a_others: Iterable[Sequence[Reading]],
    b: Sequence[Reading],
    b_others: Iterable[Sequence[Reading]],
) -> Names:
    """Two names, then by other names that either person has, of birth say."""
    main = compare(a, b)
    if main in (Names.SAME, Names.COMMON, Names.SWAPPED, Names.PARTLY):
        return main
    names_a, names_b = [a, *a_others], [b, *b_others]
    if len(names_a) + len(names_b) > 2 and any(
        compare(x, y) is Names.SAME for x, y in product(names_a, names_b)
    ):
        return Names.FORMER
    return main


_ORDER = {each: n for n, each in enumerate(Names)}


def _read_group(text: str) -> Reading | None:
    parts = (text.split("^") + [""] * 5)[:5]
    family, given, middle, _, suffix = (words(each) for each in parts)
    given += middle
    letters = "".join(family + given)
    known = [c for c in letters if c.isalpha()]
    if len(known) <= letters.count("?") or known in (["x"], ["n"]):
        return None  # nothing, or hardly anything that could be decoded
    placeholder = bool(family) and _only(family, _PLACEHOLDERS)
    placeholder = placeholder or (not family and _only(given, _PLACEHOLDERS))
    newborn = any(_plain(each) in _NEWBORN for each in given)
    generation = ""
    if not newborn:
        for each in suffix:
            generation = _GENERATIONS.get(each, generation)
        family, generation = _without_generation(family, generation)
        given, generation = _without_generation(given, generation)
    family, given = _without(family, _TITLES), _without(given, _TITLES)
    said = frozenset(family + given + suffix)
    return Reading(
        family=family,
        given=given,
        generation=generation,
        scripts=scripts("".join(family + given)),
        placeholder=placeholder,
        mark=frozenset(each.lstrip("0") for each in said - _PLACEHOLDERS - _FILLERS),
    )


def _only(parts: tuple[str, ...], these: frozenset[str]) -> bool:
    """Are these words placeholders, with what goes with them: TRAUMA 1, NN MALE?"""
    known = [each for each in parts if _plain(each) in these]
    others = [each for each in parts if _plain(each) not in these | _FILLERS]
    return bool(known) and all(len(each) == 1 or not each.isalpha() for each in others)


def _plain(word: str) -> str:
    return spellings(word)[0]


def _without(parts: tuple[str, ...], these: frozenset[str]) -> tuple[str, ...]:
    return tuple(each for each in parts if each not in these) or parts


def _without_generation(parts: tuple[str, ...], found: str) -> tuple[tuple[str, ...], str]:
    if len(parts) > 1 and parts[-1] in _GENERATIONS:
        return parts[:-1], _GENERATIONS[parts[-1]]
    return parts, found


# --------------------------------------------------------------------------- two groups


class _Part(Enum):
    EQUAL = "equal"
    LESS = "less"  # one says less than the other
    NEAR = "near"
    OTHER = "other"


def _compare_groups(a: Reading, b: Reading) -> Names:
    if a.placeholder or b.placeholder:
        both = a.placeholder and b.placeholder and a.mark and b.mark
        return Names.OTHER if both and a.mark != b.mark else Names.UNKNOWN
    if a.scripts != b.scripts:
        return _across_scripts(a, b)
    if a.generation and b.generation and a.generation != b.generation:
        return Names.OTHER_GIVEN
    found = _compare_words(a, b)
    if found in (Names.SAME, Names.SWAPPED) and a.generation != b.generation:
        return Names.PARTLY  # father and son?
    if found in (Names.OTHER, Names.OTHER_FAMILY, Names.OTHER_GIVEN) and _homophone(a, b):
        return Names.SIMILAR
    return found


def _compare_words(a: Reading, b: Reading) -> Names:
    family = _family(a.family, b.family)
    if family is _Part.OTHER and _nothing_alike(a, b):
        return Names.OTHER
    given = _given(a.given, b.given)
    if family is _Part.EQUAL and given is _Part.EQUAL:
        return Names.COMMON if _newborn(a.given) else Names.SAME
    if _crosswise(a, b):
        return Names.SWAPPED
    if not a.given or not b.given:
        return _in_one_component(a, b)
    if not a.family or not b.family:
        return {_Part.OTHER: Names.OTHER_GIVEN, _Part.NEAR: Names.SIMILAR}.get(given, Names.PARTLY)
    if family is _Part.OTHER:
        same = given is _Part.EQUAL or (given is _Part.LESS and a.given[0] == b.given[0])
        return Names.OTHER_FAMILY if same and not _newborn(a.given) else Names.OTHER
    if given is _Part.OTHER:
        return Names.OTHER_GIVEN if family in (_Part.EQUAL, _Part.LESS) else Names.OTHER
    return Names.SIMILAR if _Part.NEAR in (family, given) else Names.PARTLY


def _nothing_alike(a: Reading, b: Reading) -> bool:
    """Of two whose family names differ: are they nobody's relatives? So are most; a quick way."""
    if not a.given or not b.given or a.given[0] == b.given[0]:
        return False
    return not joined(a.given) & joined(b.given) and not _crosswise(a, b)


def _crosswise(a: Reading, b: Reading) -> bool:
    """Is it one name, its parts in other places? `John^Smith`, `Smith John`, `SMITH, JOHN`."""
    if a.given and b.given:
        across = joined(a.family) & joined(b.given) and joined(a.given) & joined(b.family)
        return bool(across)
    if not (a.given or b.given):
        return sorted(a.family) == sorted(b.family) and len(a.family) > 1
    mine, theirs = sorted(map(spellings, a.everything)), sorted(map(spellings, b.everything))
    return mine == theirs or bool(joined(a.everything) & joined(b.everything))


def _in_one_component(a: Reading, b: Reading) -> Names:
    """One of them has no given name apart: it is missing, or stands within the family name."""
    full, short = (a, b) if a.given else (b, a)
    whole = joined(short.everything)
    if not full.given:
        part = _family(a.family, b.family)
        return {_Part.NEAR: Names.SIMILAR, _Part.OTHER: Names.OTHER}.get(part, Names.PARTLY)
    if whole & joined(full.family):
        return Names.PARTLY
    if not short.family:
        return Names.UNKNOWN
    rests = {_given((rest,), full.given) for rest in _rests(whole, joined(full.family))}
    if rests:
        if rests & {_Part.EQUAL, _Part.LESS}:
            return Names.PARTLY
        return Names.SIMILAR if _Part.NEAR in rests else Names.OTHER_GIVEN
    if len(short.family) == 1 and _family(short.family, full.family) is not _Part.OTHER:
        part = _family(short.family, full.family)
        return Names.SIMILAR if part is _Part.NEAR else Names.PARTLY
    return Names.OTHER


def _rests(whole: frozenset[str], family: frozenset[str]) -> Iterable[str]:
    """What is left of a name beside the family name that it begins or ends with."""
    for text, known in product(sorted(whole), sorted(family)):
        if text.startswith(known):
            yield text[len(known) :]
        elif text.endswith(known):
            yield text[: -len(known)]


def _family(a: tuple[str, ...], b: tuple[str, ...]) -> _Part:
    if joined(a) & joined(b):
        return _Part.EQUAL
    if not a or not b:
        return _Part.LESS
    a, b = _without(a, _PARTICLES), _without(b, _PARTICLES)
    if joined(a) & joined(b):
        return _Part.EQUAL
    mine, theirs = set(map(spellings, a)), set(map(spellings, b))
    if mine <= theirs or theirs <= mine:
        return _Part.LESS
    return _near(a, b)


def _given(a: tuple[str, ...], b: tuple[str, ...]) -> _Part:
    if _newborn(a) or _newborn(b):
        return _newborns(a, b)
    if joined(a) & joined(b):
        return _Part.EQUAL
    if not a or not b or _initials(a, b) or _initials(b, a):
        return _Part.LESS
    if _word(a[0], b[0]):
        if all(_word(x, y) for x, y in zip(a, b, strict=False)):
            return _Part.LESS
        return _Part.NEAR  # another middle name
    mine, theirs = set(map(spellings, a)), set(map(spellings, b))
    if mine & theirs:
        return _Part.NEAR
    return _near(a, b)


def _word(a: str, b: str) -> bool:
    """One word, or the initial of it?"""
    short, long = sorted((_plain(a), _plain(b)), key=len)
    if len(short) == 1 and short.isascii():
        return long.startswith(short)
    return bool(joined((a,)) & joined((b,))) or _damaged(a, b)


def _damaged(a: str, b: str) -> bool:
    """One word, but for characters that were lost?"""
    if "?" not in a + b or len(a) != len(b) or len((a + b).replace("?", "")) < len(a + b) / 2 + 1:
        return False
    return all(x == y or "?" in (x, y) for x, y in zip(a, b, strict=True))


def _initials(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Is `a` the initials of `b`: JP, Jean-Pierre?"""
    return len(a) == 1 and len(b) > 1 and _plain(a[0]) == "".join(_plain(x)[:1] for x in b)


def _near(a: tuple[str, ...], b: tuple[str, ...]) -> _Part:
    for x, y in product(sorted(joined(a)), sorted(joined(b))):
        if _damaged(x, y):
            return _Part.NEAR
        short = min(len(x), len(y))
        starts = short >= 3 and (x.startswith(y) or y.startswith(x))
        if starts or (short >= 3 and OSA.distance(x, y, score_cutoff=1) <= 1):
            return _Part.NEAR
        if fuzz.ratio(x, y, score_cutoff=80):
            return _Part.NEAR
    return _Part.OTHER


def _newborn(given: tuple[str, ...]) -> bool:
    return any(_plain(each) in _NEWBORN for each in given)


def _newborns(a: tuple[str, ...], b: tuple[str, ...]) -> _Part:
    """`Baby Girl A` says less than a name, but not that it is `Baby Boy` or `Baby Girl B`."""
    for marks in (_sexes, _numbers):
        mine, theirs = marks(a), marks(b)
        if mine and theirs and mine != theirs and _newborn(a) and _newborn(b):
            return _Part.OTHER
    return _Part.EQUAL if joined(a) & joined(b) else _Part.LESS


def _sexes(given: tuple[str, ...]) -> set[str]:
    plain = {_plain(each) for each in given}
    return {name for name, these in (("F", _GIRLS), ("M", _BOYS)) if plain & these}


def _numbers(given: tuple[str, ...]) -> set[str]:
    plain = [_plain(each) for each in given]
    return {_NUMBERS.get(each, each) for each in plain if each in _NUMBERS or each.isdigit()}


# ------------------------------------------------------------------------- other scripts


def _across_scripts(a: Reading, b: Reading) -> Names:
    """Two scripts agree where one reads like the other.

    They disagree only where both can be read without knowing the language, and nothing of one
    sounds like the other.
    """
    pairs = [(a.family, b.family), (a.given, b.given)]
    if all(x and y and _reads_like(x, y) for x, y in pairs):
        return Names.TRANSLITERATED
    if a.scripts | b.scripts <= _LETTER_BY_LETTER and all(x and y for x, y in pairs):
        across = [(a.family, b.given), (a.given, b.family)]
        if not any(_sounds_like(x, y) for x, y in pairs + across):
            return Names.OTHER
    return Names.UNKNOWN


def _sounds_like(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    return fuzz.ratio(romanized(a), romanized(b)) >= 40


def _reads_like(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    x, y = romanized(a), romanized(b)
    if fuzz.ratio(x, y) >= 80:
        return True
    x, y = _consonants(x), _consonants(y)
    return len(x) >= 3 and x == y


def _consonants(text: str) -> str:
    """Arabic and Hebrew leave vowels and doubled letters unwritten."""
    return re.sub(r"(.)\1+", r"\1", re.sub("[aeiouy']", "", text))


def _homophone(a: Reading, b: Reading) -> bool:
    """Other characters for the same sound: old and simplified forms of one name, or two names."""
    if "han" not in a.scripts:
        return False
    return romanized(a.everything) == romanized(b.everything)
