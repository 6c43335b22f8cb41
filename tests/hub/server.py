"""A Hub on this computer: as much of the Hub's protocol as the real `huggingface_hub` client speaks when it pushes and loads.

    with LocalHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})

The client reads its endpoint when it is imported; where it is imported already, `point_at` tells it.
"""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import yaml
from huggingface_hub import constants
from repositories import DATE, LARGE, Blob, Refusal, Repo, validated
from transformers.utils import hub as transformers_hub

OWNER, TOKEN = "ada", "hf_thisTokenIsSecretAndMustNotAppearAnywhere"
STRANGER, STRANGERS_TOKEN = "bob", "hf_anotherOne"


class LocalHub:
    """The server and what it holds.

    Attributes:
        url: what `HF_ENDPOINT` has to be.
        repos: by kind ("model", "space") and name.
        requests: (method, path, who) of all that was asked.
        broken: a word; requests with it in their path are answered with 500.
    """

    def __init__(self):
        self.repos, self.blobs, self.requests = {}, {}, []
        self.users = {TOKEN: OWNER, STRANGERS_TOKEN: STRANGER}
        self.broken = None
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=TOKEN):
        """What a process needs in its environment to talk to this server, with an empty cache if `home` is empty."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_TOKEN": token or "",
            "HF_TOKEN_PATH": str(Path(home) / "token"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def add(self, name, folder, private=False, revision="main", kind="model"):
        """Put the files of a folder, or {path: bytes}, into a repository without the client; the commit's hash."""
        if not isinstance(folder, dict):
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            folder = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        repo = self.repos.setdefault((kind, name), Repo(kind, name, private))
        files = {path: Blob(data, path.endswith(LARGE)) for path, data in folder.items()}
        self.blobs |= {blob.sha256: blob for blob in files.values()}
        return repo.commit(files, "Upload", revision, repo.refs.get(revision))

    def files(self, name, revision="main", kind="model"):
        """{path: bytes} of a repository, without the `.gitattributes` that every one is born with."""
        found = self.repos[kind, name].files(revision)
        return {path: blob.data for path, blob in sorted(found.items()) if path != ".gitattributes"}

    def commit(self, name, revision="main", kind="model"):
        return self.repos[kind, name].at(revision)

    def titles(self, name, revision="main", kind="model"):
        """The commits' messages, the newest first."""
        repo = self.repos[kind, name]
        return [repo.commits[sha][1] for sha in repo.history(revision)]


def point_at(url, home, monkeypatch):
    """Let the libraries talk to a server, with their caches in a folder; the environment is read when they are imported."""
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(Path(home) / "hub"),
        "HF_TOKEN_PATH": str(Path(home) / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "_thread_pool", None)  # its thread is not in a fork
    monkeypatch.setattr(transformers_hub, "_hf_api", None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self):
        self.body = self._read()
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            with self.hub.lock:
                self.user = self.hub.users.get(token)
                self.hub.requests.append((self.command, unquote(parts.path), self.user))
                if self.hub.broken and self.hub.broken in parts.path:
                    raise Refusal(500, message="Something went wrong")
                if token and self.user is None:
                    raise Refusal(401, message="Invalid credentials in Authorization header")
                status, headers, data = self._route(parts.path)
        except Refusal as refusal:
            status, headers, data = refusal.status, refusal.headers, refusal.body
        self._send(status, headers, data)

    def _read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status, headers, data):
        if not isinstance(data, bytes):
            headers, data = {"Content-Type": "application/json", **headers}, json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- the endpoints ---------------------------------------------------------------------------------------------------

    def _route(self, path):
        if path == "/api/whoami-v2":
            self._need_user()
            about = {"type": "user", "name": self.user, "fullname": self.user, "orgs": []}
            return 200, {}, {**about, "auth": {"accessToken": {"displayName": "test", "role": "write"}}}
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if path == "/api/validate-yaml":
            return 200, {}, validated(json.loads(self.body)["content"])
        if match := re.fullmatch(r"/cdn/(\w+)", path):
            return 200, {}, self.hub.blobs[match[1]].data
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            return self._receive(match[1])
        if match := re.fullmatch(r"/(?:(spaces|datasets)/)?(.+)\.git/info/lfs/objects/(batch|verify)", path):
            self._need_user()
            return self._large_files(self._repo(match[1], match[2]), match[3])
        if match := re.fullmatch(r"/(?:(spaces|datasets)/)?(.+?)/resolve/([^/]+)/(.+)", path):
            return self._resolve(self._repo(match[1], match[2]), unquote(match[3]), unquote(match[4]))
        pattern = r"/api/(models|spaces|datasets)/([^/]+(?:/[^/]+)?)(?:/(revision|tree|preupload|commit|commits|branch|tag|refs)(?:/(.*))?)?"
        if match := re.fullmatch(pattern, path):
            kind, name, what, rest = match.groups()
            if what is None and "/" in name and name.split("/")[1] in ("revision", "tree"):
                name, what, rest = name.split("/")[0], "revision", "main"
            writes = what in ("preupload", "commit", "branch", "tag")
            # A pull request may be opened by whoever may read.
            repo = self._repo(kind, name, write=writes and "create_pr" not in self.query)
            return getattr(self, f"_{what or 'revision'}")(repo, rest or "main")
        raise Refusal(404, message=f"No such page: {path}")

    def _need_user(self):
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")

    def _repo(self, kind, name, write=False):
        """The repository, if whoever asks may see it and, if need be, write to it."""
        repo = self.hub.repos.get(((kind or "models").removesuffix("s"), unquote(name)))
        if repo is None or (repo.private and self.user != repo.id.split("/")[0]):
            # Nobody learns from the answer whether a private repository exists.
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if repo.gated and self.user != repo.id.split("/")[0]:
            raise Refusal(403, "GatedRepo", f"Access to model {repo.id} is restricted")
        if write:
            self._need_user()
            if self.user != repo.id.split("/")[0]:
                raise Refusal(403, message=f"You have no permission to write to {repo.id}")
        return repo

    def _create(self, wish):
        self._need_user()
        owner, kind = wish.get("organization") or self.user, wish.get("type") or "model"
        if owner != self.user:
            raise Refusal(403, message=f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{wish['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repos:
            raise Refusal(409, message=f"You already created this {kind} repo", body={"url": url, "error": "exists"})
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        repo = self.hub.repos[kind, name] = Repo(kind, name, private, wish.get("sdk"))
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
        repo.commit({".gitattributes": Blob(rules.encode(), False)}, "initial commit")
        return 200, {}, {"url": url, "name": name}

    def _revision(self, repo, revision):
        sha = repo.at(unquote(revision))
        files = repo.commits[sha][0]
        card = re.match(rb"---\n(.*?)\n---", files["README.md"].data, re.DOTALL) if "README.md" in files else None
        about = {"_id": "1", "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": sha}
        about |= {"lastModified": DATE, "createdAt": DATE, "private": repo.private, "disabled": False, "downloads": 0}
        about |= {"gated": "manual" if repo.gated else False, "likes": 0, "tags": [], "sdk": repo.sdk}
        about["cardData"] = yaml.safe_load(card[1]) if card else {}
        return 200, {}, {**about, "siblings": [{"rfilename": path} for path in sorted(files)]}

    def _tree(self, repo, rest):
        revision, _, folder = rest.partition("/")
        sha = repo.at(unquote(revision))
        files, inside = repo.commits[sha][0], f"{unquote(folder)}/" if folder else ""
        found = {path: blob for path, blob in sorted(files.items()) if path.startswith(inside)}
        if inside and not found:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist", **{"X-Repo-Commit": sha})
        deep = self.query.get("recursive", "").lower() == "true"
        entries = [blob.entry(path) for path, blob in found.items() if deep or "/" not in path[len(inside) :]]
        folders = {f"{inside}{path[len(inside) :].split('/')[0]}" for path in found if "/" in path[len(inside) :]}
        return 200, {}, [*({"type": "directory", "oid": sha, "size": 0, "path": path} for path in folders), *entries]

    def _refs(self, repo, _):
        listed = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, sha in repo.refs.items():
            pull = name.startswith("refs/pr/")
            about = {"name": name, "ref": name if pull else f"refs/heads/{name}", "targetCommit": sha}
            listed["pullRequests" if pull else "branches"].append(about)
        return 200, {}, listed

    def _commits(self, repo, revision):
        about = {"authors": [{"user": repo.id.split("/")[0]}], "date": DATE, "message": ""}
        return 200, {}, [{"id": s, "title": repo.commits[s][1], **about} for s in repo.history(unquote(revision))]

    def _branch(self, repo, name):
        name = unquote(name)
        if name in repo.refs:
            raise Refusal(409, message="Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint")
        repo.refs[name] = repo.at(start or "main")
        return 200, {}, {}

    def _tag(self, repo, revision):
        repo.refs[json.loads(self.body)["tag"]] = repo.at(unquote(revision))
        return 200, {}, {}

    def _preupload(self, repo, revision):
        files = repo.files(unquote(revision))
        answers = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) or file["size"] > 10_000_000 else "regular"
            old = files.get(file["path"])
            known = {"oid": old.etag} if old else {}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return 200, {}, {"files": answers}

    def _large_files(self, repo, step):
        wish = json.loads(self.body)
        if step == "verify":
            if wish["oid"] not in self.hub.blobs:
                raise Refusal(404, message="not uploaded")
            return 200, {}, {}
        objects = []
        for thing in wish["objects"]:
            place = "" if repo.kind == "model" else f"{repo.kind}s/"
            check = f"{self.hub.url}/{place}{repo.id}.git/info/lfs/objects/verify"
            steps = {"upload": {"href": f"{self.hub.url}/lfs/{thing['oid']}"}, "verify": {"href": check}}
            objects.append({**thing, **({} if thing["oid"] in self.hub.blobs else {"actions": steps})})
        return 200, {}, {"transfer": "basic", "objects": objects}

    def _receive(self, sha256):
        blob = Blob(self.body, True)
        if blob.sha256 != sha256:
            raise Refusal(400, message="the bytes are not those that were announced")
        self.hub.blobs[sha256] = blob
        return 200, {}, {}

    def _commit(self, repo, revision):
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        about = next(line["value"] for line in lines if line["key"] == "header")
        revision = unquote(revision)
        parent = repo.at(revision)
        if about.get("parentCommit") not in (None, parent):
            raise Refusal(412, message="A commit has happened since.")
        files = dict(repo.commits[parent][0])
        for line in lines:
            self._apply(files, line["key"], line["value"])
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        pull = "create_pr" in self.query
        sha = repo.commit(files, about["summary"], f"refs/pr/{number}" if pull else revision, parent)
        url = f"{self.hub.url}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.id}"
        opened = {"pullRequestUrl": f"{url}/discussions/{number}"} if pull else {}
        return 200, {}, {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **opened}

    def _apply(self, files, key, value):
        if key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise Refusal(400, message=f"LFS pointer to {value['path']}, which was not uploaded")
            files[value["path"]] = self.hub.blobs[value["oid"]]
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
        elif key == "deletedFolder":
            for path in [path for path in files if path.startswith(value["path"])]:
                del files[path]

    def _resolve(self, repo, revision, path):
        sha = repo.at(revision)
        blob = repo.commits[sha][0].get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", **headers)
        headers["ETag"] = f'"{blob.etag}"'
        if not blob.large:
            return 200, headers, blob.data
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        # The client follows a redirection within the same host by itself; the Hub's large files are at another one.
        elsewhere = f"http://localhost:{self.hub.server.server_port}/cdn/{blob.sha256}"
        return 302, {**headers, "Location": elsewhere}, b""
