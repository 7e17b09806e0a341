"""What a plan is made from: a run file, a model folder and given numbers; and the rows in which it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any

from npeff.errors import did_you_mean
from npeff.runs.config import RunConfig
from npeff.stages.new_run_file import count_rows
from npeff.stages.plan import CONSTANTS, H200, REFERENCES, Hardware, Plan, PlanError, Workload, plan
from npeff.tasks.huggingface.model_folder import ModelFolder

_WORK = tuple(field.name for field in fields(Workload))
_HARDWARE = tuple(field.name for field in fields(Hardware))
_BYTES = {
    **{"float32": 4, "float16": 2, "bfloat16": 2},
    **{"torchao-int8": 1, "bitsandbytes-8bit": 1, "bitsandbytes-4bit": 0.5},
}
"""Bytes of a weight, by `dtype` or `quantization`."""
_SHAPE = {"layers": ("num_hidden_layers", "n_layer"), "width": ("hidden_size", "n_embd"), "vocabulary": ("vocab_size",)}
"""Keys of a model's configuration, by the field of `Workload`."""


def plans(config: RunConfig | None, given: Mapping[str, float]) -> dict[str, Plan]:
    """Return plans by name: of a run file, of a model of which sizes are given, or of the references.

    Args:
        config: The run file; None for none.
        given: Numbers by the name of a field of `Workload` or `Hardware`, which replace those of the run file.

    Raises:
        PlanError: A name is not known, a number is missing or out of range, or the devices are too small.
        TaskError: The model or the data of the run file cannot be read.
    """
    for name in given:
        if name not in _WORK + _HARDWARE:
            hint = did_you_mean(name, _WORK + _HARDWARE)
            raise PlanError(f"unknown number {name!r}{hint}", f"give one of {', '.join(_WORK + _HARDWARE)}")
    work = {name: value for name, value in given.items() if name in _WORK}
    on = replace(H200, **{name: value for name, value in given.items() if name in _HARDWARE})
    if config is not None:
        return {"run": plan(_workload(_facts(config) | work), on)}
    if "parameters" in work:
        return {"model": plan(_workload(work), on)}
    return {name: plan(replace(each, **work), on) for name, each in REFERENCES.items()}


def numbers(assumed: Sequence[str]) -> dict[str, float]:
    """Return the numbers of texts ``NAME=NUMBER``.

    Raises:
        PlanError: A text has another form.
    """
    found = {}
    for text in assumed:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value.replace(",", ""))
        except ValueError:
            raise PlanError(f"--assume {text!r} is not NAME=NUMBER", "write it like devices=64") from None
    return found


def _workload(known: Mapping[str, float]) -> Workload:
    known = {"active": known["parameters"], **known} if "parameters" in known else known
    missing = [name for name in ("parameters", "layers", "width", "vocabulary") if name not in known]
    if missing:
        raise PlanError(f"the plan needs {', '.join(missing)}", f"give --assume {missing[0]}=NUMBER")
    return Workload(**known)


def _facts(config: RunConfig) -> dict[str, float]:
    """Return the numbers that follow from a run file and from its files, without the model's weights."""
    options, wanted = config.task.options, config.factorization
    lifted = wanted.n_components if config.lift.components is None else len(config.lift.components)
    known: dict[str, float | None] = {
        "rank": config.fishers.rank,
        "dim": None if config.fishers.sketch.kind == "identity" else config.fishers.sketch.dim,
        "components": wanted.n_components,
        "lifted": lifted,
        "direction_bytes": _BYTES[config.lift.dtype],
        "weight_bytes": _BYTES.get(str(options.get("quantization") or options.get("dtype", "float32"))),
        "length": options.get("max_length", 512 if config.task.name.endswith("lm") else 128),
        "examples": _examples(options),
    }
    if isinstance(options.get("model"), str) and (folder := ModelFolder.read(options["model"])) is not None:
        known |= _model_facts(folder, config)
    found = {name: float(value) for name, value in known.items() if value is not None}
    for name in ("rank", "dim", "examples"):
        found.setdefault(name, math.nan)  # not the reference's: `_check` asks for it
    return found


def _rows(options: Mapping[str, Any]) -> int | None:
    data = options.get("data")
    return count_rows(data, options.get("split")) if isinstance(data, str) else None


def _examples(options: Mapping[str, Any]) -> int | None:
    rows = options.get("limit") or _rows(options)
    return rows and rows * (options.get("positions_per_row") or 1)


def _model_facts(folder: ModelFolder, config: RunConfig) -> dict[str, float | None]:
    """Return the sizes of a model. Of the experts of a layer, a token uses `num_experts_per_tok`."""
    sizes, text = folder.tensor_sizes(), folder.config.get("text_config")
    model: dict[str, Any] = {**folder.config, **(text if isinstance(text, dict) else {})}
    facts: dict[str, float | None] = {
        name: next((model[key] for key in keys if isinstance(model.get(key), int)), None)
        for name, keys in _SHAPE.items()
    }
    if sizes:
        total, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)
        count = model.get("num_local_experts") or model.get("num_experts") or 1
        facts["parameters"] = total
        facts["active"] = total - experts * (1 - min(1.0, (model.get("num_experts_per_tok") or count) / count))
        adapted = config.task.options.get("adapter") is not None  # its weights are in files of their own
        facts["explained"] = math.nan if adapted else _explained(sizes, config)
    return facts


def _explained(sizes: Mapping[str, int], config: RunConfig) -> int:
    def matches(name: str, globs: Sequence[str]) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs)

    include, exclude = config.parameters.include, config.parameters.exclude
    return sum(size for name, size in sizes.items() if matches(name, include) and not matches(name, exclude))


def plan_rows(found: Mapping[str, Plan]) -> list[tuple[str, ...]]:
    """Return the rows of a table of plans: a name, and a value for each plan."""
    chosen = list(found.values())
    rows = [
        ("devices", *(f"{each.devices:,}" for each in chosen)),
        ("devices that share a model", *(f"{each.devices_per_model:,}" for each in chosen)),
        ("sequences on a device at a time", *(f"{each.batch:,}" for each in chosen)),
        ("lift: directions at a time", *(f"{each.directions_at_a_time:,}" for each in chosen)),
    ]
    parts: dict[str, list[dict[str, float | None]]] = {
        "GB of a device": [{name: value / 1e9 for name, value in each.memory.items()} for each in chosen],
        "hours": [{**each.hours, "all of these": _total(each)} for each in chosen],
        "GB in the bucket": [{name: value / 1e9 for name, value in each.bucket.items()} for each in chosen],
    }
    for title, values in parts.items():
        rows += [(f"{title}: {name}", *(_shown(each[name]) for each in values)) for name in values[0]]
    return rows


def constant_rows(given: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Return the rows of a table of all constants: name, value, whether it is measured or assumed, and the source."""
    rows = []
    for field in fields(Hardware):
        value = given.get(field.name, getattr(H200, field.name))
        if value is not None:
            source = "--assume" if field.name in given else _SOURCES.get(field.name, "data sheet of the H200 SXM")
            rows.append((field.name, f"{value:.3g}", "given" if field.name in given else "assumed", source))
    return [*rows, *CONSTANTS]


_SOURCES = {
    "network": "400 Gbit/s for each device",
    "bucket": "8 Gbit/s for each device",
    "utilisation": "part of all these speeds that is reached, but of the bucket's",
}


def _total(found: Plan) -> float | None:
    hours = [each for each in found.hours.values() if each is not None]
    return sum(hours) if len(hours) == len(found.hours) else None


def _shown(value: float | None) -> str:
    if value is None:
        return "not possible"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
