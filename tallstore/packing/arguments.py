"""The arguments of `pack` and `compare`, checked and opened: what is wrong is said before any weight is read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping

from tallstore.checkpoints import Checkpoint, CheckpointSource, HubRef, open_checkpoint
from tallstore.errors import InputError, OptionError, TooFewExpertsError
from tallstore.fit import Method, TallMask
from tallstore.format.manifest import REPO_ID, SharedDtype
from tallstore.packing.plan import is_text
from tallstore.packing.stack import is_merged

MERGED_DTYPES: Mapping[str, SharedDtype] = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int8": "I8",
    "log4": "LOG4",
}


def open_expert(task: str, source: CheckpointSource | Checkpoint) -> Checkpoint:
    """Open one expert; its errors name the task."""
    if isinstance(source, Checkpoint):
        return source
    try:
        return open_checkpoint(source)
    except InputError as error:
        raise type(error)(f"expert {task!r} ({error.where})", error.problem) from None


def open_merged(method: Method, base: Checkpoint, inputs: contextlib.ExitStack) -> Checkpoint | None:
    """Somebody else's merged model, where the method has one."""
    if not isinstance(method, TallMask) or method.given is None:
        return None
    try:
        given = inputs.enter_context(open_checkpoint(method.given))
    except InputError as error:
        known = "'sum', 'ties' or 'mean', or a merged checkpoint"
        raise type(error)(f"merge ({error.where})", f"{error.problem} (merge takes {known})") from None
    if not any(is_merged(given, base, name) for name in base.names):
        raise InputError(
            f"merge ({given.where})", "has no tensor of the base, by name and shape; give a merge of its experts"
        )
    return given


def shared_dtype(method: Method, merged_dtype: str | None) -> SharedDtype:
    """The shared vectors' dtype as the format names it: the method's own, or what was asked for."""
    if merged_dtype is None:
        return method.merged_dtype
    dtype = MERGED_DTYPES.get(str(merged_dtype).removeprefix("torch."))
    if not method.allowed_dtypes:
        raise OptionError(
            f"merged_dtype: {method.name} has no one shared vector to store in {merged_dtype!r}; leave it out"
        )
    if dtype is None or dtype not in method.allowed_dtypes:
        allowed = ", ".join(repr(name) for name, known in MERGED_DTYPES.items() if known in method.allowed_dtypes)
        raise OptionError(f"merged_dtype: {merged_dtype!r} does not go with {method.name}; give one of {allowed}")
    return dtype


def reference(base_ref: str | None) -> HubRef | None:
    """The pin that the user gave."""
    if base_ref is None:
        return None
    found = re.fullmatch(rf"({REPO_ID})@([0-9a-f]{{40}})", base_ref)
    if found is None:
        raise OptionError(f"base_ref: {base_ref!r} is no pin; give 'org/name@' and the 40 digits of a commit")
    return HubRef(found[1], found[2])


def check_arguments(experts: Mapping[str, CheckpointSource | Checkpoint], method: Method, *, evaluates: bool) -> None:
    """Refuse too few experts, names that are none, and a choice of mask_lambda that nothing makes."""
    if len(experts) < method.minimum_experts:
        raise TooFewExpertsError(
            "experts",
            f"{method.name} merges experts and was given {len(experts)}; give at least {method.minimum_experts}",
        )
    for task in experts:
        if not (1 <= len(task) <= 256 and is_text(task)):
            raise OptionError(f"experts: {task!r} is no task name; give 1 to 256 characters without control characters")
    if isinstance(method, TallMask) and len(method.lambdas) > 1 and not evaluates:
        raise OptionError(
            f"TallMask: mask_lambda gives {len(method.lambdas)} candidates, and nothing chooses between them;"
            " give one number, or evaluate="
        )
