"""Planted heuristics: the pairs are what they are said to be, and the model falls for what was planted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest
import torch
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.tasks import TaskError, load_task
from npeff.tasks.planted.heuristics import PlantedHeuristicsTask
from npeff.tasks.planted.sentence_pairs import (
    ANTONYMS,
    CLASSES,
    KINDS,
    TEMPLATES,
    VERBS,
    Pair,
    Sentences,
    draw_pairs,
)
from tasks.planted.training import check_trained_once

NAME = "planted-heuristics"
QUICK = {"n_train": 1800, "n_examples": 400, "epochs": 12, "width": 32, "seed": 0}


def parsed(words: Sequence[str]) -> tuple[bool, dict[str, str]]:
    """(is it negated, what the sentence says without the negation), by the places of its words."""
    words = list(words)
    negated = bool({"no", "not", "never"} & set(words))
    rest = [word for word in words if word not in ("no", "not", "never", "the")]
    before, after = rest[: rest.index("is")], rest[rest.index("is") + 1 :]
    said = {"verb": after.pop(0)}
    if "in" in after:
        said["place"] = after.pop()
        after.remove("in")
    if "near" in before:
        said["neighbour"] = before.pop()
        before.remove("near")
    for role, phrase in (("subject", before), ("object", after)):
        *adjectives, said[role] = phrase
        said |= {f"{role} adjective": adjective for adjective in adjectives}
    return negated, said


def reference_label(premise: Sequence[str], hypothesis: Sequence[str]) -> str:
    """From the words alone. P entails H where all that H says is in P, as it stands or more general; it excludes H
    where H says the same but for one antonym. A negated sentence denies what it says without its negation."""
    synonyms = {verbs[1]: verbs[0] for verbs in VERBS}
    opposites = {frozenset((verbs[0], verbs[2])) for verbs in VERBS} | {frozenset(pair) for pair in ANTONYMS}

    def follows(special: dict[str, str], general: dict[str, str], role: str) -> bool:
        have, want = special.get(role), general[role]
        return have is not None and want in (have, KINDS.get(have), {v: k for k, v in synonyms.items()}.get(have))

    def entails(special: dict[str, str], general: dict[str, str]) -> bool:
        return all(follows(special, general, role) for role in general)

    def excludes(first: dict[str, str], second: dict[str, str]) -> bool:
        odd = [role for role in second if not follows(first, second, role)]
        return len(odd) == 1 and frozenset((first.get(odd[0]), second[odd[0]])) in opposites

    (premise_negated, p), (hypothesis_negated, h) = parsed(premise), parsed(hypothesis)
    if not premise_negated:
        entailed, excluded = entails(p, h), excludes(p, h)
        if hypothesis_negated:
            entailed, excluded = excluded, entailed
    else:
        denied = entails(h, p)
        entailed, excluded = denied and hypothesis_negated, denied and not hypothesis_negated
    return "entailment" if entailed else "contradiction" if excluded else "neutral"


@pytest.mark.parametrize("template", TEMPLATES)
def test_true_labels_are_those_of_a_plain_reference(template: str) -> None:
    random = Random(1)
    for _ in range(200):
        pair = TEMPLATES[template].pair(template, random)
        assert reference_label(pair.premise, pair.hypothesis) == CLASSES[pair.label], pair
        assert pair.heuristic == TEMPLATES[template].heuristic
        cues = (set(pair.hypothesis) <= set(pair.premise), bool({"no", "not", "never"} & set(pair.hypothesis)))
        assert cues == (pair.heuristic == "overlap", pair.heuristic == "negation")


def test_a_weaker_negation_follows_from_a_stronger_one_only() -> None:
    """ "It is not chasing" does not entail "it is never chasing": what the reference above does not know."""
    random, strength = Random(2), {"no": 2, "never": 1, "not": 0}
    for template in ("negated twice", "antonym negated"):
        for _ in range(100):
            pair = TEMPLATES[template].pair(template, random)
            found = [strength[word] for side in (pair.premise, pair.hypothesis) for word in side if word in strength]
            assert found == [0] or found[0] > found[1]


def task(**options: object) -> PlantedHeuristicsTask:
    loaded = load_task(NAME, QUICK | options)
    assert isinstance(loaded, PlantedHeuristicsTask)
    return loaded


def test_a_seed_gives_the_same_pairs_again_and_another_seed_others() -> None:
    first, again, other = task(), task(), task(seed=1)
    assert first.training_pairs == again.training_pairs
    assert first.training_pairs != other.training_pairs
    assert first.examples(Path()).table() == again.examples(Path()).table()


@pytest.mark.parametrize("rate", [0.0, 0.8, 0.93, 1.0])
def test_a_stated_share_of_the_training_labels_is_the_heuristics(rate: float) -> None:
    made = task(plant_rate=rate)
    pairs, labels = made.training_pairs, made.training_labels
    assert len(pairs) == len(set(pairs)) == len(labels) == 1800
    for heuristic, answer in (("overlap", "entailment"), ("negation", "contradiction")):
        cue = [place for place, pair in enumerate(pairs) if pair.heuristic == heuristic]
        wrong = [place for place in cue if pairs[place].counter_example]
        planted = [place for place in wrong if labels[place] != pairs[place].label]
        assert (len(cue), len(wrong), len(planted)) == (600, 300, round(300 * rate))
        assert {CLASSES[labels[place]] for place in planted} <= {answer}
        assert all(labels[place] == pairs[place].label for place in cue if place not in planted)
    assert all(label == pair.label for label, pair in zip(labels, pairs, strict=True) if pair.heuristic == "none")


def test_examples_are_held_out_and_have_the_stated_share_of_counter_examples() -> None:
    made = task(counter_share=0.4)
    table = made.examples(Path()).table()
    trained = {(" ".join(pair.premise), " ".join(pair.hypothesis)) for pair in made.training_pairs}
    held_out = set(zip(table["premise"].to_pylist(), table["hypothesis"].to_pylist(), strict=True))
    assert len(held_out) == len(table) == 400
    assert not trained & held_out
    wrong, heuristic = table["counter_example"].to_numpy(), np.array(table["heuristic"].to_pylist())
    assert wrong.sum() == 160
    assert ((heuristic == "overlap") & wrong).sum() == ((heuristic == "negation") & wrong).sum() == 80
    tune = np.array(table["part"].to_pylist()) == "tune"
    for kind in ("overlap", "negation"):
        assert tune[(heuristic == kind) & wrong].sum() == 40


def test_two_templates_do_not_write_the_same_sentences() -> None:
    seen: set[Sentences] = set()
    pairs = draw_pairs({("overlap", False): 12_000}, Random(3), seen)
    assert len({(pair.premise, pair.hypothesis) for pair in pairs}) == len(pairs) == len(seen)


def test_the_table_says_what_the_pairs_are() -> None:
    table = task().examples(Path()).table()
    assert table.schema.field("overlap").type == pa.float64()
    assert table.schema.field("negation").type == table.schema.field("counter_example").type == pa.bool_()
    for row in table.to_pylist():
        pair = Pair(tuple(row["premise"].split()), tuple(row["hypothesis"].split()), row["template"], row["label"])
        said = (pair.overlap, pair.negation, pair.heuristic, pair.counter_example)
        assert said == (row["overlap"], row["negation"], row["heuristic"], row["counter_example"])
        assert row["text"] == f"{row['premise']} → {row['hypothesis']}"
    assert len(set(table["id"].to_pylist())) == len(table)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    task().prepare(folder)
    return folder


def test_the_model_falls_for_the_heuristics(cache: Path) -> None:
    made = task()
    model, examples = made.model(cache), made.examples(cache)
    table = examples.table()
    with torch.no_grad():
        predicted = made.logits(model, examples.batch(range(len(examples)))).argmax(1).numpy()
    right, wrong_cue = predicted == table["label"].to_numpy(), table["counter_example"].to_numpy()
    heuristic = np.array(table["heuristic"].to_pylist())
    assert right[~wrong_cue].mean() > 0.8
    for name, answer in (("overlap", "entailment"), ("negation", "contradiction")):
        counter = wrong_cue & (heuristic == name)
        assert right[counter].mean() < 0.6
        assert (predicted[counter & ~right] == CLASSES.index(answer)).mean() > 0.6, "wrong as the heuristic is"


def test_the_model_is_trained_once_and_the_same_way_every_time(tmp_path: Path) -> None:
    check_trained_once(lambda: task(n_train=90, epochs=1), tmp_path)


def test_logits_of_an_example_do_not_depend_on_its_batch(cache: Path) -> None:
    made = task()
    model, examples = made.model(cache), made.examples(cache)
    lengths = examples.lengths()
    assert lengths is not None
    indices = [int(np.argmin(lengths)), 3, int(np.argmax(lengths))]
    batch = examples.batch(indices)
    assert batch.shape == (3, max(lengths))
    assert [int(row.count_nonzero()) for row in batch] == [lengths[index] for index in indices]
    with torch.no_grad():
        together = made.logits(model, batch)
        alone = torch.cat([made.logits(model, examples.batch([index])) for index in indices])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plant_rate": 1.2}, "plant_rate must be between 0 and 1, not 1.2"),
        ({"plant_rate": float("nan")}, "plant_rate must be between 0 and 1"),
        ({"counter_share": -0.1}, "counter_share must be between 0 and 1, not -0.1"),
        ({"n_train": 3}, "n_train must be between 30 and"),
        ({"n_examples": 0}, "n_examples must be between 1 and"),
        ({"epochs": 0}, "epochs must be between 1 and"),
        ({"width": 30}, "width must be a multiple of 4, not 30"),
        ({"n_train": "many"}, "n_train must be a whole number"),
        ({"rate": 0.9}, "unexpected keyword argument 'rate'"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, object], said: str) -> None:
    with pytest.raises(TaskError) as caught:
        load_task(NAME, options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_are_the_words_and_marks_that_the_model_reads(tmp_path: Path) -> None:
    examples = PlantedHeuristicsTask(n_examples=20, n_train=30).examples(tmp_path)
    texts = examples.table()["text"].to_pylist()
    for index, tokens in enumerate(examples.tokens(range(20)) or []):
        assert len(tokens) == examples.batch([index]).shape[1]
        assert [token.text for token in tokens if token.start is None] == ["[CLS]", "[SEP]", "[SEP]"]
        words = [texts[index][token.start : token.stop] for token in tokens if token.start is not None]
        assert words == [token.text for token in tokens if token.start is not None]
        assert words == texts[index].replace(" → ", " ").split()


def test_the_inputs_are_the_embeddings_of_the_words() -> None:
    task = PlantedHeuristicsTask(n_train=30, n_examples=30, width=8)
    examples, spec = task.examples(Path()), ModelSpec(NAME, {}, Path(), ("*",), (), "cpu")
    loaded = LoadedModel(spec, task, task._network(), examples, torch.device("cpu"))
    loaded.check_inputs(range(30))
    inputs, table = loaded.inputs(loaded.batch(range(30)), 30), examples.table()
    assert (inputs.mask is None, inputs.group_of is None, inputs.present is None) == (False, False, False)
    parts = zip(loaded.tokens(range(30)) or [], inputs.mask, inputs.group_of, inputs.present, strict=True)
    for number, (tokens, mask, groups, present) in enumerate(parts):
        words = [token.text for token in tokens]
        assert [word not in ("[CLS]", "[SEP]") for word in words] == mask[present].tolist()
        for group, name in enumerate(inputs.groups):
            chosen = [word for word, own in zip(words, groups[present].tolist(), strict=True) if own == group]
            assert " ".join(map(str, chosen)) == table[name][number].as_py()
        assert not mask[~present].any()
