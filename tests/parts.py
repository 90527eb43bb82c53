"""Answers in parts (PS3.18 8.6.1.2), taken apart by the letter: every byte has its place."""

import re
from dataclasses import dataclass

import httpx
from python_multipart.multipart import parse_options_header


@dataclass(frozen=True)
class Part:
    """One part: its Content-Type as it stands there, and its bytes."""

    media_type: str
    content: bytes


def parts_of(answer: httpx.Response) -> list[Part]:
    """The parts of a whole answer. It has to be well formed (RFC 2046 5.1.1), nothing stands
    before, between or behind the parts, and each is of the type that the answer says."""
    assert answer.status_code == 200, answer.text
    kind, parameters = parse_options_header(answer.headers["content-type"])
    assert kind == b"multipart/related", kind
    assert set(parameters) == {b"type", b"boundary"}
    boundary = parameters[b"boundary"]
    assert len(boundary) >= 16, "one that could stand in a file"
    first, last = b"--" + boundary + b"\r\n", b"\r\n--" + boundary + b"--\r\n"
    assert answer.content.startswith(first), answer.content[:200]
    assert answer.content.endswith(last), answer.content[-200:]
    inside = answer.content[len(first) : -len(last)]
    found = []
    for part in inside.split(b"\r\n--" + boundary + b"\r\n"):
        head, blank, content = part.partition(b"\r\n\r\n")
        assert blank, part[:200]
        assert boundary not in content
        name, colon, media_type = head.decode("ascii").partition(": ")
        assert (name, colon) == ("Content-Type", ": "), head
        assert media_type.partition(";")[0] == parameters[b"type"].decode("ascii")
        found.append(Part(media_type, content))
    return found


def files_of(answer: httpx.Response) -> list[str]:
    """Of an envelope that the app has written for the edge to fill: the instances whose files
    come into it, by their Orthanc ids. Nothing else may stand in it."""
    found = []
    for part in parts_of(answer):
        place = re.fullmatch(
            rb'<!--# include virtual="/_orthanc-whole/instances/([0-9a-f-]{44})/file"'
            rb'(?: wait="yes")? -->',
            part.content,
        )
        assert place, part.content[:200]
        assert re.fullmatch(r"application/dicom; transfer-syntax=[0-9.]+", part.media_type)
        found.append(place[1].decode())
    return found
