"""What the local Hub holds: repositories with their history, and the Hub's opinion of a model card."""

import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property

import yaml

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".npz", ".data")
DATE = "2026-01-01T00:00:00.000Z"
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Refusal(Exception):
    """An answer that is no success; the client makes its exceptions from the code in the header."""

    def __init__(self, status, code="", message="", body=None, **headers):
        super().__init__(message)
        self.status, self.body = status, body or {"error": message}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


@dataclass
class Blob:
    data: bytes
    large: bool

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def oid(self):
        """The name that git gives it; of a large file git sees the pointer only."""
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        )
        data = pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.large else self.oid

    def entry(self, path):
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}} if self.large else {}
        return {"type": "file", "oid": self.oid, "size": len(self.data), "path": path, **lfs}


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    sdk: str | None = None
    gated: bool = False
    refs: dict = field(default_factory=dict)  # name of a branch, tag or pull request: sha
    commits: dict = field(default_factory=dict)  # sha: (files, title, parent)

    def commit(self, files, title, ref="main", parent=None):
        sha = hashlib.sha1(f"{self.id} {len(self.commits)} {title} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = (files, title, parent)
        self.refs[ref] = sha
        return sha

    def at(self, revision):
        """The commit of a branch, a tag or (part of) a hash.

        Raises:
            Refusal: there is none.
        """
        found = self.refs.get(revision) or next((sha for sha in self.commits if sha == revision), None)
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def files(self, revision):
        return self.commits[self.at(revision)][0]

    def history(self, revision):
        sha = self.at(revision)
        while sha:
            yield sha
            sha = self.commits[sha][2]


def validated(content):
    """What the Hub checks of a card, as far as it matters here: it refuses a base model that is a path.

    Raises:
        Refusal: there are errors.
    """
    match = re.match(r"\s*---\n(.*?)\n---", content, re.DOTALL)
    if match is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    try:
        about = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise Refusal(400, body={"errors": [{"message": str(error)}], "warnings": []}) from error
    errors = [{"message": error} for error in _errors_in(about)]
    if errors:
        raise Refusal(400, body={"errors": errors, "warnings": []})
    return {"errors": [], "warnings": []}


def _errors_in(about):
    bases = about.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not NAME.fullmatch(str(base)):
            yield f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
    for entry in about.get("model-index") or []:
        for result in entry.get("results", []):
            if not (result.get("task", {}).get("type") and result.get("metrics")):
                yield '"model-index[0].results[0]" needs "task.type" and "metrics"'
            if not (result.get("dataset", {}).get("type") and result["dataset"].get("name")):
                yield '"model-index[0].results[0].dataset" needs "type" and "name"'
    if not all(isinstance(tag, str) for tag in about.get("tags") or []):
        yield '"tags" must be an array of strings'
