"""An image from the web: of a public address, not too large, and not for longer than the user will wait."""

from __future__ import annotations

import base64
import ipaddress
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from string import punctuation
from threading import Timer
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from shapadapter.core.errors import ImageError, redacted

MAX_BYTES = 50 * 2**20
SECONDS = 60.0
"""How long fetching may take in all, unless the user says otherwise."""

_REDIRECTS = 5
_CHUNK = 2**16


def fetch(address: str, seconds: float | None = None) -> bytes:
    """Fetch a file, without its server learning more than the address."""
    ends, here = time.monotonic() + (SECONDS if seconds is None else seconds), address
    for _ in range(_REDIRECTS + 1):
        with _explained(address, ends), _answer(here, ends) as answer:
            if answer.status not in (301, 302, 303, 307, 308):
                return _content(answer)
            here = urljoin(here, answer.headers.get("Location", ""))
    raise ImageError(f"Cannot fetch image {redacted(address)}: it leads from one address to the next.")


@contextmanager
def _explained(address: str, ends: float) -> Iterator[None]:
    """Say in one sentence why an address cannot be fetched."""
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:
        late = time.monotonic() >= ends or isinstance(error, TimeoutError)
        why = "it takes too long: pass a larger timeout=" if late else _reason(error)
        # Without the cause, which may hold the whole address.
        raise ImageError(f"Cannot fetch image {redacted(address)}: {why}.") from None


def _reason(error: Exception) -> str:
    said = str(error) if isinstance(error, ImageError | OSError) else ""  # the rest quote what the server sent
    return getattr(error, "strerror", None) or said or type(error).__name__


def _content(answer: HTTPResponse) -> bytes:
    if answer.status != 200:
        raise ImageError(f"the server answered {answer.status}")
    content = bytearray()
    while len(content) <= MAX_BYTES and (chunk := answer.read(_CHUNK)):
        content += chunk
    if len(content) > MAX_BYTES or (answer.length or 0) > MAX_BYTES:
        raise ImageError(f"it has more than {MAX_BYTES // 2**20} MB")
    if answer.length:
        raise ImageError(f"the connection ended {answer.length} bytes too early")
    return bytes(content)


@contextmanager
def _answer(address: str, ends: float) -> Iterator[HTTPResponse]:
    """What a server says of an address; the connection is cut when the time is up, whatever it is waiting for."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ImageError("it leads to what is no address of a server")
    seconds = max(ends - time.monotonic(), 0.001)
    connection, target, headers = _asked(parts, parts.hostname, seconds)
    clock = Timer(seconds, lambda: _cut(connection))
    clock.daemon = True
    clock.start()
    try:
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as answer:
            yield answer
        if time.monotonic() >= ends:  # what was cut off can look like an end
            raise TimeoutError
    finally:
        clock.cancel()
        connection.close()


def _asked(parts: SplitResult, host: str, seconds: float) -> tuple[_Connection, str, dict[str, str]]:
    """Over which connection, not open yet, to ask for what, with which headers."""
    headers = {"User-Agent": "shapadapter", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
    headers |= _authorization(parts, "Authorization")
    target = quote(parts._replace(scheme="", netloc="", fragment="", path=parts.path or "/").geturl(), punctuation)
    proxies = {} if proxy_bypass(host) else getproxies()
    proxy = urlsplit(proxies.get(parts.scheme) or proxies.get("all") or "")
    kind = partial(_SecureConnection, context=httpx.create_ssl_context()) if parts.scheme == "https" else _Connection
    if not proxy.hostname:
        return kind(host, parts.port, timeout=seconds), target, headers
    with suppress(socket.gaierror):  # which the proxy may know
        _public(host, parts.port)
    known = _authorization(proxy, "Proxy-Authorization")
    connection = kind(proxy.hostname, proxy.port or 80, timeout=seconds)
    connection.through_proxy = True
    if parts.scheme == "https":
        connection.set_tunnel(host, parts.port, headers=known)
        return connection, target, headers
    return connection, f"http://{parts.netloc.rpartition('@')[2]}{target}", headers | known


def _authorization(parts: SplitResult, header: str) -> dict[str, str]:
    """The header for a name and password in an address; none without."""
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: f"Basic {base64.b64encode(pair.encode()).decode()}"}


class _Connection(HTTPConnection):
    """A connection to a public address, or to the user's own proxy."""

    through_proxy = False
    opened: socket.socket | None = None
    """An answer reads on from the socket when the connection no longer knows it."""

    def connect(self) -> None:
        """Connect; the name is looked up once, so that it cannot mean another address afterwards."""
        if self.through_proxy:
            super().connect()
        else:
            self.sock = _connected(_public(self.host, self.port), float(self.timeout or SECONDS))
        self.opened = self.sock


class _SecureConnection(HTTPSConnection, _Connection):
    """The same over TLS."""

    def connect(self) -> None:
        """Connect and shake hands."""
        super().connect()
        self.opened = self.sock


def _cut(connection: _Connection) -> None:
    """End what a thread waits for; past TLS, which would say goodbye first."""
    if connection.opened is not None:
        with suppress(OSError):  # closed by now
            socket.socket.shutdown(connection.opened, socket.SHUT_RDWR)


def _connected(addresses: list[Any], seconds: float) -> socket.socket:
    """A socket connected to the first of some addresses that answers, on which no wait is longer than the rest of the time."""
    ends, trouble = time.monotonic() + seconds, OSError()
    for family, kind, protocol, _, address in addresses:
        opened = socket.socket(family, kind, protocol)
        try:
            opened.settimeout(max(ends - time.monotonic(), 0.001))
            opened.connect(address)
            opened.settimeout(max(ends - time.monotonic(), 0.001))
            return opened
        except OSError as error:
            opened.close()
            trouble = error
    raise trouble


def _public(host: str, port: int | None) -> list[Any]:
    """What `getaddrinfo` finds for a host, without addresses of private networks."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    public = [one for one in found if is_public(str(one[4][0]))]
    if not public:
        raise ImageError(
            "it is on this computer or in a private network, where nothing is fetched from; fetch it yourself and pass "
            "its bytes"
        )
    return public


def is_public(address: str) -> bool:
    """Whether anybody can reach an IP address: not one of this computer, of a private network or of a cloud's own services."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        # Addresses of version 4 in those of version 6: mapped, 6to4, and translated by a gateway.
        gateway = found in ipaddress.ip_network("64:ff9b::/96") or found in ipaddress.ip_network("64:ff9b:1::/48")
        inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if gateway else found.ipv4_mapped or found.sixtofour
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast
