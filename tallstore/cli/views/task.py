"""`inspect --task`: one task's header, and a row a tensor."""

from __future__ import annotations

from rich.text import Text

from tallstore.cli import terminal
from tallstore.cli.figures import NOTHING, count, number, significant
from tallstore.cli.tables import Column, print_facts, print_table
from tallstore.inspecting.summary import TaskSummary
from tallstore.inspecting.task_details import TaskDetails, TensorSummary
from tallstore.sizes import readable


def print_task(details: TaskDetails) -> None:
    """One task's header, and a row a tensor in the order of its table."""
    console = terminal.output()
    print_facts(console, _facts(details))
    tensors = details.tensors
    print_table(
        console,
        [
            Column("tensor", [tensor.name for tensor in tensors], "name", widest=48),
            Column("kind", [_describe_kind(tensor) for tensor in tensors], "text"),
            Column("dtype", [(tensor.dtype or NOTHING).lower() for tensor in tensors], "text", droppable=2),
            Column("shape", [_shape(tensor) for tensor in tensors], droppable=6),
            Column("gain", [significant(tensor.gain) for tensor in tensors], droppable=1),
            Column("size", [_stored(tensor.nbytes) for tensor in tensors]),
        ],
    )
    if any(tensor.nbytes is None for tensor in tensors):
        console.print(Text("sizes are not known: the task's files are not here", "yellow"))


def _facts(details: TaskDetails) -> list[tuple[str, str]]:
    task = details.task
    bits = "" if task.bits is None else f", {task.bits:.2f} bits a coded parameter"
    facts = [
        ("task", f"{task.name} of {details.where} ({task.group}, {details.method})"),
        ("size", f"{readable(task.nbytes)} for {count(task.parameters)} parameters{bits}"),
        ("fidelity", _describe_fidelity(task)),
    ]
    if details.estimates:
        others = [
            f"{name} masks about {estimate.cosine:.3f} at {estimate.bits:.2f} bits"
            for name, estimate in details.estimates.items()
        ]
        facts.append(("others", f"cosine of {', of '.join(others)}"))
    if details.files:
        facts.append(("files", ", ".join(f"{file.name} ({readable(file.size)})" for file in details.files)))
    return facts


def _describe_fidelity(task: TaskSummary) -> str:
    if task.cosine is None:
        return "exact: nothing is coded"
    score = "" if task.score is None else f", score {task.score:.4g}"
    return f"cosine {task.cosine:.3f}, gain {number(task.gain, 3)}{score}"


def _describe_kind(tensor: TensorSummary) -> str:
    if tensor.tied_to is not None:
        return f"{tensor.kind} of {tensor.tied_to}"
    if tensor.rows is not None:
        return f"{tensor.kind} from row {tensor.rows}"
    return tensor.kind if tensor.base in (None, tensor.name) else f"{tensor.kind} over {tensor.base}"


def _shape(tensor: TensorSummary) -> str:
    if tensor.shape is None:
        return NOTHING
    return " × ".join(map(str, tensor.shape)) or "scalar"


def _stored(nbytes: int | None) -> str:
    if nbytes is None:
        return "?"
    return readable(nbytes) if nbytes else NOTHING
