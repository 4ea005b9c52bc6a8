"""A base and its experts on the command line: what the commands are given that pack or compare some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

_INPUTS = "Inputs"

BaseInput = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        help="What the experts were fine-tuned from: a Hugging Face directory, a .safetensors, .bin or .pt file,"
        " or a Hub id org/name[@revision].",
        rich_help_panel=_INPUTS,
        show_default=False,
    ),
]
KnownBaseInput = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        help="The base that the bundle was packed from, where the bundle neither has it nor names it: a path, or a Hub"
        " id. It is compared with the bundle's hashes.",
        rich_help_panel=_INPUTS,
        show_default=False,
    ),
]
ExpertInput = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        metavar="NAME=PATH",
        help="An expert by name, of the same kinds; give one for each.",
        rich_help_panel=_INPUTS,
        show_default=False,
    ),
]
ExpertsInput = Annotated[
    Path | None,
    typer.Option(
        "--experts",
        metavar="DIR|FILE",
        help="A folder of experts: each sub-directory with a checkpoint, and each .safetensors file, is one, named"
        " after it; a base that lies there is left out. Or a .toml file that lists them, and can name the base.",
        rich_help_panel=_INPUTS,
        show_default=False,
    ),
]
KeyMappingInput = Annotated[
    list[str] | None,
    typer.Option(
        "--key-mapping",
        metavar="REGEX=REPLACEMENT",
        help="From the experts' tensor names to the base's, where they differ; applied in the order given.",
        rich_help_panel=_INPUTS,
        show_default=False,
    ),
]
PrivateInput = Annotated[
    list[str] | None,
    typer.Option(
        "--private",
        metavar="GLOB",
        help="Tensors to store whole, bit for bit, such as 'classifier.*'; can be given again.",
        rich_help_panel="Method",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Pairs:
    """What was given as NAME=VALUE.

    Attributes:
        experts: path by name.
        key_mapping: replacement by regular expression.
    """

    experts: Mapping[str, str]
    key_mapping: Mapping[str, str]


def read_pairs(
    expert: Sequence[str] | None, experts: Path | None, key_mapping: Sequence[str] | None, *, needed: bool = True
) -> Pairs:
    """The pairs of --expert and --key-mapping; a usage error where one is none, or no expert is given."""
    named = _pairs(expert or (), "--expert", "NAME=PATH")
    if needed and not named and experts is None:
        raise typer.BadParameter(
            "give NAME=PATH for each expert, or --experts with a folder or a .toml file", param_hint="--expert"
        )
    return Pairs(named, _pairs(key_mapping or (), "--key-mapping", "REGEX=REPLACEMENT", last=True))


def find_inputs(base: str | None, experts: Path | None, given: Pairs) -> tuple[str | Path, dict[str, str | Path]]:
    """The base, and all experts by name; a usage error where nothing names the base, or an expert comes twice."""
    source, found = find_experts(base, experts, given)
    if source is not None:
        return source, found
    if experts is not None and _is_list(experts):
        raise typer.BadParameter(f'give it here, or a line base = "PATH" at the top of {experts}', param_hint="--base")
    raise typer.BadParameter("give what the experts were fine-tuned from", param_hint="--base")


def find_experts(
    base: str | None, experts: Path | None, given: Pairs
) -> tuple[str | Path | None, dict[str, str | Path]]:
    """The base, where it is named, and all experts by name; a usage error where an expert comes twice.

    Of a folder of experts, the base can only be left out where it is named.
    """
    source, found = _listed(base, experts)
    for name in given.experts.keys() & found.keys():
        raise typer.BadParameter(f"{name!r} is among --experts too; give it once", param_hint="--expert")
    return source, {**found, **given.experts}


def _listed(base: str | None, experts: Path | None) -> tuple[str | Path | None, dict[str, str | Path]]:
    """The base, and what --experts names."""
    if experts is None:
        return base, {}
    if _is_list(experts):
        from tallstore.cli.expert_file import read_expert_file  # noqa: PLC0415 - most runs need no TOML

        read = read_expert_file(experts)
        return (read.base if base is None else base), dict(read.experts)

    from tallstore.cli import expert_folder  # noqa: PLC0415 - torch

    return base, dict(expert_folder.find_experts(experts, base))


def _is_list(experts: Path) -> bool:
    return experts.suffix == ".toml" and not experts.is_dir()


def _pairs(given: Iterable[str], option: str, form: str, *, last: bool = False) -> dict[str, str]:
    """Split each NAME=VALUE at the first equals sign, or at the last one."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.rpartition("=") if last else text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option)
        if name in pairs:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        pairs[name] = value
    return pairs
