"""What a push does when the Hub or its storage fails: the local Hub of hub_server_write.py fails on demand.

After every test here nothing that was logged, printed or raised may hold the token.
"""

from __future__ import annotations

import logging
import shutil
import time

import pytest
from hub_server_write import TOKEN, dropped, dropped_after, dropped_midway, preceded_by, refused
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars
from tiny_checkpoints import save_checkpoints

from hf_dpssl.cli.commands import main
from hf_dpssl.hub.publishing import PushError, push, replay

ALWAYS = 30  # more often than anything is tried
BLOBS = (".safetensors", ".png")
LOGGERS = ("", "huggingface_hub", "httpx2", "httpx", "httpcore2", "httpcore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished checkpoint folder with its stored pair."""
    disable_progress_bars()
    folder = save_checkpoints(tmp_path_factory.mktemp("finished"), ("gan",))["gan"]
    (folder / replay.FILE_NAME).write_bytes(replay.record(folder))
    return folder


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited for between attempts, all of them without waiting."""
    waited, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (waited.append(seconds), sleep(min(seconds, 0.001))))
    return waited


@pytest.fixture(autouse=True)
def said(monkeypatch, capfd):
    """Everything that is logged, at any level and by any logger; read with stdout and stderr after the test."""
    lines: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield lines
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
    captured = capfd.readouterr()
    assert len(lines) > 5  # the client's requests at the least
    for text in (*lines, captured.out, captured.err):
        assert TOKEN not in text and "hf_wrong" not in text


def failed_push(folder, repo_id: str = "org/gan", **options) -> str:
    """The message of a push that fails; neither it nor the errors behind it hold the token."""
    with pytest.raises(PushError) as caught:
        push(folder, repo_id, **options)
    error = caught.value
    while error is not None:
        assert TOKEN not in f"{error!r} {error} {vars(error)}" and "hf_wrong" not in f"{error!r} {error}"
        error = error.__cause__ or error.__context__
    assert str(caught.value).endswith("Nothing was published. Push again: files that have arrived are not sent twice.")
    return str(caught.value)


def assert_nothing_is_published(hub, repo_id: str = "org/gan") -> None:
    """At most the empty repository is there."""
    if ("model", repo_id) in hub.store.repos:
        assert set(hub.files(repo_id)) == {".gitattributes"} and len(hub.history(repo_id)) == 1


def assert_complete(hub, folder, report, commits: int = 2) -> None:
    """The branch is the folder, and its blobs came to the server once."""
    published = hub.files("org/gan")
    assert all(published[name] == (folder / name).read_bytes() for name in report.files)
    assert report.difference == 0 and hub.history("org/gan")[0] == report.commit
    assert len(hub.history("org/gan")) == commits


def size_of_blobs(folder) -> int:
    """Bytes of the files that are kept outside git."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in BLOBS)


ROUTES = "_create_repo _info _tree _preupload _lfs_batch _lfs_put _commit".split()


@pytest.mark.parametrize("fault", [refused(500), refused(503), dropped], ids=["500", "503", "dropped"])
def test_a_failure_of_every_request_once_is_retried_and_sends_no_blob_twice(hub, folder, waits, fault):
    hub.faults = {route: [fault] for route in ROUTES}
    assert_complete(hub, folder, push(folder, "org/gan"))
    assert not any(hub.faults.values()) and len(waits) >= len(ROUTES)
    tries = hub.bytes_of("_lfs_put") - size_of_blobs(folder)  # one blob is refused with what it brought
    assert 0 <= tries <= max((folder / name).stat().st_size for name in ("model.safetensors", replay.FILE_NAME))


@pytest.mark.parametrize("route", ROUTES)
def test_an_error_500_that_stays_is_reported_with_nothing_published_and_a_retry_completes(hub, folder, waits, route):
    hub.faults[route] = [refused(500, message="out of order")] * ALWAYS
    message = failed_push(folder)
    assert f"{hub.endpoint} answered 500 while pushing to org/gan" in message
    assert_nothing_is_published(hub)
    hub.faults.clear()
    before = hub.bytes_of("_lfs_put")
    assert_complete(hub, folder, push(folder, "org/gan"))
    if route == "_commit":  # the blobs were there already
        assert before == hub.bytes_of("_lfs_put") == size_of_blobs(folder)


@pytest.mark.parametrize("route", ["_info", "_lfs_batch", "_commit"])
def test_too_many_requests_are_repeated_after_as_long_as_the_hub_says(hub, folder, waits, route):
    hub.faults[route] = [refused(429, Retry_After="7")]
    assert_complete(hub, folder, push(folder, "org/gan"))
    assert [seconds for seconds in waits if seconds >= 7] in ([7], [8])  # the client adds a second


def test_a_limit_of_requests_for_an_hour_ends_the_push_at_once(hub, folder, waits):
    hub.faults["_commit"] = [refused(429, Retry_After="3600")]
    assert "limits the number of requests (429): wait a few minutes" in failed_push(folder)
    assert waits == [] and hub.faults["_commit"] == []
    assert_nothing_is_published(hub)
    assert_complete(hub, folder, push(folder, "org/gan"))


@pytest.mark.parametrize("route", ["_preupload", "_commit"])
def test_connections_that_keep_dropping_are_reported_and_a_retry_completes(hub, folder, waits, route):
    hub.faults[route] = [dropped] * ALWAYS
    assert f"The connection to {hub.endpoint} failed while pushing to org/gan" in failed_push(folder)
    assert_nothing_is_published(hub)
    hub.faults.clear()
    assert_complete(hub, folder, push(folder, "org/gan"))


def test_a_commit_whose_answer_was_lost_is_recognised_and_not_made_twice(hub, folder, waits):
    hub.faults["_commit"] = [dropped_after]
    report = push(folder, "org/gan")
    assert_complete(hub, folder, report)
    assert report.url == f"{hub.endpoint}/org/gan/commit/{report.commit}"
    assert hub.bytes_of("_lfs_put") == size_of_blobs(folder)


def test_git_lfs_storage_that_dies_in_mid_upload_publishes_nothing_and_a_retry_sends_the_rest(hub, folder, waits):
    hub.faults["_lfs_put"] = [dropped_midway] * ALWAYS
    assert "The connection to" in failed_push(folder)
    assert_nothing_is_published(hub)
    assert 0 < hub.bytes_of("cut") and hub.bytes_of("_lfs_put") == 0
    hub.faults.clear()
    assert_complete(hub, folder, push(folder, "org/gan"))
    assert hub.bytes_of("_lfs_put") == size_of_blobs(folder)


def test_git_lfs_storage_that_dies_after_the_first_blob_gets_only_the_others_again(hub, folder, waits):
    hub.faults["_lfs_put"] = [lambda handler, proceed: proceed(), *[dropped_midway] * ALWAYS]
    failed_push(folder)
    arrived = hub.bytes_of("_lfs_put")
    assert_nothing_is_published(hub)
    assert 0 < arrived < size_of_blobs(folder)
    hub.faults.clear()
    assert_complete(hub, folder, push(folder, "org/gan"))
    assert hub.bytes_of("_lfs_put") == size_of_blobs(folder)


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, folder, tmp_path, waits):
    (tmp_path / "LICENSE.md").write_text("Theirs.")
    push(folder, "org/gan")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "results.json").write_text("{}")
    (tmp_path / "theirs").mkdir()
    for name, content in hub.files("org/gan").items():
        (tmp_path / "theirs" / name).write_bytes(content)
    (tmp_path / "theirs" / "LICENSE.md").write_text("Theirs.")
    hub.faults["_commit"] = [preceded_by(lambda: hub.add_repo("model", "org/gan", tmp_path / "theirs"))]
    message = failed_push(other)
    assert "Somebody else's commit has come onto 'main' of org/gan since this push began" in message
    assert hub.files("org/gan")["results.json"] == (folder / "results.json").read_bytes()
    report = push(other, "org/gan")
    assert_complete(hub, other, report, commits=4)
    assert hub.files("org/gan")["LICENSE.md"] == b"Theirs."


def test_a_wrong_token_and_none_are_told_apart(hub, folder, waits, monkeypatch, tmp_path):
    assert f"{hub.endpoint} does not accept the token: log in with `hf auth login`" in failed_push(
        folder, token="hf_wrong"
    )
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert f"{hub.endpoint} wants a token, and there is none" in failed_push(folder)
    assert hub.store.repos == {} and waits == []
    assert_complete(hub, folder, push(folder, "org/gan", token=TOKEN))


REASON = "Repositories of org are full: 12 of 10 GB.\nDelete some, see https://hub.example/billing & ask org's admin."


def test_every_refusal_of_the_hub_is_told_with_its_whole_reason(hub, folder, waits):
    """The first line of the client's error holds no more than the status and a request's number."""
    for status in (400, 401, 402, 403, 404, 405, 409, 410, 412, 413, 422, 429, 451, 500, 501, 503):
        for route in ("_create_repo", "_preupload", "_lfs_batch", "_commit"):
            hub.faults = {route: [refused(status, message=REASON.replace("\n", " "), X_Request_Id="no-7")] * ALWAYS}
            if (status, route) == (409, "_create_repo"):
                continue  # it is there already: no refusal
            message = failed_push(folder, f"org/{status}{route}")  # of one that is there, some refusals are passed over
            assert "\n" not in message and "no-7" in message, (status, route)
            assert " ".join(REASON.split()) in message, (status, route, message)


@pytest.mark.parametrize("fault", ["401", "404", "500", "storage"])
def test_xet_storage_that_fails_names_the_way_out_which_then_works(hub, folder, monkeypatch, fault):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")  # hf_xet waits by a clock of its own
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")
    if fault != "storage":  # the server's Xet storage itself always drops an upload midway
        hub.faults["_xet_token"] = [refused(int(fault))] * ALWAYS
    message = failed_push(folder)
    assert message.startswith("The upload to org/gan through Xet storage failed (ConnectionError: ")
    assert "set HF_HUB_DISABLE_XET=1, which uploads through Git LFS instead." in message
    assert fault == "storage" or f"{fault} " in message
    assert (hub.bytes_of("cut") > 0) == (fault == "storage")
    assert hub.bytes_of("_lfs_put") == 0 and any("/xet-write-token/" in path for _, path in hub.requests)
    assert_nothing_is_published(hub)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert_complete(hub, folder, push(folder, "org/gan"))
    assert hub.bytes_of("_lfs_put") == size_of_blobs(folder)


def test_the_command_reports_a_failed_push_in_one_line_with_status_1(hub, folder, waits, capfd):
    hub.faults["_commit"] = [refused(500, message="out of order")] * ALWAYS
    assert main(["push", str(folder), "org/gan"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and TOKEN not in err
    assert err.splitlines()[-1].startswith(f"hf-dpssl push: {hub.endpoint} answered 500 while pushing to org/gan")
    assert "Traceback" not in err


def test_the_tests_for_the_token_see_what_the_client_logs(hub, folder, said):
    push(folder, "org/gan")
    logging.getLogger("huggingface_hub").debug("seen")
    assert said[-1] == "seen" and any("/api/models/org/gan" in line for line in said)
