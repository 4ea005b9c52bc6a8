"""The same experts give the same bundle, however their checkpoints are given; companions, names and bases."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tallstore
from tallstore.checkpoints import open_checkpoint
from tests.packing_cases import assert_same, base_model, contents, experts_of, normal, pack, tuned


def write_directory(path, state, *, shards=None, companions=()):
    """A Hugging Face directory; *shards* are lists of names."""
    path.mkdir(parents=True)
    if shards is None:
        save_file(state, path / "model.safetensors")
    else:
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file({name: state[name] for name in names}, path / file)
            weight_map |= dict.fromkeys(names, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, text in dict(companions).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.fixture(scope="module")
def model():
    return base_model()


@pytest.fixture(scope="module")
def experts(model):
    return experts_of(model)


@pytest.fixture(scope="module")
def expected(model, experts, tmp_path_factory):
    """The files of the bundle that the state dicts give."""
    root = tmp_path_factory.mktemp("expected") / "bundle"
    pack(model, experts, root)
    return contents(root)


# --- kinds of input ---------------------------------------------------------------------------------------------------


def test_packing_twice_gives_the_same_files(model, experts, expected, tmp_path):
    pack(model, experts, tmp_path / "again")
    assert contents(tmp_path / "again") == expected


def test_the_order_of_names_does_not_matter(model, experts, expected, tmp_path):
    turned = {task: dict(reversed(expert.items())) for task, expert in experts.items()}
    pack(dict(reversed(model.items())), turned, tmp_path / "bundle")
    assert contents(tmp_path / "bundle") == expected


def test_safetensors_files(model, experts, expected, tmp_path):
    save_file(model, tmp_path / "base.safetensors")
    for task, expert in experts.items():
        save_file(expert, tmp_path / f"{task}.safetensors")
    paths = {task: tmp_path / f"{task}.safetensors" for task in experts}
    pack(str(tmp_path / "base.safetensors"), paths, tmp_path / "bundle")
    assert contents(tmp_path / "bundle") == expected


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_pickles_of_plain_weights(model, experts, expected, tmp_path, nested):
    for name, state in {"base": model, **experts}.items():
        torch.save({nested: state, "epoch": 3} if nested else state, tmp_path / f"{name}.pt")
    pack(tmp_path / "base.pt", {task: tmp_path / f"{task}.pt" for task in experts}, tmp_path / "bundle")
    assert contents(tmp_path / "bundle") == expected


def test_directories_whose_shards_are_in_different_orders(model, experts, expected, tmp_path):
    names = sorted(model)
    write_directory(tmp_path / "base", model, shards=[names[:4], names[4:]])
    write_directory(tmp_path / "a", experts["a"])
    write_directory(tmp_path / "b", experts["b"], shards=[names[5:], names[:1], names[1:5]])
    write_directory(tmp_path / "c", experts["c"], shards=[names[::2], names[1::2]])
    pack(tmp_path / "base", {task: tmp_path / task for task in experts}, tmp_path / "bundle")
    assert contents(tmp_path / "bundle") == expected


def test_checkpoints_that_are_open_already(model, experts, expected, tmp_path):
    opened = {task: open_checkpoint(expert) for task, expert in experts.items()}
    pack(model, opened, tmp_path / "bundle")
    assert contents(tmp_path / "bundle") == expected
    for checkpoint in opened.values():
        with pytest.raises(ValueError, match="closed"):
            checkpoint.read(checkpoint.names[0])


def test_parameters_that_need_gradients(model, experts, expected, tmp_path):
    learned = {
        task: {name: torch.nn.Parameter(t) if t.is_floating_point() else t for name, t in expert.items()}
        for task, expert in experts.items()
    }
    pack(model, learned, tmp_path / "bundle")
    assert contents(tmp_path / "bundle") == expected


def test_inputs_are_not_modified(model, tmp_path):
    experts = experts_of(model)
    kept = {task: {name: tensor.clone() for name, tensor in expert.items()} for task, expert in experts.items()}
    before = {name: tensor.clone() for name, tensor in model.items()}
    save_file(experts["c"], tmp_path / "c.safetensors")
    written = (tmp_path / "c.safetensors").read_bytes()
    for method in (tallstore.SignedMask(), tallstore.TallMask.published()):
        pack(model, experts | {"c": tmp_path / "c.safetensors"}, tmp_path / "out", method=method, overwrite=True)
    assert_same(model, before)
    for task, expert in experts.items():
        assert_same(expert, kept[task])
    assert (tmp_path / "c.safetensors").read_bytes() == written


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_dtype_does_not_matter(model, experts, expected, tmp_path, dtype):
    torch.set_default_dtype(dtype)
    try:
        pack(model, experts, tmp_path / "bundle")
    finally:
        torch.set_default_dtype(torch.float32)
    assert contents(tmp_path / "bundle") == expected


def test_the_number_of_threads_does_not_matter(model, experts, expected, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    try:
        pack(model, experts, tmp_path / "bundle")
        assert torch.get_num_threads() == (1 if threads > 1 else 3)
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "bundle") == expected


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rename", "key_mapping"),
    [
        (lambda name: f"model.{name}", {"^model\\.": ""}),
        (lambda name: name.replace("block", "layer"), {"^layer": "block"}),
        (lambda name: f"m.{name.replace('weight', 'w')}", {r"^m\.": "", r"\.w$": ".weight"}),
        (lambda name: name[::-1] if name == "nothing" else name, {}),
    ],
    ids=["prefix", "part", "two rules", "one name"],
)
def test_key_mapping_takes_the_experts_names_to_the_bases(model, experts, tmp_path, rename, key_mapping):
    renamed = {task: {rename(name): tensor for name, tensor in expert.items()} for task, expert in experts.items()}
    packed = pack(model, renamed, tmp_path / "bundle", key_mapping=key_mapping)
    plain = pack(model, experts, tmp_path / "plain")
    for task, expert in renamed.items():
        assert sorted(packed.states[task]) == sorted(expert)
        for name in experts[task]:
            assert_same({name: packed.states[task][rename(name)]}, {name: plain.states[task][name]})
    assert [kind for kind in packed.kinds("a").values() if kind == "signed"] == ["signed"] * 4


def test_a_prefix_that_the_base_has_and_the_experts_lack(model, experts, tmp_path):
    base = {f"encoder.{name}": tensor for name, tensor in model.items()}
    packed = pack(base, experts, tmp_path / "bundle", key_mapping={"^": "encoder."})
    assert packed.entry("a", "embed.weight").base == "encoder.embed.weight"
    assert sorted(packed.states["a"]) == sorted(experts["a"])


def test_a_mapped_tie_is_not_taken_for_dropped(model, experts, tmp_path):
    base = {**model, "lm_head.weight": model["embed.weight"].clone()}
    renamed = {
        task: {f"m.{name}": t for name, t in {**expert, "lm_head.weight": expert["embed.weight"]}.items()}
        for task, expert in experts.items()
    }
    packed = pack(base, renamed, tmp_path / "bundle", key_mapping={r"^m\.": ""})
    assert "dropped" not in packed.kinds("a").values()


@pytest.mark.parametrize("task", ["movie polarity", "übersetzung", "a/b", "CON", "名前", "x" * 256, "..", "-"])
def test_any_text_names_a_task(model, experts, tmp_path, task):
    packed = pack(model, {task: experts["a"], "other": experts["b"]}, tmp_path / "bundle")
    assert [entry.name for entry in packed.manifest.tasks] == [task, "other"]
    assert_same(packed.states[task], experts["a"], "head.bias")


def test_tensor_names_of_any_language_and_length(tmp_path):
    names = ["gewicht.größe", "重み", "a/b", "index", "pool", "x" * 1024]
    base = {name: normal(80, 60, seed=seed) for seed, name in enumerate(names)}
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", start=1)}
    packed = pack(base, experts, tmp_path / "bundle", private=["pool", "index"])
    assert sorted(packed.states["a"]) == sorted(names)
    assert_same(packed.states["a"], experts["a"], "index", "pool")


# --- companions -------------------------------------------------------------------------------------------------------

CONFIG = '{"architectures": ["Model"]}'


def test_companion_files_are_carried_once(model, experts, tmp_path):
    shared = {"config.json": CONFIG, "tokenizer.json": "{}" * 1000, "1_Pooling/config.json": "{}"}
    shared["modules.json"] = '[{"path": "1_Pooling"}]'
    for task in "ab":
        own = {
            "labels.txt": task,
            "vocab.txt": "one\ntwo\n",
            "trainer_state.json": "{}",
            "train.py": "1",
            ".hidden.json": "",
        }
        write_directory(tmp_path / task, experts[task], companions=shared | own | {"README.md": "#", "notes.bin": "0"})
    packed = pack(model, {"a": tmp_path / "a", "b": tmp_path / "b", "c": experts["c"]}, tmp_path / "bundle")
    carried = {task: {file.name: file for file in table.files} for task, table in packed.tables.items()}
    assert sorted(carried["a"]) == sorted([*shared, "labels.txt", "vocab.txt"])
    assert carried["c"] == {}
    stored = list((tmp_path / "bundle/files").iterdir())
    assert len(stored) == len({file.sha256 for files in carried.values() for file in files.values()}) == 7
    for task in "ab":
        for name, file in carried[task].items():
            held = tmp_path / "bundle/files" / file.sha256
            assert held.read_bytes() == (tmp_path / task / name).read_bytes()
            assert held.stat().st_size == file.size


def test_indices_of_shards_are_no_companions(model, experts, tmp_path):
    names = sorted(model)
    paths = {
        task: write_directory(tmp_path / task, expert, shards=[names[:4], names[4:]])
        for task, expert in experts.items()
    }
    packed = pack(model, paths, tmp_path / "bundle")
    assert packed.tables["a"].files == ()


# --- the base ---------------------------------------------------------------------------------------------------------


def test_an_embedded_base_is_an_ordinary_checkpoint(model, experts, tmp_path):
    companions = {"config.json": CONFIG, "1_Pooling/config.json": "{}"}
    base = write_directory(tmp_path / "base", model, companions=companions)
    packed = pack(base, experts, tmp_path / "bundle", embed_base=True)
    assert packed.manifest.base.embedded
    assert_same(load_file(tmp_path / "bundle/base/model.safetensors"), model)
    assert (tmp_path / "bundle/base/config.json").read_text() == CONFIG
    apart = pack(model, experts, tmp_path / "apart")
    for task in experts:
        assert_same(packed.states[task], apart.states[task])


def test_a_bundle_is_a_base_for_the_next_one_by_its_embedded_base(model, experts, tmp_path):
    pack(model, experts, tmp_path / "first", embed_base=True)
    pack(tmp_path / "first/base", experts, tmp_path / "second", embed_base=True)
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_base_ref_is_recorded(model, experts, tmp_path):
    packed = pack(model, experts, tmp_path / "bundle", base_ref=f"org/name@{'a1' * 20}")
    pin = packed.manifest.base
    assert (pin.repo_id, pin.revision, pin.embedded) == ("org/name", "a1" * 20, False)


def test_without_it_the_base_is_nowhere(model, experts, tmp_path):
    pin = pack(model, experts, tmp_path / "bundle").manifest.base
    assert (pin.repo_id, pin.revision, pin.embedded) == (None, None, False)
    with pytest.raises(tallstore.BaseMissingError):
        tallstore.open_bundle(tmp_path / "bundle").state_dict("a")


# --- the output -------------------------------------------------------------------------------------------------------


def test_overwrite_replaces_the_bundle_whole(model, experts, expected, tmp_path):
    pack(model, {"x": experts["b"], "y": experts["c"]}, tmp_path / "bundle", embed_base=True)
    pack(model, experts, tmp_path / "bundle", overwrite=True)
    assert contents(tmp_path / "bundle") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_empty_directory_is_filled_and_parents_are_made(model, experts, expected, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "two/levels/down"):
        pack(model, experts, out)
        assert contents(out) == expected


def test_dry_run_reports_and_leaves_nothing(model, experts, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    real = tallstore.pack(model, experts, tmp_path / "bundle")
    report = tallstore.pack(model, experts, tmp_path / "dry" / "bundle", dry_run=True)
    assert report.dry_run
    assert not (tmp_path / "dry").exists()
    assert list(scratch.iterdir()) == []
    assert report.tasks == real.tasks
    assert report.bundle_nbytes == real.bundle_nbytes
    assert str(report).startswith("would pack 3 tasks")


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (tallstore.SignedMask(), 1),
        (tallstore.TallMask.published(), 3),  # the trim reads everything twice
        (tallstore.TallMask([0.5, 1.0], merge="ties"), 5),  # and every candidate is tried
    ],
)
def test_progress_comes_to_its_end_and_never_goes_back(model, experts, tmp_path, method, passes):
    experts = experts | {"d": {**tuned(model, 9), "classifier.weight": normal(10, 20)}}
    calls = []
    options = {"method": method, "progress": lambda done, total: calls.append((done, total))}
    if passes == 5:
        options["evaluate"] = lambda _task, _weights: 0.0
    pack(model, experts, tmp_path / "bundle", **options)
    nbytes = sum(t.nbytes for expert in experts.values() for t in expert.values())
    assert calls[0] == (0, passes * nbytes)
    assert len({total for _, total in calls}) == 1
    assert calls[-1] == (passes * nbytes, passes * nbytes)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
