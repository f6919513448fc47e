"""A server on loopback that speaks as much of the Hugging Face hub's API as models and data sets need."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
LARGE = (".safetensors", ".png", ".parquet")


@dataclass
class Hub:
    """What it holds, and what it was asked for."""

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Repository -> commit, the newest last -> path -> content."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that were brought, by SHA-256."""
    uploads: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    failing: bool = False
    """Answers 503 to all."""

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to take it for the hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def files(self, repository: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """Commit and content.

        Raises:
            KeyError: there is no such repository or revision.
        """
        commits = self.commits[repository]
        commit = list(commits)[-1] if revision == "main" else revision
        return commit, commits[commit]

    def commit(self, repository: str, changes: dict[str, bytes]) -> str:
        commits = self.commits[repository]
        files = (list(commits.values())[-1] if commits else {}) | changes
        commit = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        return commit


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.failing:
            self._answer(503)
            return
        writes = self.command in ("POST", "PUT") and not path.startswith("/objects/")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401)
            return
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                try:
                    answer(self, body, *found.groups())
                except KeyError:
                    missing = (
                        "RepoNotFound" if found[1] not in self.hub.commits else "RevisionNotFound"
                    )
                    self._answer(404, X_Error_Code=missing)
                return
        self._answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.hub.commits
        self.hub.commits.setdefault(name, {})
        self._json({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)

    def validate(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repository: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def batch(self, body: bytes, repository: str) -> None:
        asked = json.loads(body)["objects"]
        objects = [
            wanted
            if wanted["oid"] in self.hub.objects
            else {
                **wanted,
                "actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}},
            }
            for wanted in asked
        ]
        self._json({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, digest: str) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.uploads.append(digest)
        self.hub.objects[digest] = body
        self._answer(200)

    def commit(self, body: bytes, repository: str) -> None:
        changes = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.commit(repository, changes)
        self._json(
            {"commitUrl": f"{self.hub.url}/{repository}/commit/{commit}", "commitOid": commit}
        )

    def info(self, body: bytes, repository: str, revision: str = "main") -> None:
        commits = self.hub.commits[repository]
        commit, files = self.hub.files(repository, revision) if commits else ("0" * 40, {})
        names = [{"rfilename": name} for name in files]
        self._json({"id": repository, "sha": commit, "siblings": names, "private": False})

    def tree(self, body: bytes, repository: str, revision: str, folder: str | None = None) -> None:
        """What is in a folder, with all that is below its folders where that is asked for."""
        _, files = self.hub.files(repository, revision)
        deep = "recursive=true" in urlsplit(self.path).query.lower()
        start = f"{folder}/" if folder else ""
        found = {}
        for name, data in files.items():
            head, _, below = name.removeprefix(start).partition("/")
            if not name.startswith(start):
                continue
            if below:
                found[f"{start}{head}"] = _folder(f"{start}{head}")
            if deep or not below:
                found[name] = _entry(name, data)
        self._json(list(found.values()), 200 if found or not folder else 404)

    def paths_info(self, body: bytes, repository: str, revision: str) -> None:
        """Of files, and of the folders that they are in."""
        _, files = self.hub.files(repository, revision)
        wanted = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
        found = [_entry(name, files[name]) for name in wanted if name in files]
        for name in wanted:
            if any(file.startswith(f"{name}/") for file in files):
                found.append(_folder(name))
        self._json(found)

    def resolve(self, body: bytes, repository: str, revision: str, path: str) -> None:
        commit, files = self.hub.files(repository, revision)
        if path not in files:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        data, status, more = files[path], 200, {}
        tag = hashlib.sha256(data).hexdigest()
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), int(asked[2] or len(data) - 1)
            more = {"Content_Range": f"bytes {start}-{end}/{len(data)}"}
            data, status = data[start : end + 1], 206
        self._answer(status, data, ETag=f'"{tag}"', X_Repo_Commit=commit, **more)


def _folder(name: str) -> dict[str, object]:
    return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {
        "type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()
    }  # fmt: skip


_NAME = "([^/]+/[^/]+)"
_ROUTES = [
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate),
    (f"POST /api/models/{_NAME}/preupload/[^/]+", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT /objects/([0-9a-f]+)", _Handler.put),
    (f"POST /api/models/{_NAME}/commit/[^/]+", _Handler.commit),
    (f"GET /api/models/{_NAME}", _Handler.info),
    (f"GET /api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    (f"GET /api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (f"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (f"GET /api/datasets/{_NAME}", _Handler.info),
    (f"GET /api/datasets/{_NAME}/revision/([^/]+)", _Handler.info),
    (f"GET /api/datasets/{_NAME}/tree/([^/]+)(?:/(.*))?", _Handler.tree),
    (f"POST /api/datasets/{_NAME}/paths-info/([^/]+)", _Handler.paths_info),
    (f"(?:GET|HEAD) /datasets/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
