"""What identifies a file: whose it is, which study, series and instance, and how to list it."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from pydicom.datadict import tag_for_keyword

from ..errors import MalformedDicom
from .charset import Charset
from .nested import Item, has_items, read_items, value_bytes
from .scan import Scan
from .tags import CHARACTER_SET
from .values import PatientIdentifier, parse_date, parse_short_text, parse_uid

_LONGEST_VALUE = 1024  # bytes; the longest legal value here is a PN of 3 x 64 characters
_LONGEST_CHARACTER = 8  # bytes, with an escape sequence
_LONGEST_ISSUER = 8192  # bytes of IssuerOfAccessionNumberSequence
_LOCAL_NAMESPACE = 0x00400031
_UNIVERSAL_ENTITY = 0x00400032
_MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,11}")


@dataclass(frozen=True)
class Header:
    """The identifying and describing attributes of one instance.

    Text is decoded, without padding; "" where the attribute is absent or empty. Of several
    values, a describing attribute keeps all, joined by a backslash. A describing attribute, which
    has no say in whose the file is, is made fit to be kept: control characters become U+FFFD, and
    of an absurdly long value the first 1024 bytes are kept. The file is left as it is.
    """

    transfer_syntax_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    patient: PatientIdentifier | None  # None: PatientID is absent or empty
    patient_name: str  # PN: Last^First^..., up to three groups joined by =
    patient_birth_date: str  # YYYYMMDD
    patient_sex: str
    accession_number: str
    accession_issuer: str  # local namespace, else universal id, of (0008,0051)
    study_date: str  # YYYYMMDD
    study_time: str
    study_description: str
    modality: str
    series_number: int | None  # None: absent, or no number
    series_description: str
    instance_number: int | None
    number_of_frames: int  # 1 if absent
    specific_character_set: str  # as written, values joined by a backslash
    meta_agrees: bool
    """The file meta information names the same SOP class and instance (PS3.10 7.1). De-identifiers
    leave it stale; the dataset alone counts, here as in Orthanc."""


def read_header(file: BinaryIO, scan: Scan) -> Header:
    """Read the header of a scanned file.

    Raises MalformedDicom for a DICOMDIR, and one that names every problem, and lists them in
    `extra["errors"]` as `{"keyword": ..., "problem": ...}`.
    """
    return _Reader(file, scan).read()


class _Reader:
    """Reads one header and gathers what is wrong with it."""

    def __init__(self, file: BinaryIO, scan: Scan) -> None:
        self.file = file
        self.scan = scan
        self.problems: list[dict[str, str]] = []
        element = scan.element(CHARACTER_SET)
        raw = self.raw("SpecificCharacterSet") if element else b""
        self.charset = Charset.of(raw)

    def read(self) -> Header:
        if self.scan.meta.sop_class_uid == _MEDIA_STORAGE_DIRECTORY:
            raise MalformedDicom(
                "This is a DICOMDIR, the table of contents of a medium (PS3.10 8): send the files "
                "that it lists."
            )
        uid = self.required_uid
        header = Header(
            transfer_syntax_uid=self.scan.transfer_syntax_uid,
            sop_class_uid=uid("SOPClassUID"),
            sop_instance_uid=uid("SOPInstanceUID"),
            series_instance_uid=uid("SeriesInstanceUID"),
            study_instance_uid=uid("StudyInstanceUID"),
            patient=self.patient(),
            patient_name=self.text("PatientName", "PN").rstrip("="),  # empty groups
            patient_birth_date=self.checked("PatientBirthDate", _date),
            patient_sex=self.text("PatientSex"),
            accession_number=self.checked("AccessionNumber", parse_short_text),
            accession_issuer=self.accession_issuer(),
            study_date=self.checked("StudyDate", _date),
            study_time=self.text("StudyTime"),
            study_description=self.text("StudyDescription"),
            modality=self.text("Modality"),
            series_number=self.number("SeriesNumber"),
            series_description=self.text("SeriesDescription"),
            instance_number=self.number("InstanceNumber"),
            number_of_frames=self.scan.frames,
            specific_character_set=shown("\\".join(self.charset.terms)),
            meta_agrees=self.meta_agrees(),
        )
        if self.problems:
            said = "; ".join(f"{p['keyword']} {p['problem']}" for p in self.problems)
            raise MalformedDicom(
                f"The DICOM file can't be accepted: {said}.", extra={"errors": self.problems}
            )
        return header

    def meta_agrees(self) -> bool:
        meta = self.scan.meta
        return (meta.sop_class_uid or self.exact("SOPClassUID")) == self.exact("SOPClassUID") and (
            meta.sop_instance_uid or self.exact("SOPInstanceUID")
        ) == self.exact("SOPInstanceUID")

    def problem(self, keyword: str, problem: str) -> None:
        self.problems.append({"keyword": keyword, "problem": problem})

    def raw(self, keyword: str) -> bytes:
        """The value without its padding; b"" if absent, or too long to be true."""
        element = self.scan.element(tag_for_keyword(keyword) or 0)
        if element is None:
            return b""
        length = element.end - element.value
        if length > _LONGEST_VALUE:
            self.problem(keyword, f"is {length} bytes long")
            return b""
        # Null is the padding of UIDs (PS3.5 9.1), and often found on text by mistake.
        return value_bytes(self.file, self.scan, element).rstrip(b"\0 ")

    def text(self, keyword: str, vr: str = "LO") -> str:
        """A value for people to read: bytes outside the character set, and control characters,
        become U+FFFD."""
        element = self.scan.element(tag_for_keyword(keyword) or 0)
        if element is None or element.end - element.value <= _LONGEST_VALUE:
            raw = self.raw(keyword)
        else:
            cut = element._replace(end=element.value + _LONGEST_VALUE)
            raw = self.whole_characters(value_bytes(self.file, self.scan, cut), vr).rstrip(b"\0 ")
        return shown(self.charset.decode_loosely(raw, vr).strip(" "))

    def whole_characters(self, raw: bytes, vr: str) -> bytes:
        """The value, cut anywhere, without the part of a character that it may end with."""
        for less in range(_LONGEST_CHARACTER):
            part = raw[: len(raw) - less]
            try:
                self.charset.decode(part, vr)
            except ValueError:
                continue
            return part
        return raw

    def exact(self, keyword: str) -> str:
        """A value that identifies: it must decode; "" with a problem noted if not."""
        try:
            return self.charset.decode(self.raw(keyword)).strip(" ")
        except ValueError:
            self.problem(keyword, "has bytes that are not in the file's SpecificCharacterSet")
            return ""

    def checked(self, keyword: str, check: Callable[[str], str]) -> str:
        text = self.exact(keyword)
        try:
            return check(text)
        except ValueError as error:
            self.problem(keyword, _clause(error))
            return ""

    def required_uid(self, keyword: str) -> str:
        """A UID of the dataset, which alone counts; see `Header.meta_agrees`."""
        before = len(self.problems)
        uid = self.exact(keyword)
        if not uid:
            if len(self.problems) == before:
                there = self.scan.element(tag_for_keyword(keyword) or 0)
                self.problem(keyword, "is empty" if there else "is missing")
            return ""
        try:
            parse_uid(uid)
        except ValueError as error:
            self.problem(keyword, _clause(error))
            return uid
        return uid

    def patient(self) -> PatientIdentifier | None:
        value = self.exact("PatientID")
        issuer = self.exact("IssuerOfPatientID")
        try:
            PatientIdentifier("-", issuer)
        except ValueError as error:
            self.problem("IssuerOfPatientID", _clause(error))
            issuer = ""
        if not value:
            return None
        try:
            return PatientIdentifier(value, issuer)
        except ValueError as error:
            self.problem("PatientID", _clause(error))
            return None

    def accession_issuer(self) -> str:
        """The assigner of the accession number (PS3.3 10.14 HL7v2 Hierarchic Designator)."""
        keyword = "IssuerOfAccessionNumberSequence"
        element = self.scan.element(tag_for_keyword(keyword) or 0)
        if element is None or not has_items(self.file, self.scan, element):
            return ""
        if element.end - element.value > _LONGEST_ISSUER:
            self.problem(keyword, f"is {element.end - element.value} bytes long")
            return ""
        items = read_items(self.file, self.scan, element)
        if len(items) > 1:
            self.problem(keyword, f"has {len(items)} items; one is allowed")
        if not items:
            return ""
        return self._of_item(items[0], _LOCAL_NAMESPACE) or self._of_item(
            items[0], _UNIVERSAL_ENTITY
        )

    def _of_item(self, item: Item, tag: int) -> str:
        raws = {number: raw for number, _, raw, _ in item if isinstance(raw, bytes)}
        own = raws.get(CHARACTER_SET)
        charset = self.charset if own is None else Charset.of(own)
        return shown(charset.decode_loosely(raws.get(tag, b"").rstrip(b"\0 ")).strip(" "))

    def number(self, keyword: str) -> int | None:
        text = self.text(keyword)
        number = int(text) if _WHOLE_NUMBER.fullmatch(text) else None
        return number if number is None or -(2**31) <= number < 2**31 else None  # PS3.5 6.2, IS


def shown(text: str) -> str:
    """Without control characters: no database holds U+0000, and no list should show the rest."""
    if text.isprintable():
        return text
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def _date(text: str) -> str:
    """A date as YYYYMMDD; "" for 00000000, which many systems write for an unknown date."""
    return "" if text == "00000000" else parse_date(text)


def _clause(error: ValueError) -> str:
    """A sentence of a check as a clause behind the keyword."""
    return f"is refused: {str(error).rstrip('.')}"
