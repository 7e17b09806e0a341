"""The model of a run in a process of its own: the coefficients of an example of one's own, and steps of any size.

`answer_requests` is the function of this process. It receives and sends JSON. Only this module of the live view imports
torch.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow.parquet import read_table

from npeff.errors import NpeffError, hide_value_of, printable_traceback, without_values
from npeff.factorization import ExampleShard
from npeff.fisher import PerExampleFishers
from npeff.live.own_example import OwnExampleError
from npeff.models.loaded import LoadedModel
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.earlier_results import direction_checksums, fingerprint_of, prediction_batch_size, sketch_of
from npeff.stages.verify.examples import Answers, Effects, distinct
from npeff.stages.verify.shift_rows import ShiftRows
from npeff.stages.verify.steps import Tested
from npeff.stages.worker_specs import model_spec
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.task_files import task_files
from npeff.tasks import load_task
from npeff.tasks.huggingface.images import FORMATS, ImageError, read_image
from npeff.variables import resolved
from npeff.verification import StepSize, moved

CLASSES_SHOWN = 8


def answer_requests(connection: Connection, run_dir: str, factorization: str | None, hidden: Collection[str]) -> None:
    """Answer requests until the other end of the connection is closed.

    A request is a JSON object with the name of a method of `RunModel` in ``do``, and its arguments. An answer has the
    result in ``found``, or the text of an error in ``problem``, which is empty for a defect.

    Args:
        connection: The connection.
        run_dir: The run directory.
        factorization: Name of the factorization.
        hidden: Environment variables whose values are not shown.
    """
    for name in hidden:
        hide_value_of(name)
    model: RunModel | None = None
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        answer: dict[str, Any]
        try:
            model = model or RunModel(run_dir, factorization)
            methods: dict[str, Callable[..., Any]] = {"example": model.example, "step": model.step}
            answer = {"found": methods[request.pop("do")](**request)}
        except NpeffError as error:
            answer = {"problem": without_values(str(error))}
        except Exception as error:
            print(printable_traceback(error), end="", file=sys.stderr)
            answer = {"problem": ""}
        connection.send_bytes(json.dumps(answer).encode())


class RunModel:
    """The model of a run.

    Args:
        run_dir: The run directory.
        factorization: Name of the factorization.

    Raises:
        NpeffError: The run has no model or no components of Fishers, or the model cannot be loaded.
    """

    def __init__(self, run_dir: str, factorization: str | None) -> None:
        self._run = RunDirectory.open(run_dir, factorization)
        self._loaded = model_spec(self._run, fingerprint_of(self._run)).load()

    def example(self, options: dict[str, Any]) -> dict[str, Any]:
        """Compute the coefficients of the last example of other data: of a text, its last prediction.

        Args:
            options: The options of the task, with the other data.

        Returns:
            ``coefficients`` and ``explained``, the fraction of the Fisher that they explain; ``classes`` with the
            largest probabilities; ``text`` of the example, its ``image`` as a PNG in base64, the name of its ``label``,
            and whether the most probable class is the label (``correct``), or None.

        Raises:
            OwnExampleError: The image cannot be read.
            NpeffError: The task refuses the data.
        """
        try:
            return self._example(options)
        except NpeffError:
            _check_image(options)  # which says more to a person who has no table
            raise

    def _example(self, options: dict[str, Any]) -> dict[str, Any]:
        config = self._run.config
        if (kind := config.factorization.kind) != "fishers":
            raise RunDirectoryError(f"components of kind {kind} have no coefficients of new examples")
        loaded = self._with(options)
        attributes = FisherStore.read_attributes(self._run.fishers)
        labels, sketch = config.fishers.label_spec(config.seed), sketch_of(attributes, loaded.layout)
        fishers = PerExampleFishers(loaded.model, loaded.logits, loaded.layout, sketch, labels, loaded.one)
        last = len(loaded.examples) - 1
        batch, targets = loaded.with_targets([last])
        found = fishers(batch, [last], targets)
        if not bool(found.valid_B.all()):
            raise RunDirectoryError("the logits or gradients of this example are not finite: try another one")
        half = config.fishers.store_dtype == "float16"
        shard = ExampleShard(found.unit_factors_BRD.to(torch.float16 if half else torch.float32))
        shard.finish(self._components_KD.to(loaded.device), l1=config.factorization.l1)
        square, misfit = float(shard.fisher_squares_N[0]), float(shard.misfits_N[0])
        row = loaded.table().slice(last, 1).to_pylist()[0]
        return {
            "coefficients": shard.coefficients_NK[0].double().cpu().tolist(),
            "explained": 1 - misfit / square if square > 0 else None,
            "text": row.get("text"),
            "image": base64.b64encode(image).decode() if (image := row.get("image")) else None,
            **self._prediction(loaded, last, row.get("label")),
        }

    def step(self, component: int, step: float, groups: dict[str, list[int]]) -> dict[str, Any]:
        """Predict examples before and after a step along a component's direction.

        Args:
            component: The component.
            step: Length of the step times its sign.
            groups: Numbers of examples by the name of a group, in the order of the results.

        Returns:
            For each group, ``classes`` and ``examples`` as in the tables `prediction_shifts` and `example_shifts`, the
            fraction of the predictions whose class has ``changed``, and the mean KL divergence ``kl``.
        """
        examples_u = distinct(*groups.values())
        batch_size = prediction_batch_size(self._run)
        before = self._loaded.predict(examples_u.tolist(), batch_size)
        direction = {name: torch.from_numpy(array) for name, array in self._directions.read(component).items()}
        with moved(self._loaded.model, direction, step):
            after = self._loaded.predict(examples_u.tolist(), batch_size)
        kl = Effects(examples_u, after.kl(before))
        changed = Effects(examples_u, after.changed(before))
        size = StepSize(abs(step), float(np.mean(kl.values_u)), True)
        tested = Tested(size, None, kl, Answers(examples_u, before), Answers(examples_u, after), {}, None)
        return {name: self._shifts(tested, np.array(members, np.int64), changed) for name, members in groups.items()}

    def _shifts(self, tested: Tested, members: NDArray[np.int64], changed: Effects) -> dict[str, Any]:
        rows = ShiftRows(tested, members, self._loaded)
        means = {"kl": _mean(tested.kl.of(members)), "changed": _mean(changed.of(members))}
        return {"classes": list(rows.classes()), "examples": list(rows.examples()), **means}

    def _with(self, options: dict[str, Any]) -> LoadedModel:
        """Return the model with the examples of other options."""
        spec = replace(self._loaded.spec, options=options)
        task = load_task(resolved(spec.task, "task.name"), resolved(options, "task.options"))
        with spec.user_code(task, "examples"):
            examples = task.examples(task_files(spec.cache))
        return LoadedModel(spec, task, self._loaded.model, examples, self._loaded.device)

    def _prediction(self, loaded: LoadedModel, example: int, label: int | None) -> dict[str, Any]:
        """Return the most probable classes of the last prediction of an example, and its label."""
        logits_C = loaded.predict([example], 1).logits[0][-1]
        found = logits_C.double().softmax(-1).topk(min(CLASSES_SHOWN, len(logits_C)))
        numbers = found.indices.tolist()
        names = self._loaded.class_texts(numbers)
        classes = [
            {"name": str(number) if name is None else name, "p": p}
            for number, name, p in zip(numbers, names, found.values.tolist(), strict=True)
        ]
        if label is None:
            return {"classes": classes, "label": None, "correct": None}
        name = self._loaded.class_texts([label])[0]
        return {"classes": classes, "label": str(label) if name is None else name, "correct": numbers[0] == label}

    @cached_property
    def _components_KD(self) -> torch.Tensor:
        return torch.from_numpy(open_factorization(self._run.factorization).read_components().copy())

    @cached_property
    def _directions(self) -> DirectionStore:
        return DirectionStore.open(self._run.directions, direction_checksums(self._run))


def _check_image(options: dict[str, Any]) -> None:
    """Raise OwnExampleError if the table has an image that cannot be read."""
    if not (column := options.get("image_column")):
        return
    file = read_table(options["data"], columns=[column])[column][0].as_py()
    try:
        read_image(file, Path(), "RGB")
    except ImageError as error:
        problem = f"this file is not an image that can be read ({error.problem})"
        raise OwnExampleError(problem, f"choose one of {', '.join(FORMATS)}") from None


def _mean(values_n: NDArray[np.float64]) -> float | None:
    mean = float(np.nanmean(values_n)) if np.isfinite(values_n).any() else math.nan
    return mean if math.isfinite(mean) else None
