"""The form of what is coded: kind and dtypes, which say what a decoder must be able to do."""

from __future__ import annotations

from tallstore.format.dtypes import Dtype
from tallstore.format.manifest import Mask, Role, SharedDtype, Sign, Signed, Sparse, TwoLevel, Uniform
from tallstore.format.owners import Task
from tallstore.format.payloads import Coded
from tallstore.loading.packed import Form, Kind, Scaled


def form_of(task: Task, coded: Coded, own: Dtype, wanted: Dtype | None = None) -> Form:
    """The form of a coded tensor of *task*.

    Args:
        task: whose tensor it is.
        coded: the tensor, or the leading rows of an extended one.
        own: the tensor's dtype.
        wanted: what its elements are cast to; None for the tensor's.
    """
    code = coded.code
    dtypes: dict[Scaled, SharedDtype] = {
        name: task.group.vector(coded.base_name, role).dtype for name, role in shared_roles(coded).items()
    }
    if isinstance(code, Sparse):
        dtypes["values"] = code.values_dtype
    centre = task.group.vectors.get((coded.base_name, "centre"))
    return Form(
        _kind(coded),
        task.base[coded.base_name].dtype,
        own,
        wanted or own,
        code.levels if isinstance(code, Uniform) else 0,
        dtypes.get("values"),
        dtypes.get("values_lo"),
        None if centre is None else centre.dtype,
    )


def shared_roles(coded: Coded) -> dict[Scaled, Role]:
    """The roles of the vectors that a gain scales."""
    return dict(zip(("values", "values_lo"), coded.roles, strict=False))


def _kind(coded: Coded) -> Kind:
    code = coded.code
    if isinstance(code, Mask):
        return "mask"
    if isinstance(code, Signed):
        return "signed"
    if isinstance(code, TwoLevel):
        return "two-level"
    if isinstance(code, Sign):
        return "sign"
    return "sparse" if isinstance(code, Sparse) else "uniform"
