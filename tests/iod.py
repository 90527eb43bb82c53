"""Files that have what their IOD requires, and programs that stand in for dciodvfy."""

from pathlib import Path
from typing import Any

from pydicom.uid import UID

from tests.images import ct_image

WHOLE: dict[str, Any] = {
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "ImagePositionPatient": [0, 0, 0],
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "FrameOfReferenceUID": UID("2.25.7"),
    "PixelSpacing": [1, 1],
    "RescaleIntercept": 0,
    "RescaleSlope": 1,
    "Manufacturer": "",
    "ReferringPhysicianName": "",
    "SliceThickness": 1,
    "KVP": 120,
    "StudyID": "1",
    "AcquisitionNumber": 1,
    "PositionReferenceIndicator": "",
    "PatientPosition": "HFS",
}
"""What a test's CT slice lacks of the CT Image IOD (PS3.3 A.3)."""

# To the proof, a dataset of one element, as the real one does; to files, what a test says.
_PROVEN = """#!/bin/sh
if [ "$(wc -c </proc/self/fd/0)" -lt 100 ]; then
    echo CTImage >&2
    echo 'Error - </PatientID(0010,0020)> - Missing attribute for Type 2 Required' \
        '- Module=<Patient>' >&2
    exit 1
fi
"""


def whole_ct(**values: Any) -> bytes:
    """A CT slice that lacks nothing; `values` as `ct_image` takes them."""
    kept = {keyword: value for keyword, value in WHOLE.items() if keyword not in values}
    asked = {k: value for k, value in values.items() if value is not None or k not in WHOLE}
    return ct_image(**kept, **asked)


def stand_in(folder: Path, script: str) -> str:
    """The path of a program that answers the proof, and then does as `script` says."""
    path = folder / "dciodvfy"
    path.write_text(_PROVEN + script + "\n")
    path.chmod(0o755)
    return str(path)
