"""The methods of repair.py. Each has six trials: settings with which it changes the model on the training part."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from npeff.models.loaded import LoadedModel
from npeff.models.predictions import kl_divergence
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import SilentProgress
from npeff.stages.earlier_results import lifted_components, prediction_batch_size
from npeff.stages.repair.stage import _Examples, _Search
from npeff.stages.worker_specs import executor_for
from npeff.storage.atomic import remove_directory
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.verification import Edit
from numpy.typing import NDArray
from torch import Tensor, nn

from repair_stage.problems import Prepared, Problem, Tuning
from repair_stage.steps import stepped

_BATCH = 32
_TOP_EXAMPLES, _MAX_HARM = 64, 0.01
"""Defaults of the stage."""
_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
_LORA_RATE = 10.0
"""Learning rates of LoRA in units of those of fine-tuning."""

Trial = dict[str, Any]
Changed = tuple[Trial, nn.Module]
"""The settings of a trial, with facts about it, and the changed model."""


@dataclass(frozen=True)
class Chosen:
    """The trial with the best result on the validation part."""

    trial: Trial | None
    """None if no trial improves the accuracy. The model is then not changed."""
    model: nn.Module
    tried: list[Trial]


def repair_trials(max_harm: float, few_trials: bool) -> list[Trial]:
    """One or several single steps, and joint steps after one single step.

    Args:
        max_harm: The larger of two values of `repair.max_harm`.
        few_trials: As in `Problem`.
    """
    single, joint = {"max_edits": 6, "joint_passes": 0}, {"max_edits": 1, "joint_passes": 40}
    few = ({"max_edits": 1, "joint_passes": 0}, {"max_edits": 1, "joint_passes": 10})
    if few_trials:  # they share the attempts of the first single step
        return [*(each | {"max_harm": _MAX_HARM} for each in few), few[1] | {"max_harm": max_harm}]
    careful = [each | {"max_harm": _MAX_HARM} for each in (single, joint, *few)]
    return [*careful, *(each | {"max_harm": max_harm} for each in (single, joint))]


def training_trials(rates: tuple[float, float, float], few_trials: bool) -> list[Trial]:
    """Learning rates, numbers of steps, and weights of the right predictions in the loss."""
    low, middle, high = rates
    if few_trials:
        settings: tuple[tuple[float, int, int], ...] = ((low, 50, 5), (middle, 50, 10), (high, 50, 5))
        return [{"rate": rate, "steps": steps, "weight_of_right": weight} for rate, steps, weight in settings]
    first = ((low, 50, 5), (low, 200, 5), (middle, 50, 10))
    settings = (*first, (middle, 200, 5), (high, 50, 5), (high, 200, 1))
    return [{"rate": rate, "steps": steps, "weight_of_right": weight} for rate, steps, weight in settings]


def methods(problem: Problem) -> dict[str, Callable[[Prepared, Tuning, int], Iterator[Changed]]]:
    """Return the methods by name."""
    few, training = problem.few_trials, training_trials(problem.learning_rates, problem.few_trials)
    return {
        "repair, whitened": lambda prepared, tuning, seed: _repaired(prepared, tuning, "whitened", few),
        "repair, own": lambda prepared, tuning, seed: _repaired(prepared, tuning, "own", few),
        "natural gradient": lambda prepared, tuning, seed: stepped(prepared, tuning, batch_size_of(prepared), few),
        "fine-tuning": lambda prepared, tuning, seed: _trained(prepared, tuning, seed, training, lora=False),
        "LoRA": lambda prepared, tuning, seed: _trained(prepared, tuning, seed, training, lora=True),
    }


def chosen(changed: Iterator[Changed], prepared: Prepared, tuning: Tuning, batch_size: int) -> Chosen:
    """Choose the trial with the largest estimated change of the accuracy, on the validation part only.

    The estimate weights the fractions of mended and of broken predictions with the known error rate, because the small
    budget contains more wrong predictions than other examples do. Ties go to the smaller mean KL divergence on the
    right predictions. No trial is chosen if no estimate is above 0.
    """
    original, examples = prepared.loaded.model, tuning.validation
    before = logits(prepared.loaded, original, examples, batch_size)
    wrong = torch.from_numpy(prepared.wrong_N[examples])
    labels = torch.from_numpy(prepared.loaded.labels_N[examples])
    best, tried = Chosen(None, original, []), []
    best_key = (0.0, -math.inf)
    for settings, model in changed:
        after = logits(prepared.loaded, model, examples, batch_size)
        right = after.argmax(-1) == labels
        mended, broken = (float(part.double().mean()) for part in (right[wrong], ~right[~wrong]))
        gain = prepared.error_rate * mended - (1 - prepared.error_rate) * broken
        kl = float(kl_divergence(after, before)[~wrong].mean())
        trial = settings | {"validation": {"mended": mended, "broken": broken, "gain": gain, "kl": kl}}
        tried.append(trial)
        if gain > 0 and (gain, -kl) > best_key:
            best, best_key = Chosen(trial, model, []), (gain, -kl)
    return replace(best, tried=tried)


@torch.no_grad()
def logits(loaded: LoadedModel, model: nn.Module, examples: NDArray[np.int64], batch_size: int) -> Tensor:
    """Return the logits (N, C) of a model, in the order of the examples."""
    rows: dict[int, Tensor] = {}
    for numbers in loaded.batches(examples.tolist(), batch_size):
        rows |= zip(numbers, loaded.logits(model, loaded.batch(numbers)), strict=True)
    return torch.stack([rows[number] for number in examples.tolist()])


# --- Repair -----------------------------------------------------------------------------------------------------------


def _repaired(prepared: Prepared, tuning: Tuning, direction: str, few_trials: bool) -> Iterator[Changed]:
    """Repair with the search of the stage, which sees the training part instead of all fitted examples.

    If no component passes the test of over-represented mistakes, the stage would do nothing. All components are then
    tried. With the small budget, the test has no power and is left out. There, the larger value of `max_harm` is 0.1,
    because 0.03 of the right predictions are less than one.
    """
    run, small = prepared.runs[direction], tuning.name == "50"
    fixed = {"top_examples": min(_TOP_EXAMPLES, len(tuning.train) // 4), "significance": 1.0 if small else 0.05}
    examples = _Examples(
        tuning=tuning.train,
        held_out=np.empty(0, dtype=np.int64),
        wrong_N=prepared.wrong_N,
        coefficients_NK=open_factorization(run.factorization).read_coefficients(),
    )
    remove_directory(run.partial_results("repair"))
    for settings in repair_trials(0.1 if small else 0.03, few_trials):
        wanted = run.config.repair.model_copy(update=fixed | settings | {"direction": "lifted"})
        config = run.config.model_copy(update={"repair": wanted})
        edits, n_tried = _edits(replace(run, config=config), examples)
        model = copy.deepcopy(prepared.loaded.model)
        _move(model, run, edits)
        yield settings | {"tried": n_tried, "edits": len(edits)}, model


def _edits(run: RunDirectory, examples: _Examples) -> tuple[list[Edit], int]:
    """Return the edits, and the number of components that were tried one by one."""
    run.partial_results("repair").mkdir(parents=True, exist_ok=True)
    for file in run.partial_results("repair").glob("[0-9]*.json"):
        if not file.name.startswith("000-"):
            file.unlink()  # of another first edit
    lifted, significance = lifted_components(run), run.config.repair.significance
    with executor_for(run, None) as workers:
        search = _Search(run, workers, SilentProgress(), examples, None, None)
        rows = search.over_represented()
        likely = [row["component"] for row in rows if row["q_value"] <= significance and row["component"] in lifted]
        edits, _ = search.edits(likely or lifted, lifted)
    return edits, len(likely or lifted)


@torch.no_grad()
def _move(model: nn.Module, run: RunDirectory, edits: list[Edit]) -> None:
    parameters, directions = dict(model.named_parameters(remove_duplicate=False)), DirectionStore.open(run.directions)
    for edit in edits:
        for name, array in directions.read(edit.component).items():
            parameters[name].add_(torch.from_numpy(array).to(parameters[name]), alpha=edit.step)


# --- Training ---------------------------------------------------------------------------------------------------------


def _trained(prepared: Prepared, tuning: Tuning, seed: int, trials: list[Trial], *, lora: bool) -> Iterator[Changed]:
    """Train all parameters, or adapters of all Linear layers, with AdamW without weight decay and without dropout."""
    for settings in trials:
        model = copy.deepcopy(prepared.loaded.model).eval()
        if lora:
            model = _with_adapters(model, seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or not lora)
        rate = settings["rate"] * (_LORA_RATE if lora else 1.0)
        _train(prepared, model, tuning.train, settings | {"rate": rate}, seed)
        yield settings | {"rate": rate}, model


def _with_adapters(model: nn.Module, seed: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inject_adapter_in_model(LoraConfig(target_modules=layers, **_LORA), model).eval()


def _train(prepared: Prepared, model: nn.Module, examples: NDArray[np.int64], settings: Trial, seed: int) -> None:
    loaded, generator = prepared.loaded, torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["rate"], weight_decay=0.0)
    weights_N = torch.from_numpy(np.where(prepared.wrong_N, 1.0, settings["weight_of_right"])).float()
    done = 0
    while done < settings["steps"]:
        for part in torch.randperm(len(examples), generator=generator).split(_BATCH)[: settings["steps"] - done]:
            numbers = examples[part.numpy()]
            labels, weights_B = torch.from_numpy(loaded.labels_N[numbers]), weights_N[numbers]
            found = loaded.logits(model, loaded.batch(numbers.tolist()))
            losses_B = nn.functional.cross_entropy(found, labels, reduction="none")
            optimizer.zero_grad()
            (losses_B @ weights_B / weights_B.sum()).backward()
            optimizer.step()
            done += 1


def batch_size_of(prepared: Prepared) -> int:
    """Return the number of examples per batch for predictions."""
    return prediction_batch_size(prepared.runs["whitened"])
