"""Every operation of OpenAPI, asked by everybody about a patient who is not theirs.

Two tables say what has to come of it, written from the contract and not from `app.access`:
RIGHTS, which caller may do what to that patient, and OPERATIONS, how each operation is asked and
which right it needs. A route that is new in OpenAPI fails here until it has its row.
"""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from starlette.routing import compile_path

from app.dicom import orthanc_id
from app.main import create_app
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import SECRET, Lightbox, Shared, World, make_settings, signed
from tests.tables import change, moment, outcomes, records

# Claims of each caller. `treats` requested the other patient's order. The patient has a scheduled
# imaging order at the site `main`; the callers `far` work at another.
CALLERS: Mapping[str, Mapping[str, Any]] = {
    "stranger": {"sub": "clinician", "roles": ["clinician"]},
    "treats": {"sub": "other", "roles": ["clinician"]},
    "rad": {"sub": "rita", "roles": ["radiologist"]},
    "rad-far": {"sub": "ralf", "roles": ["radiologist"], "site": "north"},
    "tech": {"sub": "tina", "roles": ["technologist"]},
    "tech-far": {"sub": "tom", "roles": ["technologist"], "site": "north"},
    "service": {"sub": "ehr", "roles": ["service"]},
    "admin": {"sub": "ada", "roles": ["admin"]},
    "auditor": {"sub": "otto", "roles": ["auditor"]},
    "nobody": {"sub": "nils", "roles": []},
}

# yes: done, and recorded as granted. no: 403, recorded as denied. empty: a list that is answered,
# recorded, and shows nothing of the patient.
RIGHTS_TABLE = """
                stranger treats rad   rad-far tech  tech-far service admin auditor nobody
access:explain  yes      yes    yes   yes     yes   yes      yes     no    no      no
access:report   no       no     no    no      no    no       yes     no    yes     no
arrival:list    no       no     yes   empty   yes   empty    no      no    no      no
audit:read      no       no     no    no      no    no       no      no    yes     no
care-team:read  no       yes    no    no      no    no       yes     no    no      no
care-team:write no       no     no    no      no    no       yes     no    no      no
glass:break     yes      yes    yes   yes     no    no       no      no    no      no
glass:review    no       no     no    no      no    no       no      no    yes     no
import:cancel   no       no     yes   yes     yes   yes      yes     yes   no      no
import:read     no       no     yes   yes     yes   yes      yes     yes   no      no
import:write    no       no     yes   yes     yes   yes      yes     no    no      no
order:create    no       no     no    no      no    no       yes     no    no      no
order:list      empty    yes    yes   empty   yes   empty    yes     no    no      no
order:read      no       yes    yes   no      yes   no       yes     no    no      no
order:write     no       no     no    no      no    no       yes     no    no      no
patient:create  no       no     no    no      no    no       yes     no    no      no
patient:list    empty    yes    yes   empty   yes   empty    yes     no    no      no
patient:merge   no       no     no    no      no    no       yes     no    no      no
patient:read    no       yes    yes   no      yes   no       yes     no    no      no
patient:write   no       no     no    no      no    no       yes     no    no      no
restriction:read no      no     no    no      no    no       yes     no    no      no
restriction:write no     no     no    no      no    no       yes     no    no      no
session:list    yes      yes    yes   yes     yes   yes      yes     yes   yes     no
session:revoke  yes      yes    yes   yes     yes   yes      yes     yes   yes     no
sign-out        yes      yes    yes   yes     yes   yes      yes     no    no      no
study:link      no       no     yes   no      yes   no       yes     no    no      no
statistics:read no       no     no    no      no    no       no      yes   no      no
study:delete    no       no     yes   no      no    no       yes     no    no      no
study:list      empty    yes    yes   empty   yes   empty    yes     no    no      no
study:read      no       yes    yes   no      yes   no       yes     no    no      no
study:retrieve  no       yes    yes   no      yes   no       yes     no    no      no
study:upload    no       no     yes   no      yes   no       yes     no    no      no
study:view      no       yes    yes   no      yes   no       yes     no    no      no
tags:modify     no       no     yes   yes     yes   yes      no      no    no      no
tags:read       no       no     yes   yes     yes   yes      yes     no    no      no
"""


def read_rights(table: str) -> dict[str, dict[str, str]]:
    """`{action: {caller: word}}`."""
    head, *body = (line.split() for line in table.strip().splitlines())
    return {action: dict(zip(head, words, strict=True)) for action, *words in body}


RIGHTS = read_rights(RIGHTS_TABLE)
BY_ROLE = {"admin", "auditor", "nobody"}
"""Callers whose roles show them no patient's images, whoever the patient is."""

Ask = Callable[[World], dict[str, Any]]
Arrange = Callable[[Lightbox, World, str], None]


@dataclass(frozen=True)
class Operation:
    """How an operation is asked about the other patient; `success` is its status when granted.

    `hides`: to who may see some patients, but not this one, the study is as one that isn't there.
    `arrange`: what has to be there, for the caller of that `sub`, so that it can be done.
    """

    right: str
    success: int = 200
    ask: Ask = lambda world: {}
    hides: bool = False
    arrange: Arrange = lambda lightbox, world, sub: None


def their_file(world: World) -> bytes:
    """Another slice of the other patient's study."""
    return ct_image(
        patient_id="MRN-VICTIM",
        study_uid=world.their_study,
        series_uid=world.their_image["series_instance_uid"],
        PatientName="Victim^Vera",
    )


def new_order(world: World) -> dict[str, Any]:
    return {"json": {"patient_id": world.theirs["id"], "order_category": "CT"}}


def new_patient(world: World) -> dict[str, Any]:
    person = {"first_name": "New", "last_name": "Person", "mrn": "MRN-NEW", "dob": "1990-02-03"}
    return {"json": person}


def upload(field: str) -> Ask:
    def ask(world: World) -> dict[str, Any]:
        files = {field: ("slice.dcm", their_file(world), "application/dicom")}
        return {"files": files, "data": {"order_id": world.their_order["id"]}}

    return ask


def store(world: World) -> dict[str, Any]:
    body = b"--x\r\nContent-Type: application/dicom\r\n\r\n" + their_file(world) + b"\r\n--x--"
    kind = 'multipart/related; type="application/dicom"; boundary=x'
    return {"content": body, "headers": {"Content-Type": kind}}


def a_file(world: World) -> dict[str, Any]:
    """A file that is nobody's here; the tools for tags take it in and store nothing."""
    return {"files": {"file": ("slice.dcm", ct_image(), "application/dicom")}}


def a_file_and_tags(world: World) -> dict[str, Any]:
    return {**a_file(world), "data": {"tags": '{"StudyDescription": "changed"}'}}


GRANT = UUID(int=7)
CTX = "a-viewer-of-their-own1"


def broken_glass(lightbox: Lightbox, world: World, sub: str) -> None:
    """Somebody broke the glass, long ago."""
    values = (GRANT.hex, UUID(world.theirs["id"]).hex, moment(hours=-2), moment(hours=-1))
    change(
        lightbox,
        "INSERT INTO broken_glass VALUES (?1, ?2, 'third', '', 'clinician', 'other', 'a reason',"
        " 0, ?3, ?4, NULL, '', '')",
        *values,
    )


def retired(lightbox: Lightbox, world: World, sub: str) -> None:
    """The other patient was merged into mine, with nothing of theirs."""
    values = (UUID(int=8).hex, UUID(world.theirs["id"]).hex, UUID(world.mine["id"]).hex, moment())
    change(
        lightbox,
        "INSERT INTO patient_merge VALUES (?1, ?2, ?3, 'a reason', ?4, 'ehr', NULL, '', '')",
        *values,
    )
    restriction = '{"retired": null, "survivor": null, "both": null}'
    change(
        lightbox,
        "INSERT INTO merged_row VALUES (?, 'restriction', 'before', ?)",
        *(values[0], restriction),
    )
    change(lightbox, "UPDATE patient SET merged_into = ? WHERE id = ?", values[2], values[1])


def viewer(lightbox: Lightbox, world: World, sub: str) -> None:
    """The caller has a viewer open."""
    change(lightbox, "DELETE FROM launch_session WHERE ctx = ?", CTX)
    change(
        lightbox,
        "INSERT INTO launch_session (ctx, code_sha256, actor, actor_name, actor_roles, actor_site,"
        " patient_id, opens, layout, created_at, code_expires_at, expires_at, last_used_at,"
        " redeemed_at, ended_because) VALUES (?1, ?2, ?2, '', '', 'main', ?3, '1.2', '', ?4, ?4,"
        " ?5, ?4, ?4, '')",
        *(CTX, sub, UUID(world.theirs["id"]).hex, moment(), moment(hours=1)),
    )


def arrived(state: str) -> Arrange:
    """Their study was found in the archive: it waits for somebody, or is linked."""

    def arrange(lightbox: Lightbox, world: World, sub: str) -> None:
        key, patient = orthanc_id("MRN-VICTIM", world.their_study), UUID(world.theirs["id"]).hex
        change(lightbox, "DELETE FROM arrival WHERE orthanc_id = ?", key)
        change(
            lightbox,
            "INSERT OR IGNORE INTO study (study_instance_uid, patient_id, orthanc_id,"
            " dicom_patient_id, patient_name, patient_birth_date, patient_sex, study_date,"
            " study_time, study_description, accession_number, created_at)"
            " VALUES (?1, ?2, ?3, 'MRN-VICTIM', '', '', '', '', '', '', '', ?4)",
            *(world.their_study, patient, key, moment()),
        )
        texts = (
            "dicom_patient_id patient_name folded_name patient_birth_date patient_sex "
            "accession_number study_date study_time study_description modalities disk_size rule "
            "decided_by decision"
        ).split()
        numbers = "series_count instance_count stable backlog held attempts told".split()
        change(
            lightbox,
            "INSERT INTO arrival (orthanc_id, study_instance_uid, state, patient_id, facts,"  # noqa: S608
            f" reasons, candidates, version, {', '.join([*texts, *numbers])}, arrived_at,"
            " changed_at, checked_at) VALUES (?1, ?2, ?3, ?4, '{}', '[]', '[]', 1,"
            f" {', '.join([chr(39) * 2] * len(texts) + ['0'] * len(numbers))}, ?5, ?5, ?5)",
            *(key, world.their_study, state, patient if state == "linked" else None, moment()),
        )
        change(lightbox, "DELETE FROM arrival_candidate WHERE orthanc_id = ?", key)
        change(lightbox, "INSERT INTO arrival_candidate VALUES (?, ?)", key, patient)

    return arrange


def said(**body: Any) -> Ask:
    return lambda world: {"json": {"version": 1, **body}}


IMPORT = UUID(int=8)


def an_import(state: str = "open", **file: str) -> Arrange:
    """The caller has an import, of one file if there is one."""

    def arrange(lightbox: Lightbox, world: World, sub: str) -> None:
        change(lightbox, "DELETE FROM import_file WHERE import_id = ?", IMPORT.hex)
        change(lightbox, "DELETE FROM dicom_import WHERE id = ?", IMPORT.hex)
        principal = (
            f'{{"sub": "{sub}", "name": "", "roles": [], "site": "", "sid": "", "scopes": null}}'
        )
        change(
            lightbox,
            "INSERT INTO dicom_import VALUES (?1, ?2, ?3, '', '', NULL, NULL, 1, ?4, '', 1, '', ?5,"
            " ?5, ?5, ?5, NULL)",
            *(IMPORT.hex, sub, principal, state, moment()),
        )
        if file:
            change(
                lightbox,
                "INSERT INTO import_file VALUES (?1, 1, 0, 'a', 9, ?2, ?3, 1, 0, '', '', '[]', '',"
                " 0, '', ?4)",
                *(IMPORT.hex, "0" * 64, file["file"], moment()),
            )

    return arrange


def a_piece(world: World) -> dict[str, Any]:
    kind = "application/offset+octet-stream"
    headers = {"Tus-Resumable": "1.0.0", "Content-Type": kind, "Upload-Offset": "0"}
    return {"headers": headers, "content": b""}


def an_announcement(world: World) -> dict[str, Any]:
    digest = base64.b64encode(b"0" * 64).decode()
    headers = {"Tus-Resumable": "1.0.0", "Upload-Length": "9"}
    return {"headers": {**headers, "Upload-Metadata": f"sha256 {digest}"}}


def why_the_glass(world: World) -> dict[str, Any]:
    reason = {"reason_code": "emergency-treatment", "reason_text": "Unconscious in the ER."}
    return {"json": reason}


API = "/api/v1"
WHY = f"GET {API}/dicom/viewer/why"
STORE = "POST /dicom-web/studies"
OPERATIONS: dict[str, Operation] = {
    f"POST {API}/patients": Operation("patient:create", 201, new_patient),
    f"GET {API}/patients": Operation(
        "patient:list", ask=lambda world: {"params": {"mrn": "MRN-VICTIM"}}
    ),
    f"GET {API}/patients/{{patient_id}}": Operation("patient:read"),
    f"PATCH {API}/patients/{{patient_id}}": Operation(
        "patient:write", ask=lambda world: {"json": {"first_name": "Vera"}}
    ),
    f"POST {API}/patients/{{patient_id}}/merge": Operation(
        "patient:merge",
        ask=lambda world: {"json": {"into": world.mine["id"], "reason": "the same person"}},
    ),
    f"POST {API}/patients/{{patient_id}}/unmerge": Operation(
        "patient:merge", ask=lambda world: {"json": {"reason": "not the same"}}, arrange=retired
    ),
    f"GET {API}/patients/{{patient_id}}/care-team": Operation("care-team:read"),
    f"PUT {API}/patients/{{patient_id}}/care-team/{{sub}}": Operation(
        "care-team:write", ask=lambda world: {"json": {"role": "consultant"}}
    ),
    f"DELETE {API}/patients/{{patient_id}}/care-team/{{sub}}": Operation("care-team:write", 204),
    f"GET {API}/patients/{{patient_id}}/restriction": Operation("restriction:read"),
    f"PUT {API}/patients/{{patient_id}}/restriction": Operation(
        "restriction:write", ask=lambda world: {"json": {"level": "vip", "named": ["other"]}}
    ),
    f"DELETE {API}/patients/{{patient_id}}/restriction": Operation("restriction:write", 204),
    f"POST {API}/orders": Operation("order:create", 201, new_order),
    f"GET {API}/orders": Operation(
        "order:list", ask=lambda world: {"params": {"patient_id": world.theirs["id"]}}
    ),
    f"GET {API}/orders/{{order_id}}": Operation("order:read"),
    f"PATCH {API}/orders/{{order_id}}": Operation(
        "order:write", ask=lambda world: {"json": {"attending": "clinician"}}
    ),
    f"GET {API}/reconciliation": Operation("arrival:list", arrange=arrived("proposed")),
    f"GET {API}/reconciliation/{{study_instance_uid}}": Operation(
        "study:link", arrange=arrived("proposed")
    ),
    f"POST {API}/reconciliation/{{study_instance_uid}}/confirm": Operation(
        "study:link",
        ask=lambda world: {"json": {"version": 1, "order_id": world.their_order["id"]}},
        arrange=arrived("proposed"),
    ),
    f"POST {API}/reconciliation/{{study_instance_uid}}/reject": Operation(
        "study:link", ask=said(reason="a phantom"), arrange=arrived("proposed")
    ),
    f"POST {API}/reconciliation/{{study_instance_uid}}/undo": Operation(
        "study:link", ask=said(reason="another's"), arrange=arrived("linked")
    ),
    f"POST {API}/dicom/upload": Operation("study:upload", ask=upload("file")),
    f"POST {API}/dicom/upload-multiple": Operation("study:upload", ask=upload("files")),
    STORE: Operation("study:upload", ask=store),
    f"{STORE}/{{study_instance_uid}}": Operation("study:upload", ask=store),
    f"POST {API}/dicom/imports": Operation(
        "import:write", 202, lambda world: {"json": {"file_count": 1}}
    ),
    f"GET {API}/dicom/imports": Operation("import:read"),
    f"GET {API}/dicom/imports/{{import_id}}": Operation("import:read", arrange=an_import()),
    f"GET {API}/dicom/imports/{{import_id}}/events": Operation(
        "import:read", arrange=an_import("done")
    ),
    f"DELETE {API}/dicom/imports/{{import_id}}": Operation(
        "import:cancel", 204, arrange=an_import()
    ),
    f"POST {API}/dicom/imports/{{import_id}}/files": Operation(
        "import:write", 201, an_announcement, arrange=an_import()
    ),
    f"GET {API}/dicom/imports/{{import_id}}/files/{{number}}": Operation(
        "import:read", arrange=an_import(file="receiving")
    ),
    f"PATCH {API}/dicom/imports/{{import_id}}/files/{{number}}": Operation(
        "import:write", 204, a_piece, arrange=an_import(file="receiving")
    ),
    f"DELETE {API}/dicom/imports/{{import_id}}/files/{{number}}": Operation(
        "import:write", 204, a_piece, arrange=an_import(file="receiving")
    ),
    f"POST {API}/dicom/read-tags": Operation("tags:read", ask=a_file),
    f"POST {API}/dicom/modify-tags": Operation("tags:modify", ask=a_file_and_tags),
    f"GET {API}/dicom/studies": Operation(
        "study:list", ask=lambda world: {"params": {"patient_id": world.theirs["id"]}}
    ),
    f"GET {API}/dicom/studies/{{study_instance_uid}}": Operation("study:read"),
    f"DELETE {API}/dicom/studies/{{study_instance_uid}}": Operation(
        "study:delete", ask=lambda world: {"params": {"reason": "a wrong study"}}
    ),
    f"GET {API}/dicom/studies/patient/{{patient_id}}": Operation("study:read"),
    f"GET {API}/dicom/studies/order/{{order_id}}": Operation("study:read"),
    f"GET {API}/dicom/viewer/url/{{study_instance_uid}}": Operation("study:view"),
    f"GET {API}/dicom/viewer/url/order/{{order_id}}": Operation("study:view"),
    f"GET {API}/dicom/viewer/url/patient/{{patient_id}}": Operation("study:view"),
    f"{WHY}/study/{{study_instance_uid}}": Operation("access:explain"),
    f"{WHY}/order/{{order_id}}": Operation("access:explain"),
    f"{WHY}/patient/{{patient_id}}": Operation("access:explain"),
    f"POST {API}/patients/{{patient_id}}/break-glass": Operation("glass:break", ask=why_the_glass),
    f"GET {API}/audit/break-glass": Operation("glass:review"),
    f"POST {API}/audit/break-glass/{{grant_id}}/review": Operation(
        "glass:review", ask=lambda world: {"json": {"comment": "Justified."}}, arrange=broken_glass
    ),
    f"GET {API}/viewer/sessions": Operation("session:list", arrange=viewer),
    f"DELETE {API}/viewer/sessions/{{ctx}}": Operation("session:revoke", 204, arrange=viewer),
    f"POST {API}/viewer/logout": Operation("sign-out"),
    f"GET {API}/dicom/stats": Operation("statistics:read"),
    f"GET {API}/audit": Operation(
        "audit:read", ask=lambda world: {"params": {"patient_id": world.theirs["id"]}}
    ),
    f"GET {API}/audit.csv": Operation(
        "audit:read", ask=lambda world: {"params": {"patient_id": world.theirs["id"]}}
    ),
    f"GET {API}/patients/{{patient_id}}/access-report": Operation("access:report"),
    "GET /fhir/R4/AuditEvent": Operation(
        "audit:read", ask=lambda world: {"params": {"patient": world.theirs["id"]}}
    ),
    "GET /fhir/R4/AuditEvent/{record_id}": Operation("audit:read"),
    "GET /dicom-web/studies": Operation(
        "study:list", ask=lambda world: {"params": {"PatientID": "MRN-VICTIM"}}
    ),
}
STUDY = "/studies/{study_instance_uid}"
SERIES = STUDY + "/series/{series_instance_uid}"
INSTANCE = SERIES + "/instances/{sop_instance_uid}"
FILES = {STUDY, SERIES, INSTANCE}
NAMES_A_SERIES = {
    *(SERIES, f"{SERIES}/metadata", f"{SERIES}/instances"),
    *(f"{SERIES}/rendered", f"{SERIES}/thumbnail"),
    *(INSTANCE, f"{INSTANCE}/metadata", f"{INSTANCE}/rendered", f"{INSTANCE}/thumbnail"),
    *(f"{INSTANCE}/bulk/{{path}}", f"{INSTANCE}/frames", f"{INSTANCE}/frames/{{frames}}"),
    *(f"{INSTANCE}/frames/{{frame}}/rendered", f"{INSTANCE}/frames/{{frame}}/thumbnail"),
}
NAMES_A_STUDY = NAMES_A_SERIES | {
    *(STUDY, f"{STUDY}/metadata", f"{STUDY}/series", f"{STUDY}/instances"),
    *(f"{STUDY}/rendered", f"{STUDY}/thumbnail"),
}
"""The resources of DICOMweb: the same ones for bearer tokens and in a viewing session."""
OPERATIONS |= {
    f"GET /dicom-web{path}": Operation(
        "study:retrieve" if path in FILES else "study:view", hides=True
    )
    for path in NAMES_A_STUDY
}
PUBLIC = {
    *(f"GET {API}/dicom/health", "GET /viewer", "GET /s/{ctx}/ended", "GET /fhir/R4/metadata"),
    f"POST {API}/viewer/backchannel-logout",
}
DICOM_WEB = "GET /s/{ctx}/dicom-web"
COOKIE = {f"{DICOM_WEB}{path}" for path in NAMES_A_STUDY} | {
    f"{DICOM_WEB}/studies",
    "GET /s/{ctx}/alive",
    "GET /s/{ctx}/status",
}

PATHS: dict[str, dict[str, Any]] = create_app(make_settings("sqlite+aiosqlite://", URL)).openapi()[
    "paths"
]
DECLARED = sorted(f"{method.upper()} {path}" for path, verbs in PATHS.items() for method in verbs)
BEARER_OPERATIONS = [each for each in DECLARED if each not in PUBLIC | COOKIE]


def declared(name: str) -> dict[str, Any]:
    """What OpenAPI says of an operation `METHOD /path`."""
    method, _, path = name.partition(" ")
    found: dict[str, Any] = PATHS[path][method.lower()]
    return found


def operation(name: str) -> Operation:
    """The row of an operation."""
    assert name in OPERATIONS, (
        f"{name} is in OpenAPI and no test knows it: add a row to OPERATIONS in {__file__} that "
        "says how it is asked about the other patient, and which row of RIGHTS_TABLE it needs "
        "(or to PUBLIC or COOKIE)"
    )
    return OPERATIONS[name]


def asked_with(ask: dict[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of a request, with more headers."""
    return {**ask, "headers": {**ask.get("headers", {}), **headers}}


def path_of(name: str, **values: str) -> str:
    """The path of an operation with its parameters put in; each must be known here."""
    path = name.partition(" ")[2]
    _, _, parameters = compile_path(path)
    unknown = parameters.keys() - values.keys()
    assert not unknown, f"{name}: add a value for the path parameter {unknown} to {__file__}"
    return path.format(**values)


def of_an_instance(image: Mapping[str, str]) -> dict[str, str]:
    return {
        "series_instance_uid": image["series_instance_uid"],
        "sop_instance_uid": image["sop_instance_uid"],
        "frames": "1",
        "frame": "1",
        "path": "00080018",
    }


def about_them(name: str, world: World) -> str:
    return path_of(
        name,
        patient_id=world.theirs["id"],
        order_id=world.their_order["id"],
        study_instance_uid=world.their_study,
        sub="clinician",
        record_id="1",
        grant_id=str(GRANT),
        ctx=CTX,
        import_id=str(IMPORT),
        number="1",
        **of_an_instance(world.their_image),
    )


def assert_silent(answer: httpx.Response, world: World) -> None:
    """No word and no identifier of the other patient stands in the answer or its headers."""
    said = answer.text + "".join(f"{name}: {value}\n" for name, value in answer.headers.items())
    identifiers = [world.theirs["id"], world.their_order["id"], world.their_study]
    identifiers += [world.their_order["accession_number"]]
    identifiers += [
        value for key, value in world.their_image.items() if key.endswith(("uid", "id"))
    ]
    leaked = [each for each in (*World.SECRET_WORDS, *identifiers) if each and each in said]
    assert not leaked, f"leaked {leaked}: {answer.status_code} {said}"


def assert_problem(answer: httpx.Response, status: int, asked: str) -> None:
    assert answer.status_code == status, f"{asked}: {answer.status_code} {answer.text}"
    kind = "fhir" if " /fhir/" in asked else "problem"
    assert answer.headers["content-type"] == f"application/{kind}+json", asked


def decisions(lightbox: Lightbox, request_id: str) -> list[dict[str, Any]]:
    found = records(lightbox, request_id)
    return [each for each in found if each["outcome"] in ("granted", "denied")]


# ------------------------------------------------------------------------------ the declarations


@pytest.mark.parametrize("name", DECLARED)
def test_openapi_says_of_every_operation_who_may(name: str) -> None:
    said = declared(name).get("x-access")
    assert said, f"{name} has no x-access"
    if name in PUBLIC:
        assert said["guard"] == "public"
        assert len(said["why"]) > 10
    elif name in COOKIE:
        assert said["guard"] in ("viewer-session", "session-cookie")
    else:
        assert said["action"] == operation(name).right


def test_no_row_is_left_over() -> None:
    assert {*OPERATIONS, *PUBLIC, *COOKIE} == set(DECLARED)
    assert {each.right for each in OPERATIONS.values()} == set(RIGHTS)


def test_a_bearer_token_is_asked_for_where_one_is_needed() -> None:
    with_token = {name for name in DECLARED if declared(name).get("security")}
    assert with_token == set(BEARER_OPERATIONS)


# --------------------------------------------------------------------------------- bearer tokens


@pytest.mark.parametrize("name", BEARER_OPERATIONS)
async def test_who_may_not(name: str, untouched: Shared) -> None:
    lightbox, world, row = untouched.lightbox, untouched.world, operation(name)
    method, path = name.partition(" ")[0], about_them(name, world)
    refused = [caller for caller, word in RIGHTS[row.right].items() if word != "yes"]
    assert refused
    for caller in refused:
        word, request_id = RIGHTS[row.right][caller], uuid4().hex
        answer = await lightbox.ask(
            None,
            method,
            path,
            claims=CALLERS[caller],
            **asked_with(row.ask(world), {"X-Request-ID": request_id}),
        )
        asked = f"{caller}: {name}"
        assert_silent(answer, world)
        decided = decisions(lightbox, request_id)
        assert len(decided) == 1, f"{asked}: {decided}"
        assert decided[0]["actor"] == CALLERS[caller]["sub"]
        assert decided[0]["action"] == row.right
        if word == "empty":
            assert (answer.status_code, answer.json()) == (200, []), asked
            assert outcomes(lightbox, request_id) == [(row.right, "granted")], asked
        elif answer.status_code == 200:
            # Of many files each has a status of its own.
            (result,) = answer.json()["results"]
            assert (result["status"], result["error_status"]) == ("failed", 403), asked
            assert decided[0]["outcome"] == "denied", asked
        elif answer.status_code == 409:
            # Of the parts of a store too; a file that names nobody is as one of an unknown patient.
            assert name.startswith(STORE), asked
            (failed,) = answer.json()["00081198"]["Value"]
            assert failed["00081197"]["Value"] == [0xC404], asked
            assert (decided[0]["outcome"], decided[0]["reason"]) == ("denied", "no-relationship")
        elif row.hides and caller not in BY_ROLE:
            assert_problem(answer, 404, asked)
            unknown = await lightbox.ask(
                None,
                method,
                path.replace(world.their_study, "2.25.404"),
                claims=CALLERS[caller],
                **asked_with(row.ask(world), {"X-Request-ID": request_id}),
            )
            assert (unknown.status_code, unknown.content) == (404, answer.content), asked
            assert unknown.headers == answer.headers, asked
            assert (decided[0]["outcome"], decided[0]["reason"]) == ("denied", "no-relationship")
            assert decided[0]["patient_id"] == UUID(world.theirs["id"]).hex
            assert decided[0]["study_instance_uid"] == world.their_study
        else:
            assert_problem(answer, 403, asked)
            assert decided[0]["outcome"] == "denied", asked


@pytest.mark.parametrize("name", BEARER_OPERATIONS)
async def test_who_may(
    name: str, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    row = operation(name)
    method, path = name.partition(" ")[0], about_them(name, world)
    allowed = [caller for caller, word in RIGHTS[row.right].items() if word == "yes"]
    assert allowed, f"nobody may {row.right}"
    stored = dict(fake_orthanc.bodies)
    for caller in allowed:
        row.arrange(lightbox, world, CALLERS[caller]["sub"])
        answer = await lightbox.ask(
            None,
            method,
            path,
            claims=CALLERS[caller],
            **asked_with(row.ask(world), {"X-Request-ID": f"{caller}-asks"}),
        )
        asked = f"{caller}: {name}: {answer.text}"
        assert answer.status_code == row.success, asked
        decided, *others = decisions(lightbox, f"{caller}-asks")
        # A merge is of two patients, and decided for each; the first is the one of the path.
        assert len(others) == name.endswith("/merge"), asked
        assert (decided["outcome"], decided["action"]) == ("granted", row.right), asked
        assert decided["actor"] == CALLERS[caller]["sub"]
        if row.right.endswith(":list"):
            assert len(answer.json()) == 1, asked
        if row.right == "study:retrieve" or row.hides:
            assert answer.content or "x-accel-redirect" in answer.headers, asked
        if row.right == "study:delete":
            # For the next one who may.
            body = stored[world.their_image["orthanc_instance_id"]]
            assert (await lightbox.upload(body, order_id=world.their_order["id"])).is_success


@pytest.mark.parametrize("name", BEARER_OPERATIONS)
async def test_without_a_token_nothing_is_answered(name: str, untouched: Shared) -> None:
    lightbox, world, row = untouched.lightbox, untouched.world, operation(name)
    method, path = name.partition(" ")[0], about_them(name, world)
    claims = {"sub": "ehr", "roles": ["service", "radiologist", "auditor", "admin"]}
    good = signed(lightbox.settings, **claims)
    other = lightbox.settings.model_copy(update={"jwt_issuer": "somebody-else"})
    head, payload, signature = good.split(".")
    forged = {
        "no-token": None,
        "empty": "Bearer ",
        "forged-signature": f"Bearer {head}.{payload}.{signature[::-1]}",
        "no-signature": f"Bearer {head}.{payload}.",
        "other-issuer": f"Bearer {signed(other, **claims)}",
        "expired": f"Bearer {signed(lightbox.settings, **claims, exp=1)}",
        "other-scheme": f"Basic {good}",
        "the-secret": f"Bearer {SECRET}",
    }
    for how, header in forged.items():
        request_id = uuid4().hex
        headers = {"X-Request-ID": request_id} | ({"Authorization": header} if header else {})
        answer = await lightbox.ask(None, method, path, **asked_with(row.ask(world), headers))
        assert_problem(answer, 401, f"{how}: {name}")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert_silent(answer, world)
        (record,) = records(lightbox, request_id)
        assert (record["action"], record["outcome"]) == ("sign-in", "denied")
        assert record["actor"] == ""


# ------------------------------------------------------------------------------- the open routes


@pytest.mark.parametrize("name", sorted(PUBLIC - {f"GET {API}/dicom/health"}))
async def test_what_is_open_shows_no_patient(name: str, untouched: Shared) -> None:
    theirs = untouched.theirs
    method, path = name.partition(" ")[0], path_of(name, ctx=theirs.ctx)
    for query in ({}, {"ctx": theirs.ctx}, {"launch": theirs.code}):
        answer = await untouched.lightbox.client.request(method, path, params=query)
        assert answer.status_code in ((400,) if method == "POST" else (200, 404, 410)), answer.text
        assert "set-cookie" not in answer.headers
        assert_silent(answer, untouched.world)


# -------------------------------------------------------------------------------- viewer cookies


def gateway_path(name: str, ctx: str, image: Mapping[str, str]) -> str:
    return path_of(
        name,
        ctx=ctx,
        study_instance_uid=image["study_instance_uid"],
        **of_an_instance(image),
    )


async def visit(
    lightbox: Lightbox, path: str, *, method: str = "GET", **headers: str
) -> tuple[httpx.Response, list[dict[str, Any]]]:
    """The answer of the viewer origin, and what was recorded of the request."""
    request_id = uuid4().hex
    answer = await lightbox.client.request(
        method, path, headers={"X-Request-ID": request_id, **headers}
    )
    lightbox.client.cookies.clear()
    assert "x-accel-redirect" not in answer.headers
    return answer, records(lightbox, request_id)


@pytest.mark.parametrize("name", sorted(COOKIE))
async def test_the_viewer_answers_to_its_own_cookie_alone(name: str, untouched: Shared) -> None:
    lightbox, mine, theirs = untouched.lightbox, untouched.mine, untouched.theirs
    path = gateway_path(name, theirs.ctx, untouched.world.their_image)
    proof = theirs.cookie.partition("=")[2]
    intruders = {
        "no cookie": {},
        "an empty cookie": {"Cookie": "lightbox="},
        "my cookie": {"Cookie": mine.cookie},
        "their cookie, cut": {"Cookie": theirs.cookie[:-1]},
        "their cookie under another name": {"Cookie": f"session={proof}"},
        "their ctx as cookie": {"Cookie": f"lightbox={theirs.ctx}"},
        "their code as cookie": {"Cookie": f"lightbox={theirs.code}"},
        "a bearer token": {"Authorization": f"Bearer {lightbox.token('service')}"},
        "their bearer token": {"Authorization": f"Bearer {lightbox.token('clinician', 'other')}"},
        "their cookie as bearer token": {"Authorization": f"Bearer {proof}"},
    }
    for how, headers in intruders.items():
        answer, recorded = await visit(lightbox, path, **headers)
        assert_problem(answer, 401, f"{how}: {name}")
        assert_silent(answer, untouched.world)
        (record,) = recorded
        assert (record["action"], record["outcome"]) == ("sign-in", "denied"), how
        assert proof not in str(record), how


@pytest.mark.parametrize("name", BEARER_OPERATIONS)
async def test_a_viewer_cookie_opens_nothing_of_the_api(name: str, untouched: Shared) -> None:
    method, path = name.partition(" ")[0], about_them(name, untouched.world)
    proof = untouched.theirs.cookie.partition("=")[2]
    for headers in ({"Cookie": untouched.theirs.cookie}, {"Authorization": f"Bearer {proof}"}):
        asked = asked_with(operation(name).ask(untouched.world), headers)
        answer = await untouched.lightbox.ask(None, method, path, **asked)
        assert_problem(answer, 401, name)
        assert_silent(answer, untouched.world)


@pytest.mark.parametrize("name", sorted(f"{DICOM_WEB}{each}" for each in NAMES_A_STUDY))
async def test_my_session_does_not_show_their_study(name: str, untouched: Shared) -> None:
    world, mine = untouched.world, untouched.mine
    answer, recorded = await visit(
        untouched.lightbox, gateway_path(name, mine.ctx, world.their_image), Cookie=mine.cookie
    )
    assert_problem(answer, 404, name)
    assert_silent(answer, world)
    (record,) = recorded
    assert (record["action"], record["outcome"]) == ("study:view", "denied")
    assert (record["reason"], record["actor"]) == ("not-in-session", "clinician")
    assert record["detail"] == {"requested": world.their_study}


@pytest.mark.parametrize("name", sorted(f"{DICOM_WEB}{each}" for each in NAMES_A_SERIES))
async def test_their_series_is_not_found_under_my_study(name: str, shared: Shared) -> None:
    """Nor is Orthanc asked for anything of theirs: at most how my own study is."""
    world, mine = shared.world, shared.mine
    asked_before = len(shared.orthanc.requests)
    how_mine_is = {
        ("GET", f"/studies/{world.my_image['orthanc_study_id']}/statistics"),
        ("POST", "/tools/lookup"),
    }
    mixtures = [
        {**world.their_image, "study_instance_uid": world.my_study},
        {**world.my_image, "series_instance_uid": world.their_image["series_instance_uid"]},
    ]
    if "{sop_instance_uid}" in name:
        mixtures.append(
            {**world.my_image, "sop_instance_uid": world.their_image["sop_instance_uid"]}
        )
    for image in mixtures:
        path = gateway_path(name, mine.ctx, image)
        answer, _ = await visit(shared.lightbox, path, Cookie=mine.cookie)
        assert_silent(answer, world)
        if name.endswith("}/instances"):
            # A search in what isn't there finds nothing.
            assert (answer.status_code, answer.json()) == (200, []), name
        else:
            assert_problem(answer, 404, name)
    assert set(shared.orthanc.requests[asked_before:]) <= how_mine_is


@pytest.mark.parametrize("name", sorted(COOKIE))
async def test_the_viewer_is_read_only(name: str, untouched: Shared) -> None:
    mine = untouched.mine
    path = gateway_path(name, mine.ctx, untouched.world.my_image)
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        headers = {"Cookie": mine.cookie, "X-HTTP-Method-Override": "GET"}
        answer, _ = await visit(untouched.lightbox, path, method=method, **headers)
        assert_problem(answer, 405, f"{method} {name}")
