"""Every vector of spec/vectors, and that the spec, the code and the vectors speak of the same rules."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import zstandard

import tallstore
from tallstore.format import versions
from tallstore.loading import decode_torch
from tallstore.loading.device_expert import DeviceExpert

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec"
VALID = sorted((SPEC / "vectors" / "valid").glob("*/case.json"))
INVALID = sorted((SPEC / "vectors" / "invalid").glob("*/case.json"))
assert VALID, f"no valid vectors under {SPEC / 'vectors'}"
assert INVALID, f"no invalid vectors under {SPEC / 'vectors'}"

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.complex64: "C64",
}

# Rules of the specification that no bytes of a bundle can break, and why.
NOT_IN_BYTES = {
    "WRITE-1": "a writer's duty: the manifest is written last",
    "WRITE-2": "a writer's duty: a path is never reused for other bytes",
    "WRITE-3": "a writer's duty: what it does where a cast would overflow",
    "WRITE-4": "a writer's duty: which version it gives a bundle",
    "WRITE-5": "a writer's duty: what it does not change",
    "VER-5": "there are no features yet",
    "READ-1": "a reader's duty: when it checks chunks",
    "READ-2": "a reader's duty: what it allocates",
}


def found_by(step: str) -> list[Path]:
    """Invalid vectors that *step* must refuse."""
    return [path for path in INVALID if step in json.loads(path.read_text(encoding="utf-8"))["found_by"]]


def copied(case_path: Path, tmp_path: Path) -> tuple[dict, Path, Path | None]:
    """A copy of a case with its `setup` done: the case, the bundle, and the base to open it with."""
    case = json.loads(case_path.read_text(encoding="utf-8"))
    place = tmp_path / case_path.parent.name
    shutil.copytree(case_path.parent, place)
    for zipped in place.glob("*.zst"):
        zipped.with_suffix("").write_bytes(zstandard.ZstdDecompressor().decompress(zipped.read_bytes()))
    bundle = place / "bundle"
    setup = case.get("setup", {})
    assert set(setup) <= {"symlink", "mkdir", "grow"}
    if "symlink" in setup:
        link, target = bundle / setup["symlink"][0], setup["symlink"][1]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target, target_is_directory=(link.parent / target).is_dir())
    if "mkdir" in setup:
        (bundle / setup["mkdir"]).mkdir(parents=True)
    if "grow" in setup:
        path, size = setup["grow"]
        os.truncate(bundle / path, size)
    return case, bundle, case["base"] and place / case["base"].removesuffix(".zst")


def read_safetensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Tensors of a file as dtype, shape and bytes, by the letter of the format."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {
        name: (row["dtype"], row["shape"], content[start + row["data_offsets"][0] : start + row["data_offsets"][1]])
        for name, row in header.items()
        if name != "__metadata__"
    }


def as_bytes(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
    """A tensor as dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return DTYPES[tensor.dtype], list(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def load_all(bundle_path: Path, base: Path | None) -> None:
    """Every tensor of every task."""
    with tallstore.open_bundle(bundle_path, base=base) as bundle:
        for task in bundle.tasks:
            bundle.state_dict(task)


@pytest.mark.parametrize("case_path", VALID, ids=lambda path: path.parent.name)
def test_valid_vector_decodes_bit_for_bit(case_path, tmp_path, monkeypatch):
    case, bundle_path, base = copied(case_path, tmp_path)
    if case["warns"]:  # a draft's reader reads nothing that is newer
        monkeypatch.setattr(versions, "FORMAT_VERSION", "1.0")
    expected = read_safetensors(bundle_path.parent / case["expected"].removesuffix(".zst"))
    assert expected
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tallstore.open_bundle(bundle_path, base=base) as bundle:
            fetched = [task for task in bundle.tasks if task not in case["not_fetched"]]
            found = {
                f"{task}/{name}": as_bytes(tensor)
                for task in fetched
                for name, tensor in bundle.state_dict(task).items()
            }
            for task in case["not_fetched"]:
                assert task in bundle.tasks
                with pytest.raises(tallstore.NotFetchedError):
                    bundle.state_dict(task)
        problems = tallstore.verify(bundle_path)
    assert found.keys() == expected.keys()
    differing = [name for name in expected if found[name] != expected[name]]
    assert differing == []
    assert problems == []
    assert bool(caught) == case["warns"]
    assert all(warning.category is tallstore.NewerFormatWarning for warning in caught)


@pytest.mark.filterwarnings("ignore::tallstore.NewerFormatWarning")
@pytest.mark.parametrize("case_path", VALID, ids=lambda path: path.parent.name)
def test_valid_vector_decodes_bit_for_bit_as_on_a_device(case_path, tmp_path, monkeypatch):
    case, bundle_path, base = copied(case_path, tmp_path)
    if case["warns"]:
        monkeypatch.setattr(versions, "FORMAT_VERSION", "1.0")
    expected = read_safetensors(bundle_path.parent / case["expected"].removesuffix(".zst"))
    found = {}
    with tallstore.open_bundle(bundle_path, base=base) as bundle:
        for task in set(bundle.tasks) - set(case["not_fetched"]):
            expert = DeviceExpert(
                bundle._expert(task), bundle._files, bundle._pinned(), torch.device("cpu"), decode_torch.decode
            )
            tensors = expert.tensors(bundle.keys(task))
            found |= {f"{task}/{name}": as_bytes(tensor) for name, tensor in tensors.items()}
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("case_path", INVALID, ids=lambda path: path.parent.name)
def test_invalid_vector_is_found_by_verify(case_path, tmp_path):
    case, bundle_path, _ = copied(case_path, tmp_path)
    problems = tallstore.verify(bundle_path)
    if "verify" in case["found_by"]:
        assert case["rule"] in {problem.rule for problem in problems}
        assert all(problem.where and problem.message for problem in problems)
    else:
        assert problems == []  # without its base, nothing is wrong with the bundle


@pytest.mark.parametrize("case_path", found_by("load"), ids=lambda path: path.parent.name)
def test_invalid_vector_is_refused_when_loaded(case_path, tmp_path):
    case, bundle_path, base = copied(case_path, tmp_path)
    with pytest.raises(tallstore.TallstoreError) as caught:
        load_all(bundle_path, base)
    assert caught.value.rule == case["rule"]


@pytest.mark.parametrize("case_path", found_by("open"), ids=lambda path: path.parent.name)
def test_invalid_vector_is_refused_when_opened(case_path, tmp_path):
    case, bundle_path, base = copied(case_path, tmp_path)
    with pytest.raises(tallstore.TallstoreError) as caught:
        tallstore.open_bundle(bundle_path, base=base)
    assert caught.value.rule == case["rule"]


def spec_rules() -> set[str]:
    """Ids of all normative sentences: each begins an item, in bold."""
    pages = [SPEC / "tallstore-1.md", *sorted((SPEC / "codecs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"^- \*\*([A-Z0-9]+-\d+)\*\* ", text, re.MULTILINE)
    assert len(found) == len(set(found)), "an id is given twice"
    families = {rule.rpartition("-")[0] for rule in found}
    mentioned = set(re.findall(r"\b([A-Z][A-Z0-9]*-\d+)\b", text))
    assert {rule for rule in mentioned if rule.rpartition("-")[0] in families} <= set(found)
    return set(found)


def vector_rules() -> set[str]:
    """Ids that some vector exercises or breaks."""
    cases = [json.loads(path.read_text(encoding="utf-8")) for path in VALID + INVALID]
    return {rule for case in cases for rule in (*case.get("rules", ()), *filter(None, [case.get("rule")]))}


def test_worked_example_of_the_spec_is_the_vector():
    case = SPEC / "vectors" / "valid" / "worked-example"
    expert = read_safetensors(case / "expected.safetensors")["t/w"][2]
    base = read_safetensors(case / "bundle" / "base" / "model.safetensors")["w"][2]
    mask = read_safetensors(case / "bundle" / "tasks" / "t" / "mask-00001-of-00001.safetensors")
    page = (SPEC / "tallstore-1.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| [^|]*`([0-9a-f ]+)` \|.*`([0-9a-f ]+)`[^|]*\|$", page, re.MULTILINE)
    assert len(rows) == 9
    for element, base_bytes, expert_bytes in rows:
        span = slice(2 * int(element), 2 * int(element) + 2)
        assert (bytes.fromhex(base_bytes), bytes.fromhex(expert_bytes)) == (base[span], expert[span])
    record = mask["index"][2].hex(" ")
    for shown in (mask["bits/w"][2][:2].hex(" "), record[:47], record[48:71]):
        assert f"    {shown} " in page


def test_every_rule_of_the_spec_has_a_vector():
    assert NOT_IN_BYTES.keys() <= spec_rules()
    assert spec_rules() - NOT_IN_BYTES.keys() == vector_rules()


def test_every_rule_of_the_code_is_in_the_spec():
    families = {rule.rpartition("-")[0] for rule in spec_rules()}
    literals = {
        literal
        for page in (ROOT / "tallstore").rglob("*.py")
        for literal in re.findall(r"""["']([A-Z][A-Z0-9]*-\d+)["']""", page.read_text(encoding="utf-8"))
    }
    assert {rule for rule in literals if rule.rpartition("-")[0] in families} <= spec_rules()
    assert literals
