"""Pushes while things go wrong: they succeed once, or say why not and leave the repository as it was."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings

import pytest

from tallstore.hub.refusals import refusal_of
from tallstore.hub.repository import Repository
from tests.hub.client_process import client_environment, client_process
from tests.hub.conftest import NOWHERE
from tests.hub.loopback.faults import Call, Delay, Drop, Fault, Hold, LoseAnswer, Status, Truncate
from tests.hub.loopback.wire import Answer, DropError
from tests.hub.pushes import REPO, Pusher, contents, pushed, titles

API = f"/api/models/{REPO}"
REQUESTS = [
    ("GET", API),
    ("POST", "/api/repos/create"),
    ("GET", f"{API}/tree/*"),
    ("POST", f"{API}/preupload/*"),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch"),
    ("PUT", "/lfs/*"),
    ("POST", "/api/validate-yaml"),
    ("POST", f"{API}/commit/*"),
]


@pytest.fixture
def push(hub, plain_process):
    return Pusher(plain_process, hub.url, hub.token, plots=False)


@pytest.fixture(scope="module")
def second_process(tmp_path_factory):
    with client_process(NOWHERE, tmp_path_factory.mktemp("second")) as process:
        yield process


@pytest.fixture
def ready(hub, push, bundles):
    """A repository with a bundle, so that requests of a second push are the first that go wrong."""
    push(bundles / "two", REPO)
    hub.log.clear()
    return hub.repositories[REPO]


def commits_sent(hub):
    return len(hub.log.select("POST", f"{API}/commit/*"))


# --- what passes


@pytest.mark.parametrize("fault", [Status(503), Status(429), Drop(), LoseAnswer(), Delay(0.2)], ids=repr)
@pytest.mark.parametrize("request_", REQUESTS, ids=" ".join)
def test_what_passes_is_tried_again_and_committed_once(hub, push, bundles, request_, fault):
    hub.inject(fault, *request_)
    outcome = push(bundles / "two", REPO)
    assert outcome.oid == hub.repositories[REPO].refs["refs/heads/main"], outcome.problem
    assert titles(hub) == ["Bundle of 2 tasks", "initial commit"]
    assert pushed(hub) == contents(bundles / "two")


@pytest.mark.parametrize("fault", [Status(503), Status(429), Drop(), Truncate(10)], ids=repr)
@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_what_passes_while_the_manifest_is_read_is_tried_again(hub, push, bundles, method, fault):
    hub.inject(fault, method, f"/{REPO}/resolve/*")
    outcome = push(bundles / "three", REPO)
    assert outcome.error is None, outcome.problem
    assert pushed(hub) == contents(bundles / "three")


def test_a_lost_answer_is_looked_up(hub, push, bundles, ready):
    """Also where somebody else has pushed since: the commit is below theirs."""
    before = ready.refs["refs/heads/main"]
    hub.inject(LoseAnswer(), "POST", f"{API}/commit/*")
    hub.inject(Call(lambda: ready.push({"notes.txt": b"theirs"}, title="Theirs")), "GET", f"{API}/commits/*")
    outcome = push(bundles / "three", REPO)
    theirs = ready.resolve("main")
    assert outcome.oid == theirs.parent
    assert ready.commits[outcome.oid].parent == before
    assert titles(hub)[:2] == ["Theirs", "Bundle of 3 tasks: 1 added"]
    assert commits_sent(hub) == 1


def test_a_lost_answer_of_a_request_that_was_made_again_is_looked_up(hub, push, bundles, ready):
    hub.inject(Status(503), "POST", f"{API}/commit/*")
    hub.inject(LoseAnswer(), "POST", f"{API}/commit/*")
    assert push(bundles / "three", REPO).oid == ready.refs["refs/heads/main"]
    assert titles(hub)[0] == "Bundle of 3 tasks: 1 added"
    assert len(titles(hub)) == 3


def test_a_pull_request_whose_answer_was_lost_is_opened_once(hub, push, bundles, ready):
    push(bundles / "three", REPO, create_pr=True)  # the same, from before
    hub.inject(LoseAnswer(), "POST", f"{API}/commit/*")
    outcome = push(bundles / "three", REPO, create_pr=True)
    assert outcome.pr_url == f"{hub.url}/{REPO}/discussions/2"
    assert outcome.oid == ready.refs["refs/pr/2"]
    assert sum(ref.startswith("refs/pr/") for ref in ready.refs) == 2


# --- what does not


@pytest.mark.parametrize(("method", "path"), REQUESTS[2:])
def test_what_does_not_pass_is_told_in_one_line_and_commits_nothing(hub, push, bundles, method, path):
    hub.inject(Status(503), method, path, times=None)
    outcome = push(bundles / "two", REPO)
    assert outcome.error == "HubError"
    assert outcome.problem == f"{REPO}: the Hub answers with HTTP 503; push again later"
    assert titles(hub) == ["initial commit"]
    assert hub.token not in outcome.said
    hub.faults.clear()
    assert push(bundles / "two", REPO).oid


def test_a_hub_that_is_not_there_is_told_in_one_line(push, bundles, plain_process):
    outcome = Pusher(plain_process, "http://127.0.0.1:9", "hf_secret", plots=False)(bundles / "two", REPO)
    assert outcome.error == "HubError"
    assert outcome.problem.startswith(f"{REPO}: the Hub cannot be reached (ConnectError); push again later")
    assert "hf_secret" not in outcome.said


def test_a_warning_that_was_made_an_error_is_named_and_not_quoted():
    def upload():
        try:
            warnings.warn("of hf_secret", DeprecationWarning, stacklevel=1)
        except DeprecationWarning as warning:
            raise RuntimeError("while uploading with hf_secret") from warning

    with pytest.raises(RuntimeError) as caught:  # here, warnings are errors
        upload()
    assert refusal_of(caught.value) == ("warning", 0, "RuntimeError, from DeprecationWarning")
    assert refusal_of(RuntimeError("hf_secret")) == ("other", 0, "RuntimeError")
    problem = str(Repository(REPO, None, None)._refused(caught.value))
    assert problem.startswith(
        f"{REPO}: the Hub's client has warnings (RuntimeError, from DeprecationWarning), which are"
    )


def test_metadata_that_the_hub_refuses_are_told(hub, push, bundles, ready):
    """The loopback Hub takes whatever is YAML; the Hub's answer to more than that is made up here."""
    refusal = {"errors": [{"message": '"license" must be one of these'}], "warnings": []}
    hub.inject(Reply(refusal, 400), "POST", "/api/validate-yaml")
    outcome = push(bundles / "three", REPO)
    assert outcome.error == "CardError"
    assert outcome.problem == (
        f'{REPO}, README.md: the Hub refuses its metadata ("license" must be one of these); correct them'
    )
    assert len(titles(hub)) == 2


class Reply(Fault):
    """An answer of JSON instead of the Hub's own."""

    def __init__(self, value, status):
        self.answer = Answer.of_json(value, status)

    def after(self, answer):
        return self.answer


# --- others


def test_who_pushed_in_the_meantime_is_not_overwritten(hub, push, bundles, ready):
    hub.inject(Call(lambda: ready.push({"notes.txt": b"theirs"}, title="Theirs")), "POST", f"{API}/commit/*")
    outcome = push(bundles / "three", REPO)
    assert outcome.error == "HubConflictError"
    assert outcome.problem == (f"{REPO}: somebody else pushed in the meantime; pull what is there now, and push again")
    assert titles(hub)[0] == "Theirs"
    assert pushed(hub) == contents(bundles / "two")
    assert commits_sent(hub) == 1


def test_of_two_pushers_at_once_one_wins_and_the_other_is_told(hub, push, bundles, ready, second_process):
    """Both have sent everything; the first to commit is held up until the second has."""
    hold = Hold()
    hub.inject(hold, "POST", f"{API}/commit/*")
    slow = push.start(bundles / "three", REPO)
    hold.reached.wait(60)
    fast = Pusher(second_process, hub.url, hub.token, plots=False)(bundles / "elsewhere", REPO, overwrite=True)
    hold.release()
    assert slow.result(60).error == "HubConflictError"
    assert fast.oid == ready.refs["refs/heads/main"]
    assert pushed(hub) == contents(bundles / "elsewhere")
    # And once more, from what is there now.
    assert push(bundles / "three", REPO, overwrite=True).oid == ready.refs["refs/heads/main"]
    assert ready.resolve("main").parent == fast.oid


def test_of_many_pushers_each_wins_or_is_told(hub, push, bundles, ready, second_process):
    other = Pusher(second_process, hub.url, hub.token, plots=False)
    outcomes = []
    for _ in range(3):
        racing = [
            push.start(bundles / "three", REPO, revision="race"),
            other.start(bundles / "two", REPO, revision="race"),
        ]
        outcomes += [pusher.result(60) for pusher in racing]
    assert {outcome.error for outcome in outcomes} <= {None, "HubConflictError"}
    history = [commit.sha for commit in ready.history("race")]
    assert all(outcome.oid in history for outcome in outcomes if outcome.error is None)
    assert pushed(hub, "race") in (contents(bundles / "two"), contents(bundles / "three"))


# --- what is interrupted


class HoldAndLose(Hold):
    """The request waits, and is never carried out."""

    def before(self, request):
        super().before(request)
        raise DropError


@pytest.fixture
def interrupted(hub, bundles, tmp_path):
    """Runs `tallstore push` until a request has arrived, and ends it by a signal; its exit code and stderr."""

    def run(number, hold, *request, skip=0):
        hub.inject(hold, *request, skip=skip)
        environment = client_environment(hub.url, tmp_path, token=hub.token)
        del environment["HF_HUB_DISABLE_PROGRESS_BARS"]  # where there is no terminal, there are none
        command = [sys.executable, "-m", "tallstore", "push", bundles / "two", REPO, "--no-plots"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            hold.reached.wait(60)
            process.send_signal(number)
            if number == signal.SIGINT:
                hold.release()
            process.wait(60)
            hub.faults.clear()
            return process.returncode, process.stderr.read()

    return run


@pytest.mark.parametrize(
    "end", [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGKILL, -signal.SIGKILL, "")], ids=["Ctrl-C", "killed"]
)
def test_who_was_interrupted_sends_the_rest(hub, push, bundles, interrupted, end):
    number, code, said = end
    ended, printed = interrupted(number, HoldAndLose(), "PUT", "/lfs/*", skip=2)
    assert ended == code
    assert printed.endswith(said)
    assert "B/s" not in printed
    assert titles(hub) == ["initial commit"]
    push(bundles / "two", REPO)
    arrived = [exchange.path for exchange in hub.log.select("PUT") if exchange.status == 200]
    assert len(arrived) == len(set(arrived)) == len(hub.repositories[REPO].uploaded)
    assert pushed(hub) == contents(bundles / "two")
    assert len(titles(hub)) == 2


def test_a_commit_that_is_interrupted_is_made_whole_or_not_at_all(hub, push, bundles, interrupted):
    assert interrupted(signal.SIGINT, Hold(), "POST", f"{API}/commit/*") == (130, "interrupted\n")
    assert pushed(hub) in ({}, contents(bundles / "two"))
    push(bundles / "two", REPO)
    assert pushed(hub) == contents(bundles / "two")
    assert len(titles(hub)) == 2
