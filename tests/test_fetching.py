"""Images from the web: what is too large, too slow, private or in a loop is given up, and nothing is left behind."""

import io
import socket
import ssl
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from shapadapter import ImageError
from shapadapter.data import download as fetching
from shapadapter.data.download import fetch, is_public
from shapadapter.data.images import open_image

PNG = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(PNG, format="PNG")
PNG = PNG.getvalue()
OK = b"HTTP/1.1 200 OK\r\n"


class Server:
    """A server on this computer that answers each path with a function of the connection; `asked` is what it was sent."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection:
            said = connection.recv(65536)
            self.asked.append(said.decode(errors="replace"))
            path = self.asked[-1].split()[1].split("?")[0].rpartition("/")[2]
            with suppress(OSError):  # the client has left
                self.answers[path](connection)


def drip(first, drop=b"a", pause=0.02):
    def answer(connection):
        connection.sendall(first)
        for _ in range(2000):
            connection.sendall(drop)
            time.sleep(pause)

    return answer


def say(*parts):
    return lambda connection: [connection.sendall(part) for part in parts]


def to(address):
    return say(b"HTTP/1.1 302 Found\r\nLocation: " + address.encode() + b"\r\n\r\n")


@pytest.fixture
def server(monkeypatch):
    """A server of many manners, and its address taken for a public one, that of 127.0.0.2 not."""
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    large = b"x" * 2**20
    made = Server(
        {
            "good": say(OK + f"Content-Length: {len(PNG)}\r\n\r\n".encode(), PNG),
            "until-closed": say(OK + b"\r\n", PNG),
            "in-chunks": say(
                OK + b"Transfer-Encoding: chunked\r\n\r\n", f"{len(PNG):x}\r\n".encode(), PNG, b"\r\n0\r\n\r\n"
            ),
            "announced": say(OK + b"Content-Length: 99999999999\r\n\r\nx"),
            "endless": say(OK + b"\r\n", *[large] * 60),
            "endless-chunks": say(OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"100000\r\n" + large + b"\r\n"] * 60),
            "silent": lambda connection: time.sleep(20),
            "status": drip(b"HTTP/1.1 "),
            "headers": drip(OK + b"X: "),
            "continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            "body": drip(OK + b"\r\n"),
            "length": drip(OK + b"Content-Length: 1000000\r\n\r\n"),
            "chunk": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
            "trailer": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
            "cut": say(OK + b"Content-Length: 1000\r\n\r\nabc"),
            "garbage": say(b"SSH-2.0-OpenSSH_9.6\r\n"),
            "nothing": say(),
            "zipped": say(OK + b"Content-Encoding: gzip\r\n\r\n", b"\x1f\x8b" + b"0" * 100),
            "moved": to("good?key=1"),
            "loop": to("loop"),
            "file": to("file:///etc/passwd"),
            "bad": to("http://[::"),
        }
    )
    made.answers["inside"] = to(made.url.replace("127.0.0.1", "127.0.0.2") + "/good")
    yield made
    made.listening.close()


def test_what_is_sent_in_any_way_arrives(server):
    for path in ("good", "until-closed", "in-chunks", "moved"):
        assert fetch(f"{server.url}/{path}") == PNG
    assert fetch(f"{server.url}/Bilder über/good?größe=1 2") == PNG
    assert "GET /Bilder%20%C3%BCber/good?gr%C3%B6%C3%9Fe=1%202 HTTP/1.1" in server.asked[-1]
    assert fetch(server.url.replace("//", "//me:p%40ss@") + "/good") == PNG
    assert "Authorization: Basic bWU6cEBzcw==" in server.asked[-1]


@pytest.mark.parametrize("path", ["announced", "endless", "endless-chunks"])
def test_what_is_large_is_given_up(server, path):
    with pytest.raises(ImageError, match="it has more than 50 MB"):
        fetch(f"{server.url}/{path}")


@pytest.mark.parametrize("path", ["silent", "status", "headers", "continue", "body", "length", "chunk", "trailer"])
def test_what_is_slow_is_given_up_in_time(server, path):
    threads, begin = threading.active_count(), time.monotonic()
    with pytest.raises(ImageError, match=rf"{path}: it takes too long: pass a larger timeout="):
        fetch(f"{server.url}/{path}", seconds=0.4)
    assert time.monotonic() - begin < 2
    time.sleep(0.1)
    assert [one for one in threading.enumerate() if isinstance(one, threading.Timer)] == []
    assert threading.active_count() <= threads + 2  # the server's own


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("cut", "ended 997 bytes too early"),
        ("garbage", "BadStatusLine"),
        ("nothing", "Remote end closed connection"),
        ("loop", "leads from one address to the next"),
        ("file", "no address of a server"),
        ("bad", "ValueError"),
        ("inside", "in a private network"),
    ],
)
def test_what_is_wrong_is_said_without_secrets(server, path, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        fetch(server.url.replace("//", "//me:secret@") + f"/{path}?signature=secret", seconds=5)
    assert f"{server.url}/{path}" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert len(server.asked) <= 6


def test_what_a_server_packs_is_not_unpacked(server):
    assert fetch(f"{server.url}/zipped")[:2] == b"\x1f\x8b"
    assert "Accept-Encoding: identity" in server.asked[-1]
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, format="PNG")
    server.answers["bomb"] = say(OK + b"\r\n", bomb.getvalue())
    with pytest.raises(ImageError, match="unpacks to too much"):
        open_image(fetch(f"{server.url}/bomb"))


def test_private_addresses_are_not_asked():
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    for host in (
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0.0.0.0",
        "2130706433",
        "0x7f.1",
        "[::ffff:127.0.0.1]",
        "10.0.0.1",
    ):
        with pytest.raises(ImageError, match="on this computer or in a private network"):
            fetch(f"http://{host}:{port}/x", seconds=3)
    for address in ("http://", "http://h:99999/", "http://h:x/", "https:///a", "ftp://h/x", "http://a b/"):
        with pytest.raises(ImageError, match="Cannot fetch image"):
            fetch(address, seconds=3)
    listening.setblocking(False)
    with pytest.raises(BlockingIOError):
        listening.accept()
    listening.close()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("2002:808:808::", True),
        ("64:ff9b::808:808", True),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("192.168.1.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
    ],
)
def test_what_is_public(address, public):
    assert is_public(address) == public


def test_a_name_is_looked_up_once(server, monkeypatch):
    """A second look could find another address, one inside."""
    port, looked = int(server.url.rpartition(":")[2]), []

    def look(host, port, **_):
        looked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", look)
    assert fetch(f"http://pictures.example:{port}/good") == PNG
    assert looked == ["pictures.example"]
    assert f"Host: pictures.example:{port}" in server.asked[-1]


def test_the_users_own_proxy_is_asked(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:secret@"))
    monkeypatch.setenv("https_proxy", server.url)
    assert fetch("http://no-such-host.invalid/good?a=1") == PNG
    assert server.asked[-1].startswith("GET http://no-such-host.invalid/good?a=1 HTTP/1.1")
    assert "Proxy-Authorization: Basic bWU6c2VjcmV0" in server.asked[-1]
    server.answers["no-such-host.invalid:443"] = say(b"HTTP/1.1 403 Forbidden\r\n\r\n")
    with pytest.raises(ImageError, match="403 Forbidden"):
        fetch("https://no-such-host.invalid/good")
    assert server.asked[-1].startswith("CONNECT no-such-host.invalid:443")
    before = len(server.asked)
    with pytest.raises(ImageError, match="private network"):
        fetch("http://169.254.169.254/good")
    assert len(server.asked) == before


def test_https_shakes_hands_in_time_and_with_the_right_server(server):
    secure = server.url.replace("http://", "https://")
    server.answers = dict.fromkeys(["", *server.answers], drip(b""))
    begin = time.monotonic()
    with pytest.raises(ImageError, match=f"Cannot fetch image {secure}/good"):
        fetch(f"{secure}/good", seconds=0.5)
    assert time.monotonic() - begin < 2
    assert fetching._SecureConnection("host")._context.verify_mode == ssl.CERT_REQUIRED
