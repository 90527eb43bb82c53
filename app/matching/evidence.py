"""One study beside one patient, one order: what agrees, what differs, what can't be said.

Nothing is decided here; see `rules`.
"""

from collections.abc import Collection, Iterator
from datetime import date
from typing import NamedTuple

from app.dicom import quoted
from app.matching import kinds
from app.matching.codes import MEANING, Code
from app.matching.folding import words
from app.matching.names import Names, Reading, compare_all, read
from app.matching.numbers import (
    another_notation,
    clean,
    date_slip,
    read_date,
    real_birth_date,
    slip,
)
from app.matching.values import (
    ArrivedStudy,
    Finding,
    Identifier,
    OrderCandidate,
    PatientCandidate,
)

NEAR_DAYS = 7
EARLIEST_DAYS = 30  # before the order was placed or scheduled, whichever came first
LATEST_DAYS = 365  # after
OPEN = frozenset({"scheduled", "in-progress"})
MOST_VALUES = 64  # other identifiers, names, requests of one study; more say nothing more

_BY_NAME = {
    Names.SAME: Code.NAME_AGREES,
    Names.COMMON: Code.NAME_COMMON,
    Names.SWAPPED: Code.NAME_SWAPPED,
    Names.PARTLY: Code.NAME_PARTLY,
    Names.FORMER: Code.NAME_FORMER,
    Names.TRANSLITERATED: Code.NAME_TRANSLITERATED,
    Names.SIMILAR: Code.NAME_SIMILAR,
    Names.OTHER_FAMILY: Code.NAME_OTHER_FAMILY,
    Names.OTHER_GIVEN: Code.NAME_OTHER_GIVEN,
    Names.OTHER: Code.NAME_DIFFERS,
}


class Seen(NamedTuple):
    """A code with the study's value and ours; the words are made for those that are shown."""

    code: Code
    theirs: str = ""
    ours: str = ""

    def finding(self) -> Finding:
        text = MEANING[self.code].words
        return Finding(self.code, text.format(theirs=quoted(self.theirs), ours=quoted(self.ours)))


class Prepared:
    """A study, read once for all its candidates."""

    def __init__(
        self, study: ArrivedStudy, known: Collection[PatientCandidate], authority: str
    ) -> None:
        self.study = study
        self.authority = clean(authority)
        self.uid = clean(study.study_instance_uid)
        self.patient = _clean(study.patient)
        self.other_ids = tuple(map(_clean, study.other_patient_ids[:MOST_VALUES]))
        named = [study.accession, *(each.accession for each in study.requests[:MOST_VALUES])]
        self.accessions = tuple(dict.fromkeys(each for each in map(_clean, named) if each.value))
        referenced = (clean(each.study_instance_uid) for each in study.requests[:MOST_VALUES])
        self.referenced = frozenset(referenced) - {"", self.uid}
        self.name = read(study.patient_name)
        self.other_names = [read(each) for each in study.other_patient_names[:MOST_VALUES]]
        self.birth_date = real_birth_date(read_date(study.birth_date))
        self.sex = clean(study.sex).upper()
        self.modalities = kinds.of_images(study.modalities)
        self.regions = kinds.regions(study.body_parts)
        self.date = read_date(study.study_date)
        self.stations = frozenset(clean(each) for each in study.stations) - {""}
        self.shown_stations = ", ".join(sorted(self.stations)[:MOST_VALUES])
        self.institution = frozenset(words(study.institution[:256]))
        self.holders: dict[str, set[PatientCandidate]] = {}
        for each in known:
            self.holders.setdefault(clean(each.mrn), set()).add(each)

    # ------------------------------------------------------------------------- patients

    def of_patient(self, patient: PatientCandidate) -> tuple[Seen, ...]:
        """What the study says of whose it is, beside this patient."""
        return (
            *self._identifier(patient),
            *self._name(patient),
            *self._birth_date(patient),
            *self._sex(patient),
        )

    def is_number_of(self, theirs: Identifier, patient: PatientCandidate) -> bool:
        """Is it this patient's number, by this patient's issuer?"""
        same = theirs.value != "" and theirs.value == clean(patient.mrn)
        return same and self._issuers_agree(theirs, patient.mrn_issuer)

    def _issuers_agree(self, theirs: Identifier, ours: str) -> bool:
        """Absent is the site's own authority; where that isn't named, anybody's."""
        issuer = theirs.issuer or theirs.universal or self.authority
        return not issuer or issuer == (clean(ours) or self.authority)

    def _identifier(self, patient: PatientCandidate) -> Iterator[Seen]:
        theirs, mrn = self.patient, clean(patient.mrn)
        if self.is_number_of(theirs, patient):
            others = (each for each in self.holders[mrn] if each.id != patient.id)
            ambiguous = any(self.is_number_of(theirs, each) for each in others)
            yield Seen(
                Code.PATIENT_ID_AMBIGUOUS if ambiguous else Code.PATIENT_ID_AGREES, theirs.value
            )
        elif self._is_former(theirs, patient):
            yield Seen(Code.PATIENT_ID_FORMER, theirs.value, mrn)
        elif any(self.is_number_of(each, patient) for each in self.other_ids):
            yield Seen(Code.PATIENT_ID_OTHER, theirs.value, mrn)
        elif not theirs.value:
            return
        elif theirs.value == mrn:
            issuer = theirs.issuer or theirs.universal or self.authority
            yield Seen(
                Code.PATIENT_ID_ISSUER_DIFFERS, issuer, clean(patient.mrn_issuer) or self.authority
            )
        elif another_notation(theirs.value, mrn) or slip(theirs.value, mrn):
            yield Seen(Code.PATIENT_ID_NEAR, theirs.value, mrn)
        else:
            yield Seen(Code.PATIENT_ID_DIFFERS, theirs.value, mrn)

    def _is_former(self, theirs: Identifier, patient: PatientCandidate) -> bool:
        """A number that was merged into the patient's, and not given to somebody else since."""
        if not theirs.value or theirs.value in self.holders:
            return False
        return any(
            theirs.value == clean(each.value)
            and self._issuers_agree(theirs, each.issuer or each.universal)
            for each in patient.former
        )

    def _name(self, patient: PatientCandidate) -> Iterator[Seen]:
        ours = read(patient.name)
        others: list[tuple[Reading, ...]] = [read(each) for each in patient.other_names]
        found = compare_all(self.name, self.other_names, ours, others)
        if found is not Names.UNKNOWN:
            yield Seen(_BY_NAME[found], self.study.patient_name, patient.name)

    def _birth_date(self, patient: PatientCandidate) -> Iterator[Seen]:
        theirs, ours = self.birth_date, real_birth_date(patient.birth_date)
        if theirs is None or ours is None:
            return
        code = Code.BIRTH_DATE_DIFFERS
        if theirs == ours:
            code = Code.BIRTH_DATE_AGREES
        elif date_slip(theirs, ours):
            code = Code.BIRTH_DATE_NEAR
        yield Seen(code, theirs.isoformat(), ours.isoformat())

    def _sex(self, patient: PatientCandidate) -> Iterator[Seen]:
        ours = clean(patient.sex).upper()
        if {self.sex, ours} <= {"M", "F"}:
            yield Seen(Code.SEX_AGREES if self.sex == ours else Code.SEX_DIFFERS, self.sex, ours)

    # --------------------------------------------------------------------------- orders

    def of_order(self, order: OrderCandidate) -> tuple[Seen, ...]:
        """What the study says of what it answers, beside this order."""
        return (
            *self._study(order),
            *self._accession(order),
            *self._modality(order),
            *self._body_part(order),
            *self._date(order),
            *self._place(order),
        )

    def _study(self, order: OrderCandidate) -> Iterator[Seen]:
        planned = clean(order.planned_study_instance_uid)
        linked = self.uid != "" and self.uid in order.linked
        if linked:
            yield Seen(Code.STUDY_LINKED)
        elif planned and planned == self.uid:
            yield Seen(Code.STUDY_PLANNED)
        elif planned and planned in self.referenced:
            yield Seen(Code.STUDY_REFERENCED)
        if order.status == "cancelled":
            yield Seen(Code.ORDER_CANCELLED)
        elif not linked and (order.linked or order.status not in OPEN):
            yield Seen(Code.ORDER_FULFILLED)

    def _accession(self, order: OrderCandidate) -> Iterator[Seen]:
        ours = clean(order.accession_number)
        if not ours or not self.accessions:
            return
        numbers = {each.value for each in self.accessions}
        if len(numbers) > 1:
            yield Seen(Code.SEVERAL_ACCESSIONS, ", ".join(sorted(numbers)))
        issuer = clean(order.accession_issuer)
        same = [each for each in self.accessions if each.value == ours]
        for each in same:
            theirs = each.issuer or each.universal
            if theirs and issuer and issuer not in (each.issuer, each.universal):
                yield Seen(Code.ACCESSION_ISSUER_DIFFERS, theirs, issuer)
                return
        if same:
            said = any(each.issuer or each.universal for each in same)
            unknown = said and not issuer
            yield Seen(Code.ACCESSION_ISSUER_UNKNOWN if unknown else Code.ACCESSION_AGREES, ours)
            return
        for number in sorted(numbers):
            if another_notation(number, ours):
                yield Seen(Code.ACCESSION_VARIANT, number, ours)
                return
        near = [number for number in sorted(numbers) if slip(number, ours)]
        code = Code.ACCESSION_NEAR if near else Code.ACCESSION_DIFFERS
        yield Seen(code, near[0] if near else min(numbers), ours)

    def _modality(self, order: OrderCandidate) -> Iterator[Seen]:
        ours = clean(order.modality).upper()
        if not ours or not self.modalities or ours in kinds.NO_IMAGES:
            return
        theirs = ", ".join(sorted(self.modalities))
        if ours in self.modalities:
            yield Seen(Code.MODALITY_AGREES, theirs, ours)
        elif any(kinds.equivalent(each, ours) for each in self.modalities):
            yield Seen(Code.MODALITY_EQUIVALENT, theirs, ours)
        elif kinds.known(ours):
            yield Seen(Code.MODALITY_DIFFERS, theirs, ours)

    def _body_part(self, order: OrderCandidate) -> Iterator[Seen]:
        ours = kinds.regions([order.description])
        if not ours or not self.regions:
            return
        theirs = ", ".join(self.study.body_parts[:MOST_VALUES])
        if ours & self.regions:
            yield Seen(Code.BODY_PART_AGREES, theirs, order.description)
        elif kinds.apart(ours, self.regions):
            yield Seen(Code.BODY_PART_DIFFERS, theirs, order.description)

    def _date(self, order: OrderCandidate) -> Iterator[Seen]:
        known = [each.date() for each in (order.ordered_at, order.scheduled_at) if each]
        if not known or self.date is None:
            return
        day = order.scheduled_at.date() if order.scheduled_at else known[0]
        yield Seen(_by_date(self.date, day, known), self.date.isoformat(), day.isoformat())

    def _place(self, order: OrderCandidate) -> Iterator[Seen]:
        station = clean(order.station_ae_title)
        if station and self.stations:
            agrees = station in self.stations
            code = Code.STATION_AGREES if agrees else Code.STATION_DIFFERS
            yield Seen(code, self.shown_stations, station)
        if self.institution:
            site = words(order.site[:256])
            if site and self.institution.issuperset(site):
                yield Seen(Code.SITE_AGREES, self.study.institution, order.site)


def _clean(identifier: Identifier) -> Identifier:
    return Identifier(
        clean(identifier.value), clean(identifier.issuer), clean(identifier.universal)
    )


def _by_date(made: date, day: date, known: list[date]) -> Code:
    if (min(known) - made).days > EARLIEST_DAYS or (made - max(known)).days > LATEST_DAYS:
        return Code.DATE_IMPLAUSIBLE
    apart = abs((made - day).days)
    if apart == 0:
        return Code.DATE_SAME_DAY
    return Code.DATE_NEAR if apart <= NEAR_DAYS else Code.DATE_FAR
