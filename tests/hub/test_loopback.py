"""The Hub on this machine does what the real client asks of the Hub: repositories, commits, revisions, accounts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd as Add
from huggingface_hub import CommitOperationCopy as Copy
from huggingface_hub import CommitOperationDelete as Delete
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.client_process import Client
from tests.hub.loopback import Account, LoopbackHub

MODEL = "user/model"
LARGE = b"\x08\0\0\0\0\0\0\0" + bytes(range(256)) * 100
OLD, NEW = "a" * 40, "b" * 40


def commit(client, *operations, **options):
    return client("create_commit", MODEL, operations, commit_message="Change", **options)


def files_of(snapshot):
    paths = (path for path in Path(snapshot).rglob("*") if path.is_file())
    return {path.relative_to(snapshot).as_posix(): path.read_bytes() for path in paths}


class TestRepositories:
    def test_a_repository_is_created_once(self, hub, client):
        assert client("create_repo", MODEL, private=True).repo_id == MODEL
        assert client("create_repo", MODEL, exist_ok=True).repo_id == MODEL
        with pytest.raises(HfHubHTTPError, match="You already created this model repo") as refused:
            client("create_repo", MODEL)
        assert refused.value.response.status_code == 409
        assert client("model_info", MODEL).private

    def test_a_new_repository_has_one_commit_with_attributes(self, hub, client):
        client("create_repo", "model")
        assert client("list_repo_files", MODEL) == [".gitattributes"]
        assert [made.title for made in client("list_repo_commits", MODEL)] == ["initial commit"]

    def test_a_repository_is_deleted(self, hub, client):
        client("create_repo", MODEL)
        client("delete_repo", MODEL)
        assert not client("repo_exists", MODEL)
        client("delete_repo", MODEL, missing_ok=True)
        with pytest.raises(RepositoryNotFoundError):
            client("delete_repo", MODEL)

    def test_what_is_given_is_listed(self, hub, client):
        repository = hub.add(
            MODEL, {OLD: {"a.txt": b"1", "b.txt": b"2"}, NEW: {"a.txt": b"3"}}, refs={"refs/pr/1": OLD}
        )
        assert [made.commit_id for made in client("list_repo_commits", MODEL)] == [NEW, OLD]
        assert client("list_repo_files", MODEL) == ["a.txt"]
        assert client("list_repo_files", MODEL, revision="refs/pr/1") == ["a.txt", "b.txt"]
        assert repository.read(OLD) == {"a.txt": b"1", "b.txt": b"2"}


class TestCommits:
    def test_files_come_back_as_they_were_sent(self, hub, client):
        hub.add(MODEL)
        files = {"model.safetensors": LARGE, "shards/1.safetensors": LARGE[::-1], "config.json": b"{}", "empty": b""}
        made = commit(client, *(Add(path, content) for path, content in files.items()))
        assert made.oid == hub.repositories[MODEL].resolve("main").sha
        snapshot = client("snapshot_download", MODEL)
        assert Path(snapshot).name == made.oid
        assert files_of(snapshot).items() >= files.items()

    def test_every_byte_is_counted(self, hub, client):
        hub.add(MODEL)
        commit(client, Add("model.safetensors", LARGE))
        assert [sent.received_nbytes for sent in hub.log.select("PUT")] == [len(LARGE)]
        client("hf_hub_download", MODEL, "model.safetensors")
        asked = hub.log.select(path=f"/{MODEL}/resolve/main/model.safetensors")
        assert [(one.method, one.status, one.sent_nbytes) for one in asked] == [
            ("HEAD", 200, 0),
            ("GET", 200, len(LARGE)),
        ]

    def test_what_is_there_is_neither_sent_nor_committed_again(self, hub, client):
        hub.add(MODEL)
        first = commit(client, Add("model.safetensors", LARGE), Add("config.json", b"{}"))
        hub.log.clear()
        again = commit(client, Add("model.safetensors", LARGE), Add("config.json", b"{}"))
        assert again.oid == first.oid
        assert not hub.log.select("PUT")
        assert not hub.log.select("POST", "*/commit/*")

    def test_a_large_file_under_another_name_is_not_sent_again(self, hub, client):
        hub.add(MODEL)
        commit(client, Add("model.safetensors", LARGE))
        hub.log.clear()
        commit(client, Add("copy.safetensors", LARGE), Copy("model.safetensors", "another.safetensors"))
        assert not hub.log.select("PUT")
        assert hub.repositories[MODEL].read()["another.safetensors"] == LARGE

    def test_the_name_the_size_or_a_zero_byte_keeps_a_file_out_of_git(self, hub, client):
        hub.add(MODEL)
        files = {"a.bin": b"text", "b.txt": b"x" * (10 << 20), "c.txt": b"\0", "d.txt": b"text"}
        commit(client, *(Add(path, content) for path, content in files.items()))
        infos = client("get_paths_info", MODEL, list(files))
        assert [info.path for info in infos if info.lfs] == ["a.bin", "b.txt", "c.txt"]

    def test_attributes_keep_files_out_of_git(self, hub, client):
        hub.add(MODEL)
        commit(client, Add(".gitattributes", b"*.mask filter=lfs diff=lfs merge=lfs -text\n"))
        commit(client, Add("a/b.mask", b"text"), Add("a.safetensors", b"text"))
        entries = {entry.path: entry for entry in client("list_repo_tree", MODEL, recursive=True)}
        assert entries["a/b.mask"].lfs.sha256 == hashlib.sha256(b"text").hexdigest()
        assert entries["a.safetensors"].lfs is None

    def test_many_files_are_announced_in_parts(self, hub, client):
        hub.add(MODEL)
        commit(client, *(Add(f"{number}.json", b"{}") for number in range(257)))
        assert len(hub.log.select("POST", "*/preupload/main")) == 2
        assert len(hub.repositories[MODEL].read()) == 258

    def test_files_and_directories_are_deleted(self, hub, client):
        hub.add(MODEL)
        commit(client, *(Add(path, b"x") for path in ("a", "b/c", "b/d/e", "bb")))
        commit(client, Delete("a"), Delete("b/"))
        assert set(hub.repositories[MODEL].read()) == {".gitattributes", "bb"}

    @pytest.mark.parametrize("path", ["nothing", "nothing/"])
    def test_what_is_not_there_cannot_be_deleted(self, hub, client, path):
        before = hub.add(MODEL).resolve("main").sha
        with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
            commit(client, Add("a", b"x"), Delete(path))
        assert hub.repositories[MODEL].resolve("main").sha == before

    def test_a_large_file_must_be_sent_before_it_is_committed(self, hub, client):
        hub.add(MODEL)
        unsent = Add("model.safetensors", LARGE)
        unsent._upload_mode, unsent._is_uploaded = "lfs", True
        with pytest.raises(BadRequestError, match="pointed to a file that does not exist"):
            commit(client, unsent)

    def test_a_commit_on_a_stale_parent_is_refused(self, hub, client):
        repository = hub.add(MODEL)
        parent = repository.resolve("main").sha
        made = commit(client, Add("a", b"1"), parent_commit=parent)
        with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
            commit(client, Add("a", b"2"), parent_commit=parent)
        assert refused.value.response.status_code == 412
        assert repository.resolve("main").sha == made.oid

    def test_the_metadata_of_a_card_is_read(self, hub, client):
        hub.add(MODEL)
        commit(client, Add("README.md", b"---\nlibrary_name: some\ntags: [a, b]\n---\n# Model"))
        info = client("model_info", MODEL)
        assert (info.library_name, info.tags, info.card_data.library_name) == ("some", ["a", "b"], "some")

    def test_metadata_that_is_no_yaml_is_refused(self, hub, client):
        hub.add(MODEL)
        with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
            commit(client, Add("README.md", b"---\na: [\n---\n"))


class TestReading:
    @pytest.fixture
    def filled(self, hub):
        return hub.add(MODEL, {NEW: {"a.safetensors": LARGE, "b/c.json": b"{}", "b/d/e.json": b"[]"}})

    def test_a_tree_is_listed_by_directory_or_whole(self, filled, client):
        assert [entry.path for entry in client("list_repo_tree", MODEL)] == ["a.safetensors", "b"]
        assert [entry.path for entry in client("list_repo_tree", MODEL, "b")] == ["b/c.json", "b/d"]
        whole = [entry.path for entry in client("list_repo_tree", MODEL, recursive=True)]
        assert whole == ["a.safetensors", "b", "b/c.json", "b/d", "b/d/e.json"]
        with pytest.raises(EntryNotFoundError):
            client("list_repo_tree", MODEL, "c")

    def test_paths_that_do_not_exist_are_left_out(self, filled, client):
        infos = client("get_paths_info", MODEL, ["b", "a.safetensors", "nothing"])
        assert [(type(info).__name__, info.path) for info in infos] == [
            ("RepoFolder", "b"),
            ("RepoFile", "a.safetensors"),
        ]

    def test_sizes_and_hashes_are_told(self, filled, client):
        sibling = client("model_info", MODEL, files_metadata=True).siblings[0]
        assert (sibling.rfilename, sibling.size, sibling.lfs.size) == ("a.safetensors", len(LARGE), len(LARGE))
        assert sibling.lfs.sha256 == hashlib.sha256(LARGE).hexdigest()

    def test_the_head_of_a_file_tells_its_commit_and_hash(self, hub, filled, client):
        head = client("get_hf_file_metadata", url=f"{hub.url}/{MODEL}/resolve/main/a.safetensors")
        assert (head.commit_hash, head.etag, head.size) == (NEW, hashlib.sha256(LARGE).hexdigest(), len(LARGE))

    def test_a_revision_is_pinned(self, filled, client):
        revision = client("resolve_revision", MODEL, revision="main")
        assert revision.resolved == NEW

    def test_long_lists_come_in_pages(self, plain_process, tmp_path):
        with LoopbackHub(page=2) as hub:
            hub.add(MODEL, {str(number) * 40: {f"{name}/x": b"" for name in range(number)} for number in range(1, 6)})
            client = Client(plain_process, hub.url, hub.token, tmp_path)
            assert len(client("list_repo_tree", MODEL, recursive=True)) == 10
            assert len(hub.log.select(path="*/tree/main")) == 5
            assert [made.commit_id[0] for made in client("list_repo_commits", MODEL)] == ["5", "4", "3", "2", "1"]


class TestRevisions:
    def test_branches_and_tags_are_made_and_deleted(self, hub, client):
        hub.add(MODEL, {OLD: {"a": b"1"}, NEW: {"a": b"2"}})
        client("create_branch", MODEL, branch="a/b", revision=OLD)
        client("create_tag", MODEL, tag="v1", revision="a/b")
        made = commit(client, Add("a", b"3"), revision="a/b")
        refs = client("list_repo_refs", MODEL)
        assert {ref.ref: ref.target_commit for ref in refs.branches} == {
            "refs/heads/main": NEW,
            "refs/heads/a/b": made.oid,
        }
        assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": OLD}
        client("delete_branch", MODEL, branch="a/b")
        client("delete_tag", MODEL, tag="v1")
        assert set(hub.repositories[MODEL].refs) == {"refs/heads/main"}

    def test_a_ref_is_made_once(self, hub, client):
        hub.add(MODEL)
        for method, name in (("create_branch", {"branch": "b"}), ("create_tag", {"tag": "t"})):
            client(method, MODEL, **name)
            client(method, MODEL, exist_ok=True, **name)
            with pytest.raises(HfHubHTTPError, match="409"):
                client(method, MODEL, **name)

    def test_what_does_not_exist_is_told_apart(self, hub, client):
        hub.add(MODEL, {NEW: {"a": b""}})
        with pytest.raises(RepositoryNotFoundError):
            client("hf_hub_download", "user/nothing", "a")
        with pytest.raises(RevisionNotFoundError):
            client("hf_hub_download", MODEL, "a", revision="nothing")
        with pytest.raises(EntryNotFoundError):
            client("hf_hub_download", MODEL, "nothing")
        with pytest.raises(RevisionNotFoundError):
            commit(client, Add("a", b"1"), revision="nothing")
        with pytest.raises(RevisionNotFoundError):
            client("create_tag", MODEL, tag="v1", revision="nothing")

    def test_a_pull_request_leaves_main_as_it_is(self, hub, client):
        hub.add(MODEL, {OLD: {"a": b"1"}, NEW: {"a": b"2"}})
        made = commit(client, Add("a", b"3"), create_pr=True)
        assert (made.pr_revision, made.pr_num) == ("refs/pr/1", 1)
        assert made.pr_url == f"{hub.url}/{MODEL}/discussions/1"
        assert hub.repositories[MODEL].read("refs/pr/1") == {"a": b"3"}
        assert hub.repositories[MODEL].resolve("main").sha == NEW
        refs = client("list_repo_refs", MODEL, include_pull_requests=True)
        assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", made.oid)]

    def test_a_pull_request_may_begin_at_an_older_commit_and_grow(self, hub, client):
        hub.add(MODEL, {OLD: {"a": b"1"}, NEW: {"a": b"2"}})
        made = commit(client, Add("b", b""), create_pr=True, parent_commit=OLD)
        commit(client, Add("c", b""), revision=made.pr_revision)
        assert hub.repositories[MODEL].read("refs/pr/1") == {"a": b"1", "b": b"", "c": b""}


class TestAccounts:
    @pytest.fixture
    def hub(self):
        accounts = [
            Account("hf_user", "user"),
            Account("hf_reader", "user", role="read"),
            Account("hf_other", "other"),
            Account("hf_member", "member", organisations={"org": "write", "group": "read"}),
        ]
        with LoopbackHub(accounts=accounts) as running:
            yield running

    def test_who_asks_is_known(self, client):
        known = client.signed_in("hf_member")("whoami")
        assert (known["name"], [org["name"] for org in known["orgs"]]) == ("member", ["org", "group"])

    @pytest.mark.parametrize("token", [None, "hf_other"])
    def test_a_private_repository_is_hidden(self, hub, client, token):
        hub.add(MODEL, private=True)
        for method, arguments in (("model_info", ()), ("hf_hub_download", ("a",)), ("list_repo_refs", ())):
            with pytest.raises(RepositoryNotFoundError):
                client.signed_in(token)(method, MODEL, *arguments)
        assert client.signed_in("hf_reader")("repo_exists", MODEL)

    def test_a_token_of_nobody_is_refused_everywhere(self, hub, client):
        hub.add(MODEL)
        with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as refused:
            client.signed_in("hf_nobody")("model_info", MODEL)
        assert not isinstance(refused.value, RepositoryNotFoundError)

    @pytest.mark.parametrize("token", ["hf_reader", "hf_other"])
    def test_who_may_only_read_does_not_write(self, hub, client, token):
        hub.add(MODEL)
        reader = client.signed_in(token)
        changes = (
            ("create_repo", ("user/another",), {}),
            ("create_commit", (MODEL, [Add("a", b"")]), {"commit_message": "Change"}),
            ("create_branch", (MODEL,), {"branch": "b"}),
            ("create_tag", (MODEL,), {"tag": "t"}),
            ("delete_repo", (MODEL,), {}),
        )
        for method, arguments, options in changes:
            with pytest.raises(HfHubHTTPError) as refused:
                reader(method, *arguments, **options)
            assert refused.value.response.status_code == 403

    def test_a_stranger_does_not_write(self, hub, client):
        hub.add(MODEL)
        with pytest.raises(HfHubHTTPError) as refused:
            commit(client.signed_in(None), Add("a", b""))
        assert refused.value.response.status_code == 401

    def test_others_may_propose_small_files(self, hub, client):
        hub.add(MODEL)
        other = client.signed_in("hf_other")
        assert commit(other, Add("a", b""), create_pr=True).pr_num == 1
        with pytest.raises(HfHubHTTPError, match="403"):
            commit(other, Add("a.safetensors", LARGE), create_pr=True)

    def test_a_member_writes_where_the_organisation_lets_it(self, hub, client):
        member = client.signed_in("hf_member")
        assert member("create_repo", "org/model").repo_id == "org/model"
        with pytest.raises(HfHubHTTPError, match="403"):
            member("create_repo", "group/model")

    def test_files_of_a_gated_repository_are_for_who_was_let_in(self, hub, client):
        hub.add(MODEL, {NEW: {"a": b"1"}}, gated=True)
        for token in (None, "hf_other"):
            assert client.signed_in(token)("model_info", MODEL).gated
            with pytest.raises(GatedRepoError):
                client.signed_in(token)("hf_hub_download", MODEL, "a")
        hub.repositories[MODEL].granted.add("other")
        assert Path(client.signed_in("hf_other")("hf_hub_download", MODEL, "a")).read_bytes() == b"1"
