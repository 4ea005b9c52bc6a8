"""tallstore: many fine-tunes of one model in one small bundle, and any of them back by name.

    import tallstore

    tallstore.pack("base", {"mnist": "mnist-model", "cars": "cars-model"}, "bundle")
    weights = tallstore.open_bundle("bundle", base="base").state_dict("mnist")

Names are imported when they are first used, so that ``import tallstore`` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tallstore import transformers as transformers
    from tallstore.caller_warnings import NewerFormatWarning
    from tallstore.errors import (
        AdapterCheckpointError,
        BaseError,
        BaseMismatchError,
        BaseMissingError,
        BundleChangedError,
        BundleNotFoundError,
        CardError,
        CheckpointNotFoundError,
        CompanionError,
        DamagedCheckpointError,
        FormatError,
        HubAccessError,
        HubConflictError,
        HubError,
        InputError,
        IntegrityError,
        MissingExtraError,
        NameMismatchError,
        NonFiniteError,
        NotFetchedError,
        OptionError,
        OutputBusyError,
        OutputError,
        OutputExistsError,
        OutputInsideInputError,
        QuantizedCheckpointError,
        SwitchError,
        TallstoreError,
        TooFewExpertsError,
        TooLargeError,
        UnknownNameError,
        UnknownTaskError,
        UnknownTensorError,
        UnsafeCheckpointError,
        UnsupportedFeatureError,
        UnsupportedVersionError,
        WorkerError,
    )
    from tallstore.fit import Auto, Emr, LeastSquares, Localize, Sign, SignedMask, TallMask, Uniform
    from tallstore.growing.adding import add
    from tallstore.growing.removing import remove
    from tallstore.growing.repacking import repack
    from tallstore.hub.checking import verify
    from tallstore.hub.pulling import pull
    from tallstore.hub.pushing import push
    from tallstore.hub.reporting import write_report
    from tallstore.inspecting.statistics import Statistics
    from tallstore.loading.bundle import Bundle, open_bundle
    from tallstore.loading.model_weights import LoadResult
    from tallstore.loading.switching import Switcher
    from tallstore.packing import Comparison, PackReport, compare, pack
    from tallstore.progress import progress_bar
    from tallstore.tuning import Calibration, train_masks
    from tallstore.verifying import Problem

__version__ = "0.1.0"

__all__ = [
    "AdapterCheckpointError",
    "Auto",
    "BaseError",
    "BaseMismatchError",
    "BaseMissingError",
    "Bundle",
    "BundleChangedError",
    "BundleNotFoundError",
    "Calibration",
    "CardError",
    "CheckpointNotFoundError",
    "CompanionError",
    "Comparison",
    "DamagedCheckpointError",
    "Emr",
    "FormatError",
    "HubAccessError",
    "HubConflictError",
    "HubError",
    "InputError",
    "IntegrityError",
    "LeastSquares",
    "LoadResult",
    "Localize",
    "MissingExtraError",
    "NameMismatchError",
    "NewerFormatWarning",
    "NonFiniteError",
    "NotFetchedError",
    "OptionError",
    "OutputBusyError",
    "OutputError",
    "OutputExistsError",
    "OutputInsideInputError",
    "PackReport",
    "Problem",
    "QuantizedCheckpointError",
    "Sign",
    "SignedMask",
    "Statistics",
    "SwitchError",
    "Switcher",
    "TallMask",
    "TallstoreError",
    "TooFewExpertsError",
    "TooLargeError",
    "Uniform",
    "UnknownNameError",
    "UnknownTaskError",
    "UnknownTensorError",
    "UnsafeCheckpointError",
    "UnsupportedFeatureError",
    "UnsupportedVersionError",
    "WorkerError",
    "add",
    "compare",
    "open_bundle",
    "pack",
    "progress_bar",
    "pull",
    "push",
    "remove",
    "repack",
    "train_masks",
    "verify",
    "write_report",
]

# Modules with names of their own, which no function or class has: `tallstore.transformers.from_bundle`.
_MODULES: Final = ("transformers",)

# Where the names are that are no errors. No module of the package has the name of a function: importing one would put
# the module in the function's place.
_HOMES: Final = {
    "NewerFormatWarning": "tallstore.caller_warnings",
    "Bundle": "tallstore.loading.bundle",
    "open_bundle": "tallstore.loading.bundle",
    "pull": "tallstore.hub.pulling",
    "add": "tallstore.growing.adding",
    "remove": "tallstore.growing.removing",
    "repack": "tallstore.growing.repacking",
    "LoadResult": "tallstore.loading.model_weights",
    "Switcher": "tallstore.loading.switching",
    "Statistics": "tallstore.inspecting.statistics",
    **dict.fromkeys(
        ("Auto", "Emr", "LeastSquares", "Localize", "Sign", "SignedMask", "TallMask", "Uniform"), "tallstore.fit"
    ),
    "Comparison": "tallstore.packing",
    "PackReport": "tallstore.packing",
    "compare": "tallstore.packing",
    "pack": "tallstore.packing",
    "progress_bar": "tallstore.progress",
    "push": "tallstore.hub.pushing",
    "Calibration": "tallstore.tuning",
    "train_masks": "tallstore.tuning",
    "Problem": "tallstore.verifying",
    "verify": "tallstore.hub.checking",
    "write_report": "tallstore.hub.reporting",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(_HOMES.get(name, "tallstore.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
