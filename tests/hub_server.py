"""A local server with the read side of the Hugging Face Hub's API, for tests that use the real client.

Repositories are folders on disk. Each `add_repo` makes a commit, whose content stays as it was. As on the Hub,
large-file formats are answered by a redirect to a content-addressed place, everything else directly.
The write side is in hub_server_write.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl, unquote, urlsplit

LARGE_FILE_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".onnx", ".arrow", ".png", ".jpg")
REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"
FILES = r"/(?:(?P<kind>dataset|space)s/)?(?P<repo_id>[^/]+/[^/]+)"


class HubError(Exception):
    """An answer of status 400 or more, with the Hub's error headers."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} | (headers or {})


@dataclass(frozen=True)
class StoredFile:
    """Content of one file of a commit; `is_large` means kept outside git (LFS)."""

    content: bytes
    is_large: bool

    @cached_property
    def sha256(self) -> str:
        """The name of a large file."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        """Git's hash of the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        """What the client names its cached copy by."""
        return self.sha256 if self.is_large else self.oid


@dataclass(frozen=True)
class Commit:
    """Files by path, under a hash of their paths and contents and of the commit before, if any."""

    files: dict[str, StoredFile]
    parent: str = ""

    @cached_property
    def sha(self) -> str:
        """40 hex digits, equal for equal files after equal commits."""
        listing = [self.parent, *(f"{path} {file.oid}" for path, file in sorted(self.files.items()))]
        return hashlib.sha1("\n".join(listing).encode()).hexdigest()

    @cached_property
    def folders(self) -> set[str]:
        """Paths of all folders, without the root."""
        return {str(parent) for path in self.files for parent in PurePosixPath(path).parents} - {"."}

    def describe(self, path: str) -> dict:
        """The Hub's JSON about a file or folder."""
        file = self.files.get(path)
        if file is None:
            return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
        size = len(file.content)
        lfs = {"lfs": {"oid": file.sha256, "size": size, "pointerSize": 130}} if file.is_large else {}
        return {"type": "file", "path": path, "size": size, "oid": file.oid} | lfs


@dataclass
class Repo:
    """Commits by hash, branches by name, and for a private repository the token that opens it."""

    private_token: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, files: dict[str, StoredFile], revision: str) -> str:
        """Put files on top of a branch, which is made when missing; returns the commit's hash."""
        commit = Commit(files, self.branches.get(revision, ""))
        self.commits[commit.sha] = commit
        self.branches[revision] = commit.sha
        return commit.sha


class RepoStore:
    """All repositories, by kind ("model", "dataset", "space") and id; large files by SHA-256."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, StoredFile] = {}

    def add(self, kind: str, repo_id: str, folder: Path, revision: str, private_token: str | None) -> str:
        """Commit the files of `folder` to the branch `revision`; returns the commit's hash."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        contents = [StoredFile(path.read_bytes(), path.suffix in LARGE_FILE_SUFFIXES) for path in paths]
        files = {path.relative_to(folder).as_posix(): file for path, file in zip(paths, contents, strict=True)}
        repo = self.repos.setdefault((kind, repo_id), Repo())
        self.large_files |= {file.sha256: file for file in files.values() if file.is_large}
        repo.private_token = private_token or repo.private_token
        return repo.commit(files, revision)

    def find(self, kind: str, repo_id: str, revision: str, token: str | None) -> tuple[Repo, Commit]:
        """The repository and the commit that a branch name or hash means.

        Raises:
            HubError: 404 when there is no such repository or revision, 401 when it is private and `token` another.
        """
        repo = self.repos.get((kind, repo_id))
        if repo is None:
            raise HubError(404, "RepoNotFound", "Repository not found")
        if repo.private_token not in (None, token):
            # The Hub sends no code here; its client takes any 401 of an https:// address for this one.
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        commit = repo.commits.get(repo.branches.get(revision, revision))
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit


def _byte_range(header: str | None, size: int) -> slice | None:
    """What a Range header asks for; None without one, HubError 416 when it lies outside the file."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not match or not any(match.groups()):
        return None
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise HubError(416, "RangeNotSatisfiable", f"{header} of {size} bytes", {"Content-Range": f"bytes */{size}"})
    return slice(start, stop)


class Handler(BaseHTTPRequestHandler):
    """Finds the route of a request and answers it from the server's store."""

    routes = {  # name of the method that answers: HTTP method and path
        "_info": ("GET", rf"{REPO}(?:/revision/(?P<revision>[^/]+))?"),
        "_tree": ("GET", rf"{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"),
        "_resolve": ("GET", rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
        "_large_file": ("GET", r"/large-files/(?P<sha256>[0-9a-f]{64})"),
    }
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        wanted = "GET" if self.command == "HEAD" else self.command
        try:
            for name, (method, pattern) in self.routes.items():
                if method == wanted and not url.netloc and (match := re.fullmatch(pattern, url.path)):
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return self._follow(name, parts)
            raise HubError(404, "NoRoute", f"{self.command} {self.path}")
        except HubError as error:
            self._send(error.status, str(error).encode(), error.headers)

    do_GET = do_HEAD = _answer

    def _follow(self, name: str, parts: dict[str, str]) -> None:
        getattr(self, name)(**parts)

    def _info(self, kind: str, repo_id: str, revision: str = "main") -> None:
        repo, commit = self._find(kind, repo_id, revision)
        info = {"id": repo_id, "sha": commit.sha, "private": repo.private_token is not None, "tags": []}
        self._send_json(info | {"siblings": [{"rfilename": path} for path in commit.files]})

    def _tree(self, kind: str, repo_id: str, revision: str, path: str = "") -> None:
        prefix, (_, commit) = f"{path}/" if path else "", self._find(kind, repo_id, revision)
        if path and path not in commit.folders:
            raise HubError(404, "EntryNotFound", f"{path} is no folder", {"X-Repo-Commit": commit.sha})
        below = sorted(p for p in commit.folders | commit.files.keys() if p.startswith(prefix))
        if self.query.get("recursive", "false").lower() != "true":
            below = [p for p in below if "/" not in p.removeprefix(prefix)]
        self._send_json([commit.describe(p) for p in below])

    def _resolve(self, repo_id: str, revision: str, path: str, kind: str = "model") -> None:
        _, commit = self._find(kind, repo_id, revision)
        headers, file = {"X-Repo-Commit": commit.sha}, commit.files.get(path)
        if file is None:
            raise HubError(404, "EntryNotFound", "Entry not found", headers)
        if not file.is_large:
            return self._send_file(file, headers)
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        self._send(302, b"", headers | {"Location": f"{self.server.storage}/large-files/{file.sha256}"})

    def _large_file(self, sha256: str) -> None:
        if sha256 not in self.server.store.large_files:
            raise HubError(404, "EntryNotFound", "no such large file")
        self._send_file(self.server.store.large_files[sha256], {})

    def _send_file(self, file: StoredFile, headers: dict[str, str]) -> None:
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        size, part = len(file.content), _byte_range(self.headers.get("Range"), len(file.content))
        if part is None:
            return self._send(200, file.content, headers)
        self._send(206, file.content[part], headers | {"Content-Range": f"bytes {part.start}-{part.stop - 1}/{size}"})

    def _send_json(self, content: dict | list) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def _find(self, kind: str, repo_id: str, revision: str) -> tuple[Repo, Commit]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.server.store.find(kind, repo_id, revision, token)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Keep every request that gets an answer, whatever its method."""
        self.server.requests.append((self.command, self.path))


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub: hub.add_repo(...)`; the client finds it under `hub.endpoint`.

    A client whose HTTP proxy is `hub.endpoint` too shows in `hub.requests` what it wants of any other host.
    """

    handler = Handler

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.handler)
        self.store = RepoStore()
        self.requests: list[tuple[str, str]] = []  # (method, path with query) in order of arrival
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"  # another host to the client

    def add_repo(
        self, kind: str, repo_id: str, folder: Path, revision: str = "main", private_token: str | None = None
    ) -> str:
        """Serve the files of `folder` as branch `revision` of a "model" or "dataset"; returns the commit's hash."""
        return self.store.add(kind, repo_id, Path(folder), revision, private_token)

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()
