"""The DICOMweb of API clients, driven by software that is not ours: dicomweb-client.

Each call is made against bare Orthanc and through Lightbox, with the same files behind both, and
what it brings is compared with the files. `BARE_FAILS` is what bare Orthanc (Debian 12's 1.10.1
with its DICOMweb plugin 1.7) does not answer: everything else has to work through Lightbox, and
most of that, too.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import anyio
import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from dicomweb_client.session_utils import create_session
from pydicom import Dataset

from tests.lightbox import Lightbox
from tests.live.conftest import Archive, Edged, Full, edged, stored_frame, unique
from tests.modalities import (
    cine_pictures,
    ct_slices,
    encapsulated_pdf,
    of_order,
    shipped,
    tiny_pdf,
    to_bytes,
    ultrasound_cine,
    video,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n"
EXPLICIT = "1.2.840.10008.1.2.1"
VIDEO = bytes(range(256)) * 40
COMPRESSED: Mapping[str, tuple[str, str]] = {
    # name in `Files.kept`: the sample, and what PS3.18 table 8.7.3-2 calls its frames
    "rle": ("MR_small_RLE.dcm", "image/dicom-rle"),
    "jpeg baseline": ("examples_ybr_color.dcm", "image/jpeg"),
    "jpeg extended": ("JPGExtended.dcm", "image/jpeg"),
    "jpeg lossless": ("SC_rgb_jpeg_gdcm.dcm", "image/jpeg"),
    "jpeg-ls": ("MR_small_jpeg_ls_lossless.dcm", "image/jls"),
    "jpeg 2000": ("MR_small_jp2klossless.dcm", "image/jp2"),
    "jpeg 2000 lossy": ("JPEG2000.dcm", "image/jp2"),
}
# What a media type means where no transfer syntax is named (PS3.18 table 8.7.3-5).
DEFAULT_SYNTAXES = {
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90",
}
PLAIN: Mapping[str, str] = {
    "explicit": "MR_small.dcm",
    "implicit": "MR_small_implicit.dcm",
    "deflated": "image_dfl.dcm",
    "overlay": "examples_overlay.dcm",
}


@dataclass
class Kept:
    """A stored file."""

    content: bytes

    @cached_property
    def image(self) -> Dataset:
        return pydicom.dcmread(BytesIO(self.content))

    @property
    def uids(self) -> tuple[str, str, str]:
        image = self.image
        return image.StudyInstanceUID, image.SeriesInstanceUID, image.SOPInstanceUID

    @property
    def study(self) -> str:
        return self.uids[0]

    @property
    def series(self) -> tuple[str, str]:
        return self.uids[:2]

    def frame(self, number: int) -> bytes:
        return stored_frame(self.content, number)[0]


@dataclass
class Files:
    """The files of one patient, by what they are; each kind is a study."""

    mrn: str
    accession: str
    kept: dict[str, list[Kept]]

    def __getitem__(self, kind: str) -> Kept:
        return self.kept[kind][0]

    def __iter__(self) -> Iterator[Kept]:
        return (each for group in self.kept.values() for each in group)


def files_of(patient: Any, order: Any) -> Files:
    contents = {
        "ct": [to_bytes(image) for image in ct_slices(3, 64)],
        "cine": [ultrasound_cine(cine_pictures(6, 60, 80))],
        "pdf": [encapsulated_pdf(tiny_pdf("A letter"))],
        "ecg": [shipped("waveform_ecg.dcm")],
        "report": [shipped("reportsi.dcm")],
        "video": [video(VIDEO)],
        **{kind: [shipped(name)] for kind, name in PLAIN.items()},
        **{kind: [shipped(name)] for kind, (name, _) in COMPRESSED.items()},
    }
    kept = {
        kind: [Kept(content) for content in of_order(group, patient, order)]
        for kind, group in contents.items()
    }
    return Files(patient["mrn"], order["accession_number"], kept)


@dataclass
class Served:
    """A DICOMweb server and what it holds."""

    client: DICOMwebClient
    files: Files


def client_of(url: str, **headers: str) -> DICOMwebClient:
    """A client that ignores the proxies of this machine's user, and does not try again."""
    session = create_session()
    session.trust_env = False
    client = DICOMwebClient(url, session=session, headers=headers)
    client.set_http_retry_params(retry=False)
    return client


# ------------------------------------------------------------------------------- the calls


CALLS: dict[str, Callable[[Served], None]] = {}


def call(name: str) -> Callable[[Callable[[Served], None]], Callable[[Served], None]]:
    """Enter a call into the table. It raises where the answer isn't what the files say."""

    def enter(function: Callable[[Served], None]) -> Callable[[Served], None]:
        assert name not in CALLS
        CALLS[name] = function
        return function

    return enter


def value(row: Mapping[str, Any], keyword: str) -> Any:
    """The first value of an attribute in DICOM JSON; None where there is none."""
    tag = f"{pydicom.datadict.tag_for_keyword(keyword):08X}"
    values = row.get(tag, {}).get("Value", [None])
    return values[0]


def found(rows: list[dict[str, Any]], keyword: str) -> list[str]:
    return sorted(str(value(row, keyword)) for row in rows)


# QIDO-RS

STUDY_FILTERS: Mapping[str, Callable[[Kept], str]] = {
    "PatientName": lambda kept: "Doe*",
    "StudyDate": lambda kept: f"{kept.image.StudyDate}-{kept.image.StudyDate}",
    "StudyTime": lambda kept: f"{kept.image.StudyTime}-{kept.image.StudyTime}",
    "AccessionNumber": lambda kept: str(kept.image.AccessionNumber),
    "ModalitiesInStudy": lambda kept: str(kept.image.Modality),
    "StudyInstanceUID": lambda kept: kept.study,
    "StudyID": lambda kept: str(kept.image.StudyID),
    "StudyDescription": lambda kept: str(kept.image.StudyDescription),
    "ReferringPhysicianName": lambda kept: str(kept.image.ReferringPhysicianName) or "*",
}


def study_filter(keyword: str, make: Callable[[Kept], str]) -> None:
    @call(f"search_for_studies, {keyword}")
    def search(served: Served) -> None:
        kept = served.files["ct"]
        wanted = {"PatientID": served.files.mrn, keyword: make(kept)}
        rows = served.client.search_for_studies(search_filters=wanted)
        assert kept.study in found(rows, "StudyInstanceUID")
        assert {value(row, "PatientID") for row in rows} == {served.files.mrn}
        none = {"PatientID": served.files.mrn, keyword: nothing_like(keyword)}
        assert served.client.search_for_studies(search_filters=none) == []


def nothing_like(keyword: str) -> str:
    """A valid value that no study has."""
    return {
        "StudyDate": "19000101-19000102",
        "StudyTime": "235958-235959",
        "StudyInstanceUID": "1.2.3.4.5.6.7.8.9",
    }.get(keyword, "NOTHING")


for each_keyword, each_make in STUDY_FILTERS.items():
    study_filter(each_keyword, each_make)


@call("search_for_studies, PatientID")
def search_by_patient(served: Served) -> None:
    rows = served.client.search_for_studies(search_filters={"PatientID": served.files.mrn})
    studies = sorted({kept.study for kept in served.files})
    assert found(rows, "StudyInstanceUID") == studies
    (row,) = (row for row in rows if value(row, "StudyInstanceUID") == served.files["ct"].study)
    assert value(row, "NumberOfStudyRelatedInstances") == 3
    assert value(row, "NumberOfStudyRelatedSeries") == 1
    assert value(row, "ModalitiesInStudy") == "CT"
    assert value(row, "PatientName") == {"Alphabetic": "Doe^Jane"}


@call("search_for_studies, a tag in place of a keyword")
def search_by_tag(served: Served) -> None:
    rows = served.client.search_for_studies(
        search_filters={"00100020": served.files.mrn, "0020000D": served.files["pdf"].study}
    )
    assert found(rows, "StudyInstanceUID") == [served.files["pdf"].study]


@call("search_for_studies, pages")
def search_pages(served: Served) -> None:
    wanted = {"PatientID": served.files.mrn}
    studies = sorted({kept.study for kept in served.files})
    page = served.client.search_for_studies(search_filters=wanted, limit=4, offset=2)
    assert len(page) == 4
    beyond = served.client.search_for_studies(search_filters=wanted, offset=len(studies))
    assert beyond == []
    rows = served.client.search_for_studies(search_filters=wanted, limit=4, get_remaining=True)
    assert found(rows, "StudyInstanceUID") == studies


@call("search_for_studies, fields and no fuzzy matching")
def search_fields(served: Served) -> None:
    (row,) = served.client.search_for_studies(
        search_filters={"StudyInstanceUID": served.files["ct"].study},
        fields=["StudyDescription", "00080061", "PatientBirthDate"],
        fuzzymatching=False,
    )
    assert value(row, "StudyDescription") == served.files["ct"].image.StudyDescription
    assert value(row, "PatientBirthDate") == "19800101"


@call("search_for_series of a study")
def search_series(served: Served) -> None:
    kept = served.files["ct"]
    (row,) = served.client.search_for_series(kept.study)
    assert (value(row, "StudyInstanceUID"), value(row, "SeriesInstanceUID")) == kept.series
    assert value(row, "NumberOfSeriesRelatedInstances") == 3
    assert value(row, "Modality") == "CT"
    for wanted in (
        {"SeriesInstanceUID": kept.series[1]},
        {"Modality": "CT"},
        {"SeriesNumber": "1"},
    ):
        (same,) = served.client.search_for_series(kept.study, search_filters=wanted)
        assert value(same, "SeriesInstanceUID") == kept.series[1]
    assert served.client.search_for_series(kept.study, search_filters={"Modality": "MR"}) == []


@call("search_for_series of all studies")
def search_all_series(served: Served) -> None:
    kept = served.files["ct"]
    wanted = {"SeriesInstanceUID": kept.series[1]}
    (row,) = served.client.search_for_series(search_filters=wanted)
    assert value(row, "SeriesInstanceUID") == kept.series[1]


@call("search_for_instances of a study")
def search_instances_of_study(served: Served) -> None:
    kept = served.files.kept["ct"]
    rows = served.client.search_for_instances(kept[0].study)
    assert found(rows, "SOPInstanceUID") == sorted(each.uids[2] for each in kept)
    assert {value(row, "SOPClassUID") for row in rows} == {kept[0].image.SOPClassUID}


@call("search_for_instances of a series")
def search_instances_of_series(served: Served) -> None:
    kept = served.files.kept["ct"]
    rows = served.client.search_for_instances(*kept[0].series)
    assert found(rows, "SOPInstanceUID") == sorted(each.uids[2] for each in kept)
    for wanted in ({"SOPInstanceUID": kept[1].uids[2]}, {"InstanceNumber": "2"}):
        (row,) = served.client.search_for_instances(*kept[0].series, search_filters=wanted)
        assert value(row, "SOPInstanceUID") == kept[1].uids[2]
    page = served.client.search_for_instances(*kept[0].series, limit=2, offset=1)
    assert len(page) == 2


@call("search_for_instances, what describes the pixels")
def search_instance_fields(served: Served) -> None:
    kept = served.files["cine"]
    (row,) = served.client.search_for_instances(
        *kept.series, fields=["Rows", "Columns", "BitsAllocated", "NumberOfFrames"]
    )
    wanted = (kept.image.Rows, kept.image.Columns, 8, 6)
    keywords = ("Rows", "Columns", "BitsAllocated", "NumberOfFrames")
    assert tuple(int(value(row, keyword)) for keyword in keywords) == wanted


@call("search_for_instances of all studies")
def search_all_instances(served: Served) -> None:
    kept = served.files["ct"]
    wanted = {"SOPInstanceUID": kept.uids[2]}
    (row,) = served.client.search_for_instances(search_filters=wanted)
    assert value(row, "SOPInstanceUID") == kept.uids[2]


# WADO-RS, files


def same(got: list[Dataset], wanted: list[Kept]) -> None:
    """The same datasets in the same transfer syntax, in whatever order."""
    by_uid = {each.SOPInstanceUID: each for each in got}
    assert sorted(by_uid) == sorted(each.uids[2] for each in wanted)
    assert len(by_uid) == len(got)
    for each in wanted:
        image = by_uid[each.uids[2]]
        assert image == each.image
        syntax = each.image.file_meta.TransferSyntaxUID
        assert image.file_meta.TransferSyntaxUID == syntax


@call("retrieve_study")
def retrieve_study(served: Served) -> None:
    kept = served.files.kept["ct"]
    same(served.client.retrieve_study(kept[0].study), kept)


@call("iter_study")
def iter_study(served: Served) -> None:
    kept = served.files.kept["ct"]
    same(list(served.client.iter_study(kept[0].study)), kept)


@call("retrieve_study, compressed, any transfer syntax")
def retrieve_compressed(served: Served) -> None:
    for kind in COMPRESSED:
        kept = served.files.kept[kind]
        anything = (("application/dicom", "*"),)
        same(served.client.retrieve_study(kept[0].study, media_types=anything), kept)


@call("retrieve_study, compressed, its own transfer syntax")
def retrieve_in_its_own(served: Served) -> None:
    kept = served.files.kept["jpeg 2000"]
    own = (("application/dicom", "1.2.840.10008.1.2.4.90"),)
    same(served.client.retrieve_study(kept[0].study, media_types=own), kept)


@call("retrieve_series")
def retrieve_series(served: Served) -> None:
    kept = served.files.kept["ct"]
    same(served.client.retrieve_series(*kept[0].series), kept)


@call("iter_series")
def iter_series(served: Served) -> None:
    kept = served.files.kept["ct"]
    same(list(served.client.iter_series(*kept[0].series)), kept)


@call("retrieve_instance")
def retrieve_instance(served: Served) -> None:
    for kept in served.files:
        same([served.client.retrieve_instance(*kept.uids)], [kept])


@call("retrieve_instance, Explicit VR Little Endian")
def retrieve_explicit(served: Served) -> None:
    kept = served.files["ct"]
    explicit = (("application/dicom", EXPLICIT),)
    same([served.client.retrieve_instance(*kept.uids, media_types=explicit)], [kept])


# WADO-RS, metadata


def described(rows: list[dict[str, Any]], wanted: list[Kept]) -> None:
    """Each row says of its instance what the file says."""
    by_uid = {value(row, "SOPInstanceUID"): row for row in rows}
    assert sorted(by_uid) == sorted(each.uids[2] for each in wanted)
    for each in wanted:
        read = Dataset.from_json(by_uid[each.uids[2]], lambda *_: b"")
        for element in each.image:
            if element.VR in ("CS", "UI", "LO", "SH", "DA", "TM", "PN", "IS", "DS", "US", "FD"):
                assert element.tag in read, element
                if not element.is_empty:
                    assert read[element.tag].value == element.value, element


@call("retrieve_study_metadata")
def study_metadata(served: Served) -> None:
    kept = served.files.kept["ct"]
    described(served.client.retrieve_study_metadata(kept[0].study), kept)


@call("retrieve_series_metadata")
def series_metadata(served: Served) -> None:
    kept = served.files.kept["ct"]
    described(served.client.retrieve_series_metadata(*kept[0].series), kept)


@call("retrieve_instance_metadata")
def instance_metadata(served: Served) -> None:
    for kind in ("ct", "pdf", "cine", "rle"):
        kept = served.files[kind]
        row: Any = served.client.retrieve_instance_metadata(*kept.uids)
        described([row], [kept])


# WADO-RS, frames


@call("retrieve_instance_frames, one")
def one_frame(served: Served) -> None:
    for kind in ("ct", "cine", *PLAIN):
        kept = served.files[kind]
        assert served.client.retrieve_instance_frames(*kept.uids, [1]) == [kept.frame(1)]


@call("retrieve_instance_frames, several")
def several_frames(served: Served) -> None:
    kept = served.files["cine"]
    numbers = [2, 1, 6]
    wanted = [kept.frame(number) for number in numbers]
    assert served.client.retrieve_instance_frames(*kept.uids, numbers) == wanted
    pixels = np.frombuffer(wanted[0], dtype=np.uint8).reshape(60, 80, 3)
    assert np.array_equal(pixels, cine_pictures(6, 60, 80)[1])


@call("iter_instance_frames")
def iter_frames(served: Served) -> None:
    kept = served.files["cine"]
    got = list(served.client.iter_instance_frames(*kept.uids, [1, 2, 3, 4, 5, 6]))
    assert b"".join(got) == kept.image.PixelData


@call("retrieve_instance_frames, octets")
def frames_as_octets(served: Served) -> None:
    kept = served.files["cine"]
    for octets in (
        ("application/octet-stream",),
        (("application/octet-stream", EXPLICIT),),
    ):
        got = served.client.retrieve_instance_frames(*kept.uids, [1, 3], media_types=octets)
        assert got == [kept.frame(1), kept.frame(3)]


@call("retrieve_instance_frames, any transfer syntax")
def frames_in_any(served: Served) -> None:
    for kind in ("cine", *COMPRESSED):
        kept = served.files[kind]
        anything = (("*/*", "*"),)
        got = served.client.retrieve_instance_frames(*kept.uids, [1], media_types=anything)
        assert unpadded(got) == unpadded([kept.frame(1)]), kind


@call("retrieve_instance_frames, compressed, by default")
def compressed_by_default(served: Served) -> None:
    for kind in COMPRESSED:
        kept = served.files[kind]
        got = served.client.retrieve_instance_frames(*kept.uids, [1])
        assert unpadded(got) == unpadded([kept.frame(1)]), kind


def decompressed_form(kind: str) -> None:
    @call(f"retrieve_instance_frames, {kind} as octets")
    def decompressed(served: Served) -> None:
        """Octets without a transfer syntax are uncompressed (PS3.18 8.7.3.3.2)."""
        octets = ("application/octet-stream",)
        uids = served.files[kind].uids
        (got,) = served.client.retrieve_instance_frames(*uids, [1], media_types=octets)
        assert got == served.files["explicit"].frame(1)


for each_kind in ("rle", "jpeg-ls", "jpeg 2000"):
    decompressed_form(each_kind)


def compressed_forms(kind: str, media_type: str) -> None:
    """A frame as it lies in the file, asked for in the three ways of PS3.18 8.7.3.5."""

    def compare(served: Served, *media_types: tuple[str, str]) -> None:
        kept = served.files[kind]
        got = served.client.retrieve_instance_frames(*kept.uids, [1], media_types=media_types)
        assert unpadded(got) == unpadded([kept.frame(1)])

    @call(f"retrieve_instance_frames, {kind} as {media_type} in its own transfer syntax")
    def in_its_own(served: Served) -> None:
        own = str(served.files[kind].image.file_meta.TransferSyntaxUID)
        compare(served, (media_type, own))

    @call(f"retrieve_instance_frames, {kind} as {media_type} in any transfer syntax")
    def in_any(served: Served) -> None:
        compare(served, (media_type, "*"))

    @call(f"retrieve_instance_frames, {kind} as {media_type}")
    def by_type(served: Served) -> None:
        kept = served.files[kind]
        (got,) = served.client.retrieve_instance_frames(*kept.uids, [1], media_types=(media_type,))
        if kept.image.file_meta.TransferSyntaxUID in DEFAULT_SYNTAXES:
            assert unpadded([got]) == unpadded([kept.frame(1)])
        else:
            assert got[:2] == kept.frame(1)[:2]  # JPEG or JPEG 2000, if not the same


for each_kind, (_, each_type) in COMPRESSED.items():
    compressed_forms(each_kind, each_type)


@call("retrieve_instance_frames, several media types to choose from")
def alternatives(served: Served) -> None:
    """The first that the server has."""
    for kind, (_, media_type) in COMPRESSED.items():
        kept = served.files[kind]
        own = str(kept.image.file_meta.TransferSyntaxUID)
        media_types = ((media_type, own), ("application/octet-stream", EXPLICIT))
        got = served.client.retrieve_instance_frames(*kept.uids, [1], media_types=media_types)
        assert unpadded(got) == unpadded([kept.frame(1)]), kind


@call("retrieve_instance_frames, several compressed")
def several_compressed(served: Served) -> None:
    kept = served.files["jpeg baseline"]
    got = served.client.retrieve_instance_frames(
        *kept.uids, [30, 1], media_types=(("image/jpeg", "1.2.840.10008.1.2.4.50"),)
    )
    assert unpadded(got) == unpadded([kept.frame(30), kept.frame(1)])


def unpadded(frames: list[bytes]) -> list[bytes]:
    """Fragments have an even length (PS3.5 A.4); whether the byte is sent is the server's."""
    return [frame.rstrip(b"\0") for frame in frames]


# WADO-RS, renderings


@call("retrieve_instance_rendered")
def rendered(served: Served) -> None:
    for kind in ("ct", "cine", "rle", "jpeg baseline", "jpeg-ls"):
        got = served.client.retrieve_instance_rendered(*served.files[kind].uids)
        assert got.startswith(JPEG), kind


@call("retrieve_instance_rendered of JPEG 2000")
def rendered_jpeg_2000(served: Served) -> None:
    got = served.client.retrieve_instance_rendered(*served.files["jpeg 2000"].uids)
    assert got.startswith(JPEG)


@call("retrieve_instance_rendered, JPEG and PNG")
def rendered_types(served: Served) -> None:
    uids = served.files["ct"].uids
    got = served.client.retrieve_instance_rendered(*uids, media_types=("image/jpeg",))
    assert got.startswith(JPEG)
    got = served.client.retrieve_instance_rendered(*uids, media_types=("image/png",))
    assert got.startswith(PNG)
    assert png_size(got) == (64, 64)


def drawn(served: Served, media_type: str, **params: Any) -> bytes:
    return served.client.retrieve_instance_rendered(
        *served.files["ct"].uids, media_types=(media_type,), params=params
    )


@call("retrieve_instance_rendered, viewport")
def rendered_viewport(served: Served) -> None:
    assert png_size(drawn(served, "image/png", viewport="32,32")) == (32, 32)
    assert png_size(drawn(served, "image/png", viewport="20,32")) == (20, 20)


@call("retrieve_instance_rendered, window")
def rendered_window(served: Served) -> None:
    wide = drawn(served, "image/png", window="40,4000,linear")
    assert wide != drawn(served, "image/png", window="40,50,linear")


@call("retrieve_instance_rendered, quality")
def rendered_quality(served: Served) -> None:
    coarse = drawn(served, "image/jpeg", quality=10)
    assert len(coarse) < len(drawn(served, "image/jpeg", quality=95))


@call("retrieve_instance_rendered of a PDF")
def rendered_pdf(served: Served) -> None:
    uids = served.files["pdf"].uids
    got = served.client.retrieve_instance_rendered(*uids, media_types=("application/pdf",))
    assert got.rstrip(b"\0") == tiny_pdf("A letter").rstrip(b"\0")


@call("retrieve_instance_rendered of a video")
def rendered_video(served: Served) -> None:
    uids = served.files["video"].uids
    got = served.client.retrieve_instance_rendered(*uids, media_types=("video/mp4",))
    assert got == VIDEO


@call("retrieve_instance_frames_rendered")
def frames_rendered(served: Served) -> None:
    uids = served.files["cine"].uids
    pictures = [
        served.client.retrieve_instance_frames_rendered(*uids, [number], media_types=(media_type,))
        for number in (1, 2)
        for media_type in ("image/jpeg", "image/png")
    ]
    assert [each[:3] for each in pictures] == [JPEG, PNG[:3], JPEG, PNG[:3]]
    assert len(set(pictures)) == 4
    assert served.client.retrieve_instance_frames_rendered(*uids, [6]).startswith(JPEG)


@call("retrieve_series_rendered")
def series_rendered(served: Served) -> None:
    got = served.client.retrieve_series_rendered(*served.files["cine"].series)
    assert got.startswith(JPEG)


def png_size(content: bytes) -> tuple[int, int]:
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


# WADO-RS, bulk data


def addresses(row: Mapping[str, Any], image: Dataset) -> Iterator[tuple[str, str, bytes]]:
    """Every BulkDataURI in the row, however deep: its tag, and the bytes in the file."""
    for tag, element in row.items():
        if "BulkDataURI" in element:
            yield tag, element["BulkDataURI"], image[int(tag, 16)].value
        if element.get("vr") == "SQ":
            for item, inner in zip(
                element.get("Value", []), image[int(tag, 16)].value, strict=True
            ):
                yield from addresses(item, inner)


def bulk_of(served: Served, kind: str) -> dict[str, tuple[str, bytes]]:
    kept = served.files[kind]
    row: Any = served.client.retrieve_instance_metadata(*kept.uids)
    return {tag: (url, content) for tag, url, content in addresses(row, kept.image)}


@call("retrieve_bulkdata of a PDF")
def bulk_pdf(served: Served) -> None:
    url, content = bulk_of(served, "pdf")["00420011"]
    assert served.client.retrieve_bulkdata(url) == [content]


@call("retrieve_bulkdata, octets")
def bulk_octets(served: Served) -> None:
    url, content = bulk_of(served, "pdf")["00420011"]
    octets = ("application/octet-stream",)
    assert served.client.retrieve_bulkdata(url, media_types=octets) == [content]


@call("iter_bulkdata")
def iter_bulk(served: Served) -> None:
    url, content = bulk_of(served, "pdf")["00420011"]
    assert list(served.client.iter_bulkdata(url)) == [content]


@call("retrieve_bulkdata of a waveform in a sequence")
def bulk_waveform(served: Served) -> None:
    kept = served.files["ecg"]
    row: Any = served.client.retrieve_instance_metadata(*kept.uids)
    waveforms = [
        (url, content) for tag, url, content in addresses(row, kept.image) if tag == "54001010"
    ]
    assert len(waveforms) == 2
    for url, content in waveforms:
        assert served.client.retrieve_bulkdata(url) == [content]


@call("retrieve_bulkdata of an overlay")
def bulk_overlay(served: Served) -> None:
    url, content = bulk_of(served, "overlay")["60003000"]
    assert served.client.retrieve_bulkdata(url) == [content]


@call("retrieve_bulkdata of uncompressed pixels")
def bulk_pixels(served: Served) -> None:
    url, content = bulk_of(served, "ct")["7FE00010"]
    assert served.client.retrieve_bulkdata(url) == [content]


@call("retrieve_bulkdata of uncompressed pixels, all frames")
def bulk_many_pixels(served: Served) -> None:
    """PS3.18 10.4.1.1.5: as one value, or a part for each frame."""
    url, content = bulk_of(served, "cine")["7FE00010"]
    assert b"".join(served.client.retrieve_bulkdata(url)) == content


# ------------------------------------------------------------------------ what bare Orthanc does


ESCAPES = "400 or nothing found: it does not decode what is escaped in a query"
ANYTHING = '400: it does not know `multipart/related; type="*/*"`, which the client sends'
ANY_SYNTAX = "400: of images it does not know `transfer-syntax=*`"
NO_PORT = "its addresses have no port, as the client's Host header has none"
NO_DECODER = "500 or 400: it can't decode JPEG 2000"
BARE_FAILS: Mapping[str, str] = {
    "search_for_studies, PatientName": ESCAPES,
    "search_for_studies, StudyDescription": ESCAPES,
    "search_for_studies, ReferringPhysicianName": ESCAPES,
    "retrieve_instance_frames, one": ANYTHING,
    "retrieve_instance_frames, several": ANYTHING,
    "iter_instance_frames": ANYTHING,
    "retrieve_instance_frames, any transfer syntax": ANYTHING,
    "retrieve_instance_frames, compressed, by default": ANYTHING,
    **{
        f"retrieve_instance_frames, {kind} as {media_type} in any transfer syntax": ANY_SYNTAX
        for kind, (_, media_type) in COMPRESSED.items()
    },
    "retrieve_instance_frames, several media types to choose from": "400: it takes one only",
    "retrieve_instance_frames, jpeg 2000 as octets": NO_DECODER,
    "retrieve_instance_frames, jpeg 2000 lossy as image/jp2": NO_DECODER,
    "retrieve_instance_rendered of JPEG 2000": NO_DECODER,
    "retrieve_instance_rendered, viewport": ESCAPES,
    "retrieve_instance_rendered, window": ESCAPES,
    "retrieve_instance_rendered of a PDF": "400",
    "retrieve_instance_rendered of a video": "400",
    "retrieve_bulkdata of a PDF": NO_PORT,
    "retrieve_bulkdata, octets": NO_PORT,
    "iter_bulkdata": NO_PORT,
    "retrieve_bulkdata of a waveform in a sequence": NO_PORT,
    "retrieve_bulkdata of an overlay": NO_PORT,
    "retrieve_bulkdata of uncompressed pixels": NO_PORT,
    "retrieve_bulkdata of uncompressed pixels, all frames": NO_PORT,
}

# Neither does Lightbox, whose pictures Orthanc draws.
NOT_DECODED = (
    "retrieve_instance_frames, jpeg 2000 as octets",
    "retrieve_instance_rendered of JPEG 2000",
)
NOT_OFFERED: Mapping[str, str] = {
    "search_for_series of all studies": "a search of series names its study",
    "search_for_instances of all studies": "a search of instances names its study",
}

# What a client raises where a server answers wrongly or not at all, and what we then find.
WRONG = (requests.RequestException, AssertionError, KeyError, IndexError, TypeError, ValueError)


@pytest.fixture(scope="module")
def bare(archive: Archive) -> Served:
    """Orthanc itself, with files of its own."""
    patient = {
        "mrn": unique(),
        "first_name": "Jane",
        "last_name": "Doe",
        "dob": "1980-01-01",
        "sex": "F",
    }
    files = files_of(patient, {"accession_number": unique("ACC")[:16]})
    for kept in files:
        archive.store(kept.content)
    server = archive.server
    client = client_of(f"{server.url}/dicom-web")
    client._session.auth = (server.username, server.password)
    return Served(client, files)


def refusal(ask: Callable[[], object]) -> requests.Response:
    """The answer of a server that refuses."""
    with pytest.raises(requests.HTTPError) as caught:
        ask()
    answer = caught.value.response
    assert answer is not None
    return answer


def test_bare_orthanc_is_as_the_table_says(bare: Served, archive: Archive) -> None:
    if archive.ask("GET", "/system").json()["Version"] != "1.10.1":
        pytest.skip("the table is that of Orthanc 1.10.1")
    failed = {}
    for name, make in CALLS.items():
        try:
            make(bare)
        except WRONG as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
    assert failed.keys() == BARE_FAILS.keys(), failed


# ----------------------------------------------------------------------------------- Lightbox


async def fill(full: Full) -> tuple[Files, Files, Mapping[str, str]]:
    """A patient of `clinician` with all the files, and one of somebody else's."""
    async with edged(full.settings) as lightbox:
        mine = await filed(lightbox, requested_by="clinician")
        theirs = await filed(lightbox, requested_by="somebody.else")
        tokens = {role: lightbox.token(role) for role in ("clinician", "technologist", "service")}
    return mine, theirs, tokens


async def filed(lightbox: Edged, **order: Any) -> Files:
    patient = await lightbox.patient(unique())
    made = await lightbox.order(patient, **order)
    files = files_of(patient, made)
    for kept in files:
        answer = await lightbox.upload(kept.content, order_id=made["id"])
        assert answer.status_code == 200, answer.text
    return files


@dataclass
class Behind:
    """Lightbox with two patients in it."""

    full: Full
    mine: Files
    theirs: Files
    tokens: Mapping[str, str]

    def client(self, role: str) -> DICOMwebClient:
        url = f"{self.full.settings.api_base_url}/dicom-web"
        return client_of(url, Authorization=f"Bearer {self.tokens[role]}")

    @property
    def served(self) -> Served:
        return Served(self.client("clinician"), self.mine)


@pytest.fixture(scope="module")
def behind(full: Full) -> Behind:
    return Behind(full, *anyio.run(fill, full))


@pytest.mark.parametrize(
    "name", [name for name in CALLS if name not in (*NOT_OFFERED, *NOT_DECODED)]
)
def test_through_lightbox(behind: Behind, name: str) -> None:
    CALLS[name](behind.served)


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_not_offered(behind: Behind, name: str) -> None:
    assert refusal(lambda: CALLS[name](behind.served)).status_code == 404


@pytest.mark.parametrize("name", NOT_DECODED)
def test_not_decoded(behind: Behind, name: str) -> None:
    """In words, not as a broken picture."""
    answer = refusal(lambda: CALLS[name](behind.served))
    assert answer.status_code in (406, 415, 422, 503)
    assert answer.headers["content-type"] == "application/problem+json"


def test_addresses_of_bulk_data_are_on_the_api_origin(behind: Behind) -> None:
    root = f"{behind.full.settings.api_base_url}/dicom-web/"
    for kind in ("pdf", "ecg", "overlay", "ct", "cine"):
        bulk = bulk_of(behind.served, kind)
        assert bulk
        assert [url for url, _ in bulk.values() if not url.startswith(root)] == []


def test_a_search_without_a_filter_finds_the_callers_patients_only(behind: Behind) -> None:
    rows = behind.client("clinician").search_for_studies(get_remaining=True, limit=100)
    patients = {value(row, "PatientID") for row in rows}
    assert behind.mine.mrn in patients
    assert behind.theirs.mrn not in patients
    for wanted in (
        {"PatientID": behind.theirs.mrn},
        {"StudyInstanceUID": behind.theirs["ct"].study},
        {"AccessionNumber": behind.theirs.accession},
    ):
        assert behind.client("clinician").search_for_studies(search_filters=wanted) == []


REFUSED: Mapping[str, Callable[[DICOMwebClient, Kept], object]] = {
    "retrieve_study": lambda client, kept: client.retrieve_study(kept.study),
    "retrieve_series": lambda client, kept: client.retrieve_series(*kept.series),
    "retrieve_instance": lambda client, kept: client.retrieve_instance(*kept.uids),
    "study metadata": lambda client, kept: client.retrieve_study_metadata(kept.study),
    "series metadata": lambda client, kept: client.retrieve_series_metadata(*kept.series),
    "instance metadata": lambda client, kept: client.retrieve_instance_metadata(*kept.uids),
    "frames": lambda client, kept: client.retrieve_instance_frames(*kept.uids, [1]),
    "rendered": lambda client, kept: client.retrieve_instance_rendered(*kept.uids),
    "search series": lambda client, kept: client.search_for_series(kept.study),
    "search instances": lambda client, kept: client.search_for_instances(kept.study),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_patients_study_is_refused(behind: Behind, name: str) -> None:
    kept = behind.theirs["ct"]
    answer = refusal(lambda: REFUSED[name](behind.client("clinician"), kept))
    assert answer.status_code in (403, 404)
    assert behind.theirs.mrn not in answer.text


def test_another_patients_series_is_not_below_my_study(behind: Behind) -> None:
    mine, theirs = behind.mine["ct"], behind.theirs["ct"]
    client = behind.client("clinician")
    questions: list[Callable[[], object]] = [
        lambda: client.retrieve_series(mine.study, theirs.series[1]),
        lambda: client.retrieve_instance(mine.study, *theirs.uids[1:]),
        lambda: client.retrieve_instance(*mine.series, theirs.uids[2]),
        lambda: client.retrieve_instance_frames(*mine.series, theirs.uids[2], [1]),
        lambda: client.retrieve_series_metadata(mine.study, theirs.series[1]),
    ]
    for ask in questions:
        assert refusal(ask).status_code == 404


@pytest.mark.parametrize("role", ["clinician", "service"])
def test_nothing_is_deleted(behind: Behind, role: str) -> None:
    kept, client = behind.mine["ct"], behind.client(role)
    deletions: list[Callable[[], object]] = [
        lambda: client.delete_study(kept.study),
        lambda: client.delete_series(*kept.series),
        lambda: client.delete_instance(*kept.uids),
    ]
    for ask in deletions:
        assert refusal(ask).status_code in (404, 405)
    retrieve_study(behind.served)


def test_without_a_token_nothing_is_said(behind: Behind) -> None:
    client = client_of(f"{behind.full.settings.api_base_url}/dicom-web")
    assert refusal(client.search_for_studies).status_code == 401


def test_instances_are_stored_and_come_back(behind: Behind) -> None:
    """STOW-RS by who uploads; the clinician then reads what was sent."""

    async def patient_of_mine() -> tuple[Any, Any]:
        async with edged(behind.full.settings) as lightbox:
            return await ordered(lightbox)

    patient, order = anyio.run(patient_of_mine)
    contents = of_order([to_bytes(image) for image in ct_slices(2, 32)], patient, order)
    kept = [Kept(content) for content in contents]
    answer = behind.client("technologist").store_instances([each.image for each in kept])
    stored = [item.ReferencedSOPInstanceUID for item in answer.ReferencedSOPSequence]
    assert sorted(stored) == sorted(each.uids[2] for each in kept)
    assert "FailedSOPSequence" not in answer
    same(behind.client("clinician").retrieve_study(kept[0].study), kept)
    again = behind.client("technologist").store_instances(
        [kept[0].image], study_instance_uid=kept[0].study
    )
    assert len(again.ReferencedSOPSequence) == 1


async def ordered(lightbox: Lightbox) -> tuple[Any, Any]:
    patient = await lightbox.patient(unique())
    return patient, await lightbox.order(patient)


def test_instances_of_nobody_are_not_stored(behind: Behind) -> None:
    image = Kept(to_bytes(ct_slices(1, 32)[0])).image
    image.PatientID = unique("NOBODY")
    answer = refusal(lambda: behind.client("technologist").store_instances([image]))
    assert answer.status_code == 409
    failed = Dataset.from_json(answer.json()).FailedSOPSequence
    assert [item.ReferencedSOPInstanceUID for item in failed] == [image.SOPInstanceUID]


def test_a_clinician_stores_nothing(behind: Behind) -> None:
    image, client = behind.mine["ct"].image, behind.client("clinician")
    assert refusal(lambda: client.store_instances([image])).status_code == 403
