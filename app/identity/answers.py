"""JSON from servers and tokens that may be broken or hostile: bounded, and in one meaning."""

import json
from json import JSONDecoder
from typing import Any

import httpx


class TooMuch(ValueError):
    """An answer is longer than it may be."""


class StrictDecoder(JSONDecoder):
    """JSON in which no name stands twice in an object (RFC 7519, section 4) and no number is NaN.
    Which of two values holds is what attackers and parsers disagree about."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=_unique, parse_constant=_refuse)


def strict_json(data: bytes) -> Any:
    """Parsed UTF-8 JSON. Raises ValueError, for too deep nesting too."""
    try:
        return json.loads(data.decode("utf-8"), cls=StrictDecoder)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


async def read_json(client: httpx.AsyncClient, request: httpx.Request, *, limit: int) -> Any:
    """What a 200 says, of at most `limit` bytes; no redirect is followed.

    Raises httpx.HTTPError, and ValueError for another status and for what is no strict JSON.
    """
    # A body that comes packed could be much longer than it looks.
    request.headers["Accept-Encoding"] = "identity"
    response = await client.send(request, stream=True, follow_redirects=False)
    try:
        if response.status_code != 200:
            raise ValueError(f"the answer is {response.status_code}")
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > limit:
                raise TooMuch(f"the answer has more than {limit} bytes")
    finally:
        await response.aclose()
    return strict_json(bytes(body))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
