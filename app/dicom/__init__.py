"""DICOM files: a bounded look first (`scan`), then their header, their tags, a changed copy.

Synchronous, and with memory that does not grow with the file: call it from a thread.

    with scan(file, Limits(max_bytes=...)) as scanned:
        header = read_header(file, scanned)
"""

from .changes import changes_from_json
from .describe import Described, describe
from .header import Header, read_header
from .meta import Element
from .rewrite import rewrite
from .scan import Limits, Scan, scan
from .tag_values import read_tags
from .values import (
    PatientIdentifier,
    new_uid,
    orthanc_id,
    parse_code,
    parse_date,
    parse_short_text,
    parse_text,
    parse_uid,
    person_name,
    quoted,
)

__all__ = [
    "Described",
    "Element",
    "Header",
    "Limits",
    "PatientIdentifier",
    "Scan",
    "changes_from_json",
    "describe",
    "new_uid",
    "orthanc_id",
    "parse_code",
    "parse_date",
    "parse_short_text",
    "parse_text",
    "parse_uid",
    "person_name",
    "quoted",
    "read_header",
    "read_tags",
    "rewrite",
    "scan",
]
