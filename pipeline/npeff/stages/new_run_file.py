"""A first run file for a model and data, with comments (``npeff init``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from npeff.errors import printable
from npeff.runs.yaml_text import flow
from npeff.tasks.image_folders import image_table
from npeff.tasks.names import LANGUAGE_MODELS
from npeff.tasks.proposal import Columns, Proposal, propose

_LONGEST_TEXT = 128
_MANY = 2000
"""With more examples, a first run with this number of them is proposed."""
_COMPONENTS, _EXAMPLES_PER_COMPONENT = 32, 40
"""Largest number of components, and least number of examples for each."""
_NORMALIZATIONS = ("*Norm*", "*norm*", "*ln_*")
_TOKENS = ("*embed*", "*wte*", "*wpe*", "*lm_head*", "*shared*")
"""Parameters of embeddings of tokens and positions, and of the output over a vocabulary."""
_IMAGES = "huggingface-image-classification"
_CAUSAL = "huggingface-causal-lm"
_MOST_TRUNCATED = 512
"""Largest vocabulary for truncated labels. Their decomposition takes 0.1 s per example, and grows with the cube."""
_PREDICTIONS, _PREDICTIONS_PER_TEXT = 1000, 8
"""Number of examples that a few texts of a causal language model are to give, and the most of each text."""
_LARGE_DIRECTIONS = 8 * 2**30
"""Size in bytes of directions in float32 above which half precision is proposed."""


@dataclass(frozen=True)
class _Line:
    """A line of a run file."""

    text: str
    comment: str = ""


def new_run_file(
    run_dir: str,
    *,
    model: str | None,
    data: str,
    task: str | None = None,
    text: Sequence[str] | None = None,
    label: str | None = None,
    label_names: Sequence[str] | None = None,
    split: str | None = None,
) -> str:
    """Return the text of a run file for a model and data.

    Args:
        run_dir: The directory of the run.
        model, data, task, split: As in `propose`.
        text: Columns of texts; recognized if None.
        label: Column of labels; recognized if None.
        label_names: Names of the classes in the order of the logits; those of the model if None.

    Raises:
        TaskError: As in `propose`.
    """
    proposal, n_rows = propose(model, data, task, Columns(text, label, label_names), split), count_rows(data, split)
    lines = [
        _Line("# Check this file with `npeff validate` and run it with `npeff run`. Columns of the data:"),
        _Line(f"# {printable(', '.join(proposal.columns))}"),
        _Line("# The data are best examples that the model was not trained on."),
        _Line(f"run_dir: {flow(run_dir)}", "all results; the same command resumes"),
        *_task(proposal, n_rows),
        *_parameters(proposal),
        *_fishers(proposal),
        *_factorization(proposal, None if n_rows is None else n_rows * _per_row(proposal, n_rows)),
    ]
    return "".join(f"{line.text}  # {line.comment}\n" if line.comment else f"{line.text}\n" for line in lines)


def _task(proposal: Proposal, n_rows: int | None) -> list[_Line]:
    lines = [_Line("task:"), _Line(f"  name: {proposal.task}"), _Line("  options:")]
    lines += [
        _Line(f"    {name}: {flow(value)}", proposal.notes.get(name, "")) for name, value in proposal.options.items()
    ]
    if n_rows is not None and n_rows > _MANY:
        lines.append(_Line(f"    limit: {_MANY}", f"of {n_rows:,} rows, for a first run; remove it to use all"))
    if proposal.task in LANGUAGE_MODELS:
        positions = None if proposal.model is None else proposal.model.positions
        longest = min(_LONGEST_TEXT, positions or _LONGEST_TEXT)
        lines.append(_Line(f"    max_length: {longest}", "tokens of a text; longer texts are truncated"))
        lines.append(_Line("    # dtype: bfloat16", "on GPUs: half the memory"))
        lines.append(_Line("    # quantization: torchao-int8", "under an adapter: quantized weights are not explained"))
    if proposal.task == _CAUSAL:
        lines.append(_Line("    examples: positions", "an example is one predicted token, and not a whole text"))
        per_row = _per_row(proposal, n_rows)
        lines.append(_Line(f"    positions_per_row: {per_row}", "tokens of a text that are examples, drawn at random"))
    return lines


def _per_row(proposal: Proposal, n_rows: int | None) -> int:
    """Return the number of examples of each row."""
    if proposal.task != _CAUSAL or not n_rows:
        return 1
    return max(1, min(_PREDICTIONS_PER_TEXT, _PREDICTIONS // n_rows))


def _parameters(proposal: Proposal) -> list[_Line]:
    if proposal.model is None:
        return []
    names = proposal.model.tensor_sizes()
    exclude = [glob for glob in _left_out(proposal) if not names or any(fnmatchcase(name, glob) for name in names)]
    words = "normalizations" if proposal.task == _IMAGES else "embeddings, normalizations and outputs over a vocabulary"
    comment = f"leaves out {words}; `npeff estimate --parameters` lists all"
    return [_Line(f'parameters: {{include: ["*"], exclude: {flow(exclude)}}}', comment)] if exclude else []


def _left_out(proposal: Proposal) -> tuple[str, ...]:
    """Return the globs of parameters to leave out. The embeddings of an image model are its first layer."""
    return _NORMALIZATIONS if proposal.task == _IMAGES else (*_TOKENS, *_NORMALIZATIONS)


def _fishers(proposal: Proposal) -> list[_Line]:
    if proposal.task == _CAUSAL:
        vocabulary = None if proposal.model is None else proposal.model.vocabulary
        if vocabulary is not None and vocabulary <= _MOST_TRUNCATED:
            return [_Line("fishers: {labels: truncated, rank: 8}", f"of at most {vocabulary - 1} rows for each token")]
        return [_Line("fishers: {labels: sampled, rank: 16}", "tokens drawn from the model; more draws, less noise")]
    if proposal.task in LANGUAGE_MODELS or proposal.task == "huggingface-token-classification":
        return [_Line("fishers: {labels: sampled, rank: 4}", "an example has several predictions")]
    classes = len(proposal.options.get("label_names") or (proposal.model and proposal.model.class_names) or ())
    if classes > _COMPONENTS:
        return [_Line("fishers: {labels: truncated, rank: 8}", f"instead of {classes - 1} rows for {classes} classes")]
    return []


def _factorization(proposal: Proposal, n_rows: int | None) -> list[_Line]:
    components = _COMPONENTS
    if n_rows is not None:
        components = min(components, max(4, n_rows // _EXAMPLES_PER_COMPONENT))
    lines = [_Line(f"factorization: {{n_components: {components}}}", "`npeff select` compares numbers of components")]
    sizes = {} if proposal.model is None else proposal.model.tensor_sizes()
    globs = _left_out(proposal)
    kept = sum(size for name, size in sizes.items() if not any(fnmatchcase(name, glob) for glob in globs))
    if (needed := 4 * components * kept) > _LARGE_DIRECTIONS:
        comment = f"directions of {needed / 2**31:.0f} GiB on disk instead of {needed / 2**30:.0f}"
        lines.append(_Line("lift: {dtype: float16}", comment))
    return lines


def count_rows(data: str, split: str | None) -> int | None:
    """Return the number of rows of a file, without reading its values; None if it is not known."""
    path = Path(data)
    if path.is_dir() and (images := image_table(path, split)) is not None:
        return len(images)
    if split is not None or not path.is_file():
        return None
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    if path.suffix in (".csv", ".tsv", ".txt", ".jsonl"):
        return max(0, _count_records(path, quoted=path.suffix == ".csv") - (path.suffix != ".jsonl"))
    return None


def _count_records(path: Path, quoted: bool) -> int:
    """Return the number of lines of a file that are not empty. A line break between quotes does not end a line."""
    count, quotes = 0, 0
    with path.open("rb") as file:
        for line in file:
            quotes += line.count(b'"') if quoted else 0
            count += not quotes % 2 and bool(line.strip())
    return count
