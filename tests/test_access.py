"""The demo page answers only requests to its own host and from its own pages."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from spd_zoo.access import SameOrigin, host_name

Headers = dict[str, str]


def status(host: str, allowed: tuple[str, ...], headers: Headers, method: str = "POST", kind: str = "http") -> int:
    """The status that a request gets; 200 if it reaches the application."""
    sent: list[MutableMapping[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"status": 200})

    async def receive() -> MutableMapping[str, Any]:
        return {"type": f"{kind}.connect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    asyncio.run(SameOrigin(app, host, tuple(map(host_name, allowed)))(scope, receive, send))
    result: int = sent[0].get("status") or sent[0]["code"]
    return result


PUBLIC = "org-name.hf.space"


@pytest.mark.parametrize(
    ("host", "allowed", "headers"),
    [
        ("127.0.0.1", (), {"host": "127.0.0.1:7860"}),
        ("127.0.0.1", (), {"host": "localhost:7860", "origin": "http://localhost:7860"}),
        (
            "127.0.0.1",
            (),
            {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"},
        ),
        ("::1", (), {"host": "[::1]:7860", "origin": "http://[::1]:7860"}),
        ("127.0.0.1", (), {"host": "127.0.0.1", "origin": "http://127.0.0.1:80"}),
        ("0.0.0.0", (), {"host": "192.168.1.7:7860", "origin": "http://192.168.1.7:7860"}),
        ("0.0.0.0", ("Demo.Example.org",), {"host": "demo.example.org:7860"}),
    ],
)
def test_its_own_host_and_pages_are_answered(host: str, allowed: tuple[str, ...], headers: Headers) -> None:
    assert status(host, allowed, headers) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": PUBLIC, "x-forwarded-host": PUBLIC, "x-forwarded-proto": "https", "origin": f"https://{PUBLIC}"},
        {"host": "10.0.3.4:7860", "x-forwarded-host": PUBLIC, "origin": f"https://{PUBLIC}"},  # the proxy rewrote Host
        {"host": f"{PUBLIC}:443", "origin": f"https://{PUBLIC}", "x-forwarded-for": "203.0.113.9"},
        {"host": "10.0.3.4:7860"},  # a health check
    ],
)
def test_the_public_name_of_a_proxy_is_answered_if_it_is_allowed(headers: Headers) -> None:
    assert status("0.0.0.0", (PUBLIC,), headers) == 200
    public = any(PUBLIC in headers.get(name, "") for name in ("host", "origin"))
    assert status("0.0.0.0", (), headers) == (403 if public else 200)
    if "origin" in headers:
        assert status("0.0.0.0", (PUBLIC,), headers | {"origin": "https://other.hf.space"}) == 403


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "evil.example"},
        {"host": "evil.example", "x-forwarded-host": "127.0.0.1:7860"},
        {"host": "127.0.0.1.evil.example:7860"},
        {"host": "user@127.0.0.1:7860"},
        {"host": "192.168.1.7:7860"},
        {"host": "[::1"},
        {"host": "127.0.0.1:7860", "origin": "https://evil.example"},
        {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:3000"},  # another server on this machine
        {"host": "127.0.0.1:7860", "origin": "http://localhost:7860"},
        {"host": "127.0.0.1:7860", "origin": "null"},
        {"host": "127.0.0.1:7860", "origin": "https://127.0.0.1:7860@evil.example"},
    ],
    ids=str,
)
def test_other_hosts_and_other_sites_pages_are_refused(headers: Headers, method: str) -> None:
    assert status("127.0.0.1", (), headers, method) == 403
    assert status("127.0.0.1", (), headers, method, "websocket") == 1008


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_post_from_another_site_is_refused_without_an_origin_too(site: str) -> None:
    headers = {"host": "127.0.0.1:7860", "sec-fetch-site": site}
    assert status("127.0.0.1", (), headers) == 403
    assert status("127.0.0.1", (), headers, "GET") == 200  # a link to the page


@pytest.mark.parametrize("name", ["", "https://a.example", "a.example:80", "a.example/b", "u@a.example"])
def test_invalid_host_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a host name; write it like"):
        host_name(name)
