"""What is fuzzed: each target takes any bytes, and raises where they cause anything but success or a typed error.

A target that is stateful (it keeps a directory) is made anew for each process, by `make`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import bundle_targets, input_targets, payload_targets, seeds, table_targets, text_targets
from tests.fuzz.mutations import (
    Mutation,
    havoc,
    json_or_havoc,
    prefixed_json_or_havoc,
    random_bytes,
    safetensors_or_havoc,
)

Run = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """Something to be fuzzed.

    Attributes:
        make: from a directory to work in, what takes the bytes.
        seeds: where mutations begin.
        mutate: an input from them.
    """

    make: Callable[[Path], Run]
    seeds: Callable[[], Iterable[bytes]]
    mutate: Mutation

    @property
    def has_own_mutator(self) -> bool:
        """Whether its inputs have a form that changes had better keep."""
        return self.mutate is not random_bytes


def _no_seeds() -> list[bytes]:
    return [bytes(96)]


TARGETS: dict[str, Target] = {
    "manifest": Target(lambda _: table_targets.manifest, seeds.manifests, json_or_havoc),
    "tables": Target(lambda _: table_targets.any_table, table_targets.table_seeds, prefixed_json_or_havoc),
    "header": Target(lambda _: table_targets.header, seeds.headers, safetensors_or_havoc),
    "frame": Target(lambda _: payload_targets.frame, payload_targets.frame_seeds, havoc),
    "payload": Target(lambda _: payload_targets.payload, _no_seeds, random_bytes),
    "checkpoint": Target(input_targets.Checkpoints, input_targets.checkpoint_seeds, safetensors_or_havoc),
    "torch-file": Target(input_targets.TorchFiles, input_targets.torch_seeds, havoc),
    "index": Target(input_targets.Indices, input_targets.index_seeds, prefixed_json_or_havoc),
    "card": Target(lambda _: text_targets.readme, text_targets.card_seeds, havoc),
    "experts-file": Target(text_targets.ExpertFiles, text_targets.expert_file_seeds, havoc),
    "origin": Target(text_targets.Origins, text_targets.origin_seeds, json_or_havoc),
    "bundle": Target(bundle_targets.Structure, _no_seeds, random_bytes),
    "numbers": Target(bundle_targets.Numbers, _no_seeds, random_bytes),
}
