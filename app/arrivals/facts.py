"""What the files of a study say of whose it is, as the matcher takes it.

Of the archive's index there is a first idea; certain is only what was read in files that were
bounded first. The files of one study have to agree.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from app.dicom import Header
from app.matching import ArrivedStudy, Identifier, Request
from app.orthanc import Held

MOST_VALUES = 64
_LONGEST = 256


class FilesDisagreeError(Exception):
    """Files of one study name different people; `keyword` says in what."""

    def __init__(self, keyword: str) -> None:
        super().__init__(f"The images of the study disagree in {keyword}.")
        self.keyword = keyword


def of_index(held: Held) -> ArrivedStudy:
    """As Orthanc's index has it: without issuers, requests and other identifiers."""
    tags = {key: value.strip("\0 ")[:_LONGEST] for key, value in held.tags.items()}
    return ArrivedStudy(
        study_instance_uid=tags.get("StudyInstanceUID", ""),
        patient=Identifier(tags.get("PatientID", "")),
        accession=Identifier(tags.get("AccessionNumber", "")),
        patient_name=tags.get("PatientName", ""),
        birth_date=tags.get("PatientBirthDate", ""),
        sex=tags.get("PatientSex", ""),
        study_date=tags.get("StudyDate", ""),
        institution=tags.get("InstitutionName", ""),
    )


def of_file(header: Header, tags: Mapping[str, object]) -> ArrivedStudy:
    """As one file says; `tags` are those of `app.dicom.read_tags`."""
    patient = header.patient
    qualifiers = _items(tags, "IssuerOfPatientIDQualifiersSequence")
    return ArrivedStudy(
        study_instance_uid=header.study_instance_uid,
        patient=Identifier(
            patient.value if patient else "",
            patient.issuer if patient else "",
            _first(_texts(each, "UniversalEntityID") for each in qualifiers),
        ),
        other_patient_ids=tuple(
            Identifier(
                _first([_texts(each, "PatientID")]), _first([_texts(each, "IssuerOfPatientID")])
            )
            for each in _items(tags, "OtherPatientIDsSequence")
        )[:MOST_VALUES]
        or tuple(Identifier(each) for each in _texts(tags, "OtherPatientIDs")),
        accession=_issued(header.accession_number, _items(tags, "IssuerOfAccessionNumberSequence")),
        requests=tuple(_request(each) for each in _items(tags, "RequestAttributesSequence"))[
            :MOST_VALUES
        ],
        patient_name=header.patient_name[:_LONGEST],
        other_patient_names=(
            *_texts(tags, "OtherPatientNames"),
            *_texts(tags, "PatientBirthName"),
        ),
        birth_date=header.patient_birth_date,
        sex=header.patient_sex,
        modalities=(header.modality,) if header.modality else (),
        study_date=header.study_date,
        body_parts=_texts(tags, "BodyPartExamined"),
        stations=(*_texts(tags, "StationName"), *_texts(tags, "PerformedStationAETitle")),
        institution=_first([_texts(tags, "InstitutionName")]),
    )


def merged(files: Sequence[ArrivedStudy]) -> ArrivedStudy:
    """One study of all its files; at least one. Raises FilesDisagreeError.

    A describing value that a file lacks is no contradiction; PatientID and its issuer must be the
    same in all. Further accession numbers become requests, so that the matcher sees them all.
    """
    whole = files[0]
    for file in files[1:]:
        for name, keyword in {
            "study_instance_uid": "StudyInstanceUID",
            "patient": "PatientID or its issuer",
        }.items():
            if getattr(file, name) != getattr(whole, name):
                raise FilesDisagreeError(keyword)
        for name, keyword in {
            "patient_name": "PatientName",
            "birth_date": "PatientBirthDate",
            "sex": "PatientSex",
        }.items():
            ours, theirs = getattr(whole, name), getattr(file, name)
            if ours and theirs and ours.rstrip("^ ") != theirs.rstrip("^ "):
                raise FilesDisagreeError(keyword)
            whole = replace(whole, **{name: ours or theirs})
    accessions = _once(each.accession for each in files if each.accession.value)
    requests = _once(
        [*(r for each in files for r in each.requests), *(Request(a) for a in accessions[1:])]
    )
    return replace(
        whole,
        accession=accessions[0] if accessions else Identifier(),
        requests=requests,
        other_patient_ids=_once(x for each in files for x in each.other_patient_ids),
        other_patient_names=_once(x for each in files for x in each.other_patient_names),
        modalities=_once(x for each in files for x in each.modalities),
        body_parts=_once(x for each in files for x in each.body_parts),
        stations=_once(x for each in files for x in each.stations),
    )


def as_json(study: ArrivedStudy, *, from_files: bool) -> str:
    """To be kept; `from_files` tells it from what only the index said."""
    kept = asdict(study)
    del kept["under_two_patients"], kept["owner"]
    return json.dumps({**kept, "from_files": from_files}, separators=(",", ":"))


def from_json(text: str) -> tuple[ArrivedStudy, bool]:
    """What was kept, and whether it is from files."""
    kept: dict[str, Any] = json.loads(text)
    from_files = bool(kept.pop("from_files", False))
    for name in ("patient", "accession"):
        kept[name] = Identifier(**kept.get(name, {}))
    kept["other_patient_ids"] = tuple(Identifier(**x) for x in kept.get("other_patient_ids", ()))
    kept["requests"] = tuple(
        Request(Identifier(**x["accession"]), x["study_instance_uid"])
        for x in kept.get("requests", ())
    )
    for name in ("other_patient_names", "modalities", "body_parts", "stations"):
        kept[name] = tuple(kept.get(name, ()))
    known = {each.name for each in fields(ArrivedStudy)}  # of this version
    kept = {name: value for name, value in kept.items() if name in known}
    return ArrivedStudy(**{"study_instance_uid": "", **kept}), from_files


def _once(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))[:MOST_VALUES]


def _request(item: Mapping[str, object]) -> Request:
    referenced = [
        _first([_texts(x, "ReferencedSOPInstanceUID")])
        for x in _items(item, "ReferencedStudySequence")
    ]
    accession = _first([_texts(item, "AccessionNumber")])
    return Request(
        _issued(accession, _items(item, "IssuerOfAccessionNumberSequence")),
        _first([_texts(item, "StudyInstanceUID"), tuple(referenced)]),
    )


def _issued(value: str, issuers: Sequence[Mapping[str, object]]) -> Identifier:
    return Identifier(
        value,
        _first(_texts(each, "LocalNamespaceEntityID") for each in issuers),
        _first(_texts(each, "UniversalEntityID") for each in issuers),
    )


def _items(tags: Mapping[str, object], keyword: str) -> list[Mapping[str, object]]:
    found = tags.get(keyword)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _texts(tags: Mapping[str, object], keyword: str) -> tuple[str, ...]:
    """The values of a text element, none of them empty."""
    found = tags.get(keyword)
    values = found if isinstance(found, list) else [found]
    return tuple(x[:_LONGEST] for x in values if isinstance(x, str) and x)[:MOST_VALUES]


def _first(values: Iterable[Sequence[str]]) -> str:
    return next((x for each in values for x in each if x), "")
