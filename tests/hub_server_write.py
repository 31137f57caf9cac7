"""The write side of the local Hub: repositories, branches, commits, pull requests, large files, and faults on demand.

`WritableHub.faults` holds, by the name of a route, what happens to its next requests instead of the right answer; see
`refused`, `dropped`, `dropped_after`, `dropped_midway` and `preceded_by`. Of Xet storage there is only what fails.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial

import yaml
from hub_server import FILES, LARGE_FILE_SUFFIXES, REPO, Handler, HubError, HubServer, Repo, StoredFile

TOKEN = "hf_onlyForTestsOfPushing"
Fault = Callable[["WriteHandler", Callable[[], None]], None]


def refused(status: int, code: str = "", message: str = "", **headers: str) -> Fault:
    """An answer of this status; underscores in names of headers stand for hyphens."""

    def fault(handler: WriteHandler, proceed: Callable[[], None]) -> None:
        raise HubError(status, code, message, {name.replace("_", "-"): value for name, value in headers.items()})

    return fault


def dropped(handler: WriteHandler, proceed: Callable[[], None]) -> None:
    """The connection ends without an answer, and nothing is done."""
    handler.hang_up()


def dropped_after(handler: WriteHandler, proceed: Callable[[], None]) -> None:
    """What was asked for is done, but the connection ends before the answer."""
    handler.is_mute = True
    proceed()
    handler.hang_up()


def dropped_midway(handler: WriteHandler, proceed: Callable[[], None]) -> None:
    """The connection ends after half of the request's body."""
    half = int(handler.headers.get("Content-Length", 0)) // 2
    handler.server.received.append(("cut", len(handler.rfile.read(half))))
    handler.hang_up()


def preceded_by(action: Callable[[], object]) -> Fault:
    """The right answer, after something else has happened."""

    def fault(handler: WriteHandler, proceed: Callable[[], None]) -> None:
        action()
        proceed()

    return fault


class WriteHandler(Handler):
    """All routes; those that write need a token that may write in the repository's organisation."""

    routes = Handler.routes | {
        "_create_repo": ("POST", r"/api/repos/create"),
        "_space_variable": ("POST", r"/api/spaces/(?P<repo_id>[^/]+/[^/]+)/variables"),
        "_validate_yaml": ("POST", r"/api/validate-yaml"),
        "_preupload": ("POST", rf"{REPO}/preupload/(?P<revision>[^/]+)"),
        "_commit": ("POST", rf"{REPO}/commit/(?P<revision>[^/]+)"),
        "_branch": ("POST", rf"{REPO}/branch/(?P<revision>[^/]+)"),
        "_refs": ("GET", rf"{REPO}/refs"),
        "_xet_token": ("GET", rf"{REPO}/xet-write-token/(?P<revision>[^/]+)"),
        "_xet_post": ("POST", r"/xet-storage/.*"),
        "_xet_get": ("GET", r"/xet-storage/.*"),
        "_lfs_batch": ("POST", rf"{FILES}\.git/info/lfs/objects/batch"),
        "_lfs_verify": ("POST", rf"{FILES}\.git/info/lfs/objects/verify"),
        "_lfs_put": ("PUT", r"/lfs-uploads/(?P<sha256>[0-9a-f]{64})(?:/(?P<part>\d+))?"),
        "_lfs_complete": ("POST", r"/lfs-uploads/(?P<sha256>[0-9a-f]{64})"),
    }
    server: WritableHub
    is_mute = False

    def _answer(self) -> None:
        self.route, self.content = "", None
        super()._answer()

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _follow(self, name: str, parts: dict[str, str]) -> None:
        self.route = name
        queue = self.server.faults.get(name)
        proceed = partial(getattr(self, name), **parts)
        queue.pop(0)(self, proceed) if queue else proceed()

    def _body(self) -> bytes:
        if self.command in ("GET", "HEAD"):
            return b""
        if self.content is None:
            self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.server.received.append((self.route, len(self.content)))
        return self.content

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._body()  # what is left of the request must not stand before the next one
        if not self.is_mute:
            super()._send(status, body, headers)

    def hang_up(self) -> None:
        """End the connection; the request counts all the same."""
        self.log_request("dropped")
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def _writable(self, kind: str, repo_id: str) -> Repo:
        """The repository, when the request's token may write to it; HubError 401, 403 or 404 otherwise."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.server.tokens:
            message = "Invalid credentials in Authorization header" if token else "Invalid username or password."
            raise HubError(401, "", message)
        if repo_id.partition("/")[0] not in self.server.tokens[token]:
            raise HubError(403, "", "You don't have the rights to create or change a model under this namespace")
        if (kind, repo_id) not in self.server.store.repos:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.server.store.repos[kind, repo_id]

    def _create_repo(self) -> None:
        asked = json.loads(self._body())
        kind, repo_id = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.server.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}", "name": repo_id}
        try:
            self._writable(kind, repo_id)
        except HubError as error:
            if error.status != 404:
                raise
            token = self.headers["Authorization"].removeprefix("Bearer ")
            repo = Repo(private_token=token if asked.get("visibility") == "private" else None)
            repo.commit(
                {".gitattributes": StoredFile(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}, "main"
            )
            self.server.store.repos[kind, repo_id] = repo
            return self._send_json(answer)
        self._send(409, json.dumps(answer | {"error": "You already created this repo"}).encode(), {})

    def _space_variable(self, repo_id: str) -> None:
        self._writable("space", repo_id)
        asked = json.loads(self._body())
        variables = self.server.variables.setdefault(repo_id, {})
        variables[asked["key"]] = asked["value"]
        self._send_json({name: {"key": name, "value": value} for name, value in variables.items()})

    def _validate_yaml(self) -> None:
        text = json.loads(self._body())["content"]
        errors = []
        if text.startswith("---\n"):
            try:
                found = yaml.safe_load(text.split("---\n")[1])
                errors = [] if isinstance(found, dict) else ["metadata is no mapping"]
            except yaml.YAMLError as error:
                errors = [str(error)]
        content = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._send(400 if errors else 200, json.dumps(content).encode(), {})

    def _branch(self, kind: str, repo_id: str, revision: str) -> None:
        repo, start = self._writable(kind, repo_id), json.loads(self._body() or b"{}").get("startingPoint", "main")
        if revision in repo.branches:
            raise HubError(409, "", f"Reference already exists: {revision}")
        if start not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {start}")
        repo.branches[revision] = repo.branches[start]
        self._send_json({})

    def _refs(self, kind: str, repo_id: str) -> None:
        repo, _ = self._find(kind, repo_id, "main")
        refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
        self._send_json({"branches": refs, "converts": [], "tags": []})

    def _preupload(self, kind: str, repo_id: str, revision: str) -> None:
        self._writable(kind, repo_id)
        _, commit = self._find(kind, repo_id, revision)
        files = []
        for asked in json.loads(self._body())["files"]:
            mode = "lfs" if asked["path"].endswith(LARGE_FILE_SUFFIXES) else "regular"
            present = {"oid": commit.files[asked["path"]].etag} if asked["path"] in commit.files else {}
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False} | present)
        self._send_json({"files": files})

    def _commit(self, kind: str, repo_id: str, revision: str) -> None:
        repo, (_, head) = self._writable(kind, repo_id), self._find(kind, repo_id, revision)
        lines = [json.loads(line) for line in self._body().splitlines()]
        if lines[0]["value"].get("parentCommit", head.sha) != head.sha:
            raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.store.large_files:
                    raise HubError(400, "", f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = self.server.store.large_files[value["oid"]]
            else:
                del files[value["path"]]
        pull_request = {}
        if self.query.get("create_pr") == "1":
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
            pull_request = {"pullRequestUrl": f"{self.server.endpoint}/{repo_id}/discussions/{number}"}
            revision, repo.branches[f"refs/pr/{number}"] = f"refs/pr/{number}", head.sha
        sha = repo.commit(files, revision)
        where = {"commitOid": sha, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{sha}"}
        self._send_json({"success": True, "hookOutput": ""} | where | pull_request)

    def _lfs_batch(self, repo_id: str, kind: str = "model") -> None:
        self._writable(kind, repo_id)
        found = []
        for asked in json.loads(self._body())["objects"]:
            url, size = f"{self.server.storage}/lfs-uploads/{asked['oid']}", self.server.chunk_size
            upload = {"href": url, "header": {}}
            if size and asked["size"] > size:
                parts = {str(number + 1): f"{url}/{number + 1}" for number in range(-(-asked["size"] // size))}
                upload["header"] = {"chunk_size": str(size)} | parts
            place = repo_id if kind == "model" else f"{kind}s/{repo_id}"
            verify = {"href": f"{self.server.endpoint}/{place}.git/info/lfs/objects/verify"}
            known = asked["oid"] in self.server.store.large_files
            found.append(asked if known else asked | {"actions": {"upload": upload, "verify": verify}})
        self._send_json({"transfer": "basic", "objects": found})

    def _lfs_put(self, sha256: str, part: str = "") -> None:
        if part:
            self.server.parts[sha256, int(part)] = self._body()
            return self._send(200, b"", {"ETag": hashlib.md5(self._body()).hexdigest()})
        self._keep(sha256, self._body())

    def _lfs_complete(self, sha256: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self._body())["parts"]]
        self._keep(sha256, b"".join(self.server.parts[sha256, number] for number in numbers))

    def _keep(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, "", "content does not have the hash it was announced with")
        self.server.store.large_files[sha256] = StoredFile(content, True)
        self._send(200, b"", {})

    def _lfs_verify(self, repo_id: str, kind: str = "model") -> None:
        self._writable(kind, repo_id)
        asked = json.loads(self._body())
        if len(self.server.store.large_files[asked["oid"]].content) != asked["size"]:
            raise HubError(400, "", "size differs")
        self._send_json({})

    def _xet_token(self, kind: str, repo_id: str, revision: str) -> None:
        self._writable(kind, repo_id)
        where = {"casUrl": f"{self.server.endpoint}/xet-storage", "accessToken": "xet", "exp": int(time.time()) + 3600}
        headers = {
            "X-Xet-Cas-Url": where["casUrl"],
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(where["exp"]),
        }
        self._send(200, json.dumps(where).encode(), headers)

    def _xet_get(self) -> None:
        raise HubError(404, "", "no such chunk")

    def _xet_post(self) -> None:
        if "/xorb-grants/" in self.path:
            raise HubError(404, "", "xorbs are to be sent directly")
        dropped_midway(self, lambda: None)


class WritableHub(HubServer):
    """`with WritableHub() as hub`: a Hub to push to with the token TOKEN, whose owner may write in "org".

    received: (route, bytes of the body) of every request that brought one. chunk_size: larger files come in parts.
    """

    handler = WriteHandler

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[str, tuple[str, ...]] = {TOKEN: ("org",)}
        self.faults: dict[str, list[Fault]] = {}
        self.received: list[tuple[str, int]] = []
        self.variables: dict[str, dict[str, str]] = {}  # of Spaces
        self.chunk_size: int | None = None
        self.parts: dict[tuple[str, int], bytes] = {}

    def bytes_of(self, route: str) -> int:
        """Bytes that requests of a route have brought, "_lfs_put" for example."""
        return sum(size for name, size in self.received if name == route)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of the files of a model's branch."""
        repo = self.store.repos["model", repo_id]
        return {path: file.content for path, file in repo.commits[repo.branches[revision]].files.items()}

    def history(self, repo_id: str, revision: str = "main") -> list[str]:
        """Hashes of a branch's commits, newest first."""
        repo, found = self.store.repos["model", repo_id], []
        sha = repo.branches[revision]
        while sha:
            found.append(sha)
            sha = repo.commits[sha].parent
        return found
