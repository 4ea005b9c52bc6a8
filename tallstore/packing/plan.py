"""Which tensor of an expert can be coded against which tensor of the base: from names, dtypes and shapes alone."""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tallstore.checkpoints import Checkpoint
from tallstore.errors import InputError, NameMismatchError, OptionError
from tallstore.format.dtypes import CODED, TensorSpec
from tallstore.format.manifest import CONTROL

SMALLEST_CODED_NUMEL = 4096  # below it a code saves next to nothing, and its few numbers degenerate


@dataclass(frozen=True)
class Expert:
    """One input expert.

    Attributes:
        task: its name.
        checkpoint: its weights.
        aliases: tied name -> the name that carries the weights: the first one that the base has, where there is one.
        base_names: for each of its tensors that is not a tie, the base's name for it; None where the base has none.
        dropped: the base's tensors that it lacks under each of their names.
    """

    task: str
    checkpoint: Checkpoint
    aliases: Mapping[str, str]
    base_names: Mapping[str, str | None]
    dropped: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, ties counted once."""
        return sum(self.checkpoint.spec(name).nbytes for name in self.base_names)

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"expert {self.task!r} ({self.checkpoint.where})"


@dataclass(frozen=True)
class Part:
    """A tensor of an expert beside the tensor of the base that it descends from.

    Attributes:
        expert, name, spec: the expert's tensor.
        base_spec: the base's tensor.
        numel: elements of the leading rows that both have; all of them, unless the vocabulary was resized.
        whole_because: why it is not coded; None where it can be.
    """

    expert: Expert
    name: str
    spec: TensorSpec
    base_spec: TensorSpec
    numel: int
    whole_because: str | None

    @property
    def is_resized(self) -> bool:
        """Whether expert and base have different numbers of rows."""
        return self.spec.shape != self.base_spec.shape

    @property
    def rows(self) -> int:
        """Leading rows, by the first dimension, that both have."""
        return min(self.spec.shape[0], self.base_spec.shape[0])


def name_experts(
    base: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    key_mapping: Mapping[str, str],
    base_names: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> tuple[Expert, ...]:
    """Find each expert tensor's name in the base.

    Args:
        base: the base.
        checkpoints: by task.
        key_mapping: regular expression -> replacement, applied in order to the expert's names.
        base_names: by task, the base's names of an expert's tensors, where they are known; no key_mapping changes them.

    Raises:
        NameMismatchError: an expert has no name in common with the base, or two of its names become one.
        InputError: a tensor cannot be in a bundle.
        OptionError: a regular expression is none, or its replacement does not fit it.
    """
    _check_storable(base, f"the base ({base.where})")
    try:
        rules = [(re.compile(pattern), replacement) for pattern, replacement in key_mapping.items()]
    except re.error as error:
        raise OptionError(f"key_mapping: {error.pattern!r} is no regular expression ({error})") from None
    return tuple(
        _name_expert(base, task, checkpoint, rules, base_names.get(task, {}))
        for task, checkpoint in checkpoints.items()
    )


def _name_expert(
    base: Checkpoint,
    task: str,
    checkpoint: Checkpoint,
    rules: Sequence[tuple[re.Pattern[str], str]],
    known_names: Mapping[str, str],
) -> Expert:
    where = f"expert {task!r} ({checkpoint.where})"
    _check_storable(checkpoint, where)
    known = set(base.names)
    mapped_names: dict[str, str | None] = {}
    for name in checkpoint.names:
        mapped = known_names.get(name) or _mapped(name, rules)
        mapped_names[name] = mapped if mapped in known else None
    aliases = _carry_by_known(checkpoint, mapped_names)
    base_names = {name: mapped for name, mapped in mapped_names.items() if name not in aliases}
    twice = [mapped for mapped, count in Counter(filter(None, base_names.values())).items() if count > 1]
    if twice:
        names = [name for name, mapped in base_names.items() if mapped == twice[0]]
        raise NameMismatchError(where, f"key_mapping takes {names[0]!r} and {names[1]!r} both to {twice[0]!r}")
    if not any(base_names.values()):
        hint = _prefix_hint(checkpoint.names, base.names)
        example = f"it has {checkpoint.names[0]!r}, the base has {base.names[0]!r}"
        raise NameMismatchError(where, f"has no tensor name in common with the base ({example}); {hint}")
    present = {base.aliases.get(mapped, mapped) for mapped in mapped_names.values() if mapped is not None}
    dropped = tuple(name for name in base.names if name not in base.aliases and name not in present)
    return Expert(task, checkpoint, aliases, base_names, dropped)


def _mapped(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    try:
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
    except (re.error, IndexError) as error:
        raise OptionError(f"key_mapping: a replacement does not fit its regular expression ({error})") from None
    return name


def _carry_by_known(checkpoint: Checkpoint, mapped_names: Mapping[str, str | None]) -> dict[str, str]:
    """The ties of a checkpoint, each carried by a name that the base has: files of a base keep one of several names."""
    aliases = {}
    for carrier in dict.fromkeys(checkpoint.aliases.values()):
        names = [carrier, *(name for name, of in checkpoint.aliases.items() if of == carrier)]
        known = next((name for name in names if mapped_names[name] is not None), carrier)
        aliases.update({name: known for name in names if name != known})
    return aliases


def _check_storable(checkpoint: Checkpoint, where: str) -> None:
    for name in checkpoint.names:
        if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= 1024 or not is_text(name):
            raise InputError(where, f"tensor {name[:80]!r} has a name that a bundle cannot hold; rename it")
        if len(checkpoint.spec(name).shape) > 16:
            raise InputError(where, f"tensor {name!r} has more than 16 dimensions; reshape it")


def is_text(name: str) -> bool:
    """Whether *name* has neither control characters nor halves of surrogate pairs."""
    return re.search(rf"[{CONTROL}\ud800-\udfff]", name) is None


def _prefix_hint(expert_names: Sequence[str], base_names: Sequence[str]) -> str:
    """The key_mapping that most probably makes the names meet."""
    for longer, shorter, mapping in (
        (expert_names, base_names, '{{"^{escaped}": ""}}'),
        (base_names, expert_names, '{{"^": "{prefix}"}}'),
    ):
        known = set(shorter)
        prefixes = Counter(
            name[: len(name) - len(tail)]
            for name in longer
            for tail in (name.split(".", depth)[-1] for depth in range(1, name.count(".") + 1))
            if tail in known
        )
        if prefixes:
            prefix = prefixes.most_common(1)[0][0]
            pair = mapping.format(escaped=re.escape(prefix).replace("\\", "\\\\"), prefix=prefix)
            return f"the prefix {prefix!r} seems to differ: give key_mapping={pair}"
    return "give key_mapping={regular expression: replacement} if the names differ, or check that these belong together"


def parts_by_base_name(
    base: Checkpoint, experts: Iterable[Expert], private: Sequence[str]
) -> dict[str, tuple[Part, ...]]:
    """For each base tensor that some expert has, the experts' parts in the order of the experts."""
    parts: dict[str, list[Part]] = {}
    for expert in experts:
        for name, base_name in expert.base_names.items():
            if base_name is not None:
                part = _part(expert, name, base.spec(base_name), private)
                parts.setdefault(base_name, []).append(part)
    return {name: tuple(parts[name]) for name in sorted(parts)}


def _part(expert: Expert, name: str, base_spec: TensorSpec, private: Sequence[str]) -> Part:
    spec = expert.checkpoint.spec(name)
    resizable = len(spec.shape) > 0 and spec.shape[1:] == base_spec.shape[1:] and len(base_spec.shape) > 0
    if spec.shape == base_spec.shape:
        numel = spec.numel
    else:
        numel = min(spec.shape[0], base_spec.shape[0]) * math.prod(spec.shape[1:]) if resizable else 0
    if is_private(name, private):
        reason: str | None = "asked for by private="
    elif spec.shape != base_spec.shape and not resizable:
        reason = f"its shape is not the base's {list(base_spec.shape)}"
    elif spec.dtype not in CODED or base_spec.dtype not in CODED:
        reason = f"{spec.dtype if spec.dtype not in CODED else base_spec.dtype} is not coded"
    elif numel < SMALLEST_CODED_NUMEL:
        reason = f"fewer than {SMALLEST_CODED_NUMEL:,} elements"
    else:
        reason = None
    return Part(expert, name, spec, base_spec, numel, reason)


def counts_for_the_trim(part: Part, private: Sequence[str]) -> bool:
    """Whether a part is of the task vector whose largest moves are sought: floating-point, and not asked for whole."""
    coded = part.spec.dtype in CODED and part.base_spec.dtype in CODED
    return coded and part.numel > 0 and not is_private(part.name, private)


def hints(base: Checkpoint, experts: Iterable[Expert], private: Sequence[str]) -> tuple[str, ...]:
    """What looks like a slip in the arguments, a line each: patterns without a match, experts that hardly overlap."""
    experts = tuple(experts)
    names = {name for expert in experts for name in expert.checkpoint.names}
    lines = [
        f"private={pattern!r} matches no tensor of any expert"
        for pattern in private
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names)
    ]
    for expert in experts:
        shared = sum(base_name is not None for base_name in expert.base_names.values())
        if 2 * shared < len(base.names):
            lines.append(
                f"{expert.where} has {shared} of the base's {len(base.names)} tensors; give key_mapping if names differ"
            )
    return tuple(lines)


def is_private(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the glob *patterns* matches *name*, case and all."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
