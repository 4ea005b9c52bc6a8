"""Write the bundle of the first release, ``tests/data/first-release``, which every later version must read.

    python tests/data/make_first_release.py

It is written once, by the release whose format it has, and never again: what it holds is what people have. `bundle` was
packed and then grown, a group for every method, one of which went again; `referred` lies beside it, without a base of
its own. `weights.json` has dtype, shape and the sha256 of the bytes of every tensor of the base, and of those of every
task that are not the base's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tallstore
from tallstore import Emr, LeastSquares, Localize, Sign, SignedMask, TallMask, Uniform

HERE = Path(__file__).resolve().parent
OUT = HERE / "first-release"
CODED = {"w": torch.float32, "h": torch.float16, "b": torch.bfloat16, "d": torch.float64}
SIDE = 64  # coded tensors have 4,096 elements, the fewest that are coded

# Of the groups that are added, one after another: what of, how, and which tensors the fine-tunes change.
ADDED: list[tuple[dict[str, str], dict[str, object]]] = [
    ({"tall 1": "wh", "tall 2": "wh"}, {"method": TallMask()}),
    ({"levels 1": "b", "levels 2": "b"}, {"method": LeastSquares(2), "merged_dtype": "bfloat16"}),
    ({"emr 1": "w", "emr 2": "w"}, {"method": Emr()}),
    ({"centred 1": "d", "centred 2": "dh"}, {"method": Sign(centre=True), "merged_dtype": "float16"}),
    ({"sign": "whbd"}, {"method": Sign()}),
    ({"three": "whbd"}, {"method": Uniform(3, "tensor")}),
    ({"four": "we"}, {"method": Uniform(4)}),
    ({"eight": "h"}, {"method": Uniform(8)}),
    ({"sixteen": "b"}, {"method": Uniform(16)}),
    ({"sparse": "whbd"}, {"method": Localize(0.05)}),
    ({"float32 1": "b", "float32 2": "b"}, {"method": TallMask(), "merged_dtype": "float32", "compress": False}),
]


def normal(seed: str, *shape: int) -> Tensor:
    """Normally distributed float64 numbers."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.default_rng(number).standard_normal(shape))


def coarse(numbers: Tensor) -> Tensor:
    """Numbers of few bits, which take little room in an archive."""
    return torch.round(numbers * 16) / 16


def base() -> dict[str, Tensor]:
    """Coded tensors of every float dtype, one that grows, tied ones, and what is not coded."""
    tensors = {name: coarse(normal(name, SIDE, SIDE)).to(dtype) for name, dtype in CODED.items()}
    tensors["e"] = coarse(normal("e", 70, 60)).to(torch.bfloat16)
    tensors["tied"] = tensors["w"]
    tensors["bias"] = coarse(normal("bias", 7)).to(torch.float32)
    tensors["pooler"] = coarse(normal("pooler", 4, 4)).to(torch.float16)
    tensors["ids"] = torch.arange(12)
    tensors["flags"] = torch.tensor([True, False, True])
    return tensors


def tuned(task: str, names: str) -> dict[str, Tensor]:
    """A fine-tune that changes the tensors of those names."""
    tensors = base()
    for name in names:
        change = 0.01 * normal(f"{task}, {name}", *tensors[name].shape)
        tensors[name] = (tensors[name].double() + change).to(tensors[name].dtype)
    tensors["tied"] = tensors["w"]
    return tensors


def whole(task: str) -> dict[str, Tensor]:
    """A fine-tune that changes all, has more rows, a head of its own, and other integers, and lacks the pooler."""
    tensors = tuned(task, "whbde")
    tensors["e"] = torch.cat([tensors["e"], coarse(normal(f"{task}, rows", 2, 60)).to(torch.bfloat16)])
    tensors["head"] = coarse(normal(f"{task}, head", 80, 64)).to(torch.float16)
    tensors["scores"] = torch.arange(4200, dtype=torch.int16).reshape(2, 3, 700)
    tensors["bias"] = tensors["bias"] + 1
    tensors["ids"] = tensors["ids"].flip(0)
    tensors["empty"] = torch.empty(0, 3, dtype=torch.float16)
    del tensors["pooler"]
    return tensors


def save(directory: Path, tensors: dict[str, Tensor], **config: str) -> Path:
    """A checkpoint as people have them, tied tensors kept, with companion files."""
    directory.mkdir()
    torch.save(tensors, directory / "pytorch_model.bin")
    (directory / "config.json").write_text(json.dumps({"model_type": "tiny", **config}), encoding="utf-8")
    (directory / "vocab.txt").write_text("one\ntwo\n", encoding="utf-8")
    return directory


def write(out: Path, scratch: Path) -> None:
    """Pack, and add group by group."""
    pretrained = save(scratch / "base", base())
    first = {f"signed {n}": save(scratch / f"signed {n}", whole(f"signed {n}"), task=str(n)) for n in (1, 2)}
    tallstore.pack(pretrained, first, out / "bundle", method=SignedMask(), embed_base=True)
    for experts, options in ADDED:
        models = {task: tuned(task, names) for task, names in experts.items()}
        tallstore.add(out / "bundle", models, **options)
    tallstore.add(out / "bundle", {"gone": tuned("gone", "h")}, method=Sign())
    tallstore.remove(out / "bundle", ["gone"])
    names = {"one": "w", "zwei: Größe/№ 2": "w"}
    models = {task: tuned(task, changed) for task, changed in names.items()}
    tallstore.pack(pretrained, models, out / "referred", method=SignedMask(scale="row"), merged_dtype="int8")


def described(tensors: dict[str, Tensor]) -> dict[str, str]:
    """dtype, shape, and the sha256 of the bytes of each tensor."""
    found = {}
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[name] = f"{dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
    return found


def weights(out: Path) -> dict[str, dict[str, dict[str, str | None]]]:
    """What comes out of each bundle, by task and tensor; None for a tensor of the base that the task does not have."""
    pretrained = described(base())
    found: dict[str, dict[str, dict[str, str | None]]] = {"base": {"": dict(pretrained)}}
    for name, given in (("bundle", None), ("referred", out / "bundle" / "base")):
        with tallstore.open_bundle(out / name, base=given) as bundle:
            found[name] = {}
            for task in bundle.tasks:
                tensors = described(bundle.state_dict(task))
                others = {key: value for key, value in tensors.items() if pretrained.get(key) != value}
                found[name][task] = others | dict.fromkeys(sorted(pretrained.keys() - tensors.keys()))
    return found


def main() -> int:
    """Write what is not there yet."""
    if OUT.exists():
        print(f"{OUT} is there: it is written once", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "out"
        staged.mkdir()
        write(staged, Path(scratch))
        lines = json.dumps(weights(staged), indent=1, ensure_ascii=False) + "\n"
        (staged / "weights.json").write_text(lines, encoding="utf-8", newline="\n")
        shutil.copytree(staged, OUT)
    nbytes = sum(path.stat().st_size for path in OUT.rglob("*") if path.is_file())
    print(f"{OUT}: {nbytes:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
