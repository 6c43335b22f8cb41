"""The demo app keeps its limits against programs that do not look like a browser."""

import asyncio
import json
import os
import time

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")

from huggingface_hub.utils import httpx  # noqa: E402

from shapadapter.hub.space import limits  # noqa: E402
from shapadapter.hub.space.app import build_app, launch  # noqa: E402
from shapadapter.hub.space.limits import MAX_REQUEST, Limits  # noqa: E402

MEGABYTE = 2**20


class Inner:
    """An application that reads what it is sent, into the folder, and says how much it was."""

    def __init__(self, folder):
        self.folder, self.number = folder, 0

    async def __call__(self, scope, receive, send):
        data, more = b"", True
        while more:
            message = await receive()
            data, more = data + message["body"], message.get("more_body", False)
        self.number += 1
        (self.folder / f"{self.number}").mkdir()
        (self.folder / f"{self.number}" / "file").write_bytes(data)
        await send({"type": "http.response.start", "status": 200})


def post(app, *parts, announced=None, path="/upload", pause=0.0):
    """The status with which a request in parts is answered."""
    from starlette.exceptions import HTTPException

    left, said = list(parts), []
    headers = [] if announced is None else [(b"content-length", str(announced).encode())]

    async def receive():
        await asyncio.sleep(pause)
        return {"body": left.pop(0) if left else b"", "more_body": bool(left)}

    async def send(message):
        said.append(message)

    try:
        asyncio.run(app({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send))
    except HTTPException as error:  # which FastAPI answers with
        return error.status_code
    return said[0]["status"]


def test_a_request_is_limited_in_all(tmp_path):
    app = Limits(Inner(tmp_path), tmp_path)
    part = b"x" * MEGABYTE
    most = MAX_REQUEST // MEGABYTE
    assert post(app, *[part] * most) == 200
    assert post(app, *[part] * most, b"x") == 413
    assert post(app, b"", announced=MAX_REQUEST + 1) == 413
    assert post(app, b"", announced="9" * 30) in (200, 413)
    assert post(app, part, b"x", announced=MEGABYTE) == 413  # more than it said
    assert app.awaited == 0


def test_a_slow_request_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.3)
    app = Limits(Inner(tmp_path), tmp_path)
    begin = time.monotonic()
    assert post(app, *[b"x"] * 1000, pause=0.05) == 408
    assert time.monotonic() - begin < 2
    assert app.awaited == 0


def test_the_disk_is_bounded_and_the_oldest_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_DISK", 100 * MEGABYTE)
    sample = tmp_path / "sample"
    sample.mkdir()
    (sample / "001.png").write_bytes(b"x" * MEGABYTE)
    os.utime(sample / "001.png", (0, 0))
    app = Limits(Inner(tmp_path), tmp_path)
    answers = [post(app, b"x" * 10 * MEGABYTE, announced=10 * MEGABYTE) for _ in range(20)]
    assert answers[:6] == [200] * 6
    assert answers[-1] == 503
    kept = sorted(tmp_path.rglob("file"))
    assert sum(path.stat().st_size for path in kept) <= 100 * MEGABYTE
    for number, path in enumerate(sorted(kept, key=lambda path: int(path.parent.name))):
        os.utime(path, (1000 + number, 1000 + number))
    assert post(app, b"x" * 10 * MEGABYTE, announced=10 * MEGABYTE) == 200
    left = {int(path.parent.name) for path in tmp_path.rglob("file")}
    assert left == set(range(max(left) - len(left) + 1, max(left) + 1))  # the newest
    assert (sample / "001.png").is_file()
    assert len(left) < len(kept)
    for path in tmp_path.rglob("file"):
        os.utime(path, (time.time() - 2000, time.time() - 2000))
    app.looked = 0 if time.monotonic() > 100 else -100
    assert post(app, b"") == 200  # which finds that they have been there for too long
    assert len(list(tmp_path.rglob("file"))) == 1
    many = [post(app, b"", announced=0) for _ in range(5)]
    assert 503 not in many


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The real app, running."""
    from spaces import write_checkpoint

    root = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root / "uploads"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setattr(gradio.Blocks, "block_thread", lambda self: None)
        app = build_app(write_checkpoint(root))
        launch(app)
        yield app.local_url.rstrip("/") + "/gradio_api", root / "uploads"
        app.close()


def test_the_running_app(address, tmp_path):
    url, folder = address
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "picture.png")
    good = (tmp_path / "picture.png").read_bytes()
    with httpx.Client(trust_env=False, timeout=30) as client:
        (path,) = client.post(f"{url}/upload", files={"files": ("picture.png", good)}).json()
        assert path.startswith(str(folder))
        several = [("files", (f"{n}.png", b"x" * 3 * MEGABYTE)) for n in range(4)]
        assert client.post(f"{url}/upload", files=several).status_code == 413

        def parts():
            yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
            for _ in range(4):
                yield b"x" * 3 * MEGABYTE
                yield b'\r\n--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'

        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        assert client.post(f"{url}/upload", content=parts(), headers=kind).status_code == 413
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < MAX_REQUEST + MEGABYTE
        for place in ("file=http://127.0.0.1:9/x", "file=https://example.org", "proxy=http://127.0.0.1:9/x"):
            assert client.get(f"{url}/{place}").status_code == 403
        assert client.post(f"{url}/process_recording", files={"files": ("a", b"x")}).status_code == 403
        asked = {}
        for name, place in {
            "upload": path,
            "elsewhere": "http://127.0.0.1:9/secret.png",
            "inside": "/etc/passwd",
        }.items():
            data = [{"path": place, "meta": {"_type": "gradio.FileData"}}, "", True, 100, 100]
            body = {"data": data, "fn_index": 0, "session_hash": name}
            assert client.post(f"{url}/queue/join", json=body).status_code == 200
            lines = client.get(f"{url}/queue/data", params={"session_hash": name}).text.splitlines()
            events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
            (asked[name],) = [event for event in events if event["msg"] == "process_completed"]
    assert asked["upload"]["success"]
    assert not asked["elsewhere"]["success"]
    assert not asked["inside"]["success"]
    assert "Upload the picture itself" in json.dumps(asked["elsewhere"])
