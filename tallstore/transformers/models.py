"""`from_bundle`: a task's expert as a model of transformers."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from tallstore.errors import CompanionError, MissingExtraError, OptionError
from tallstore.transformers.files import CONFIG, beside
from tallstore.transformers.library import BundleSource, first_line, library, opened, place, reading
from tallstore.transformers.weights import separate, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DeviceMap: TypeAlias = str | int | torch.device | Mapping[str, str | int | torch.device]

_GENERATION: Final = "generation_config.json"
_SPREADS: Final = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's words for: it chooses


def from_bundle(
    bundle: BundleSource,
    task: str,
    auto_class: type[Any] | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """A task's expert as a model in evaluation mode, as `from_pretrained` makes it of the exported expert.

    What the expert lacks of the class, or has beyond it, transformers logs, as it does there.

    Args:
        bundle: an open bundle, which stays open; or what `open_bundle` takes.
        task: the expert's name.
        auto_class: ``transformers.AutoModelForSequenceClassification``, another such class or a model's own, or the
            name of either; by default the class that the config names first, or `AutoModel` where it names none.
        dtype: what weights are cast to, a ``torch.dtype`` or its name; None and "auto" stand for the config's, and for
            the weights' own where it has none.
        device_map: a device, ``"auto"`` or another word of accelerate's, or a device for each module; the CPU by
            default. All but the default need accelerate. Modules on ``"disk"`` are refused.

    Returns:
        the model.

    Cost:
        reads what `Bundle.state_dict` reads. Each weight is rebuilt once, tied ones too, on the device and in the dtype
        that it will have; beyond the model, memory for the few that are being rebuilt.

    Raises:
        MissingExtraError: transformers 5 is not installed, or accelerate, for *device_map*.
        OptionError: no such class, dtype or device, or no class of that sort for the config.
        CompanionError: there is no config, or one that cannot be loaded, does not fit the weights, or needs code of its
            own.
        UnknownTaskError, NotFetchedError, FormatError, IntegrityError, BaseError, InputError: as `Bundle.tensor`.
    """
    transformers = library()
    options: dict[str, Any] = {"dtype": _checked_dtype(dtype), "device_map": _checked_device_map(device_map)}
    with opened(bundle) as found, beside(found, task, "config", CONFIG.__eq__, only=(CONFIG, _GENERATION)) as directory:
        where = place(found, task)
        chosen, config = _class(transformers, auto_class, directory, where)
        if chosen.can_generate():
            options["generation_config"] = _generation_config(transformers, directory, where)
        weights = weights_of(found, task)
        model, report = _load(chosen, where, config=config, state_dict=weights, **options)
        _refuse_other_shapes(report, chosen, where)
        separate(model, weights)
        model.config.name_or_path = model.name_or_path = str(found.path)  # some of transformers takes it for a path
    return model


# --- arguments --------------------------------------------------------------------------------------------------------


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        return "auto"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"dtype is {dtype!r}; give 'auto' or a floating-point one, 'bfloat16' or torch.float32")
    return found


def _checked_device_map(device_map: DeviceMap | None) -> DeviceMap | None:
    if device_map is None:
        return None
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("device_map", "accelerate", "transformers")
    if not isinstance(device_map, Mapping):
        if device_map not in _SPREADS:
            _check_device(device_map, device_map)
        return device_map
    for device in device_map.values():
        if device == "disk":
            raise OptionError("device_map has modules on 'disk'; give 'cpu', since the bundle is on disk already")
        _check_device(device, device_map)
    return dict(device_map)


def _check_device(device: str | int | torch.device, device_map: DeviceMap) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ValueError) as error:
        raise OptionError(f"device_map is {device_map!r}: {first_line(error)}") from None


# --- config and class -------------------------------------------------------------------------------------------------


def _entries(directory: Path, where: str) -> dict[str, Any]:
    """What config.json holds, once it is known to ask for no code."""

    def refuse(entries: dict[str, Any]) -> dict[str, Any]:
        for key, value in entries.items():
            named = value.values() if isinstance(value, dict) else [value]
            if key.endswith("_implementation") and any("/" in str(name) for name in named):
                raise CompanionError(where, f"its {CONFIG} names code on the Hub in {key!r}, which is never run")
            if key == "quantization_config" and value is not None:
                raise CompanionError(where, f"its {CONFIG} is for quantised weights, which no bundle has")
        return entries

    with reading(where, f"its {CONFIG}"):
        entries = json.loads((directory / CONFIG).read_bytes(), object_hook=refuse)
    if not isinstance(entries, dict):
        raise CompanionError(where, f"its {CONFIG} holds no JSON object")
    return entries


def _class(
    transformers: ModuleType, auto_class: type[Any] | str | None, directory: Path, where: str
) -> tuple[type[Any], PreTrainedConfig]:
    """The model's class, and the config that it takes: of a model of several parts, it may be one part's."""
    entries = _entries(directory, where)
    chosen: Any = _first_architecture(transformers, entries, where) if auto_class is None else auto_class
    if isinstance(chosen, str):
        chosen = _named(transformers, chosen)
    if hasattr(chosen, "from_config"):
        if not entries.get("model_type"):  # older releases would guess it from the directory's name
            raise CompanionError(where, f"its {CONFIG} has no model_type; give a model's own class as auto_class")
        with reading(where, f"its {CONFIG}"):
            config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        return _stood_for(chosen, config, where)
    if not hasattr(chosen, "from_pretrained") or not hasattr(chosen, "can_generate"):
        raise OptionError(f"auto_class is {auto_class!r}; give a model class of transformers, or its name")
    with reading(where, f"its {CONFIG} for {chosen.__name__}"):
        return chosen, chosen.config_class.from_pretrained(directory)


def _first_architecture(transformers: ModuleType, entries: Mapping[str, Any], where: str) -> str:
    name = next(iter(entries.get("architectures") or ()), "AutoModel")
    if not isinstance(name, str) or not hasattr(transformers, name):
        raise CompanionError(where, f"its {CONFIG} names {name!r}, which transformers does not have; give auto_class")
    return name


def _named(transformers: ModuleType, name: str) -> object:
    found = getattr(transformers, name, None)
    if found is None:
        near = difflib.get_close_matches(name, dir(transformers), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "give a class, or the name of one"
        raise OptionError(f"auto_class is {name!r}, which transformers does not have; {hint}")
    return found


def _stood_for(auto_class: Any, config: PreTrainedConfig, where: str) -> tuple[type[Any], PreTrainedConfig]:  # noqa: ANN401
    """The class that an automatic one, which takes no weights without a path, chooses: a model without memory tells."""
    try:
        with reading(where, f"its {CONFIG} for {auto_class.__name__}"), torch.device("meta"):
            skeleton = auto_class.from_config(config, trust_remote_code=False)
    except CompanionError as error:
        if not isinstance(error.__cause__, ValueError) or "auto_map" in dir(config):
            raise
        raise OptionError(f"auto_class is {auto_class.__name__}: {first_line(error.__cause__)}") from error
    return type(skeleton), skeleton.config


def _generation_config(transformers: ModuleType, directory: Path, where: str) -> object:
    """As `from_pretrained` reads it: from its file, or from the config, where older models have it."""
    with reading(where, f"its {_GENERATION}"):
        try:
            return transformers.GenerationConfig.from_pretrained(directory)
        except OSError:
            return transformers.GenerationConfig.from_pretrained(directory, CONFIG, _from_model_config=True)


# --- loading ----------------------------------------------------------------------------------------------------------


def _load(chosen: type[Any], where: str, **options: Any) -> tuple[Any, Mapping[str, Any]]:  # noqa: ANN401
    """The model, and what transformers reports about its weights."""
    try:
        with reading(where, f"the weights as {chosen.__name__}"):
            # Shapes that differ are reported: its own error names none of them.
            return chosen.from_pretrained(  # type: ignore[no-any-return]
                None, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False, **options
            )
    except CompanionError as error:
        if options["device_map"] is None or not isinstance(error.__cause__, ValueError):
            raise
        raise OptionError(f"device_map is {options['device_map']!r}: {first_line(error.__cause__)}") from error


def _refuse_other_shapes(report: Mapping[str, Any], chosen: type[Any], where: str) -> None:
    for name, own, wanted in sorted(report["mismatched_keys"]):
        raise CompanionError(
            where,
            f"{name!r} is {list(own)}, where {chosen.__name__} with its {CONFIG} has {list(wanted)};"
            " give the auto_class that it was trained as, or export it and mend the config",
        )
