"""compose.yaml and the two Dockerfiles: what can be held without an engine.

Nothing here starts a container. Pinned images, no secret with a value, one way in, no privileges,
and that what is named exists and is called by its right name.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app import __version__
from app.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILES = ("app/Dockerfile", "ohif/Dockerfile")
PINNED = re.compile(r"[a-z0-9./-]+:(?=[^:]*[0-9]+\.[0-9]+)[A-Za-z0-9._-]+")

_LINE = re.compile(r"(?P<indent> *)(?P<item>- )?(?:(?P<key>[A-Za-z0-9_./-]+):)?(?: ?(?P<rest>.+))?")


def read_yaml(text: str) -> Any:
    """The YAML that compose.yaml keeps to: block mappings and lists, JSON lists, plain scalars.

    Raises ValueError for anything else, so that nothing is read differently from what is meant.
    """
    lines = [
        (number, line.rstrip())
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    value, rest = _block(lines, 0)
    if rest:
        raise ValueError(f"line {rest[0][0]}: unexpected indentation")
    return value


def _block(lines: list[tuple[int, str]], indent: int) -> tuple[Any, list[tuple[int, str]]]:
    mapping: dict[str, Any] = {}
    items: list[Any] = []
    while lines:
        number, line = lines[0]
        depth = len(line) - len(line.lstrip(" "))
        if depth < indent:
            break
        match = _LINE.fullmatch(line)
        if depth > indent or match is None or re.search(r"\t| #|^\s*[&*!|>%@`]", line):
            raise ValueError(f"line {number}: not the YAML that this reader knows")
        lines = lines[1:]
        if match["item"]:
            items.append(_scalar(line.lstrip(" ")[2:], number))
            continue
        key, rest = match["key"], match["rest"]
        if key is None or key in mapping:
            raise ValueError(f"line {number}: no key, or one that is there twice")
        if rest is not None:
            mapping[key] = _scalar(rest, number)
        elif lines and len(lines[0][1]) - len(lines[0][1].lstrip(" ")) > indent:
            mapping[key], lines = _block(lines, indent + 2)
        else:
            mapping[key] = None
    if mapping and items:
        raise ValueError("a list and a mapping in one block")
    return (items or mapping), lines


def _scalar(text: str, number: int) -> Any:
    if text[0] in '["':
        return json.loads(text)
    if text in ("true", "false"):
        return text == "true"
    if text[0] in "{'&*!|>%@`?-" or ": " in text:
        raise ValueError(f"line {number}: quote this value")
    return int(text) if text.isdigit() else text


COMPOSE: dict[str, Any] = read_yaml((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
every_service = pytest.mark.parametrize("name", sorted(SERVICES))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: b", {"a": "b"}),
        ('a:\n  b: 1\n  # c\n  c: ["d", "e"]\nf:', {"a": {"b": 1, "c": ["d", "e"]}, "f": None}),
        ('a:\n  - b:c\n  - "d: e"', {"a": ["b:c", "d: e"]}),
        ("a: true", {"a": True}),
        ('a: "8"', {"a": "8"}),
    ],
)
def test_the_reader(text: str, value: Any) -> None:
    assert read_yaml(text) == value


@pytest.mark.parametrize(
    "text", ["a: b\na: c", "a: &b c", "a: |\n  b", "a:\n   b: c", "a: {b: c}", "a: b # c", "a: 'b'"]
)
def test_the_reader_guesses_nothing(text: str) -> None:
    with pytest.raises(ValueError, match=r"line|block"):
        read_yaml(text)


def test_the_services_are_those_of_the_design() -> None:
    assert set(SERVICES) == {"db", "migrate", "app", "orthanc", "edge"}


@every_service
def test_images_are_pinned(name: str) -> None:
    service = SERVICES[name]
    image = service["image"]
    assert PINNED.fullmatch(image), image
    if "build" in service:
        assert image.endswith(f":{__version__}")


@pytest.mark.parametrize("path", DOCKERFILES)
def test_base_images_are_pinned(path: str) -> None:
    bases = re.findall(r"^FROM (\S+)", (REPOSITORY / path).read_text(), re.MULTILINE)
    assert bases
    assert [base for base in bases if not PINNED.fullmatch(base)] == []


@every_service
def test_nothing_secret_has_a_value(name: str) -> None:
    """Passwords, and URLs that hold one, come from files; a shared secret from outside or not."""
    for variable, value in SERVICES[name].get("environment", {}).items():
        assert not re.search(r"://[^/]*@", str(value or "")), variable
        if re.search("PASSWORD|SECRET|TOKEN|DATABASE_URL", variable):
            assert value is None or str(value).startswith("/run/secrets/"), variable


def test_secrets_are_files_from_a_folder_that_must_be_named() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert set(secret) == {"file"}
        assert re.fullmatch(r"\$\{LIGHTBOX_SECRETS_DIR:\?[^}]+\}/" + name, secret["file"])


@every_service
def test_each_secret_goes_where_it_is_needed(name: str) -> None:
    given = set(SERVICES[name].get("secrets", []))
    assert (
        given
        == {
            "db": {"postgres_password", "lightbox_database_url", "lightbox_migration_database_url"},
            "migrate": {"lightbox_database_url", "lightbox_migration_database_url"},
            "app": {"lightbox_database_url", "lightbox_orthanc_password"},
            "orthanc": {"lightbox_orthanc_password"},
            "edge": {"lightbox_orthanc_password"},
        }[name]
    )
    assert given <= set(COMPOSE["secrets"])


def test_the_app_finds_its_secrets_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("DATABASE_URL", "ORTHANC_PASSWORD", "JWT_SECRET", "OIDC_ISSUER"):
        monkeypatch.delenv(f"LIGHTBOX_{variable}", raising=False)
    (tmp_path / "lightbox_database_url").write_text("postgresql+psycopg://app:x@db/lightbox\n")
    (tmp_path / "lightbox_orthanc_password").write_text("a password\n")
    more: dict[str, Any] = {
        "_secrets_dir": tmp_path,
        "orthanc_url": "http://orthanc:8042",
        "orthanc_username": "lightbox",
        "oidc_issuer": "https://idp.example",
    }
    settings = Settings(**more)
    assert settings.orthanc_password.get_secret_value() == "a password"
    assert settings.database_url == "postgresql+psycopg://app:x@db/lightbox"
    (tmp_path / "lightbox_orthanc_password").unlink()
    with pytest.raises(ValidationError):
        Settings(**more)


@pytest.mark.parametrize("name", ["app", "migrate"])
def test_the_app_knows_every_variable_it_is_given(name: str) -> None:
    known = {f"LIGHTBOX_{field.upper()}" for field in Settings.model_fields}
    assert set(SERVICES[name].get("environment", {})) <= known
    assert set(SERVICES[name]["secrets"]) <= {each.lower() for each in known}


def test_only_the_edge_is_published() -> None:
    published = {name: each["ports"] for name, each in SERVICES.items() if "ports" in each}
    assert set(published) == {"edge"}
    for port in published["edge"]:
        assert re.fullmatch(
            r"\$\{LIGHTBOX_PUBLISH_ADDRESS:-127\.0\.0\.1\}:(8000:8000|3001:3001)", port
        )
    assert not any("network_mode" in each or "expose" in each for each in SERVICES.values())


def test_who_shares_a_network() -> None:
    """Orthanc and the database reach neither the outside nor each other."""
    networks: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for network in service["networks"]:
            networks.setdefault(network, set()).add(name)
    assert networks == {
        "published": {"edge"},
        "identity": {"app"},
        "front": {"edge", "app"},
        "archive": {"edge", "app", "orthanc"},
        "data": {"db", "migrate", "app"},
    }
    open_ones = {name for name, each in COMPOSE["networks"].items() if each is None}
    assert open_ones == {"published", "identity"}
    assert all(each == {"internal": True} for each in COMPOSE["networks"].values() if each)


@every_service
def test_nothing_runs_with_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "devices", "pid", "ipc"}
    if "build" not in service:
        assert service["user"] not in ("root", "0", "0:0")


@pytest.mark.parametrize("path", DOCKERFILES)
def test_our_images_run_unprivileged(path: str) -> None:
    users = re.findall(r"^USER (\S+)", (REPOSITORY / path).read_text(), re.MULTILINE)
    assert users
    assert users[-1].partition(":")[0] not in ("root", "0")


def test_our_image_is_made_of_hashed_wheels() -> None:
    text = (REPOSITORY / "app/Dockerfile").read_text()
    assert "--require-hashes" in text
    assert "--only-binary :all:" in text
    assert "apt-get" not in text


@every_service
def test_whatever_runs_says_how_it_is(name: str) -> None:
    service = SERVICES[name]
    if service["restart"] == "no":
        return
    assert service["healthcheck"]["test"][0] == "CMD"
    for other, wanted in service.get("depends_on", {}).items():
        once = SERVICES[other]["restart"] == "no"
        assert wanted["condition"] == (
            "service_completed_successfully" if once else "service_healthy"
        )


def test_the_health_address_is_the_apps() -> None:
    assert "/api/v1/dicom/health" in SERVICES["app"]["healthcheck"]["test"][-1]
    assert "/api/v1/dicom/health" in (REPOSITORY / "app/Dockerfile").read_text()


@every_service
def test_what_is_named_exists(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert (REPOSITORY / service["build"]["dockerfile"]).is_file()
    for volume in service.get("volumes", []):
        source = volume.partition(":")[0]
        if source.startswith("."):
            assert (REPOSITORY / source).is_file(), source
            assert volume.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("path", DOCKERFILES)
def test_what_is_copied_exists_and_is_not_ignored(path: str) -> None:
    let_in = re.findall(r"^!(\S+)", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE)
    copied = re.findall(r"^COPY (?!--from)(.+)$", (REPOSITORY / path).read_text(), re.MULTILINE)
    assert copied
    for line in copied:
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert source.partition("/")[0] in let_in


def test_orthanc_is_given_every_variable_of_its_configuration() -> None:
    configuration = (REPOSITORY / "orthanc/orthanc.json").read_text(encoding="utf-8")
    asked = set(re.findall(r"\$\{(LIGHTBOX_[A-Z_]+)\}", configuration))
    service = SERVICES["orthanc"]
    exported = set(re.findall(r"export (LIGHTBOX_[A-Z_]+)", service["entrypoint"][-1]))
    assert set(service["environment"]) | exported == asked
    assert service["environment"]["LIGHTBOX_ORTHANC_DICOM_ENABLED"] == "false"


def test_app_edge_and_orthanc_name_one_user() -> None:
    users = {
        each["environment"]["LIGHTBOX_ORTHANC_USERNAME"]
        for name, each in SERVICES.items()
        if name not in ("db", "migrate")
    }
    assert users == {"lightbox"}


def test_the_script_of_the_database_is_one_the_image_will_run() -> None:
    script = REPOSITORY / "app/postgres-init.sh"
    assert script.stat().st_mode & 0o111
    assert script.read_text().startswith("#!/bin/sh\n")
