"""The same searches on SQLite and PostgreSQL find the same: what the standard says."""

import random

import sqlalchemy as sa

from tests.lightbox import Lightbox
from tests.live.conftest import DatabaseUrls
from tests.matching import FOLDED, TAGS, WANTED, many_studies, matches

ALPHABET = "aADdMR-^*?[]_%\\1 oö"


def made_up(times: int) -> list[tuple[str, str]]:
    """Patterns of what has a meaning to GLOB, LIKE or regular expressions; always the same ones."""
    chance = random.Random(4711)
    texts = ("AccessionNumber", "ModalitiesInStudy", "PatientID", "StudyID", *FOLDED)
    return [
        (chance.choice(texts), "".join(chance.choices(ALPHABET, k=chance.randint(1, 5))))
        for _ in range(times)
    ]


async def test_either_database_finds_what_the_standard_says(live: Lightbox) -> None:
    await all_found(live)


async def test_whatever_order_of_letters_the_database_was_made_with(
    live: Lightbox, database: DatabaseUrls
) -> None:
    """PostgreSQL sorts by language unless told otherwise: there a tilde stands before a digit."""
    if database.is_postgres:
        engine = sa.create_engine(database.sync_owner)
        with engine.begin() as connection:
            columns = connection.scalars(
                sa.text(
                    "SELECT column_name FROM information_schema.columns WHERE table_name = 'study'"
                    " AND data_type = 'character varying' AND column_name <> 'study_instance_uid'"
                )
            ).all()
            for name in columns:
                how = f'ALTER TABLE study ALTER COLUMN {name} TYPE varchar COLLATE "en-x-icu"'
                connection.execute(sa.text(how))
        engine.dispose()
    await all_found(live)


async def all_found(live: Lightbox) -> None:
    sent = await many_studies(live)
    total = 0
    for keyword, wanted in [*WANTED, *made_up(150)]:
        expected = {
            each["StudyInstanceUID"]
            for each in sent
            if matches(keyword, wanted, [str(each.get(keyword, ""))])
        }
        answer = await live.ask(
            "clinician", "GET", "/dicom-web/studies", params={TAGS[keyword]: wanted}
        )
        assert answer.status_code == 200, (keyword, wanted, answer.text)
        found = {row["0020000D"]["Value"][0] for row in answer.json()}
        assert found == expected, (keyword, wanted)
        assert answer.headers["x-total-count"] == str(len(expected)), (keyword, wanted)
        total += len(expected)
    assert total > 100, "patterns that match nothing show nothing"
    newest = [each["StudyInstanceUID"] for each in reversed(sent)]
    pages = [
        await live.ask(
            "clinician", "GET", "/dicom-web/studies", params={"limit": 4, "offset": offset}
        )
        for offset in (0, 4, 8, 12)
    ]
    assert [row["0020000D"]["Value"][0] for page in pages for row in page.json()] == newest
    assert {page.headers["x-total-count"] for page in pages} == {"10"}
