"""Bundles opened by their id: what is fetched and what is not, what the cache gives, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import save

import tallstore
from tallstore.format import layout
from tallstore.hub.pinned import Access
from tests.hub import pulls
from tests.hub.client_process import client_process
from tests.hub.loopback import Account, LoopbackHub
from tests.hub.loopback.faults import Call
from tests.hub.pulls import call, contents, digests, shown
from tests.packing_cases import base_model, tuned

OWNER, STRANGER = "hf_owner", "hf_stranger"
BASE_SHA, OTHER_SHA = "b" * 40, "c" * 40
TASKS = pulls.NAMES


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Twenty tasks, over a base that is on the Hub."""
    out = tmp_path_factory.mktemp("packed") / "bundle"
    base = base_model()
    experts = {task: tuned(base, seed) for seed, task in enumerate(TASKS)}
    tallstore.pack(base, experts, out, base_ref=f"org/base@{BASE_SHA}", private=["head.bias"])
    return out


@pytest.fixture(scope="module")
def running(bundle):
    accounts = [Account(OWNER, "user", organisations={"org": "write"}), Account(STRANGER, "stranger")]
    with LoopbackHub(accounts=accounts) as hub:
        weights = save({name: tensor.contiguous() for name, tensor in base_model().items()})
        hub.add("org/base", {BASE_SHA: {"model.safetensors": weights, "config.json": b"{}"}, OTHER_SHA: {"x": b""}})
        hub.add("org/bundle").push(contents(bundle))
        yield hub


@pytest.fixture(scope="module")
def process(running, tmp_path_factory):
    with client_process(running.url, tmp_path_factory.mktemp("home"), token=OWNER) as started:
        yield started


@pytest.fixture
def hub(running):
    """With an empty log, and nothing that goes wrong."""
    running.log.clear()
    yield running
    running.faults.clear()


@pytest.fixture
def repo_id(request, hub, bundle):
    """A repository with the bundle that no other test has."""
    repo_id = f"org/{pulls.name_of(request)}"
    hub.add(repo_id).push(contents(bundle))
    return repo_id


def fetched(hub, repo_id) -> set[str]:
    """The files whose bodies were sent."""
    return {
        each.path.rpartition("/resolve/")[2].partition("/")[2]
        for each in hub.log.select("GET", f"/{repo_id}/resolve/*")
    }


def nbytes(hub) -> int:
    return sum(exchange.sent_nbytes for exchange in hub.log)


def paths_of(bundle, *tasks):
    """The files of tasks, and those that they share, as the manifest lists them."""
    manifest = json.loads((bundle / layout.MANIFEST).read_bytes())
    slugs = [task["slug"] for task in manifest["tasks"] if task["name"] in tasks]
    own = {
        file["path"]
        for file in manifest["files"]
        if file["path"].split("/")[1:2] and file["path"].split("/")[1] in slugs
    }
    shared = {file["path"] for file in manifest["files"] if file["path"].startswith(("base.json", "groups/"))}
    return own, shared


# --- what is fetched ---


def test_a_task_fetches_its_own_files_and_what_it_shares(hub, process, bundle, tmp_path):
    found = call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    assert found.value == digests(bundle, TASKS[:1], base=base_model())
    own, shared = paths_of(bundle, TASKS[0])
    assert fetched(hub, "org/bundle") == {layout.MANIFEST, *own, *shared}
    assert fetched(hub, "org/base") == {"model.safetensors", "config.json"}
    budget = sum((bundle / path).stat().st_size for path in {*own, *shared} if path.endswith(".safetensors")) + 200_000
    base = sum(each.sent_nbytes for each in hub.log.select("GET", "/org/base/resolve/*"))
    assert nbytes(hub) - base < budget


def test_another_task_fetches_its_own_files_alone(hub, process, bundle, tmp_path):
    call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    hub.log.clear()
    found = call(process, digests, "org/bundle", TASKS[1:2], cache_dir=tmp_path)
    assert found.value == digests(bundle, TASKS[1:2], base=base_model())
    own, _ = paths_of(bundle, TASKS[1])
    assert fetched(hub, "org/bundle") == own
    assert fetched(hub, "org/base") == set()


def test_the_requests_are_few(hub, process, tmp_path):
    """One that resolves, two of the manifest; then one for all files together, and two for each."""
    call(process, shown, "org/bundle", cache_dir=tmp_path)
    assert [(each.method, each.path.rpartition("/")[2]) for each in hub.log] == [
        ("HEAD", layout.MANIFEST),
        ("HEAD", layout.MANIFEST),
        ("GET", layout.MANIFEST),
    ]
    hub.log.clear()
    call(process, pulls.tensor, "org/bundle", TASKS[0], "head.bias", cache_dir=tmp_path)
    assert len(hub.log.select("HEAD", "*/tallstore.json")) == 1
    assert len(hub.log.select("POST", "*/paths-info/*")) == 2  # the tables; one shard
    assert len(hub.log) == 1 + 2 + 2 * (3 + 1)


def test_one_tensor_fetches_no_shard_but_its_own(hub, process, bundle, tmp_path):
    found = call(process, pulls.tensor, "org/bundle", TASKS[0], "head.bias", cache_dir=tmp_path)
    assert len(found.value) == 7
    shards = [path for path in fetched(hub, "org/bundle") if path.endswith(".safetensors")]
    assert [path.rpartition("/")[2] for path in shards] == ["private-00001-of-00001.safetensors"]


def test_what_is_in_the_cache_is_not_asked_for(hub, process, tmp_path):
    sha = hub.repositories["org/bundle"].refs["refs/heads/main"]
    call(process, digests, f"org/bundle@{sha}", TASKS[:1], cache_dir=tmp_path)
    hub.log.clear()
    call(process, digests, f"org/bundle@{sha}", TASKS[:1], base=base_model(), cache_dir=tmp_path)
    assert not hub.log


def test_the_commit_is_kept_whatever_is_pushed_meanwhile(hub, process, bundle, repo_id, tmp_path):
    expected = digests(bundle, TASKS[:1], base=base_model())
    repository = hub.repositories[repo_id]
    hub.inject(Call(lambda: repository.push({layout.MANIFEST: b"{}"})), "POST", f"*{repo_id}/paths-info/*")
    found = call(process, digests, repo_id, TASKS[:1], cache_dir=tmp_path)
    assert found.value == expected
    assert len(repository.commits) == 3


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "1" * 40])
def test_revisions(hub, process, repo_id, tmp_path, revision):
    repository = hub.repositories[repo_id]
    files = repository.read()
    repository.push(files, sha="1" * 40)
    repository.refs |= {"refs/tags/v1": "1" * 40, "refs/pr/1": "1" * 40}
    repository.push({layout.MANIFEST: b"{}"})
    for source, options in ((f"{repo_id}@{revision}", {}), (repo_id, {"revision": revision})):
        found = call(process, shown, source, cache_dir=tmp_path, **options)
        assert found.value[2].name == "1" * 40


# --- the cache ---


def test_it_works_offline_then(hub, process, bundle, tmp_path):
    call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    hub.log.clear()
    found = call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path, local_files_only=True)
    assert found.value == digests(bundle, TASKS[:1], base=base_model())
    with client_process(hub.url, tmp_path / "home", HF_HUB_OFFLINE="1") as offline:
        again = call(offline, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    assert again.value == found.value
    assert not hub.log


def test_offline_says_which_file_is_missing(hub, process, tmp_path):
    nothing = call(process, shown, "org/bundle", cache_dir=tmp_path, local_files_only=True)
    assert (nothing.error, "tallstore.json is not in the Hub's cache" in nothing.problem) == (
        "BundleNotFoundError",
        True,
    )
    call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    found = call(process, digests, "org/bundle", TASKS[1:2], cache_dir=tmp_path, local_files_only=True)
    assert found.error == "NotFetchedError"
    assert "tasks/task-b/task.json is not in the Hub's cache here" in found.problem
    assert "tallstore pull org/bundle" in found.problem


def test_the_snapshot_is_a_bundle_in_a_directory(hub, process, bundle, tmp_path):
    call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    _, _, path, here = call(process, shown, "org/bundle", cache_dir=tmp_path).value
    assert [task for task, is_here in here.items() if is_here] == TASKS[:1]
    assert (path / layout.MANIFEST).is_symlink()
    assert digests(path, TASKS[:1], base=base_model()) == digests(bundle, TASKS[:1], base=base_model())
    assert tallstore.verify(path) == []


def test_a_shared_blob_is_followed_one_step_further(hub, process, tmp_path):
    """As the client's cache has files that came by Xet."""
    call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    path = call(process, shown, "org/bundle", cache_dir=tmp_path).value[2]
    blob = (path / "base.json").resolve()
    shared = tmp_path / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ab/{'ab' * 32}")
    assert layout.resolve(path, "base.json").read_bytes() == shared.read_bytes()
    assert tallstore.open_bundle(path).keys(TASKS[0])


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../../secret", "../../blobs", "../../refs/main", "groups", "../../blobs/out"]
)
def test_any_other_link_is_refused(hub, process, tmp_path, target):
    call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    path = call(process, shown, "org/bundle", cache_dir=tmp_path).value[2]
    (tmp_path / "secret").write_text("{}")
    (path / "../../blobs/out").symlink_to("../../secret")
    (path / "base.json").unlink()
    (path / "base.json").symlink_to(target)
    with pytest.raises(tallstore.FormatError, match=r"symbolic link.*PATH-2"):
        tallstore.open_bundle(path).keys(TASKS[0])


def test_a_cut_off_blob_is_fetched_again(hub, process, bundle, tmp_path):
    call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    path = call(process, shown, "org/bundle", cache_dir=tmp_path).value[2]
    shard = next(path.glob("groups/*/merged-*"))
    shard.resolve().write_bytes(shard.read_bytes()[:100])
    hub.log.clear()
    found = call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    assert found.value == digests(bundle, TASKS[:1], base=base_model())
    assert fetched(hub, "org/bundle") == {shard.relative_to(path).as_posix()}


def test_force_download_fetches_what_is_needed_again_once(hub, process, bundle, tmp_path):
    call(process, digests, "org/bundle", TASKS[:1], cache_dir=tmp_path)
    hub.log.clear()
    call(
        process, digests, "org/bundle", [TASKS[0], TASKS[0]], base=base_model(), cache_dir=tmp_path, force_download=True
    )
    own, shared = paths_of(bundle, TASKS[0])
    assert fetched(hub, "org/bundle") == {layout.MANIFEST, *own, *shared}
    assert len(hub.log.select("GET", "*/base.json")) == 1


def test_a_path_comes_before_an_id(hub, process, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundle, tmp_path / "org" / "bundle")
    assert tallstore.open_bundle("org/bundle").tasks == tuple(TASKS)
    assert not hub.log


# --- who may, and what is there ---


def test_a_private_repository_needs_its_token(hub, process, bundle, tmp_path):
    hub.add("org/private", private=True).push(contents(bundle))
    refused = call(process, shown, "org/private", token=STRANGER, cache_dir=tmp_path)
    assert refused.error == "BundleNotFoundError"
    assert "no such repository on the Hub; a private one needs a token" in refused.problem
    found = call(process, digests, "org/private", TASKS[:1], token=OWNER, base=base_model(), cache_dir=tmp_path)
    assert found.value == digests(bundle, TASKS[:1], base=base_model())


def test_the_token_reaches_the_base(hub, process, bundle, tmp_path):
    repository = hub.repositories["org/base"]
    repository.private = True
    try:
        found = call(process, digests, "org/bundle", TASKS[:1], token=OWNER, cache_dir=tmp_path)
        refused = call(process, digests, "org/bundle", TASKS[:1], token=STRANGER, cache_dir=tmp_path / "other")
    finally:
        repository.private = False
    assert found.error is None
    assert refused.error == "BaseMissingError"
    assert f"its base cannot be had from org/base@{BASE_SHA[:12]}" in refused.problem
    assert "base=" in refused.problem


@pytest.mark.parametrize(
    ("source", "options", "error", "problem"),
    [
        ("org/nothing", {}, "BundleNotFoundError", "org/nothing: no such path here, and no such repository on the Hub"),
        (
            "org/bundle@v9",
            {},
            "BundleNotFoundError",
            "org/bundle@v9: the Hub has that repository, but no such revision",
        ),
        ("org/base", {}, "BundleNotFoundError", "org/base: the repository has no tallstore.json, it is no bundle"),
        ("org/a--b", {}, "BundleNotFoundError", "no valid id of a repository"),
        ("org/bundle", {"token": "hf_wrong"}, "HubAccessError", "org/bundle: the Hub refuses access (HTTP 401)"),
        ("org/bundle", {"token": "hf_impossible\n"}, "HubError", "cannot be downloaded from the Hub"),
        ("org/bundle@v1", {"revision": "v2"}, "OptionError", "revision is 'v2', and 'org/bundle@v1' names another"),
        ("org/bundle", {"force_download": True, "local_files_only": True}, "OptionError", "exclude each other"),
    ],
)
def test_what_cannot_be_opened_is_one_line(process, tmp_path, source, options, error, problem):  # noqa: PLR0917
    found = call(process, shown, source, cache_dir=tmp_path, **options)
    assert (found.error, problem in found.problem) == (error, True), found.problem
    assert "\n" not in found.problem
    assert "hf_" not in found.problem


def test_the_token_is_said_nowhere(hub, process, tmp_path):
    found = call(process, shown, "org/bundle", token=OWNER, cache_dir=tmp_path)
    wrong = call(process, shown, "org/bundle", token="hf_wrong", cache_dir=tmp_path / "other")  # noqa: S106
    assert OWNER not in repr(found)
    assert "hf_wrong" not in repr(wrong)
    assert OWNER not in repr(Access(OWNER))
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or OWNER.encode() not in file.read_bytes()


def test_a_bundle_shows_itself_by_its_id(hub, process, tmp_path):
    in_a_line, in_lines, path, _ = call(process, shown, "org/bundle", cache_dir=tmp_path).value
    assert in_a_line.startswith(f"<Bundle 'org/bundle@{path.name[:12]}': 20 tasks")
    assert in_lines.startswith(f"bundle org/bundle@{path.name[:12]}: 20 tasks")


# --- other ways to an expert ---


def test_models_and_switches_fetch_what_they_need(hub, process, bundle, tmp_path):
    found = call(process, pulls.by_other_ways, "org/bundle", TASKS[:3], cache_dir=tmp_path)
    assert found.error is None, found.problem
    assert found.value == [digests(bundle, [task], base=base_model())[task] for task in TASKS[:3]]
    own, shared = paths_of(bundle, *TASKS[:3])
    assert fetched(hub, "org/bundle") == {layout.MANIFEST, *own, *shared}


def test_statistics_need_no_shared_vectors(hub, process, bundle, tmp_path):
    found = call(process, pulls.density, "org/bundle", TASKS[:2], cache_dir=tmp_path)
    assert 0 < found.value < 1
    assert not [path for path in fetched(hub, "org/bundle") if path.startswith("groups/g0001/merged")]
    none = call(process, pulls.density, "org/bundle", None, cache_dir=tmp_path / "other")
    assert (none.error, "name the tasks" in none.problem) == ("NotFetchedError", True)


def test_what_was_pushed_is_opened_and_pulled(hub, process, bundle, tmp_path):
    assert call(process, tallstore.push, bundle, "user/pushed").error is None
    found = call(process, digests, "user/pushed", TASKS[:1], cache_dir=tmp_path)
    assert found.value == digests(bundle, TASKS[:1], base=base_model())
    path = call(process, tallstore.pull, "user/pushed", cache_dir=tmp_path).value
    assert contents(path) == contents(bundle)
    assert call(process, tallstore.verify, "user/pushed", cache_dir=tmp_path).value == []
