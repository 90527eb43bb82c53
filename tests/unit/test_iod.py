"""dciodvfy, as Lightbox asks it: what counts, what it is given, and what a broken one means."""

import asyncio
import io
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pydicom
import pytest
from anyio.abc import Process
from pydicom import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RTDoseStorage,
)

from app.dicom import Limits, scan
from app.errors import Nonconforming, NotValidated
from app.intake import iod
from app.intake.iod import Validator
from tests.iod import stand_in, whole_ct
from tests.lightbox import make_settings

LIMITS = Limits(max_bytes=64 * 1024 * 1024)


@pytest.fixture(autouse=True)
def anything_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """pydicom writes what isn't valid."""
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.IGNORE)
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.IGNORE)


def validator(folder: Path, mode: str = "warn", program: str = "") -> Validator:
    return Validator(
        make_settings(
            "sqlite+aiosqlite:///x",
            "http://orthanc.test",
            iod_validation=mode,
            dciodvfy=program,
            spool_dir=folder,
        )
    )


async def check(checking: Validator, content: bytes, **changes: Any) -> list[str]:
    file, written = io.BytesIO(content), Dataset()
    for keyword, value in changes.items():
        setattr(written, keyword, value)
    with scan(file, LIMITS) as scanned:
        return await checking.check(file, scanned, written)


async def lacking(folder: Path, content: bytes) -> list[str]:
    file = io.BytesIO(content)
    with scan(file, LIMITS) as scanned:
        found = await validator(folder).lacking(file, scanned)
    return [f"{each}: {each.problem}" for each in found]


def given(content: bytes) -> bytes:
    """What dciodvfy gets of a file."""
    file, target = io.BytesIO(content), io.BytesIO()
    with scan(file, LIMITS) as scanned:
        iod.excerpt(file, scanned, target)
    return target.getvalue()


def edited(content: bytes, edit: Callable[[Dataset], None], syntax: str = "") -> bytes:
    read, image, out = pydicom.dcmread(io.BytesIO(content)), Dataset(), io.BytesIO()
    image.update(read)
    image.file_meta = read.file_meta
    edit(image)
    image.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax or ExplicitVRLittleEndian)
    image.save_as(
        out,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax != ExplicitVRBigEndian,
        enforce_file_format=True,
    )
    return out.getvalue()


def dose(syntax: str) -> bytes:
    """An RT dose of 32 bits a sample, which dciodvfy ends itself at if it sees the pixels."""

    def edit(image: Dataset) -> None:
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = RTDoseStorage
        image.Modality = "RTDOSE"
        image.BitsAllocated = image.BitsStored = 32
        image.HighBit = 31
        image["PixelData"].VR = "OW"
        image.PixelData = bytes(16 * 16 * 4)
        del image.RescaleIntercept, image.RescaleSlope
        image.DoseUnits, image.DoseType, image.DoseSummationType = "GY", "PHYSICAL", "MULTI_PLAN"

    return edited(whole_ct(OperatorsName=""), edit, syntax)


# ------------------------------------------------------------------------------- what counts


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"KVP": None}, ["KVP: type 2, missing"]),
        ({"KVP": ""}, []),
        ({"PixelSpacing": None}, ["PixelSpacing: type 1, missing"]),
        ({"PixelSpacing": ""}, ["PixelSpacing: type 1, empty"]),
        ({"PatientPosition": None}, ["PatientPosition: type 2C, missing"]),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "BitsAllocated": 8,
          "BitsStored": 8, "HighBit": 7, "PixelData": bytes(768)},
         ["PlanarConfiguration: type 1C, missing"]),
        ({"PixelData": None}, ["PixelData: type 1C, missing"]),
        # Neither is about what is required.
        ({"PatientSex": "nonsense", "StudyDate": "2025-1-2", "AccessionNumber": "x" * 60}, []),
        # Only who knows the body part knows whether there is a left one.
        ({"BodyPartExamined": "KNEE"}, []),
    ],
)  # fmt: skip
async def test_what_is_required_and_nothing_else(
    tmp_path: Path, values: dict[str, Any], expected: list[str]
) -> None:
    assert await lacking(tmp_path, whole_ct(**values)) == expected


async def test_what_many_items_lack_is_said_once_and_where(tmp_path: Path) -> None:
    inner = Dataset()
    inner.PurposeOfReferenceCodeSequence = Sequence([Dataset()])
    image = whole_ct(ReferencedImageSequence=Sequence([inner, inner, Dataset()]))
    found = await lacking(tmp_path, image)
    assert found[:2] == [
        "ReferencedImageSequence/ReferencedSOPClassUID: type 1, missing",
        "ReferencedImageSequence/ReferencedSOPInstanceUID: type 1, missing",
    ]
    code = "ReferencedImageSequence/PurposeOfReferenceCodeSequence/CodeValue: type 1C, missing"
    assert found.count(code) == 1
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
)
async def test_samples_of_32_bits_are_looked_at_in_every_encoding(
    tmp_path: Path, syntax: str
) -> None:
    assert await lacking(tmp_path, dose(syntax)) == [
        "DoseGridScaling: type 1C, missing",
        "ReferencedRTPlanSequence: type 1C, missing",
    ]


async def test_encapsulated_pixels_and_icons(tmp_path: Path) -> None:
    icon = Dataset()
    for keyword in ("Rows", "Columns"):
        setattr(icon, keyword, 1)
    icon.SamplesPerPixel, icon.PhotometricInterpretation = 1, "MONOCHROME2"
    icon.BitsAllocated = icon.BitsStored = 8
    icon.HighBit, icon.PixelRepresentation = 7, 0
    icon.add_new("PixelData", "OB", pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"]))
    icon["PixelData"].is_undefined_length = True

    def edit(image: Dataset) -> None:
        image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
        image.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" + b"secret!!" + b"\xff\xd9"])
        image["PixelData"].VR = "OB"
        image["PixelData"].is_undefined_length = True
        image.IconImageSequence = Sequence([icon])
        image.LossyImageCompression = "01"
        del image.KVP

    image = edited(whole_ct(), edit, JPEGBaseline8Bit)
    assert await lacking(tmp_path, image) == ["KVP: type 2, missing"]
    assert b"secret!!" not in given(image)


async def test_what_a_coercion_writes_is_not_missing(tmp_path: Path) -> None:
    image = whole_ct(PatientBirthDate=None, StudyID=None)
    (said,) = await check(validator(tmp_path), image, PatientBirthDate="19800101")
    assert "PatientBirthDate" not in said
    assert "StudyID (type 2, missing)" in said


async def test_messages_are_bounded(tmp_path: Path) -> None:
    image = whole_ct(**dict.fromkeys(PIXEL_MODULE))
    (said,) = await check(validator(tmp_path), image)
    assert said.count("type ") == iod.NAMED
    assert re.search(r"\) and [0-9]+ more\.$", said)
    with pytest.raises(Nonconforming) as refusal:
        await check(validator(tmp_path, "refuse"), image)
    assert len(refusal.value.extra["errors"]) == iod.NAMED


PIXEL_MODULE = (
    *("SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated"),
    *("BitsStored", "HighBit", "PixelRepresentation", "PixelData", "ImageType", "KVP", "StudyID"),
    *("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "PixelSpacing"),
    *("RescaleIntercept", "RescaleSlope", "Manufacturer", "SliceThickness", "PatientPosition"),
)


# ------------------------------------------------------------------------------- what it is given


async def test_pixels_documents_and_private_elements_stay_here() -> None:
    image = whole_ct(PixelData=b"pixels!!" * 64)

    def edit(each: Dataset) -> None:
        each.private_block(0x0099, "SOMEBODY", create=True).add_new(1, "LO", "private!")
        each.add_new(0x00420011, "OB", b"document" * 10)

    content = given(edited(image, edit))
    assert b"pixels!!" in image
    for word in (b"pixels!!", b"private!", b"SOMEBODY", b"document"):
        assert word not in content
    assert b"Doe^Jane" in content


async def test_a_large_rest_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iod, "MAX_GIVEN_BYTES", 10_000)
    assert await check(validator(tmp_path), whole_ct(PixelData=bytes(512))) == []
    with pytest.raises(NotValidated, match="without its pixels it is larger than"):
        await check(validator(tmp_path, "refuse"), whole_ct(ImageComments="x" * 10_000))


async def test_a_file_cannot_make_it_say_what_is_not_so(tmp_path: Path) -> None:
    """dciodvfy quotes values with their line breaks."""
    forged = (
        "x\nError - </PatientID(0010,0020)> - Missing attribute for Type 2 Required"
        " - Module=<Patient>\nError - </Doe Jane(0010,0010)> - Missing attribute for Type 1 "
        "Required - Module=<Patient>\nCTImage\n"
    )
    assert await check(validator(tmp_path, "refuse"), whole_ct(StudyID=forged)) == []
    image = whole_ct(StudyID=forged, KVP=None)
    with pytest.raises(Nonconforming) as refusal:
        await check(validator(tmp_path, "refuse"), image)
    assert refusal.value.extra["errors"] == [{"keyword": "KVP", "problem": "type 2, missing"}]
    assert "Doe" not in refusal.value.detail
    private = whole_ct(StudyID=forged, SOPClassUID="1.2.3")
    with pytest.raises(NotValidated, match="does not know its SOP class"):
        await check(validator(tmp_path, "refuse"), private)


async def test_a_file_that_makes_it_say_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these characters is a line that quotes the whole value."""
    monkeypatch.setattr(iod, "MAX_SAID_BYTES", 1024 * 1024)
    image = whole_ct(ImageComments="x\x01" * 3000)
    (said,) = await check(validator(tmp_path), image)
    assert "could not be checked: dciodvfy said more than" in said


async def test_many_items_and_deep_ones(tmp_path: Path) -> None:
    deep = top = Dataset()
    for _ in range(14):
        inner = Dataset()
        deep.ReferencedStudySequence = Sequence([inner])
        deep = inner
    image = whole_ct(ReferencedStudySequence=Sequence([top, *(Dataset() for _ in range(2000))]))
    assert await lacking(tmp_path, image) == [
        "ReferencedStudySequence/ReferencedSOPClassUID: type 1, missing",
        "ReferencedStudySequence/ReferencedSOPInstanceUID: type 1, missing",
    ]


# ------------------------------------------------------------------------------- a broken one


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -ABRT $$", "dciodvfy ended with status -6"),
        ("kill -SEGV $$", "dciodvfy ended with status -11"),
        ("exit 3", "dciodvfy ended with status 3"),
        ("echo CTImage >&2; kill -KILL $$", "dciodvfy ended with status -9"),
        ("exit 0", "dciodvfy did not say which IOD it is of"),
        ("echo CTImage >&2; echo 'Error - Dicom dataset read failed' >&2", "to its end"),
        ("yes CTImage >&2", "dciodvfy said more than 8 MiB about it"),
        ("tr '\\0' x </dev/zero >&2", "dciodvfy said more than 8 MiB about it"),
    ],
)
async def test_a_program_that_breaks_is_no_statement_about_the_file(
    tmp_path: Path, script: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    program = stand_in(tmp_path, script)
    (said,) = await check(validator(tmp_path, "warn", program), whole_ct(KVP=None))
    assert said.startswith("Whether the file has what its IOD requires could not be checked: ")
    assert reason in said
    assert reason in caplog.text
    assert "Doe" not in caplog.text
    with pytest.raises(NotValidated, match=reason):
        await check(validator(tmp_path, "refuse", program), whole_ct())


async def test_a_program_that_never_ends_is_killed_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iod, "SECONDS", 1.0)
    started = processes_of(monkeypatch)
    program = stand_in(tmp_path, "sleep 3600 & sleep 3600")
    with pytest.raises(NotValidated, match="took longer than 1 s"):
        await check(validator(tmp_path, "refuse", program), whole_ct())
    assert len(started) == 2, "the proof, and the file"
    await until(lambda: not any(map(session, started)))


async def test_who_goes_away_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = processes_of(monkeypatch)
    program = stand_in(tmp_path, "sleep 3600 & sleep 3600")
    task = asyncio.create_task(check(validator(tmp_path, "warn", program), whole_ct()))
    await until(lambda: len(started) == 2 and len(session(started[1])) > 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not any(map(session, started)))
    assert listed(tmp_path) == ["dciodvfy"]


async def test_a_program_that_went_away_or_may_not_run(tmp_path: Path) -> None:
    program = stand_in(tmp_path, "exit 0")
    checking = validator(tmp_path, "refuse", program)
    remove(program)
    with pytest.raises(NotValidated, match="dciodvfy ended with status 127"):
        await check(checking, whole_ct())


async def test_no_room_for_what_it_would_be_given(tmp_path: Path) -> None:
    checking = validator(tmp_path / "gone", "refuse")
    with pytest.raises(NotValidated, match="there is no room"):
        await check(checking, whole_ct())


async def test_a_program_that_finds_nothing_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "silent"
    path.write_text("#!/bin/sh\necho CTImage >&2\n")
    path.chmod(0o755)
    with pytest.raises(NotValidated, match="not answer as the one that Lightbox knows"):
        await check(validator(tmp_path, "refuse", str(path)), whole_ct())


async def test_the_program_is_confined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTBOX_JWT_SECRET", "a secret of the app")
    script = "exec >&2; ulimit -a; pwd; env; ls /proc/self/fd; (echo x >%s/written) && echo wrote"
    command = iod._command(stand_in(tmp_path, script % tmp_path), ExplicitVRLittleEndian)
    with (tmp_path / "given").open("w+b") as file:
        file.write(bytes(200))
        file.seek(0)
        async with iod._running(command, file) as process:
            assert process.stderr is not None
            said = b"".join([chunk async for chunk in process.stderr]).decode()
            await process.wait()
            await process.aclose()
    assert re.search(r"time\(seconds\) +20\n", said)
    assert re.search(r"file\(blocks\) +0\n", said)
    assert re.search(r"coredump\(blocks\) +0\n", said)
    assert re.search(r"memory\(kbytes\) +524288\n", said)
    assert "\n/\n" in said, "the working directory"
    assert "secret" not in said
    assert set(re.findall(r"^([A-Z_]+)=", said, re.MULTILINE)) <= {"PATH", "LC_ALL", "PWD", "_"}
    assert re.findall(r"^[0-9]+$", said, re.MULTILINE) == ["0", "1", "2", "3"], "3 is the folder"
    assert "wrote" not in said
    assert not (tmp_path / "written").exists() or (tmp_path / "written").stat().st_size == 0


async def test_only_so_many_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0
    original = iod._running

    @asynccontextmanager
    async def counted(*arguments: Any) -> AsyncIterator[Process]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            async with original(*arguments) as process:
                yield process
        finally:
            running -= 1

    await check(validator(tmp_path), whole_ct())
    monkeypatch.setattr(iod, "_running", counted)
    image = whole_ct()
    async with anyio.create_task_group() as group:
        for _ in range(12):  # each with a validator of its own, as imports have
            group.start_soon(check, validator(tmp_path), image)
    assert most == iod.AT_ONCE


async def test_switched_off_nothing_is_started(tmp_path: Path) -> None:
    assert await check(validator(tmp_path, "off", "/nowhere/dciodvfy"), whole_ct(KVP=None)) == []


def test_settings_say_what_is_to_be_installed(tmp_path: Path) -> None:
    for mode in ("warn", "refuse"):
        with pytest.raises(ValueError, match=r"apt-get install --no-install-recommends dicom3tool"):
            validator(tmp_path, mode, str(tmp_path / "nothing"))
    (tmp_path / "not-a-program").write_text("")
    with pytest.raises(ValueError, match="LIGHTBOX_DCIODVFY"):
        validator(tmp_path, "warn", str(tmp_path / "not-a-program"))
    with pytest.raises(ValueError, match="iod_validation"):
        validator(tmp_path, "maybe")


def processes_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of processes as they are started: of their sessions, too."""
    started: list[int] = []
    original = anyio.open_process

    async def kept(*arguments: Any, **more: Any) -> Process:
        process = await original(*arguments, **more)
        started.append(process.pid)
        return process

    monkeypatch.setattr(anyio, "open_process", kept)
    return started


def listed(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir()]


def remove(path: str) -> None:
    Path(path).unlink()


def session(leader: int) -> list[int]:
    """Who of a session still runs (proc_pid_stat(5))."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(ValueError, OSError):
            number = int(folder.name)
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == leader and state != "Z":
                found.append(number)
    return found


async def until(good: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not good():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
