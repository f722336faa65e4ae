"""A small Hub on loopback: as much of the HTTP interface of huggingface.co as its client needs to push and to pull a model."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34


class Hub(ThreadingHTTPServer):
    """Repositories in memory; a commit is the name -> content of all files, whole or not there."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        # Repository -> its commits, oldest first
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        # What the client sends as README metadata for validation
        self.cards: list[str] = []
        # Close the connection in the middle of an upload instead of answering
        self.cut_uploads = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no reason to print."""

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][-1]

    def commit_id(self, repo: str) -> str:
        return hashlib.sha1(f"{repo}{len(self.repos[repo])}".encode()).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def is_lfs(name: str) -> bool:
    return name.endswith((".zip", ".mp4", ".pkl", ".pth"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """The test's own list is enough."""

    def respond(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str, message: str) -> None:
        self.respond(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/uploads/") and self.server.cut_uploads:
            self.rfile.read(10)
            self.close_connection = True
            self.connection.close()
            return
        body = self.body()
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command != "HEAD" and self.command != "GET" and not authorized and not path.startswith("/uploads/"):
            return self.respond(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid credentials")
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return function(self, body, *match.groups())
        return self.fail(404, "", f"This Hub knows no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def known(self, repo: str) -> bool:
        if repo in self.server.repos:
            return True
        self.fail(404, "RepoNotFound", "Repository not found")
        return False

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo = "/".join(part for part in (request.get("organization"), request["name"]) if part)
        status = 409 if repo in self.server.repos else 200
        self.server.repos.setdefault(repo, [{".gitattributes": b"*.zip filter=lfs diff=lfs merge=lfs -text\n"}])
        self.respond(status, {"url": f"{self.server.endpoint}/{repo}", "name": repo, "id": repo})

    def info(self, body: bytes, repo: str) -> None:
        if self.known(repo):
            siblings = [{"rfilename": name} for name in self.server.files(repo)]
            self.respond(
                200, {"id": repo, "sha": self.server.commit_id(repo), "private": False, "tags": [], "siblings": siblings}
            )

    def tree(self, body: bytes, repo: str) -> None:
        if self.known(repo):
            self.respond(200, [describe(name, content) for name, content in self.server.files(repo).items()])

    def preupload(self, body: bytes, repo: str) -> None:
        if self.known(repo):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "lfs" if is_lfs(name) else "regular", "shouldIgnore": False} for name in names
            ]
            self.respond(200, {"files": modes})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            href = f"{self.server.endpoint}/uploads/{item['oid']}"
            objects.append({**item, "authenticated": True, "actions": {"upload": {"href": href, "header": {}}}})
        self.respond(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.respond(200)

    def validate(self, body: bytes) -> None:
        self.server.cards.append(json.loads(body)["content"])
        self.respond(200, {"errors": [], "warnings": []})

    def commit(self, body: bytes, repo: str) -> None:
        if not self.known(repo):
            return
        files = dict(self.server.files(repo))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        self.server.repos[repo].append(files)
        commit = self.server.commit_id(repo)
        self.respond(200, {"commitOid": commit, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{commit}"})

    def resolve(self, body: bytes, repo: str, name: str) -> None:
        if not self.known(repo):
            return
        content = self.server.files(repo).get(name)
        if content is None:
            return self.fail(404, "EntryNotFound", "Entry not found")
        commit, etag = self.server.commit_id(repo), f'"{hashlib.sha256(content).hexdigest()}"'
        if is_lfs(name):
            # Large files are on another host; what counts is told before the redirect to it
            elsewhere = f"http://localhost:{self.server.server_port}/cdn/{repo}/{name}"
            headers = {"X_Linked_Etag": etag, "X_Linked_Size": str(len(content))}
            return self.respond(302, Location=elsewhere, X_Repo_Commit=commit, **headers)
        return self.respond(200, content, ETag=etag, X_Repo_Commit=commit)

    def cdn(self, body: bytes, repo: str, name: str) -> None:
        self.respond(200, self.server.files(repo)[name])


def describe(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if is_lfs(name):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 128}
    return entry


REPO = r"([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", rf"/api/models/{REPO}(?:/revision/[^/]+)?", Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/[^/]+", Handler.tree),
    ("POST", rf"/api/models/{REPO}/preupload/[^/]+", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/[^/]+", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/uploads/([^/]+)", Handler.upload),
    ("GET HEAD", rf"/{REPO}/resolve/[^/]+/(.+)", Handler.resolve),
    ("GET HEAD", rf"/cdn/{REPO}/(.+)", Handler.cdn),
]
