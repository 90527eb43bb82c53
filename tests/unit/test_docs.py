"""The documentation is held against the code: settings, routes, errors, audit words, links.

The table of settings in docs/configuration.md is made from the settings themselves. After a
change of a setting, write it anew:

    .venv/bin/python -m tests.unit.test_docs
"""

import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from app.access.policy import ANY_PATIENT, POLICY, READS, TREATS, WORKS_ON, WRITES, Reason
from app.audit import Action, Outcome
from app.errors import LightboxError
from app.identity import Role
from app.main import create_app
from app.settings import Settings
from app.viewer.endings import EndedBecause
from tests.fake_orthanc import URL
from tests.lightbox import make_settings

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
CONFIGURATION = DOCS / "configuration.md"
BEGIN, END = "<!-- settings: made by tests/unit/test_docs.py -->", "<!-- end of settings -->"

MARKDOWN = sorted([*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")])
DECISIONS = sorted((DOCS / "decisions").glob("[0-9]*.md"))
# Who may be linked to: standards, formats, and the projects that Lightbox joins.
LINKED_HOSTS = {
    "dicom.nist.gov",
    "dicom.nema.org",
    "hl7.org",
    "keepachangelog.com",
    "ohif.org",
    "orthanc.uclouvain.be",
    "profiles.ihe.net",
    "semver.org",
    "terminology.hl7.org",
    "www.rfc-editor.org",
}
EXAMPLE_HOSTS = re.compile(r"localhost|127\.0\.0\.1|app|orthanc|db|host|([a-z0-9-]+\.)*example")


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------- settings


def settings_table() -> str:
    """The settings as Markdown: one row a field, in the order of `Settings`."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        if field.is_required():
            default = "required"
        elif name == "spool_dir":
            default = "the system's folder for temporary files"  # differs by machine
        else:
            default = _shown(field.default)
        assert field.description, f"{name} has no description"
        meaning = re.sub(r"`([a-z_]+)`", _variable, field.description)
        rows.append(f"| `LIGHTBOX_{name.upper()}` | {default} | {meaning.replace('|', '&#124;')} |")
    return "\n".join(rows)


def _variable(name: re.Match[str]) -> str:
    """Another setting by its variable; other words as they are."""
    return f"`LIGHTBOX_{name[1].upper()}`" if name[1] in Settings.model_fields else name[0]


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "empty"
    return f"`{','.join(value)}`" if isinstance(value, tuple) else f"`{value}`"


def with_settings_table(text: str) -> str:
    """`text` with the table between its marks written anew."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{CONFIGURATION} lacks its marks"
    assert end, f"{CONFIGURATION} lacks its marks"
    return f"{before}{begin}\n\n{settings_table()}\n\n{end}{after}"


def test_every_setting_is_documented_as_it_is() -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert text == with_settings_table(text), "run: .venv/bin/python -m tests.unit.test_docs"


def test_the_variables_of_the_demo_are_documented() -> None:
    source = "".join(
        (REPOSITORY / "app" / "demo" / name).read_text() for name in ("run.py", "seed.py")
    )
    read_there = set(re.findall(r'(?:environ\.get|port)\(\s*"(LIGHTBOX_[A-Z_]+)"', source))
    section = read("configuration.md").partition("## The demo")[2]
    assert set(re.findall(r"^\| `(LIGHTBOX_[A-Z_]+)`", section, re.MULTILINE)) == read_there


# ------------------------------------------------------------------------------------ API


def operations() -> set[str]:
    """Every operation of OpenAPI as `GET /path`."""
    paths = create_app(make_settings("sqlite+aiosqlite://", URL)).openapi()["paths"]
    return {f"{method.upper()} {path}" for path, each in paths.items() for method in each}


def test_every_operation_is_documented_and_no_other() -> None:
    text = read("api.md")
    named = set(re.findall(r"`((?:GET|POST|PUT|PATCH|DELETE) /[^` ?]*)`", text))
    for path in re.findall(r"`GET {root}(/[^` ?]*)`", text):
        named |= {f"GET {root}{path}" for root in ("/dicom-web", "/s/{ctx}/dicom-web")}
    assert named == operations()


def errors(kind: type[LightboxError] = LightboxError) -> Iterator[type[LightboxError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from errors(each)


def test_every_problem_is_documented_and_no_other() -> None:
    rows = re.findall(r"^\| `urn:lightbox:problem:([a-z-]+)` \| ([0-9]+) \|", read("api.md"), re.M)
    assert sorted(rows) == sorted({(each.slug, str(each.status)) for each in errors()})


def test_the_table_of_rights_is_the_policy() -> None:
    """One row an action that a role can have, one column a role; which patients, in the cell."""
    words = {
        "": None,
        "yes": ANY_PATIENT,
        "treats": TREATS,
        "site": READS,
        "own site": WRITES,
        "works on": WORKS_ON,
    }
    section = read("api.md").partition("## Roles")[2].partition("\n## ")[0]
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    roles = [Role(each) for each in header[1:]]
    assert set(roles) == set(Role)
    said = {
        (Action(row[0].strip("`")), role): words[cell]
        for row in rows
        for role, cell in zip(roles, row[1:], strict=True)
    }
    policy = {(action, role): by for role, each in POLICY.items() for action, by in each.items()}
    assert {key: by for key, by in said.items() if by is not None} == policy


# ---------------------------------------------------------------------------------- audit


@pytest.mark.parametrize(
    ("heading", "words"),
    [("## Actions", Action), ("## Outcomes", Outcome)],
    ids=["actions", "outcomes"],
)
def test_every_word_of_the_trail_has_its_row(heading: str, words: type[StrEnum]) -> None:
    section = read("audit.md").partition(heading)[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z:-]+)` \|", section, re.MULTILINE)
    assert sorted(rows) == sorted(each.value for each in words)


def test_every_reason_has_its_row() -> None:
    section = read("audit.md").partition("## Reasons")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)
    assert len(rows) == len(set(rows))
    # Those without a vocabulary of their own in the code.
    others = {
        *("bad-cookie", "bad-token", "no-cookie", "no-token"),
        *("not-in-session", "unknown", "unknown-code", "used"),
        "replayed",
        *("not-a-uid", "not-enumerated", "not-plain", "too-many-tries"),
        *("archive-replaced", "study-gone", "instances-gone", "stored-anew"),
        *("rejected", "undone", "cut-off"),
    }
    assert set(rows) == {*map(str, Reason), *map(str, EndedBecause), *others}
    source = "".join(path.read_text() for path in (REPOSITORY / "app").rglob("*.py"))
    assert [word for word in others if f'"{word}"' not in source] == []
    # Up to the next name of an argument or a member.
    written = " ".join(
        re.findall(r'(?:\breason|"reason")(?:=|: )(.*?)(?:, "?\w+"?[=:]|$)', source, re.M)
    )
    assert set(re.findall(r'"([a-z-]+)"', written)) - {"reason"} <= set(rows)


# --------------------------------------------------------------------------- links, pages


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        url = urlsplit(target)
        if url.scheme:
            assert url.hostname in LINKED_HOSTS, target
            continue
        there = (path.parent / unquote(url.path)).resolve() if url.path else path
        assert there.is_relative_to(REPOSITORY), target
        assert there.exists(), target
        if url.fragment:
            assert url.fragment in anchors(there), target


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_addresses_are_known_or_examples(path: Path) -> None:
    hosts = re.findall(
        r"[a-z+]+://(?:[^/@`\n]*@)?([A-Za-z0-9][A-Za-z0-9.-]*)", path.read_text("utf-8")
    )
    strange = [h for h in hosts if h not in LINKED_HOSTS and not EXAMPLE_HOSTS.fullmatch(h)]
    assert strange == []


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_names_the_tests_that_hold_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Context", "Decision", "Consequences", "Held by"]
    held = re.findall(
        r"`(tests/[a-z_/]+\.py)(?:::(test_[a-z0-9_]+))?`", text.partition("## Held")[2]
    )
    assert held
    for file, name in held:
        assert (REPOSITORY / file).is_file(), file
        assert not name or f"def {name}(" in (REPOSITORY / file).read_text(), f"{file}::{name}"


def test_every_page_can_be_found() -> None:
    """From the README or from another page."""
    linked = {
        (path.parent / unquote(urlsplit(target).path)).resolve()
        for path in MARKDOWN
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(path))
        if not urlsplit(target).scheme and urlsplit(target).path
    }
    assert [page for page in DOCS.rglob("*.md") if page.resolve() not in linked] == []


if __name__ == "__main__":
    CONFIGURATION.write_text(with_settings_table(CONFIGURATION.read_text("utf-8")), "utf-8")
