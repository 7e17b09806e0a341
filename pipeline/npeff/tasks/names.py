"""Names of the built-in tasks. This module imports no task."""

from __future__ import annotations

_HUGGING_FACE = "npeff.tasks.huggingface"
_HUGGING_FACE_OPTIONS = f"{_HUGGING_FACE}.options"

BUILT_IN = {
    "digits": "npeff.tasks.digits:DigitsTask",
    "sklearn-table": "npeff.tasks.sklearn_table:SklearnTableTask",
    "gaussian-textures": "npeff.tasks.gaussian_textures:GaussianTexturesTask",
    "compiled-rules": "npeff.tasks.planted.compiled:CompiledRulesTask",
    "trained-rules": "npeff.tasks.planted.trained:TrainedRulesTask",
    "tracr-program": "npeff.tasks.planted.tracr:TracrProgramTask",
    "coloured-digits": "npeff.tasks.planted.coloured_digits:ColouredDigitsTask",
    "planted-heuristics": "npeff.tasks.planted.heuristics:PlantedHeuristicsTask",
    "huggingface-sequence-classification": f"{_HUGGING_FACE}.sequence_classification:SequenceClassificationTask",
    "huggingface-token-classification": f"{_HUGGING_FACE}.token_classification:TokenClassificationTask",
    "huggingface-image-classification": f"{_HUGGING_FACE}.image_classification:ImageClassificationTask",
    "huggingface-causal-lm": f"{_HUGGING_FACE}.causal_lm:CausalLMTask",
    "huggingface-seq2seq-lm": f"{_HUGGING_FACE}.seq2seq_lm:Seq2SeqLMTask",
    "huggingface-multiple-choice": f"{_HUGGING_FACE}.multiple_choice:MultipleChoiceTask",
}
"""Import paths of the built-in tasks by name."""

OPTIONS = {
    "sklearn-table": "npeff.tasks.sklearn_table_options:SklearnTableOptions",
    "huggingface-sequence-classification": f"{_HUGGING_FACE_OPTIONS}:SequenceClassificationOptions",
    "huggingface-token-classification": f"{_HUGGING_FACE_OPTIONS}:TokenClassificationOptions",
    "huggingface-image-classification": f"{_HUGGING_FACE_OPTIONS}:ImageClassificationOptions",
    "huggingface-causal-lm": f"{_HUGGING_FACE_OPTIONS}:CausalLMOptions",
    "huggingface-seq2seq-lm": f"{_HUGGING_FACE_OPTIONS}:Seq2SeqLMOptions",
    "huggingface-multiple-choice": f"{_HUGGING_FACE_OPTIONS}:MultipleChoiceOptions",
}
"""Import paths of the options of those tasks that read a table. They need no torch."""

LANGUAGE_MODELS = ("huggingface-causal-lm", "huggingface-seq2seq-lm")
"""Tasks whose classes are the vocabulary."""

_MOVED = {
    "pipeline.tasks.compiled": "npeff.tasks.planted.compiled",
    "pipeline.tasks.heuristics": "npeff.tasks.planted.heuristics",
}
"""Modules of tasks that have moved since version 0.1, when the package was called ``pipeline``."""


def present_path(path: str) -> str:
    """Return the current import path of a task, for a path that a run of version 0.1 may have stored."""
    module, separator, name = path.partition(":")
    if module.partition(".")[0] == "pipeline":
        module = _MOVED.get(module, module.replace("pipeline.", "npeff.", 1))
    return module + separator + name


def how_to_import(module: str) -> str:
    """Return the remedy for a module that cannot be imported."""
    if module in ("transformers", "tokenizers"):
        return "pip install 'npeff-pipeline[hf]'"
    if module.partition(".")[0] == "pipeline":
        return "the package is imported as npeff: from npeff.tasks import Task, Examples"
    return (
        f"install it, or run npeff in the folder that contains {module}, or add that folder to PYTHONPATH; for a job "
        "on a cluster, give npeff submit --py-module (your own package) or --pip (any other)"
    )
