"""Audit messages: valid by the schema of PS3.15 A.5.1 for every record that there can be, the
right event for each, and their frames."""

import base64
import copy
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import uuid4
from xml.etree.ElementTree import Element, SubElement, fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.atna import Reporter, audit_message, events
from app.atna.syslog import Receiver, syslog_message
from app.audit import Action
from app.audit.known import Known, KnownStudy
from app.models import AuditRecord
from app.settings import Settings
from tests.audit_schema import event_faults, schema_faults
from tests.lightbox import make_settings
from tests.trail_records import CT, ORDER, PATIENT, STUDY, WHOSE, every_record, known, record

REPORTER = Reporter("https://lightbox.hospital.example", "main")
RECORDS = list(every_record())


def message(made: AuditRecord, about: Known | None = None) -> Element:
    return fromstring(audit_message(made, about or known(), REPORTER))  # noqa: S314  (our own)


def objects(found: Element) -> dict[str, Element]:
    """The participant objects by the code of their id's type."""
    return {
        each.find("ParticipantObjectIDTypeCode").get("csd-code", ""): each  # type: ignore[union-attr]
        for each in found.iter("ParticipantObjectIdentification")
    }


def details(element: Element) -> dict[str, str]:
    return {
        each.get("type", ""): base64.b64decode(each.get("value", "")).decode()
        for each in element.iter("ParticipantObjectDetail")
    }


# ---------------------------------------------------------------------------------- the standard


@pytest.mark.parametrize("action", Action)
def test_every_record_is_a_valid_message(action: Action) -> None:
    made = [each for each in RECORDS if each.action == action]
    assert len(made) == 4 * len(WHOSE)
    for each in made:
        for about in (known(), Known()):
            found = message(each, about)
            assert schema_faults(found) == []
            assert event_faults(found) == [], each.outcome
            assert objects(found)["audit_record"].get("ParticipantObjectID") == str(each.id)


BREAKS: list[Callable[[Element], object]] = [
    lambda found: found.remove(found[0]),
    lambda found: found.append(found[0]),
    lambda found: found.set("version", "1"),
    lambda found: found[0].set("EventOutcomeIndicator", "1"),
    lambda found: found[0].set("EventActionCode", "RU"),
    lambda found: found[0].set("EventDateTime", "2026-11-21T07:52:04"),
    lambda found: found[0][0].attrib.pop("originalText"),
    lambda found: found[0].insert(0, Element("EventOutcomeDescription")),
    lambda found: found[1].set("UserIsRequestor", "yes"),
    lambda found: found[1].attrib.pop("UserID"),
    lambda found: found[1].set("NetworkAccessPointTypeCode", "6"),
    lambda found: found.find("AuditSourceIdentification/AuditSourceTypeCode").set("csd-code", "x"),  # type: ignore[union-attr]
    lambda found: found[-1].remove(found[-1][1]),
    lambda found: SubElement(found[-1], "ParticipantObjectQuery"),
    lambda found: found[-1][2].set("value", "not base64!"),
    lambda found: found[-1].set("ParticipantObjectTypeCodeRole", "27"),
    lambda found: SubElement(found, "Anything"),
    lambda found: found.find(".//SOPClass").attrib.pop("NumberOfInstances"),  # type: ignore[union-attr]
]


@pytest.mark.parametrize("at", range(len(BREAKS)))
def test_the_check_of_the_schema_sees_what_is_wrong(at: int) -> None:
    found = copy.deepcopy(message(record("study:view", "granted", **WHOSE["a study's"])))
    assert schema_faults(found) == []
    BREAKS[at](found)
    assert schema_faults(found)


EVENTS = [
    ("study:view", "granted", "a study's", "110103", "R", "0"),
    ("study:view", "granted", "a study's, by DICOMweb", "110103", "R", "0"),
    ("study:view", "granted", "a study's, of a link", "study:view", "E", "0"),
    ("study:view", "granted", "an order's", "study:view", "E", "0"),  # a link too
    ("study:view", "granted", "a patient's", "study:view", "E", "0"),
    ("study:view", "done", "a study's", "study:view", "E", "0"),
    ("study:view", "failed", "a study's, of a link", "study:view", "E", "4"),
    ("study:read", "granted", "an order's", "110109", "R", "0"),
    ("study:read", "granted", "a patient's", "110110", "R", "0"),
    ("study:coerce", "done", "a study's", "110103", "U", "0"),
    ("study:retrieve", "granted", "a study's", "110104", "R", "0"),
    ("study:upload", "done", "a study's", "110104", "C", "0"),
    ("study:upload", "failed", "a study's", "110104", "C", "4"),
    ("study:delete", "done", "a study's", "110105", "D", "0"),
    ("patient:read", "granted", "a patient's", "110110", "R", "0"),
    ("order:write", "done", "an order's", "110109", "U", "0"),
    ("study:list", "granted", "a search's", "110112", "E", "0"),
    ("audit:read", "granted", "a search's", "110101", "R", "0"),
    ("access:report", "granted", "a patient's", "110101", "R", "0"),
    ("glass:break", "done", "in an emergency", "110113", "E", "0"),
    ("glass:break", "granted", "in an emergency", "glass:break", "E", "0"),
    ("glass:break", "granted", "a patient's", "glass:break", "E", "0"),
    ("glass:break", "failed", "in an emergency", "glass:break", "E", "4"),
    ("glass:review", "granted", "a search's", "glass:review", "R", "0"),
    ("glass:review", "done", "a patient's", "110110", "U", "0"),
    ("study:link", "done", "a study's", "110110", "U", "0"),
    ("study:link", "failed", "nobody's", "study:link", "U", "4"),
    ("archive:change", "done", "a study's", "110110", "U", "0"),
    ("archive:change", "done", "nobody's", "archive:change", "U", "0"),
    ("worklist:publish", "done", "a study's, of an order", "110110", "R", "0"),
    ("arrival:list", "granted", "a search's", "110112", "E", "0"),
    ("arrival:list", "done", "a patient's", "110112", "E", "0"),
    ("of:another-version", "done", "a patient's", "of:another-version", "E", "0"),
    ("restriction:write", "done", "a patient's", "110113", "E", "0"),
    ("study:view", "denied", "a study's", "110113", "E", "8"),
    ("audit:read", "denied", "nobody's", "110113", "E", "8"),
    ("sign-in", "denied", "nobody's", "110114", "E", "4"),
    ("session:open", "denied", "a patient's", "110114", "E", "8"),
    ("session:open", "granted", "a patient's", "110114", "E", "0"),
    ("session:end", "done", "a session's", "110114", "E", "0"),
    ("statistics:read", "granted", "nobody's", "statistics:read", "R", "0"),
]


@pytest.mark.parametrize(("action", "outcome", "about", "code", "verb", "indicator"), EVENTS)
def test_which_event_a_record_is(
    action: str, outcome: str, about: str, code: str, verb: str, indicator: str
) -> None:
    found = message(record(action, outcome, **WHOSE[about]))
    identification = found.find("EventIdentification")
    assert identification is not None
    assert identification[0].get("csd-code") == code
    assert identification.get("EventActionCode") == verb
    assert identification.get("EventOutcomeIndicator") == indicator


def test_every_action_is_an_event() -> None:
    assert set(events.EVENTS) == set(Action)


def test_a_glass_is_broken_once() -> None:
    for outcome, codes in (("granted", 0), ("failed", 0), ("denied", 0), ("done", 1)):
        found = message(record("glass:break", outcome, **WHOSE["in an emergency"]))
        types = [each.get("csd-code") for each in found.iter("EventTypeCode")]
        assert types.count("110127") == codes, outcome


TYPES = [
    ("glass:break", "done", "110127"),
    ("care-team:write", "done", "110137"),
    ("restriction:write", "done", "110135"),
    ("study:view", "denied", "110132"),
    ("sign-in", "denied", "110122"),
    ("session:open", "granted", "110122"),
    ("sign-out", "done", "110123"),
    ("application:start", "done", "110120"),
    ("application:stop", "done", "110121"),
]


@pytest.mark.parametrize(("action", "outcome", "code"), TYPES)
def test_what_an_alert_or_a_sign_in_is_of(action: str, outcome: str, code: str) -> None:
    found = message(record(action, outcome, patient_id=PATIENT))
    types = [each.get("csd-code") for each in found.iter("EventTypeCode")]
    assert types == [code, action, outcome]


# -------------------------------------------------------------------------------- what is in it


def test_a_viewing_names_person_patient_and_study() -> None:
    found = message(record("study:view", "granted", **WHOSE["a study's, of an order"]))
    person, process = found.iter("ActiveParticipant")
    assert (person.get("UserID"), person.get("UserIsRequestor")) == ("dr.novak", "true")
    assert person.get("NetworkAccessPointID") == "192.0.2.7"
    assert person.get("NetworkAccessPointTypeCode") == "2"
    assert (process.get("UserIsRequestor"), process[0].get("csd-code")) == ("false", "110150")
    named = objects(found)
    assert named["2"].get("ParticipantObjectID") == "DOC-1"
    assert named["2"].findtext("ParticipantObjectName") == "Santos^Maria"
    assert details(named["2"]) == {"patient_id": str(PATIENT), "IssuerOfPatientID": "HOSPITAL"}
    assert named["110180"].get("ParticipantObjectID") == STUDY
    description = named["110180"].find("ParticipantObjectDescription")
    assert description is not None
    assert [(each.tag, dict(each.items())) for each in description] == [
        ("Accession", {"Number": "26-D8"}),
        ("SOPClass", {"UID": CT, "NumberOfInstances": "3"}),
    ]
    assert named["order_id"].get("ParticipantObjectID") == str(ORDER)
    assert details(named["audit_record"])["sha256"] == "5e" * 32


@pytest.mark.parametrize(
    ("action", "person", "application"),
    [
        ("study:retrieve", "110152", "110153"),
        ("study:upload", "110153", "110152"),
        ("study:list", "110153", "110152"),
    ],
)
def test_what_goes_from_whom_to_whom(action: str, person: str, application: str) -> None:
    found = message(record(action, "done", **WHOSE["a study's"]))
    roles = [each[0].get("csd-code") for each in found.iter("ActiveParticipant")]
    assert roles == [person, application]


def test_a_deleted_study_says_how_much_it_was() -> None:
    deleted = record(
        *("study:delete", "done"),
        patient_id=PATIENT,
        study_instance_uid="2.25.3",
        detail={"instance_count": 12, "sop_instance_uids": ["2.25.9"] * 12},
    )
    found = message(deleted)
    (sop_class,) = found.iter("SOPClass")
    assert dict(sop_class.items()) == {"NumberOfInstances": "12"}


def test_a_query_is_kept_as_it_was_asked() -> None:
    found = message(record("study:list", "granted", **WHOSE["a search's"]))
    asked = found.findtext(".//ParticipantObjectQuery") or ""
    assert base64.b64decode(asked).decode() == "?mrn=MRN-1&modality=CT&modality=MR"


def test_a_study_that_is_anothers_now_is_not_described() -> None:
    about = known()
    about.studies[STUDY] = KnownStudy(uuid4(), "20240404", "secret study", "SECRET", {CT: 1})
    made = record("study:view", "granted", **WHOSE["a study's"])
    assert b"secret" not in audit_message(made, about, REPORTER).lower()


def test_an_emergency_is_named() -> None:
    found = message(record("study:view", "granted", **WHOSE["in an emergency"]))
    (purpose,) = [each for each in found.iter("EventTypeCode") if each.get("csd-code") == "BTG"]
    assert purpose.get("codeSystemName") == "2.16.840.1.113883.5.8"


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_breaks_the_xml(actor: str, said: str) -> None:
    made = record(
        *("study:view", "failed"),
        actor=actor,
        reason=said,
        patient_id=PATIENT,
        request_id=said[:64],
        detail={"problem": said, "viewer": actor},
    )
    assert schema_faults(message(made)) == []


# -------------------------------------------------------------------------------------- syslog


def test_a_message_has_its_length_in_octets_in_front() -> None:
    at = datetime(2026, 11, 21, 7, 52, 4, 768063, tzinfo=UTC)
    framed = syslog_message(17, at, "lightbox.hospital.example", "<a>é</a>".encode())
    length, _, rest = framed.partition(b" ")
    assert int(length) == len(rest)
    head, _, body = rest.partition(b"\xef\xbb\xbf")
    words = head.decode("ascii").split(" ", 6)
    assert words[:4] == [
        *("<85>1", "2026-11-21T07:52:04.768063Z", "lightbox.hospital.example", "Lightbox"),
    ]
    assert words[4].isdigit()
    assert words[5:] == ["DICOM+RFC3881", '[meta sequenceId="17"] ']
    assert body.decode() == "<a>é</a>"


@pytest.mark.parametrize(
    ("record_id", "sequence"), [(1, 1), (2_147_483_647, 2_147_483_647), (2_147_483_648, 1)]
)
def test_a_sequence_id_stays_in_the_range_of_the_rfc(record_id: int, sequence: int) -> None:
    framed = syslog_message(record_id, datetime.now(UTC), "host", b"")
    assert f'sequenceId="{sequence}"'.encode() in framed


def settings(**more: object) -> Settings:
    return make_settings("sqlite+aiosqlite://", "http://orthanc.test", **more)


@pytest.mark.parametrize(
    "more",
    [
        {"syslog_host": "audit.hospital.example", "syslog_transport": "tcp-to-local-relay"},
        {"syslog_host": "10.0.0.1", "syslog_transport": "tcp-to-local-relay"},
        {"syslog_host": "localhost", "syslog_transport": "tcp"},
        {"syslog_host": "localhost", "syslog_key_file": "key.pem"},
        {"syslog_host": "localhost", "syslog_port": 0},
    ],
    ids=str,
)
def test_settings_that_would_send_names_in_the_clear_are_refused(more: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"syslog|SYSLOG"):
        settings(**more)


def test_without_a_host_nothing_is_sent() -> None:
    assert Receiver.from_settings(settings()) is None
    relay = Receiver.from_settings(
        settings(syslog_host="localhost", syslog_transport="tcp-to-local-relay")
    )
    assert relay is not None
    assert relay.tls is False
    secured = Receiver.from_settings(settings(syslog_host="audit.hospital.example"))
    assert secured == Receiver("audit.hospital.example", 6514)
