"""Orthanc, the tables, the trail and what clients were told: do they agree?"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from app.audit.entries import UNDERTAKEN, Action
from tests.killed.clients import Told

WRITES = {
    "break-glass": {Action.GLASS_BREAK},
    "cancel-import": {Action.IMPORT_CANCEL},
    "care-team": {Action.CARE_TEAM_WRITE},
    "cancel": {Action.ORDER_WRITE},
    "correct": {Action.PATIENT_WRITE},
    "coerce": {Action.STUDY_COERCE, Action.STUDY_UPLOAD},
    "delete": {Action.STUDY_DELETE},
    "duplicate": {Action.STUDY_COERCE, Action.STUDY_UPLOAD},
    "known": {Action.STUDY_UPLOAD},
    "merge": {Action.PATIENT_MERGE},
    "open-import": {Action.IMPORT_WRITE},
    "order": {Action.ORDER_CREATE},
    "patient": {Action.PATIENT_CREATE},
    "restrict": {Action.RESTRICTION_WRITE},
    "review": {Action.GLASS_REVIEW},
    "revoke": {Action.SESSION_REVOKE},
    "sign-out": {Action.SIGN_OUT},
    "stow": {Action.STUDY_UPLOAD},
    "twice": {Action.STUDY_UPLOAD},
    "upload": {Action.STUDY_UPLOAD},
    "view": {Action.STUDY_VIEW},
}
"""What leaves a `done` record where the answer is a success."""

ENDS = ("done", "failed")


class Tables:
    """The tables, read behind the app's back. `url` is the owner's, for a sync driver."""

    def __init__(self, url: str) -> None:
        engine = sa.create_engine(url)
        try:
            with engine.connect() as connection:
                self.records = [
                    {**row._mapping, "detail": json.loads(row.detail)}
                    for row in connection.execute(sa.text("SELECT * FROM audit_record ORDER BY id"))
                ]
                self.instances: dict[str, str] = {
                    row.orthanc_id: row.sop_instance_uid
                    for row in connection.execute(sa.text("SELECT * FROM instance"))
                }
                self.orders: set[str] = {
                    str(row.id).replace("-", "")
                    for row in connection.execute(sa.text("SELECT id FROM imaging_order"))
                }
                self.under_way: list[Any] = list(
                    connection.execute(sa.text("SELECT * FROM operation"))
                )
        finally:
            engine.dispose()


def differences(
    tables: Tables, in_orthanc: Iterable[str], there_before: Iterable[str], told: Iterable[Told]
) -> list[str]:
    """Every way in which they don't agree; none is right."""
    archive, before, linked = set(in_orthanc), set(there_before), set(tables.instances)
    found = [f"in Orthanc and linked to nobody: {each}" for each in archive - linked - before]
    found += [f"linked and not in Orthanc: {each}" for each in linked - archive]
    found += [f"was there before and is gone: {each}" for each in before - archive]
    found += [f"still under way: {each}" for each in tables.under_way]
    by_request: dict[str, list[Any]] = defaultdict(list)
    for each in tables.records:
        by_request[each["request_id"]].append(each)
    found += _links_without_record(tables)
    for request_id, records in by_request.items():
        found += _grants_without_end(request_id, records)
    for answer in told:
        found += _answers_without_records(answer, by_request.get(answer.request_id, []))
    return found + [
        f"answered and not there: order {answer.answer['id']}"
        for answer in told
        if (answer.kind, answer.status) == ("order", 201)
        and answer.answer["id"].replace("-", "") not in tables.orders
    ]


def _links_without_record(tables: Tables) -> list[str]:
    recorded = {
        each["detail"].get("sop_instance_uid")
        for each in tables.records
        if each["outcome"] == "done" and each["action"] in ("study:upload", "study:coerce")
    }
    return [
        f"linked without a record: {each}"
        for each in tables.instances.values()
        if each not in recorded
    ]


def _grants_without_end(request_id: str, records: list[Any]) -> list[str]:
    """Each grant of a write has an outcome; that of an upload may be its coercion's."""
    grants, ends = Counter[str](), Counter[str]()
    for each in records:
        action = "study:upload" if each["action"] == "study:coerce" else each["action"]
        if action == Action.GLASS_REVIEW and "query" in each["detail"]:
            continue  # the queue was read
        if each["outcome"] == "granted" and not each["ctx"] and each["action"] in UNDERTAKEN:
            grants[action] += each["action"] != "study:coerce"
        elif each["outcome"] in ENDS:
            ends[action] += 1
    return [
        f"{request_id}: {count} grants of {action}, {ends[action]} outcomes"
        for action, count in grants.items()
        if ends[action] < count
    ]


def _answers_without_records(told: Told, records: list[Any]) -> list[str]:
    if told.kind not in WRITES or not 200 <= told.status < 300:
        return []
    done = [
        each
        for each in records
        if each["outcome"] == "done" and each["action"] in WRITES[told.kind]
    ]
    cut_off = [each for each in records if each["reason"] == "cut-off"]
    if told.kind == "stow":
        # 202 is a success of some of it.
        uids = {each["detail"]["sop_instance_uid"] for each in done}
        missing = set(told.sop_uids) - uids if told.status == 200 else set()
        return [f"STOW was told stored, without a record: {each}" for each in missing]
    # A merge is done to two patients.
    if len(done) != (2 if told.kind == "merge" else 1) or cut_off:
        outcomes = [(each["action"], each["outcome"], each["reason"]) for each in records]
        return [f"{told.kind} {told.request_id} was told {told.status}, recorded {outcomes}"]
    return []
