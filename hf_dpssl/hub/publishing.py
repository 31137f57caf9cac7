"""All traffic that writes to the Hub: a finished checkpoint folder becomes one commit, is pulled back and replayed.

Large files are uploaded first, by content, then one commit with its parent names them: until that commit nothing is
published, another's commit in between is noticed, and what has arrived is not sent again by a retry.
(`HfApi.upload_large_folder` makes many commits; it is not used.)

Uploads go through Xet storage where the client has it (package hf_xet), else through Git LFS; HF_HUB_DISABLE_XET=1
chooses the latter.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_token

from ..contrastive.modeling_pretraining import ContrastivePreTrainedModel
from ..runs.console import one_line
from ..runs.lineage import well_formed
from . import eval_files, replay
from .card_merge import pushed_card
from .published_files import holds_weights, publishable_files, without_machine

_WAITS = (1.0, 2.0, 4.0)  # seconds between attempts, unless the Hub says how long
_LONGEST_WAIT = 300.0
_AGAIN = "Nothing was published. Push again: files that have arrived are not sent twice."
Content = Path | bytes
Result = TypeVar("Result")


class PushError(OSError):
    """A push that failed: what happened, whether anything is published, and the way out."""


class Published(NamedTuple):
    """A commit on the Hub: hash, address, and address of the pull request, if one was asked for."""

    commit: str
    url: str
    pull_request: str | None


@dataclass
class PushReport:
    """What a push sent.

    Args:
        repo_id, revision: where to.
        files: bytes of every file that the folder gives the repository, by path.
        left_out: what of the folder is not published.
        removed: weights (and pretraining/) of an earlier push that no longer belong to the model.
        commit, url, pull_request: of the commit; None for a dry run.
        difference: largest difference when the stored pair was replayed on what was pulled back, see replay.py; None
            where there is no pair.
        seconds: from the start of the push to the verified pull.
    """

    repo_id: str
    revision: str
    files: dict[str, int]
    left_out: list[str]
    removed: list[str] = field(default_factory=list)
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None
    difference: float | None = None
    seconds: float | None = None


class Target:
    """A branch of a repository as it was found: commits come on top of exactly that state.

    Args:
        repo_id: ORG/NAME; made when missing.
        repo_type: "model", "dataset" or "space".
        space_sdk: of a Space that is made, "gradio" for example.
        private: of a repository that is made; None: as the organisation's default.
        revision: branch, made when missing; None is main.
        create_pr: open a pull request against the branch instead of changing it.
        token, endpoint: None: of the environment or of `hf auth login`.

    Raises:
        PushError: the Hub refuses or cannot be reached.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        repo_type: str = "model",
        space_sdk: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        endpoint: str | None = None,
    ):
        self.api = HfApi(endpoint=endpoint, token=token)
        self.where = {"repo_id": repo_id, "repo_type": repo_type}
        self.revision, self.create_pr = revision or "main", create_pr
        with self._explained():
            options = {"private": private, "space_sdk": space_sdk, "exist_ok": True}
            _retried(lambda: self.api.create_repo(**self.where, **options))
            if revision not in (None, "main") and not create_pr and not revision.startswith("refs/"):
                _retried(lambda: self.api.create_branch(**self.where, branch=revision, exist_ok=True))
            self.parent = _retried(lambda: self.api.repo_info(**self.where, revision=self.revision)).sha
            self.present = self._files(self.parent)

    def read(self, path: str) -> bytes | None:
        """A file as it is on the branch; None when there is none."""
        if path not in self.present:
            return None
        with self._explained(), tempfile.TemporaryDirectory() as cache:
            options = {"revision": self.parent, "cache_dir": cache}
            return Path(self.api.hf_hub_download(**self.where, filename=path, **options)).read_bytes()

    def commit(self, contents: dict[str, Content], message: str, removed: list[str] | tuple = ()) -> Published:
        """One commit with these files by path, less `removed`; the branch's own when nothing is new."""
        adds = [CommitOperationAdd(path, content) for path, content in contents.items()]
        adds = [add for add in adds if not _holds(self.present, add)]
        if not adds and not removed:
            return Published(self.parent, self._url(self.parent), None)
        operations = [*adds, *(CommitOperationDelete(path) for path in removed)]
        options = {"revision": self.revision, "create_pr": self.create_pr}
        with self._explained(uploading=True):
            self.api.preupload_lfs_files(**self.where, additions=adds, free_memory=False, **options)
        with self._explained():
            options |= {"commit_message": message, "parent_commit": self.parent}
            try:  # its parent makes a second attempt harmless, except that there might be two pull requests
                attempts = 1 if self.create_pr else None
                made = _retried(
                    lambda: self.api.create_commit(**self.where, operations=operations, **options), attempts
                )
                return Published(made.oid, made.commit_url, made.pr_url)
            except HfHubHTTPError as error:
                head = self._own_commit(adds, removed) if error.response.status_code == 412 else None
                if head is None:
                    raise
                return Published(head, self._url(head), None)

    def set_variables(self, variables: dict[str, str]) -> None:
        """Environment variables of a Space, which restarts with them."""
        with self._explained():
            for name, value in variables.items():
                _retried(lambda name=name, value=value: self.api.add_space_variable(self.where["repo_id"], name, value))

    def _own_commit(self, adds: list[CommitOperationAdd], removed: list[str] | tuple) -> str | None:
        """The branch's head, when it is our commit whose answer was lost."""
        head = self.api.repo_info(**self.where, revision=self.revision).sha
        files = self._files(head)
        return head if all(_holds(files, add) for add in adds) and not set(removed) & set(files) else None

    def _url(self, commit: str) -> str:
        kind = {"model": "", "dataset": "datasets/", "space": "spaces/"}[self.where["repo_type"]]
        return f"{self.api.endpoint}/{kind}{self.where['repo_id']}/commit/{commit}"

    def _files(self, revision: str) -> dict[str, str]:
        """Hash of each file of a commit: SHA-256 of a large one, else git's."""
        tree = _retried(lambda: list(self.api.list_repo_tree(**self.where, revision=revision, recursive=True)))
        return {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in tree if isinstance(e, RepoFile)}

    @contextmanager
    def _explained(self, uploading: bool = False) -> Iterator[None]:
        """Every error of the client as PushError."""
        try:
            yield
        except Exception as error:
            # A malformed id or card: the client's own words say what to do. The Hub's 400 is a ValueError, too.
            if isinstance(error, ValueError) and not isinstance(error, HTTPError):
                raise
            raise PushError(f"{self._reason(error, uploading)} {_AGAIN}") from error

    def _reason(self, error: Exception, uploading: bool) -> str:
        repo_id, endpoint = self.where["repo_id"], self.api.endpoint
        while not isinstance(error, HTTPError) and isinstance(error.__cause__, HTTPError):
            error = error.__cause__  # the client wraps failures of single files
        if not isinstance(error, HTTPError) and uploading and not constants.HF_HUB_DISABLE_XET:
            return (
                f"The upload to {repo_id} through Xet storage failed ({_short(error)}). If this goes on, set "
                "HF_HUB_DISABLE_XET=1, which uploads through Git LFS instead."
            )
        if not isinstance(error, HfHubHTTPError):
            return f"The connection to {endpoint} failed while pushing to {repo_id} ({_short(error)})."
        return f"{self._answer(error.response.status_code)} The Hub's own words: {one_line(error)}."

    def _answer(self, status: int) -> str:
        """What an answer of this status means for a push, and what to do."""
        repo_id, endpoint = self.where["repo_id"], self.api.endpoint
        if status == 401:
            has_token = (self.api.token or get_token()) is not None
            found = "does not accept the token" if has_token else "wants a token, and there is none"
            return f"{endpoint} {found}: log in with `hf auth login`, or set HF_TOKEN to one that may write."
        if status == 403:
            return f"The token may not write to {repo_id}: use one with write access to it, or another organisation."
        if status == 404:
            return f"{endpoint} has no {repo_id} at revision {self.revision!r} that this token may read."
        if status == 412:
            return f"Somebody else's commit has come onto {self.revision!r} of {repo_id} since this push began."
        if status == 429:
            return f"{endpoint} limits the number of requests (429): wait a few minutes."
        return f"{endpoint} answered {status} while pushing to {repo_id}."


def _holds(files: dict[str, str], add: CommitOperationAdd) -> bool:
    """Whether a commit whose files have these hashes holds the file that is to be added."""
    known = files.get(add.path_in_repo, "")
    if len(known) == 64:
        return known == add.upload_info.sha256.hex()
    if not known:
        return False
    with add.as_file() as file:
        content = file.read()
    return known == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _retried(call: Callable[[], Result], attempts: int | None = None) -> Result:
    """call(), again while the Hub is busy (429, 5xx) or the connection fails; waits as long as the Hub says."""
    for wait in [*_WAITS, None][-(attempts or len(_WAITS) + 1) :]:
        try:
            return call()
        except HTTPError as error:
            response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
            if wait is None or (response is not None and response.status_code not in (408, 429, 500, 502, 503, 504)):
                raise
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            wait = float(asked) if asked.isdigit() else wait
            if wait > _LONGEST_WAIT:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> PushReport:
    """Publish a finished checkpoint folder as one commit, pull it back into a fresh cache and replay its stored pair.

    Published are the files of `publishable_files`, without folders of this machine in what JSON and YAML say. A README
    on the Hub keeps what a person wrote outside the generated part; one without such a part, of a person's own, is
    published as it is in the folder, in the place of what the Hub has (which its history keeps). Weights of an earlier
    push that the folder no longer has, and the pretraining/ of another encoder, are removed in the same commit; other
    files stay.

    Args:
        folder: as the training scripts write it (encoder/, autoencoder/, dit/, ...).
        repo_id, private, revision, create_pr, token, endpoint: see `Target`.
        dry_run: only say what would be sent; no request is made.
        message: of the commit.

    Raises:
        FileNotFoundError: no finished checkpoint.
        ValueError: a card whose marks are damaged, or that lacks the generated part which the Hub's has.
        PushError: the Hub refuses or cannot be reached, and nothing is published; or what was pulled back differs.
    """
    start, folder = time.perf_counter(), Path(folder)
    with well_formed(folder):
        files, left_out = publishable_files(folder)
    contents, card = {name: without_machine(name, path) for name, path in files.items()}, files.get("README.md")
    if card:
        contents["README.md"] = card.read_text(encoding="utf-8").replace("REPO_OR_FOLDER", repo_id).encode()
    report = PushReport(repo_id, revision or "main", {}, left_out)
    if dry_run:
        _set_pair(contents, folder, None)
        report.files = _sizes(contents)
        return report
    where = {"private": private, "revision": revision, "create_pr": create_pr, "token": token, "endpoint": endpoint}
    target = Target(repo_id, **where)
    _set_pair(contents, folder, target.read(replay.FILE_NAME))
    if card:
        existing, own = target.read("README.md") or b"", contents["README.md"]
        contents["README.md"] = pushed_card(existing.decode("utf-8"), own.decode("utf-8")).encode()
    for name in (name for name in contents if name.startswith(constants.EVAL_RESULTS_FOLDER)):
        entries = eval_files.read_entries(name, files[name].read_bytes())
        contents[name] = eval_files.merged(name, target.read(name), entries).encode()
    report.removed = _stale(target.present, contents)
    made = target.commit(contents, message or f"Push {folder.resolve().name}", report.removed)
    report.commit, report.url, report.pull_request = made
    report.files, report.difference = _sizes(contents), _verified(target, made.commit, contents)
    report.seconds = time.perf_counter() - start
    return report


def _set_pair(contents: dict[str, Content], folder: Path, published: bytes | None) -> None:
    """Add the stored input and output: the folder's or the Hub's while they still fit the model, or new ones."""
    own = contents.pop(replay.FILE_NAME, None)
    if (pair := replay.fitting_pair(folder, [own and own.read_bytes(), published])) is not None:
        contents[replay.FILE_NAME] = pair


def _sizes(contents: dict[str, Content]) -> dict[str, int]:
    return {path: len(c) if isinstance(c, bytes) else c.stat().st_size for path, c in sorted(contents.items())}


def _stale(present: dict[str, str], contents: dict[str, Content]) -> list[str]:
    """Weights beside new ones that are none of them, and another encoder's `pretraining/`: a loader might take them."""
    folders = {path.rpartition("/")[0] for path in contents if holds_weights(path)}
    others = () if "pretraining" in folders else ("pretraining/",)
    found = (p for p in present if p.startswith(others) or (holds_weights(p) and p.rpartition("/")[0] in folders))
    return sorted(path for path in found if path not in contents)


def _verified(target: Target, commit: str, contents: dict[str, Content]) -> float | None:
    """Pull a commit into a fresh cache, compare every byte, and replay the stored pair; its largest difference."""
    published = f"{target.where['repo_id']} is published as commit {commit}, but"
    with tempfile.TemporaryDirectory() as cache:
        try:
            pulled = Path(target.api.snapshot_download(**target.where, revision=commit, cache_dir=cache))
        except Exception as error:
            raise PushError(f"{published} could not be pulled back: {_short(error)}.") from error
        for path, content in contents.items():
            expected = content if isinstance(content, bytes) else content.read_bytes()
            if not (pulled / path).is_file() or (pulled / path).read_bytes() != expected:
                raise PushError(f"{published} {path} was not pulled back as it was sent: push again.")
        if replay.FILE_NAME not in contents:
            return None
        try:
            return replay.replay(pulled, pulled / replay.FILE_NAME)
        except ValueError as error:
            raise PushError(f"{published} what was pulled back computes something else: {error}") from error


def push_to_hub(
    self,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **save_options,
) -> PushReport:
    """Publish this model or pipeline in the layout of `hf-dpssl push`, see `hf_dpssl.hub.publishing.push`.

    A model that pretrains an encoder becomes the encoder's repository with the whole model under `pretraining/`.
    What only a training run knows (recipe, results, pictures, card) is not part of it: push the run's folder for that.

    Args:
        save_options: for `save_pretrained`, max_shard_size for example.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(self, ContrastivePreTrainedModel):
            self.encoder.save_pretrained(folder, **save_options)
            self.save_pretrained(Path(folder, "pretraining"), **save_options)
        else:
            self.save_pretrained(folder, **save_options)
        options = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
        return push(folder, repo_id, message=commit_message or f"Push {type(self).__name__}", **options)
