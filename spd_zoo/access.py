"""Restricts the demo page to requests to its own host and from its own pages."""

import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from ipaddress import ip_address
from typing import Any, TypeAlias
from urllib.parse import urlsplit

__all__ = ["SameOrigin", "host_name"]

Message: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
Send: TypeAlias = "Callable[[Message], Awaitable[None]]"
App: TypeAlias = "Callable[[Message, Receive, Send], Awaitable[None]]"

_DEFAULT_PORTS = {"http": 80, "https": 443}
_OTHER_SITES = ("cross-site", "same-site")  # values of Sec-Fetch-Site for pages of other sites


class SameOrigin:
    """ASGI middleware that refuses requests to other hosts (DNS rebinding) and from other sites' pages (CSRF).

    Accepted hosts are the address that the page listens on (or, if it listens on all addresses, every IP address and
    this machine's name) and "localhost". Behind a proxy, the public name of the page must be in `allowed`.

    Args:
        app: The application.
        host: The address that it listens on.
        allowed: Other accepted host names, as `host_name` returns them.
    """

    def __init__(self, app: App, host: str, allowed: Sequence[str] = ()) -> None:
        self.app = app
        self.allowed = set(allowed)
        self.names = {host.lower(), "localhost"}
        address = _address(host)
        self.all_addresses = address is not None and address.is_unspecified
        if self.all_addresses:
            self.names.add(socket.gethostname().lower())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it with status 403."""
        reason = self._reason_to_refuse(scope) if scope["type"] in ("http", "websocket") else None
        if reason is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": f"{reason}\n".encode()})

    def _reason_to_refuse(self, scope: Message) -> str | None:
        headers: dict[str, list[str]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts, origins = headers.get("host", []), headers.get("origin", [])
        host = _host_and_port(f"//{hosts[0]}") if len(hosts) == 1 else None
        if host is None or not self._is_own(host[0]):
            return f"this page does not answer to the host {', '.join(hosts) or '(none)'}; spd-zoo demo --allow-host"
        if origins:
            scheme, origin = origins[0].partition("://")[0], _host_and_port(origins[0])
            default = _DEFAULT_PORTS.get(scheme)
            same = origin is not None and (origin[0], origin[1] or default) == (host[0], host[1] or default)
            if len(origins) > 1 or origin is None or not (same or origin[0] in self.allowed):
                return f"this page accepts no requests from pages of {', '.join(origins)}; spd-zoo demo --allow-host"
        elif scope.get("method") == "POST" and "".join(headers.get("sec-fetch-site", [])) in _OTHER_SITES:
            return "this page accepts no requests from other pages"
        return None

    def _is_own(self, name: str) -> bool:
        return name in self.names or name in self.allowed or (self.all_addresses and _address(name) is not None)


def _address(host: str) -> Any:
    """An IP address; None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def _host_and_port(url: str) -> tuple[str, int | None] | None:
    """The lower-case host and the port of a URL; None if it has no host."""
    try:
        parts = urlsplit(url)
        if not parts.hostname or parts.username is not None or parts.path or parts.query or parts.fragment:
            return None
        return parts.hostname.rstrip("."), parts.port
    except ValueError:
        return None


def host_name(name: str) -> str:
    """Normalises a host name to the form that browsers send, in lower case.

    Args:
        name: The host name or address.

    Returns:
        The normalised name.

    Raises:
        ValueError: If it is something else, for example a URL.
    """
    is_ipv6 = getattr(_address(name), "version", None) == 6  # older Pythons accept anything in brackets
    host = _host_and_port(f"//[{name}]" if is_ipv6 else f"//{name}")
    if host is None or host[1] is not None:
        raise ValueError(f"{name!r} is not a host name; write it like demo.example.org, without scheme and port")
    return host[0]
