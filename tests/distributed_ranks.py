"""Ranks of a gloo group in processes of their own on this machine, and what they load from bundles."""

from __future__ import annotations

import datetime as dt
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed import checkpoint, fsdp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, empty
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tallstore
from tallstore.distributed import BundleStorageReader
from tests.reference import same_bits

_PATIENCE = 120  # seconds; ranks that take longer hang

Placements = Sequence[Any]


class Net(nn.Module):
    """Something of every sort: a tied pair of an odd number of rows, biases, a norm, a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(301, 70)
        self.up = nn.Linear(70, 136)
        self.down = nn.Linear(136, 70)
        self.norm = nn.LayerNorm(70)
        self.head = nn.Linear(70, 301, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(self.norm(hidden + self.down(torch.relu(self.up(hidden)))))


def new_net() -> Net:
    """The same in every process."""
    torch.manual_seed(0)
    return Net()


# --- processes --------------------------------------------------------------------------------------------------------


def run_ranks(count: int, cases: Sequence[Callable[[Path], Any]], root: Path) -> list[dict[str, Any]]:
    """Call *cases* one after the other in every rank of a new group.

    Args:
        count: of ranks.
        cases: functions of a module, which take *root*.
        root: for what they read; also for the meeting of the ranks.

    Returns:
        for each rank what each case returned, by its name; the traceback, as text, of one that raised.
    """
    meeting = root / f"meeting-{time.monotonic_ns()}"
    meeting.mkdir()
    ranks = multiprocessing.start_processes(
        _rank, (count, list(cases), root, meeting), nprocs=count, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + _PATIENCE
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in ranks.processes:
            process.kill()
    return [torch.load(meeting / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _rank(rank: int, count: int, cases: Sequence[Callable[[Path], Any]], root: Path, meeting: Path) -> None:
    warnings.simplefilter("ignore")  # torch's own
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=(meeting / "group").as_uri(),
        rank=rank,
        world_size=count,
        timeout=dt.timedelta(seconds=_PATIENCE / 2),
    )
    torch.save({case.__name__: _result(case, root) for case in cases}, meeting / f"{rank}.pt")
    distributed.destroy_process_group()


def _result(case: Callable[[Path], Any], root: Path) -> Any:
    try:
        return case(root)
    except Exception:  # noqa: BLE001 - the test judges what it was
        return traceback.format_exc()


# --- cases: each returns what is wrong --------------------------------------------------------------------------------


@contextmanager
def _reader(root: Path, name: str, task: str = "t") -> Iterator[tuple[tallstore.Bundle, BundleStorageReader]]:
    base = root / f"{name}-base.safetensors"
    with tallstore.open_bundle(root / name, base=base if base.exists() else None) as bundle:
        yield bundle, BundleStorageReader(bundle, task)


def _mesh(*sizes: int) -> Any:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])


def _differing(weights: dict[str, Any], expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not this rank's slices of the expected ones, bit for bit."""
    wrong = []
    for name, found in weights.items():
        due = expected[name].to(found.dtype)
        if isinstance(found, DTensor):
            due = distribute_tensor(due, found.device_mesh, found.placements, src_data_rank=None).to_local()
            found = found.to_local()  # noqa: PLW2901 - the same, here
        if not same_bits(found.detach().contiguous(), due.contiguous()):
            wrong.append(name)
    return wrong


def _sharded(root: Path, name: str, mesh: Any, choose: Callable[[Tensor], Placements], **options: Any) -> list[str]:
    """What is wrong of a whole expert whose tensors are placed as *choose* says."""
    expected = torch.load(root / f"{name}.pt")
    with _reader(root, name) as (_, reader):
        weights = {
            key: empty(
                tensor.shape,
                dtype=options.get("dtype", tensor.dtype) if tensor.is_floating_point() else tensor.dtype,
                device_mesh=mesh,
                placements=choose(tensor),
            )
            for key, tensor in expected.items()
        }
        checkpoint.load(weights, storage_reader=reader)
    return _differing(weights, expected)


def _along(axis: int, mesh: Any) -> Callable[[Tensor], Placements]:
    """Shards along *axis* where a tensor has it, on the mesh's last dimension; whole elsewhere."""
    before = [Replicate()] * (mesh.ndim - 1)
    return lambda tensor: [*before, Shard(axis) if axis < tensor.ndim else Replicate()]


def shards_of_every_form(root: Path) -> list[str]:
    """Along each dimension; there are fewer rows than ranks, and none at all."""
    mesh = _mesh(distributed.get_world_size())
    return [
        f"{name} along {axis}: {key}"
        for name in ("forms", "kinds")
        for axis in range(5)
        for key in _sharded(root, name, mesh, _along(axis, mesh))
    ]


def shards_of_several_chunks(root: Path) -> list[str]:
    mesh = _mesh(distributed.get_world_size())
    return [f"along {axis}: {key}" for axis in range(3) for key in _sharded(root, "large", mesh, _along(axis, mesh))]


def shards_of_another_dtype(root: Path) -> list[str]:
    mesh = _mesh(distributed.get_world_size())
    return [
        f"{name} along {axis} in {dtype}: {key}"
        for name in ("kinds", "large")
        for axis in range(2)
        for dtype in (torch.float64, torch.float16)
        for key in _sharded(root, name, mesh, _along(axis, mesh), dtype=dtype)
    ]


def shards_of_a_mesh(root: Path) -> list[str]:
    """Both dimensions of a mesh cut, the same dimension or two."""
    mesh = _mesh(2, 2)
    pairs = [(0, 1), (1, 0), (0, 0), (1, 1), (2, 1)]
    return [
        f"{name} along {pair}: {key}"
        for name in ("forms", "kinds", "large")
        for pair in pairs
        for key in _sharded(
            root,
            name,
            mesh,
            lambda tensor, pair=pair: [Shard(axis) if axis < tensor.ndim else Replicate() for axis in pair],
        )
    ]


def plain_tensors_beside_shards(root: Path) -> list[str]:
    """Every rank has them whole; some are not contiguous."""
    expected = torch.load(root / "kinds.pt")
    mesh = _mesh(distributed.get_world_size())
    with _reader(root, "kinds") as (_, reader):
        weights: dict[str, Any] = {
            name: torch.zeros(tensor.shape[::-1], dtype=tensor.dtype).permute(tuple(range(tensor.ndim))[::-1])
            for name, tensor in expected.items()
        }
        weights["mask"] = empty(expected["mask"].shape, device_mesh=mesh, placements=[Shard(0)])
        checkpoint.load(weights, storage_reader=reader)
    return _differing(weights, expected)


def bytes_of_rows_and_columns(root: Path) -> dict[str, float]:
    """What this rank reads of a tensor of whole chunks, over what it reads of it whole; tables left out."""
    mesh = _mesh(distributed.get_world_size())
    shares, whole = {}, 0
    for label, placement in (("whole", Replicate()), ("rows", Shard(0)), ("columns", Shard(1))):
        with _reader(root, "wide") as (bundle, reader):
            before = bundle.bytes_read
            weights = {"wide": empty(4096, 1024, dtype=torch.bfloat16, device_mesh=mesh, placements=[placement])}
            checkpoint.load(weights, storage_reader=reader)
            read = bundle.bytes_read - before
        whole = whole or read
        shares[label] = read / whole
    return shares


def _filled(net: nn.Module, root: Path) -> list[str]:
    """Load the expert "a" as people do, then "b" in place; what differs from an ordinary model."""
    wrong = []
    for task in ("a", "b"):
        plain = new_net()
        with _reader(root, "net", task) as (bundle, reader):
            bundle.load_into(plain, task)
            weights = get_model_state_dict(net)
            checkpoint.load(weights, storage_reader=reader)
            set_model_state_dict(net, weights)
        wrong += [f"{task}: {key}" for key in _differing(net.state_dict(), plain.state_dict())]
        ids = torch.arange(7)[None]
        with torch.no_grad():
            if not torch.allclose(_local(net(ids)), plain(ids), atol=1e-5):
                wrong.append(f"{task}: what the model says")
    return wrong


def _local(output: Any) -> Tensor:
    return output.full_tensor() if isinstance(output, DTensor) else output


def model_of_fsdp2(root: Path) -> list[str]:
    net, mesh = new_net(), _mesh(distributed.get_world_size())
    for layer in (net.up, net.down, net):
        fsdp.fully_shard(layer, mesh=mesh)
    return _filled(net, root)


def model_of_tensor_parallel_layers(root: Path) -> list[str]:
    return _filled(_tensor_parallel(new_net(), _mesh(distributed.get_world_size())), root)


def model_of_both(root: Path) -> list[str]:
    mesh = _mesh(2, 2)
    net = _tensor_parallel(new_net(), mesh["tp"])
    for layer in (net.up, net.down, net):
        fsdp.fully_shard(layer, mesh=mesh["dp"])
    return _filled(net, root)


def model_of_replicas(root: Path) -> list[str]:
    """Sharded in one dimension of the mesh, the same in the other."""
    net, mesh = new_net(), _mesh(2, 2)
    for layer in (net.up, net.down, net):
        fsdp.fully_shard(layer, mesh=mesh)
    return _filled(net, root)


def _tensor_parallel(net: Net, mesh: Any) -> nn.Module:
    return parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


# --- cases: each returns what was said --------------------------------------------------------------------------------


def _refusal(root: Path, name: str, weights: dict[str, Any]) -> tuple[str, dict[int, str]]:
    """Type and message of what is raised, and by which ranks."""
    with _reader(root, name) as (_, reader):
        try:
            checkpoint.load(weights, storage_reader=reader)
        except checkpoint.CheckpointException as error:
            reasons = {rank: f"{type(reason[0]).__name__}: {reason[0]}" for rank, reason in error.failures.items()}
            return str(error), reasons
    return "", {}


def refusal_of_a_name(root: Path) -> tuple[str, dict[int, str]]:
    return _refusal(root, "kinds", {"msak": torch.zeros(3)})


def refusal_of_a_shape(root: Path) -> tuple[str, dict[int, str]]:
    return _refusal(root, "kinds", {"mask": torch.zeros(3)})


def refusal_of_changed_bytes(root: Path) -> tuple[str, dict[int, str]]:
    """In rows that only the last rank has."""
    mesh = _mesh(distributed.get_world_size())
    weights = {"wide": empty(4096, 1024, dtype=torch.bfloat16, device_mesh=mesh, placements=[Shard(0)])}
    return _refusal(root, "broken", weights)
