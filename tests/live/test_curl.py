"""The DICOMweb of API clients, from the command line: what somebody types who has only curl."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.live.conftest import Full, edged, stored_frame, unique
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

VIDEO = bytes(range(256)) * 40
PDF = tiny_pdf("A letter, typed")
CINE = ultrasound_cine(cine_pictures(4, 30, 40))


@dataclass(frozen=True)
class Curled:
    """What curl wrote: the status, the headers in lower case, the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Terminal:
    """A shell with a token, and the addresses of what is stored: `{cine}` of an instance."""

    root: str
    token: str
    mrn: str
    instances: Mapping[str, str]
    contents: Mapping[str, bytes]
    folder: Path

    def curl(self, path: str, *options: str, token: str | None = None) -> Curled:
        """`curl OPTIONS -H "Authorization: Bearer TOKEN" ROOT/PATH`."""
        head, body = self.folder / "head", self.folder / "body"
        body.write_bytes(b"")
        bearer = self.token if token is None else token
        command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--dump-header", str(head)]
        command += [*options, "--output", str(body)]
        if bearer:
            command += ["--header", f"Authorization: Bearer {bearer}"]
        address = f"{self.root}{path.format(**self.instances, mrn=self.mrn)}"
        subprocess.run([*command, address], check=True, timeout=60, capture_output=True)
        status, *lines = (
            head.read_bytes().decode("latin-1").strip().split("\r\n\r\n")[-1].split("\r\n")
        )
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        content = b"" if "--head" in options else body.read_bytes()
        return Curled(int(status.split()[1]), headers, content)


async def fill(full: Full) -> tuple[str, str, dict[str, str], dict[str, bytes]]:
    async with edged(full.settings) as lightbox:
        mrn = unique()
        patient = await lightbox.patient(mrn)
        order = await lightbox.order(patient)
        kinds = {
            "ct": to_bytes(ct_slices(1, 64)[0]),
            "cine": CINE,
            "pdf": encapsulated_pdf(PDF),
            "video": video(VIDEO),
            "jpeg": shipped("examples_ybr_color.dcm"),
        }
        instances, contents = {}, {}
        for kind, content in kinds.items():
            (contents[kind],) = of_order([content], patient, order)
            answer = await lightbox.upload(contents[kind], order_id=order["id"])
            assert answer.status_code == 200, answer.text
            stored = answer.json()
            instances[f"{kind}_study"] = f"/studies/{stored['study_instance_uid']}"
            instances[f"{kind}_series"] = (
                f"{instances[f'{kind}_study']}/series/{stored['series_instance_uid']}"
            )
            instances[kind] = (
                f"{instances[f'{kind}_series']}/instances/{stored['sop_instance_uid']}"
            )
        return lightbox.token("clinician"), mrn, instances, contents


@pytest.fixture(scope="module")
def terminal(full: Full, tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    token, mrn, instances, contents = anyio.run(fill, full)
    root = f"{full.settings.api_base_url}/dicom-web"
    return Terminal(root, token, mrn, instances, contents, tmp_path_factory.mktemp("curl"))


JSON = "application/dicom+json"
OCTETS = "application/octet-stream"
TYPES = [
    # path, Accept (empty: curl's own), the Content-Type that begins the answer
    ("/studies?PatientID={mrn}", "", JSON),
    ("/studies?PatientID={mrn}", "application/json", JSON),
    ("{ct_study}/series", "", JSON),
    ("{ct_study}/instances", JSON, JSON),
    ("{ct_series}/instances", "", JSON),
    ("{ct_study}/metadata", "", JSON),
    ("{ct_series}/metadata", JSON, JSON),
    ("{ct}/metadata", JSON, JSON),
    ("{cine}/frames/2", OCTETS, OCTETS),
    ("{cine}/frames/2", f"{OCTETS}; transfer-syntax=*", OCTETS),
    ("{cine}/frames/2", f'multipart/related; type="{OCTETS}"', "multipart/related"),
    ("{cine}/frames/2", f"multipart/related; type={OCTETS}; transfer-syntax=*", "multipart/"),
    ("{cine}/frames/1,2", f'multipart/related; type="{OCTETS}"', "multipart/related"),
    ("{jpeg}/frames/1", "image/jpeg", "image/jpeg"),
    ("{jpeg}/frames/1", 'multipart/related; type="image/jpeg"', "multipart/related"),
    ("{cine}/rendered", "", "image/jpeg"),
    ("{cine}/rendered", "image/png", "image/png"),
    ("{cine}/frames/3/rendered?viewport=20,20", "image/jpeg", "image/jpeg"),
    ("{video}/rendered", "video/mp4", "video/mp4"),
    ("{pdf}/rendered", "application/pdf", "application/pdf"),
    ("{ct_study}/thumbnail", "image/jpeg", "image/jpeg"),
    ("{ct_series}/thumbnail", "", "image/"),
    ("{ct}/thumbnail", "image/png", "image/png"),
    ("{cine}/frames/2/thumbnail", "", "image/"),
    ("{pdf}/bulk/00420011", "", "application/pdf"),
    ("{pdf}/bulk/00420011", OCTETS, OCTETS),
    ("{ct}", "application/dicom", "application/dicom"),
    ("{ct}", 'multipart/related; type="application/dicom"', "multipart/related"),
    ("{ct_study}", 'multipart/related; type="application/dicom"', "multipart/related"),
    ("{ct_series}", "", "multipart/related"),
]


@pytest.mark.parametrize(("path", "accept", "media_type"), TYPES)
def test_what_is_asked_for_comes(
    terminal: Terminal, path: str, accept: str, media_type: str
) -> None:
    options = ["--header", f"Accept: {accept}"] if accept else []
    got = terminal.curl(path, *options)
    assert got.status == 200, got.body
    assert got.headers["content-type"].startswith(media_type)
    assert got.body
    if media_type == JSON:
        assert got.json


@pytest.mark.parametrize(("path", "accept", "media_type"), TYPES)
def test_head_is_get_without_the_body(
    terminal: Terminal, path: str, accept: str, media_type: str
) -> None:
    """`curl -I` (RFC 9110 9.3.2): status, type and validator of the GET."""
    options = ["--header", f"Accept: {accept}"] if accept else []
    got = terminal.curl(path, "--head", *options)
    assert got.status == 200
    assert got.headers["content-type"].startswith(media_type)
    whole = terminal.curl(path, *options)
    assert got.headers.get("etag") == whole.headers.get("etag")
    if "content-length" in got.headers and "content-length" in whole.headers:
        assert got.headers["content-length"] == whole.headers["content-length"]


@pytest.mark.parametrize(
    "path",
    [
        "{ct_study}/metadata",
        "{ct_series}/metadata",
        "{ct}/metadata",
        "{cine}/frames/2",
        "{cine}/rendered",
        "{pdf}/bulk/00420011",
        "{video}/rendered",
        "{ct}",
        "{ct_study}",
    ],
)
def test_what_is_known_already_is_not_sent_again(terminal: Terminal, path: str) -> None:
    first = terminal.curl(path)
    assert first.status == 200
    again = terminal.curl(path, "--header", f"If-None-Match: {first.headers['etag']}")
    assert again.status == 304
    assert again.body == b""
    assert again.headers["etag"].removeprefix("W/") == first.headers["etag"].removeprefix("W/")
    other = terminal.curl(path, "--header", 'If-None-Match: "something else"')
    assert other.status == 200
    assert len(other.body) == len(first.body)


@pytest.mark.parametrize(
    ("path", "wanted"), [("{pdf}/bulk/00420011", PDF), ("{video}/rendered", VIDEO)]
)
def test_a_range_of_a_document_or_a_video(terminal: Terminal, path: str, wanted: bytes) -> None:
    """`curl -r 100-199`, and what a player asks for at the end."""
    part = terminal.curl(path, "--range", "100-199")
    assert part.status == 206, part.body
    assert part.body == wanted[100:200]
    _, _, total = part.headers["content-range"].partition("bytes 100-199/")
    whole = terminal.curl(path)
    assert int(total) == len(whole.body) == int(whole.headers["content-length"])
    assert whole.body[: len(wanted)] == wanted
    assert whole.headers["accept-ranges"] == "bytes"
    end = terminal.curl(path, "--range", "-50")
    assert (end.status, end.body) == (206, whole.body[-50:])
    beyond = terminal.curl(path, "--range", "99999999-")
    assert beyond.status == 416


def test_the_pixels_are_those_of_the_file(terminal: Terminal) -> None:
    for number in (1, 4):
        got = terminal.curl(f"{{cine}}/frames/{number}", "--header", f"Accept: {OCTETS}")
        assert got.body == stored_frame(terminal.contents["cine"], number)[0]
    got = terminal.curl("{ct}", "--header", "Accept: application/dicom")
    assert got.body == terminal.contents["ct"]


def test_metadata_is_compressed_for_who_asks(terminal: Terminal) -> None:
    plain = terminal.curl("{ct_series}/metadata")
    packed = terminal.curl("{ct_series}/metadata", "--compressed")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.json == plain.json


@pytest.mark.parametrize(
    ("path", "accept"),
    [
        ("{cine}/frames/1", "image/jpeg"),
        ("{cine}/frames/1", f"{OCTETS}; transfer-syntax=1.2.840.10008.1.2.4.90"),
        ("{ct}/metadata", "application/dicom+xml"),
        ("{ct}/rendered", "text/html"),
        ("{ct_study}", "application/zip"),
    ],
)
def test_what_is_not_there_in_that_form_is_406(terminal: Terminal, path: str, accept: str) -> None:
    got = terminal.curl(path, "--header", f"Accept: {accept}")
    assert got.status == 406
    assert got.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("{cine}/frames/5", (), 404),
        ("{cine}/frames/0", (), 404),
        ("{cine}/bulk/7FE00010/1", (), 404),
        ("{ct_study}/../studies", ("--path-as-is",), 404),
        ("/studies?patientid={mrn}", (), 422),
        ("{cine}/rendered?viewport=0,0", (), 422),
        ("{ct_study}", ("--request", "DELETE"), 405),
        ("{ct}/metadata", ("--request", "POST", "--data", ""), 405),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(
    terminal: Terminal, path: str, options: tuple[str, ...], status: int
) -> None:
    got = terminal.curl(path, *options)
    assert got.status == status, got.body
    assert got.headers["content-type"] == "application/problem+json"
    assert len(got.json["detail"]) > 15


def test_without_a_token_nothing_is_said(terminal: Terminal) -> None:
    for path in ("/studies", "{ct}/metadata", "{ct}/frames/1", "/studies/1.2.3/metadata"):
        got = terminal.curl(path, token="")
        assert got.status == 401
        assert got.headers["www-authenticate"].startswith("Bearer")
