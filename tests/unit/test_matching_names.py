"""One person's name in two ways, and two persons' names that look like one's."""

import pytest

from app.matching.folding import words
from app.matching.names import Names, compare, compare_all, read
from tests.adversarial.people import NOBODY, ONE_PERSON

SAME, SWAPPED, PARTLY, COMMON = Names.SAME, Names.SWAPPED, Names.PARTLY, Names.COMMON
UNKNOWN, SIMILAR, OTHER = Names.UNKNOWN, Names.SIMILAR, Names.OTHER


def compared(a: str, b: str) -> Names:
    found = compare(read(a), read(b))
    assert compare(read(b), read(a)) is found
    return found


@pytest.mark.parametrize(("ours", "theirs"), ONE_PERSON)
def test_one_person_however_it_is_written(ours: str, theirs: str) -> None:
    assert compared(ours, theirs) in (SAME, SWAPPED, UNKNOWN, Names.TRANSLITERATED)


@pytest.mark.parametrize("name", [*NOBODY, "", "=", "NN", "Unknown^Foxtrot", "不明", "НЕИЗВЕСТНЫЙ"])
def test_nobodys_name_says_nothing(name: str) -> None:
    assert compared(name, "Smith^John") is UNKNOWN


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # Writing.
        ("Smith^John", " SMITH ^ john^^^ ", SAME),
        ("Smith^John", "Smi\x00th^Jo\u200bhn", SAME),
        ("Smith^John", "Ｓｍｉｔｈ^Ｊｏｈｎ", SAME),
        ("Müller^Jörg", "Mueller^Joerg", SAME),
        ("Müller^Jörg", "Muller^Jorg", SAME),
        ("Müller^Jörg", "Mu\u0308ller^Jo\u0308rg", SAME),
        ("O'Neil^Ann", "ONEIL^ANN", SAME),
        ("Mac Donald^Ann", "MacDonald^Ann", SAME),
        ("Meier-Schmidt^Anna", "Meier Schmidt^Anna", SAME),
        ("Meier^Anna Lena", "Meier^Anna^Lena", SAME),
        ("Meier^Anna", "Meier^Anna^^Dr.", SAME),
        ("ヤマダ^タロウ", "ﾔﾏﾀﾞ^ﾀﾛｳ", SAME),
        ("ヤマダ^タロウ", "やまだ^たろう", SAME),
        # Places.
        ("Smith^John", "John^Smith", SWAPPED),
        ("Smith^John", "SMITH, JOHN", SWAPPED),
        ("Smith^John", "John Smith", SWAPPED),
        ("山田^太郎", "山田太郎", SWAPPED),
        # One says less.
        ("Smith^John", "Smith", PARTLY),
        ("Smith^John", "Smith^J", PARTLY),
        ("Smith^Jean-Pierre", "Smith^JP", PARTLY),
        ("Smith^John^Adam", "Smith^John", PARTLY),
        ("Smith^John^Adam", "Smith^John^A", PARTLY),
        ("Schmidt-Meier^Anna", "Meier^Anna", PARTLY),
        ("Lopez Garcia^Ana", "Garcia Lopez^Ana", PARTLY),
        ("Smith^John^^^Jr", "Smith^John", PARTLY),
        ("M?ller^Anna", "Meller^Anna", SIMILAR),
        ("Smith^Baby Girl", "Smith^Emma", PARTLY),
        ("Smith^Baby Girl", "Smith^Baby Girl A", PARTLY),
        ("Smith^Baby Girl", "Smith^BABY GIRL", COMMON),
        # Another script.
        ("Иванов^Пётр", "Ivanov^Petr", Names.TRANSLITERATED),
        ("ヤマダ^タロウ", "Yamada^Taro", Names.TRANSLITERATED),
        ("محمد^احمد", "Mohammed^Ahmed", Names.TRANSLITERATED),
        ("山田^太郎", "Yamada^Taro", UNKNOWN),
        ("山田^太郎", "やまだ^たろう", UNKNOWN),
        ("김^민준", "Kim^Minjun", UNKNOWN),
        ("Иванов^Пётр", "Smith^John", OTHER),
        ("山田^太郎", "Smith^John", UNKNOWN),
        ("????^???", "Smith^John", UNKNOWN),
        # A slip, or a sibling.
        ("Smith^Anna", "Smith^Hanna", SIMILAR),
        ("Smith^Anna", "Smyth^Anna", SIMILAR),
        ("Smith^Anna Maria", "Smith^Anna Luisa", SIMILAR),
        ("Smith^Maria Anna", "Smith^Anna", SIMILAR),
        ("Smith^John^Adam", "Smith^John^Bert", SIMILAR),
        ("髙橋^花子", "高橋^花子", SIMILAR),
        ("Yamada^Taro=山田^太郎", "Yamada^Taro=山田^次郎", SIMILAR),
        # Two persons.
        ("Smith^Anna", "Smith^Berta", Names.OTHER_GIVEN),
        ("Smith^John^^^Jr", "Smith^John^^^Sr", Names.OTHER_GIVEN),
        ("Smith Jr^John", "Smith III^John", Names.OTHER_GIVEN),
        ("Smith^Baby Girl A", "Smith^Baby Girl B", Names.OTHER_GIVEN),
        ("Smith^Baby Girl", "Smith^Baby Boy", Names.OTHER_GIVEN),
        ("Smith^Twin 1", "Smith^Twin II", Names.OTHER_GIVEN),
        ("Smith Anna", "Smith^Berta", Names.OTHER_GIVEN),
        ("山田^太郎", "山田^花子", Names.OTHER_GIVEN),
        ("Smith^Anna", "Jones^Anna", Names.OTHER_FAMILY),
        ("Smith^Anna", "Jones^Berta", OTHER),
        ("TRAUMA^1", "TRAUMA^2", OTHER),
        ("Unknown^Foxtrot", "Unknown^Golf", OTHER),
        # Indic vowels are marks, too.
        ("राम^सीता", "रीम^सीता", SIMILAR),
    ],
)
def test_two_names(a: str, b: str, expected: Names) -> None:
    assert compared(a, b) is expected


def test_another_name_of_the_patient_is_theirs() -> None:
    ours, born = read("Keller^Anna"), read("Vogel^Anna")
    assert compare_all(born, [], ours, [born]) is Names.FORMER
    assert compare_all(born, [], ours, []) is Names.OTHER_FAMILY
    assert compare_all(born, [ours], ours, []) is Names.FORMER


def test_words_are_folded() -> None:
    assert words("  O’Neil-MEIER,\tanna ") == ("oneil", "meier", "anna")
    assert words("\ud800\x07\u202e") == ()
    assert words("Stra\xdfe") == ("strasse",)
