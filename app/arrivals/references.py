"""UIDs inside a file that refer to other images of its study: in a copy they refer to the copies.

A segmentation, a report, a presentation state names its images by UIDs in sequences (PS3.3 10.3,
10.8, C.8.20); a copy with new UIDs whose references stayed behind would show nothing.
"""

import uuid
from collections.abc import Mapping
from typing import BinaryIO, cast

from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.multival import MultiValue

from app.dicom import Scan

ORIGINAL_ATTRIBUTES = 0x04000561  # says what was: never changed
_NAMESPACE = uuid.UUID("8f0a3d1e-7c55-4c0e-9d7b-3a5a1f1e6b42")


def renumbered(patient_id: str, uid: str) -> str:
    """The UID that a copy for this patient has for it: always the same (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, f'{patient_id} {uid}').int}"


def following(file: BinaryIO, scan: Scan, uids: Mapping[str, str]) -> dict[int, bytes]:
    """The top-level elements that hold one of these UIDs (former: new), with the new ones in it;
    encoded as the file is. All other values keep their bytes. Blocking."""
    source, found = scan.source(file), {}
    for element in scan.elements:
        if element.tag == ORIGINAL_ATTRIBUTES or _vr(element.tag, element.vr) not in ("SQ", "UI"):
            continue
        source.seek(element.header)
        part = DicomBytesIO(source.read(element.end - element.header))
        dataset = read_dataset(cast(BinaryIO, part), scan.implicit, scan.little_endian)
        if _change(dataset, uids):
            out = DicomBytesIO()
            out.is_implicit_VR, out.is_little_endian = scan.implicit, scan.little_endian
            write_dataset(out, dataset)
            found[element.tag] = out.getvalue()
    return found


def _change(dataset: Dataset, uids: Mapping[str, str]) -> bool:
    """Was there one of them, at any depth? `scan` has bounded that."""
    changed = False
    for tag in list(dataset.keys()):
        element = dataset.get_item(tag)
        vr = _vr(int(tag), element.VR or "")
        if int(tag) == ORIGINAL_ATTRIBUTES:
            continue
        if vr == "SQ":
            read = dataset[tag]
            # A value of unknown VR that is no sequence, whatever the dictionary says, stays.
            for item in read.value or () if read.VR == "SQ" else ():
                changed |= _change(item, uids)
        elif vr == "UI":
            before = _uids_of(element)
            after = [uids.get(each, each) for each in before]
            if after != before:
                dataset[tag] = DataElement(tag, "UI", after if len(after) > 1 else after[0])
                changed = True
    return changed


def _uids_of(element: DataElement | RawDataElement) -> list[str]:
    value = element.value
    if isinstance(value, bytes):
        return [each.strip("\0 ") for each in value.decode("ascii", "replace").split("\\")]
    return [str(each) for each in value] if isinstance(value, MultiValue) else [str(value or "")]


def _vr(tag: int, vr: str) -> str:
    """As the file says, or, where it says nothing, the dictionary; empty: unknown."""
    if vr not in ("", "UN"):
        return vr
    try:
        return dictionary_VR(tag)
    except KeyError:
        return ""
