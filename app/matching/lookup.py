"""Under which keys to look for candidates, so that the truth is among them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import chain

from app.matching.folding import joined, romanized
from app.matching.names import read
from app.matching.numbers import LONGEST_IDENTIFIER, clean, read_date, real_birth_date
from app.matching.values import ArrivedStudy

MOST_KEYS = 256


@dataclass(frozen=True)
class Lookup:
    """Values for equality in SQL; sorted, and empty where the study says nothing.

    What the identifiers find must all be handed to `match`, without a limit: it judges whether
    there is another. What `family_keys` and `birth_dates` find together may be limited.
    """

    study_instance_uids: tuple[str, ...]  # planned for an order, or linked to one
    accession_numbers: tuple[str, ...]  # whatever their issuer
    patient_ids: tuple[str, ...]  # current or merged, whatever their issuer; with their orders
    family_keys: tuple[str, ...]  # as `family_keys` made them of the patients' names
    birth_dates: tuple[date, ...]  # the day, and those a slip away that are likely


def look_up(study: ArrivedStudy) -> Lookup:
    """The keys of a study."""
    numbers = (study.accession, *(each.accession for each in study.requests))
    return Lookup(
        study_instance_uids=_sorted(
            clean(uid)
            for uid in (
                study.study_instance_uid,
                *(each.study_instance_uid for each in study.requests),
            )
        ),
        accession_numbers=_notations(each.value for each in numbers),
        patient_ids=_notations(each.value for each in (study.patient, *study.other_patient_ids)),
        family_keys=_sorted(
            chain.from_iterable(
                family_keys(name) for name in (study.patient_name, *study.other_patient_names)
            )
        ),
        birth_dates=_birth_dates(study.birth_date),
    )


def family_keys(name: str) -> frozenset[str]:
    """What to keep with a patient to find them by name: each family name, folded.

    Of a name whose parts were exchanged the given name is one, too.
    """
    found: set[str] = set()
    for group in read(name):
        for part in (group.family, group.given):
            for word in (part, *((each,) for each in part)):
                found |= joined(word) | {romanized(word)}
    return frozenset(found - {""})


def _notations(values: Iterable[str]) -> tuple[str, ...]:
    """Each number, in other notations too that a sender may have made of ours."""
    found: set[str] = set()
    for value in map(clean, values):
        if len(value) > LONGEST_IDENTIFIER:
            continue  # no table holds it
        bare = value.lstrip("0")
        tail = re.split(r"[^0-9A-Za-z]", value)[-1]
        letters = value.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
        padded = (bare.zfill(n) for n in range(6, 17)) if bare.isdecimal() else ()
        found |= {value, bare, tail, letters, value.upper(), value[:16], *padded}
    return _sorted(found)


def _birth_dates(text: str) -> tuple[date, ...]:
    day = real_birth_date(read_date(text))
    if day is None:
        return ()
    found = {day, day - timedelta(days=1), day + timedelta(days=1)}
    if day.day <= 12:
        found.add(day.replace(month=day.day, day=day.month))
    return tuple(sorted(found))


def _sorted(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values) - {""})[:MOST_KEYS])
