"""Import of the files of the NPEFF reference implementation; `reference_files.py` describes their content.

    import_fishers         a PEF file        → a run with the stage fishers complete, for factorize, query and report
    import_factorization   a decomposition   → a run with the stage factorize complete, for query and report

An imported run has no model, so its components cannot be lifted or verified. Its sketch is one of

    {"kind": "columns", "indices": [...], "n_parameters": P}     coordinate j is parameter indices[j]
    {"kind": "count", "dim": D, "seed": s, "n_parameters": P}    `CountSketch`: parameters hashed to D coordinates

Legend: N examples, C classes, R rows, D coordinates, P parameters, K components, V values, M columns of components.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from npeff.factorization import Statistics, explained, near_duplicates
from npeff.interchange.coordinates import Columns, Coordinates, choose_coordinates, coordinates_of, kept_parameters
from npeff.interchange.export_run import complete_fishers
from npeff.interchange.options import ImportOptions
from npeff.interchange.reference_files import (
    BLOCK_VALUES,
    DecompositionFile,
    PefBlock,
    PefFile,
    file_format,
    open_decomposition,
    open_pef,
)
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.config_sections import IMPORTED_TASK
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import ProgressDisplay, SilentProgress
from npeff.runs.stage import Stage
from npeff.stages.factorize import FACTORIZE
from npeff.stages.factorize.tables import write_component_tables
from npeff.stages.fishers import FISHERS
from npeff.stages.fishers.tables import write_example_tables, write_parameter_table
from npeff.storage.atomic import is_committed, remove_directory
from npeff.storage.checksums import file_checksum
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import location
from npeff.store.component_store import write_factorization
from npeff.store.fisher_store import FisherStore
from npeff.store.schemas import SCHEMAS
from npeff.store.shard_records import CompletionRecord, ShardRecords
from npeff.store.tables import rows_to_columns, write_table
from npeff.variables import literal

_IMPORTED = "imported"
"""Value of ``stopped`` for an imported decomposition."""
_SHARD_NUMBERS = 1 << 24
"""Largest number of entries of the dense factors of a shard, which bounds the memory of an import."""


def import_run(
    file: str | Path,
    run_dir: str | Path,
    *,
    fishers: str | Path | None = None,
    options: ImportOptions = ImportOptions(),
    progress: ProgressDisplay | None = None,
) -> RunDirectory:
    """Create a run from a decomposition (`import_factorization`) or a PEF file (`import_fishers`).

    Raises:
        ConfigError, RunDirectoryError, StoreError: As in these functions.
    """
    if file_format(file).endswith("decomposition"):
        return import_factorization(file, run_dir, fishers=fishers, options=options, progress=progress)
    if fishers is not None:
        raise ConfigError(f"{file} is a PEF file: give fishers only with a decomposition")
    return import_fishers(file, run_dir, options=options, progress=progress)


def import_fishers(
    file: str | Path,
    run_dir: str | Path,
    *,
    options: ImportOptions = ImportOptions(),
    progress: ProgressDisplay | None = None,
) -> RunDirectory:
    """Create a run with the Fishers of an LRM-PEF or LVRM-PEF file, or resume an interrupted import of the file.

    The factors are the rows of the file divided by the square root of the stored norm, which is the norm before the
    selection of the largest entries.

    Args:
        file: The PEF file.
        run_dir: The run directory to create.
        options: Options of the import.
        progress: Display of the progress; by default, none.

    Raises:
        ConfigError: An option is not valid.
        RunDirectoryError: `run_dir` is not empty and holds another run or other files.
        StoreError: The file is damaged or has another format, or the run cannot be written.
    """
    return _import_fishers(location(file), location(run_dir), options, {}, progress or SilentProgress())


def import_factorization(
    file: str | Path,
    run_dir: str | Path,
    *,
    fishers: str | Path | None = None,
    options: ImportOptions = ImportOptions(),
    progress: ProgressDisplay | None = None,
) -> RunDirectory:
    """Create a run with the coefficients and components of an LRM decomposition, in the order of the file.

    The components are normalized to unit rows, and the coefficients are multiplied by the squared norms.

    Args:
        file: The decomposition.
        run_dir: The run directory to create.
        fishers: The decomposed PEF file. If it is given, the run also has the labels and predictions of the examples
            and the explained fraction of the Fishers.
        options: Options of the import.
        progress: Display of the progress; by default, none.

    Raises:
        ConfigError: An option is not valid.
        RunDirectoryError: `run_dir` is not empty and holds another run or other files.
        StoreError: A file is damaged or has another format, the files do not match, or the run cannot be written.
    """
    file, progress = location(file), progress or SilentProgress()
    with open_decomposition(file) as opened:
        found = opened.decomposition
        if found.n_classes is None:
            raise _no_diagonal(file)
        options = replace(options, n_components=found.n_components, held_out_fraction=0.0)
        source = {"factorization": str(file.absolute()), "factorization_checksum": _checksum(file)}
        if fishers is not None:
            run = _import_fishers(location(fishers), location(run_dir), options, source, progress)
            coordinates = coordinates_of(FisherStore.open(run.fishers).attrs["sketch"])
        else:
            coordinates = choose_coordinates(np.sort(found.column_indices_M), found.n_parameters, options)
            run = RunDirectory.create(_config(location(run_dir), options, source, coordinates, shard_size=256))
        with run.lock():
            if fishers is None:
                _write_unknown_examples(run, len(found.coefficients_NK), _class_names(found.n_classes, options, file))
            summary = _write_factorization(run, opened, file, coordinates)
    progress.say(
        f"{found.n_components} components of {len(found.coefficients_NK)} examples"
        + (f", explained {summary['explained']:.4f} of their Fishers" if "explained" in summary else "")
    )
    return run


def _import_fishers(
    file: Path, run_dir: Path, options: ImportOptions, source: dict[str, Any], progress: ProgressDisplay
) -> RunDirectory:
    """Import a PEF file. `source` describes further sources of the run."""
    began = time.monotonic()
    if file_format(file) == "D-PEF":
        raise _no_diagonal(file)
    with open_pef(file) as pef:
        header = pef.header
        if not header.n_examples or not header.n_classes:
            raise StoreError(
                f"{file} has {header.n_examples} examples and {header.n_classes} classes: give a file with at least one"
            )
        names = _class_names(header.n_classes, options, file)
        kept_M = kept_parameters(pef, options.min_nonzero, progress)
        if not len(kept_M):
            raise StoreError(f"no parameter has {options.min_nonzero} values in {file}: lower min_nonzero")
        coordinates = choose_coordinates(kept_M, header.n_parameters, options)
        rank = max(1, header.rank)
        shard_size = int(np.clip(_SHARD_NUMBERS // (rank * coordinates.dim), 1, 256))
        source = {"file": str(file.absolute()), "checksum": _checksum(file), **source}
        config = _config(run_dir, options, source, coordinates, shard_size)
        run = RunDirectory.create(config)
        with run.lock():
            records = ShardRecords(run.shard_records, config.signature("task", "fishers", "seed"))
            if not is_committed(run.fishers):
                remove_directory(run.shard_records)  # the records of deleted Fishers
                FisherStore.create(
                    run.fishers,
                    n_examples=header.n_examples,
                    rank=rank,
                    dim=coordinates.dim,
                    n_classes=header.n_classes,
                    shard_size=shard_size,
                    store_dtype=options.store_dtype,
                    attrs={
                        "labels": {"kind": "exact" if header.format == "LRM-PEF" else "truncated"},
                        "parameter_layout": {"names": ["parameters"], "shapes": [[header.n_parameters]]},
                        "sketch": coordinates.to_json(),
                        "model_fingerprint": "",
                        "batch_size": 1,
                        "source": {"format": header.format, "min_prob_class": header.min_prob_class},
                    },
                )
            store = FisherStore.open(run.fishers)
            complete = records.complete()
            with progress.stage("import", store.plan.n_shards, "shards", done=len(complete)) as tick:
                for shard in sorted(set(range(store.plan.n_shards)) - set(complete)):
                    complete[shard] = _import_shard(pef, store, shard, coordinates, kept_M, records)
                    tick(len(complete))
            table = pa.table({"id": [str(example) for example in range(header.n_examples)]})
            write_example_tables(run, [table], names)
            write_parameter_table(run, {}, {})
            Stage(run, FISHERS, None, began).complete(
                {
                    "n_examples": header.n_examples,
                    "n_invalid": sum(record.n_invalid for record in complete.values()),
                    "n_classes": header.n_classes,
                    "rank": rank,
                    "n_parameters": header.n_parameters,
                    "sketch_dim": coordinates.dim,
                    "n_shards": store.plan.n_shards,
                    "worker_seconds": sum(record.seconds for record in complete.values()),
                    "signature": records.signature,
                },
            )
    return run


def _import_shard(
    pef: PefFile,
    store: FisherStore,
    shard: int,
    coordinates: Coordinates,
    kept_M: np.ndarray,
    records: ShardRecords,
) -> CompletionRecord:
    """Read, store and record one shard."""
    began = time.monotonic()
    start, stop = store.plan.bounds(shard)
    n, rank, dim = stop - start, store.rank, store.dim
    factors_NRD = np.zeros((n, rank, dim), dtype=np.float32)
    grams_NRR = np.zeros((n, rank, rank))
    blocks = []
    for block in pef.blocks(start, stop, max(1, BLOCK_VALUES * 8 // max(8, rank))):
        examples, rows, indices, values = block.entries()
        examples = examples + block.start - start
        _add_grams(grams_NRR, examples, rows, indices, values)
        nearest = np.searchsorted(kept_M, indices).clip(max=len(kept_M) - 1)
        kept = (kept_M[nearest] == indices) & np.isfinite(values)
        places, signs = coordinates.place(indices[kept])
        np.add.at(factors_NRD.reshape(-1), (examples[kept] * rank + rows[kept]) * dim + places, values[kept] * signs)
        blocks.append(block)
    arrays = _example_arrays(pef, blocks, grams_NRR)
    scale_N = np.where(arrays["frobenius_norms"] > 0, arrays["frobenius_norms"], 1.0) ** -0.5
    arrays["factors"] = factors_NRD * (scale_N * arrays["valid"]).astype(np.float32)[:, None, None]
    checksum, array_checksums = store.write(shard, {name: arrays[name] for name in store.array_names})
    record = CompletionRecord(
        shard=shard,
        start=start,
        stop=stop,
        checksum=checksum,
        n_invalid=int((~arrays["valid"]).sum()),
        seconds=time.monotonic() - began,
        signature=records.signature,
        array_checksums=array_checksums,
    )
    records.write(record)
    return record


def _add_grams(
    grams_NRR: np.ndarray, examples: np.ndarray, rows: np.ndarray, indices: np.ndarray, values: np.ndarray
) -> None:
    """Add A Aᵀ of the examples, in parameter coordinates. The arrays contain all entries of the examples."""
    rank, n_parameters = grams_NRR.shape[1], int(indices.max(initial=0)) + 1
    pairs, positions = np.unique(examples * n_parameters + indices, return_inverse=True)
    entries_MR = np.bincount(positions * rank + rows, weights=values, minlength=len(pairs) * rank).reshape(-1, rank)
    present, firsts = np.unique(pairs // n_parameters, return_index=True)
    with np.errstate(invalid="ignore"):  # these examples are marked as not valid
        for example, entries_mR in zip(present, np.split(entries_MR, firsts[1:]), strict=False):
            grams_NRR[example] += entries_mR.T @ entries_mR


def _example_arrays(pef: PefFile, blocks: Sequence[PefBlock], grams_NRR: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of a shard without its factors. Raises StoreError if they are inconsistent."""
    labels_N = np.concatenate([block.labels_N for block in blocks]).astype(np.int64)
    logits_NC = np.concatenate([block.logits_NC for block in blocks])
    norms_N = np.concatenate([block.frobenius_norms_N for block in blocks]).astype(np.float64)
    ranks_N = np.concatenate([block.ranks_N for block in blocks])
    valid_N = np.isfinite(logits_NC).all(axis=1) & np.isfinite(norms_N) & np.isfinite(grams_NRR).all(axis=(1, 2))
    contradictions = {
        "a negative Frobenius norm": norms_N < 0,
        "Frobenius norm 0 and non-zero values": valid_N & (norms_N == 0) & grams_NRR.any(axis=(1, 2)),
        f"a label that is not one of its {logits_NC.shape[1]} classes": labels_N >= logits_NC.shape[1],
    }
    for what, wrong_N in contradictions.items():
        if wrong_N.any():
            example = blocks[0].start + int(wrong_N.argmax())
            raise StoreError(f"example {example} of {pef.path} has {what}: get or export the file again")
    log_p_NC = _log_probabilities(logits_NC)
    losses_N = -np.take_along_axis(log_p_NC, labels_N.clip(min=0)[:, None], axis=1)[:, 0]
    return {
        "frobenius_norms": np.where(valid_N, norms_N, 0.0),
        "grams": np.where(valid_N[:, None, None], grams_NRR, 0.0),
        "ranks": np.where(valid_N, ranks_N, 0),
        "logits": logits_NC,
        "labels": np.where(labels_N < 0, -1, labels_N),
        "valid": valid_N,
        "kept_trace": np.where(valid_N, _kept_trace(log_p_NC, ranks_N), np.nan),
        "losses": np.where(valid_N & (labels_N >= 0), losses_N, np.nan).astype(np.float32),
    }


def _log_probabilities(logits_NC: np.ndarray) -> np.ndarray:
    """Return log-probabilities in float64. Rows that are not finite have no meaning."""
    with np.errstate(invalid="ignore"):
        shifted_NC = logits_NC - logits_NC.max(axis=1, keepdims=True).astype(np.float64)
        result: np.ndarray = shifted_NC - np.log(np.exp(shifted_NC).sum(axis=1, keepdims=True))
        return result


def _kept_trace(log_p_NC: np.ndarray, ranks_N: np.ndarray) -> np.ndarray:
    """Return the fraction (N,) of the trace of diag(p) - p pᵀ that the most probable classes cover.

    The trace is that of Σ_y p_y (e_y - p)(e_y - p)ᵀ.
    """
    p_NC = np.sort(np.exp(log_p_NC), axis=1)[:, ::-1]
    traces_NC = p_NC * ((1 - p_NC) ** 2 + (p_NC**2).sum(axis=1, keepdims=True) - p_NC**2)
    kept_N = np.where(np.arange(p_NC.shape[1]) < ranks_N[:, None], traces_NC, 0).sum(axis=1)
    total_N = traces_NC.sum(axis=1)
    result: np.ndarray = np.divide(kept_N, total_N, out=np.ones_like(total_N), where=total_N > 0)
    return result


def _write_factorization(
    run: RunDirectory, opened: DecompositionFile, file: Path, coordinates: Coordinates
) -> dict[str, Any]:
    """Write the outputs of the stage factorize from a decomposition, and return the record of the stage.

    No later stage completes the table of components. Without Fishers, no other record contains the checksums of the
    tables of examples, classes and parameters.
    """
    began, found = time.monotonic(), opened.decomposition
    further_tables = [run.table("components")]
    components_KD, squared_norms_K = _components(opened, file, coordinates)
    coefficients_NK = found.coefficients_NK * squared_norms_K.astype(np.float32)
    summary: dict[str, Any] = {
        "n_components": found.n_components,
        "stopped": _IMPORTED,
        "n_fit": len(coefficients_NK),
        "near_duplicates": near_duplicates(torch.tensor(components_KD)),
    }
    history: list[dict[str, Any]] = []
    if is_committed(run.fishers):
        store, checksums = complete_fishers(run)
        if (store.plan.n_examples, store.attrs["parameter_layout"]["shapes"]) != (
            len(coefficients_NK),
            [[found.n_parameters]],
        ):
            raise StoreError(
                f"{file} has {len(coefficients_NK)} examples and {found.n_parameters} parameters, unlike the Fishers "
                f"in {run.path}: give the PEF file that was decomposed"
            )
        statistics = _statistics(store, checksums, coefficients_NK, components_KD)
        loss = statistics.loss(torch.tensor(components_KD))
        summary |= {
            "n_fit": statistics.n_examples,
            "loss": loss,
            "explained": explained(loss, statistics.fisher_square_sum),
        }
        n_dead = int((~coefficients_NK.any(axis=0)).sum())
        row = {"iteration": 0, "loss": loss, "explained": summary["explained"], "mu": 0.0, "accepted": True}
        history = [row | {"objective": row["loss"], "n_dead": n_dead, "seconds": 0.0, "sent_bytes": 0}]
        coefficients_NK[~store.read_rows(np.arange(store.plan.n_examples), ["valid"])["valid"]] = np.nan
    else:
        further_tables += [run.shared_table(name) for name in ("examples", "classes", "parameters")]
    run.reopen("factorize")
    attrs = summary | {"sketch": coordinates.to_json()}
    write_factorization(run.factorization, components_KD, coefficients_NK, attrs)
    write_component_tables(run, components_KD, coefficients_NK)
    write_table(run.table("history"), "history", rows_to_columns(history, "history"))
    return Stage(run, FACTORIZE, None, began).complete(summary, further_tables)


def _components(opened: DecompositionFile, file: Path, coordinates: Coordinates) -> tuple[np.ndarray, np.ndarray]:
    """Return the normalized components (K, D) float64, with 0 for a zero component, and their squared norms (K,)."""
    found = opened.decomposition
    places_M, signs_M = coordinates.place(found.column_indices_M)
    if not signs_M.all():
        raise StoreError(
            f"{file} has {int((signs_M == 0).sum())} parameters without values in the Fishers: give the PEF file that "
            "was decomposed, or lower min_nonzero"
        )
    components_KD = np.zeros((found.n_components, coordinates.dim))
    squared_norms_K = np.zeros(found.n_components)
    for component in range(found.n_components):
        values_M = opened.components(component, component + 1)[0].astype(np.float64)
        squared_norm = float(values_M @ values_M)
        if abs(squared_norm - 1) < 1e-6:
            squared_norm = 1.0  # a unit row, rounded to float32
        row_D = np.bincount(places_M, weights=values_M * signs_M, minlength=coordinates.dim)
        components_KD[component] = row_D / (np.linalg.norm(row_D) or 1.0)
        squared_norms_K[component] = squared_norm
    return components_KD, squared_norms_K


def _statistics(
    store: FisherStore, checksums: dict[int, str], coefficients_NK: np.ndarray, components_KD: np.ndarray
) -> Statistics:
    """Return the statistics of the loss for the imported coefficients, which are not refitted."""
    total = Statistics.zeros(*components_KD.shape)
    for shard, (start, stop) in enumerate(store.plan):
        arrays = store.read_shard(shard, checksums[shard])
        for example in np.flatnonzero(arrays["valid"]):
            rows_RD = arrays["factors"][example].astype(np.float64)
            w_K = coefficients_NK[start + example].astype(np.float64)
            total.wt += float(w_K @ np.square(components_KD @ rows_RD.T).sum(axis=1))
            total.fisher_square_sum += float(np.square(rows_RD @ rows_RD.T).sum())
        w_NK = torch.from_numpy(coefficients_NK[start:stop][arrays["valid"]]).double()
        total.ww_KK += w_NK.T @ w_NK
        total.n_examples += len(w_NK)
    return total


def _write_unknown_examples(run: RunDirectory, n_examples: int, names: Sequence[str]) -> None:
    """Write the tables ``examples`` and ``classes`` for a decomposition without Fishers."""
    columns = {
        "example": np.arange(n_examples),
        "id": [str(example) for example in range(n_examples)],
        "split": ["fit"] * n_examples,
        "valid": np.ones(n_examples, dtype=bool),
        "fisher_norm": np.full(n_examples, np.nan),
        "fisher_rank": np.zeros(n_examples, dtype=np.int64),
    }
    unknown = {field.name: [None] * n_examples for field in SCHEMAS["examples"] if field.nullable}
    write_table(run.shared_table("examples"), "examples", columns | unknown)
    write_table(run.shared_table("classes"), "classes", {"class": range(len(names)), "name": list(names)})
    write_parameter_table(run, {}, {})  # the file contains only the number of parameters


def _config(
    run_dir: Path, options: ImportOptions, source: dict[str, Any], coordinates: Coordinates, shard_size: int
) -> RunConfig:
    """Return the configuration of an imported run. The options of its task describe the imported files."""
    columns = isinstance(coordinates, Columns)
    how = {"max_dim": options.max_dim, "min_nonzero": options.min_nonzero, "class_names": list(options.class_names)}
    document = {
        "run_dir": str(run_dir),
        "seed": options.seed,
        "task": {"name": IMPORTED_TASK, "options": source | how},
        "fishers": {
            # the most similar kind of sketch in a run file
            "sketch": {"kind": "identity"} if columns else {"kind": "tensorsketch", "dim": coordinates.dim},
            "store_dtype": options.store_dtype,
            "shard_size": shard_size,
        },
        "factorization": {
            "n_components": options.n_components,
            "held_out_fraction": options.held_out_fraction,
        },
    }
    return RunConfig.model_validate(literal(document))


def _class_names(n_classes: int, options: ImportOptions, file: Path) -> list[str]:
    if options.class_names and len(options.class_names) != n_classes:
        raise ConfigError(f"{file} has {n_classes} classes: give as many class_names, not {len(options.class_names)}")
    return list(options.class_names) or [f"class {number}" for number in range(n_classes)]


def _checksum(file: Path) -> str:
    with os_errors_explained("read", file):
        return file_checksum(file)


def _no_diagonal(file: Path) -> StoreError:
    return StoreError(
        f"{file} has diagonal Fishers, which cannot be imported: read it with open_diagonal_pef or open_decomposition "
        "of npeff.interchange.reference_files"
    )
