"""Sequence classification with a Hugging Face model: a tiny BERT made here, and a real one where there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import select_parameters
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.sketches import SketchSpec, make_sketch
from npeff.tasks import TaskError, load_task

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig, XLNetConfig

NAME = "huggingface-sequence-classification"
TEXTS = [
    "a small cat",
    "the dog sleeps and the cat sings",
    "dog",
    "a bird sings in the small tree near the dog",
    "cat ?",
]
OTHERS = ["a cat", "nothing sleeps", "the dog is near", "a bird", "the tree sings in a small bird and the bird sleeps"]
LABELS = ["NEUTRAL", "no", "Yes", "yes", "neutral"]
NUMBERS = [1, 0, 2, 2, 1]
IDS = ["p-1", "p-2", "q-3", "q-4", "r-5"]
COLUMNS: dict[str, list[Any]] = {"key": IDS, "text": TEXTS, "other": OTHERS, "answer": LABELS, "number": NUMBERS}


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with three classes and random weights, and a WordPiece tokenizer of the words above."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = sorted({word for text in TEXTS + OTHERS for word in text.split()} - {"sleeps", "?"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, "sleep", "##s"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("tiny-bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
        id2label={0: "no", 1: "neutral", 2: "yes"},
        label2id={"no": 0, "neutral": 1, "yes": 2},
        initializer_range=0.4,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table(COLUMNS), path)
    return str(path)


def load(model: Path | str, data: str | Path, include: tuple[str, ...] = ("*",), **options: Any) -> LoadedModel:
    options = {"model": str(model), "data": str(data), "text_columns": ["text"], **options}
    return ModelSpec(NAME, options, Path("unused"), include, (), "cpu").load()


@torch.no_grad()
def logits_of(loaded: LoadedModel, indices: range) -> torch.Tensor:
    parts = [indices[start : start + 32] for start in range(0, len(indices), 32)]
    return torch.cat([loaded.logits(loaded.model, loaded.batch(part)) for part in parts])


def fishers(loaded: LoadedModel, indices: list[int]) -> Any:
    sketch = make_sketch(SketchSpec("identity"), loaded.layout, 0)
    compute = PerExampleFishers(loaded.model, loaded.logits, loaded.layout, sketch)
    return compute(loaded.batch(indices), len(indices))


def autograd_fisher_factor(loaded: LoadedModel, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows √p_y ∇log p(y), (C, P), of one example by ordinary autograd, and its logits; F is their Gram matrix."""
    named = dict(loaded.model.named_parameters())
    parameters = [named[name].requires_grad_() for name in loaded.layout.names]
    with torch.enable_grad():
        logits_C = loaded.logits(loaded.model, loaded.batch([index]))[0]
        log_p_C = logits_C.log_softmax(0)
        rows = []
        for log_p in log_p_C:
            found = torch.autograd.grad(log_p, parameters, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    rows_CP = torch.stack(rows).double() * log_p_C.detach().double().exp().sqrt()[:, None]
    return rows_CP, logits_C.detach()


def fisher_error(factor_RP: torch.Tensor, expected_CP: torch.Tensor) -> float:
    """‖AᵀA − EᵀE‖_F / ‖EᵀE‖_F without a P×P matrix: from Gram matrices of the rows."""
    factor_RP = factor_RP.double()
    own, cross, other = (
        (a @ b.T).square().sum()
        for a, b in ((factor_RP, factor_RP), (factor_RP, expected_CP), (expected_CP, expected_CP))
    )
    return float((own - 2 * cross + other).clamp_min(0).sqrt() / other.sqrt())


def test_a_row_is_an_example(tiny_bert: Path, data: str) -> None:
    loaded = load(tiny_bert, data, label_column="answer", id_column="key")
    table = loaded.examples.table()
    assert loaded.examples.class_names == ("no", "neutral", "yes")
    assert table["id"].to_pylist() == IDS
    assert table["text"].to_pylist() == TEXTS
    assert table["label"].to_pylist() == NUMBERS
    assert table["number"].to_pylist() == NUMBERS
    assert table["other"].to_pylist() == OTHERS
    assert logits_of(loaded, range(5)).shape == (5, 3)
    assert np.array(loaded.lengths).tolist() == [5, 10, 3, 12, 4]


def test_labels_are_numbers_or_names_or_absent(tiny_bert: Path, data: str) -> None:
    by_number = load(tiny_bert, data, label_column="number").examples.table()
    assert by_number["label"].to_pylist() == NUMBERS
    assert by_number["id"].to_pylist() == ["0", "1", "2", "3", "4"]
    named = load(tiny_bert, data, label_column="answer", label_names=["Yes", "Neutral", "No"]).examples
    assert named.table()["label"].to_pylist() == [1, 2, 0, 0, 1]
    assert named.class_names == ("Yes", "Neutral", "No")
    assert load(tiny_bert, data).examples.table()["label"].to_pylist() == [None] * 5


def test_a_label_may_be_missing(tiny_bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    for column in ("answer", "number"):
        pq.write_table(pa.table(COLUMNS | {column: [COLUMNS[column][0], None, *COLUMNS[column][2:]]}), path)
        assert load(tiny_bert, path, label_column=column).examples.table()["label"].to_pylist() == [1, None, 2, 2, 1]


def test_pairs_are_read_together_and_shown_together(tiny_bert: Path, data: str) -> None:
    pairs = load(tiny_bert, data, text_columns=["text", "other"])
    assert pairs.examples.table()["text"].to_pylist() == [f"{a}\n{b}" for a, b in zip(TEXTS, OTHERS, strict=True)]
    batch = pairs.batch([0, 2])
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}
    assert (batch["input_ids"] == 3).sum(1).tolist() == [2, 2], "two separators"
    swapped = load(tiny_bert, data, text_columns=["other", "text"])
    assert not torch.allclose(logits_of(pairs, range(1)), logits_of(swapped, range(1)))


@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_tokens_are_those_of_the_batch_with_their_places_in_the_text(
    columns: list[str], tiny_bert: Path, data: str
) -> None:
    loaded = load(tiny_bert, data, text_columns=columns, max_length=14)
    shown = loaded.examples.table()["text"].to_pylist()
    found = loaded.tokens([3, 1])
    assert found is not None
    for index, tokens in zip([3, 1], found, strict=True):
        assert len(tokens) == loaded.batch([index])["input_ids"].shape[1]
        assert tokens[0] == ("[CLS]", None, None)
        assert tokens[-1] == ("[SEP]", None, None)
        places = [(token.start, token.stop) for token in tokens if token.start is not None]
        assert places == sorted(places)
        assert [shown[index][start:stop] for start, stop in places] == [t.text for t in tokens if t.start is not None]
    assert [token.text for token in found[1]][:5] == ["[CLS]", "the", "dog", "sleep", "s"]


def test_texts_are_cut_at_max_length_and_rows_at_limit(tiny_bert: Path, data: str) -> None:
    loaded = load(tiny_bert, data, max_length=5, limit=4)
    assert len(loaded.examples) == len(loaded.examples.table()) == 4
    assert loaded.batch(range(4))["input_ids"].shape == (4, 5)


def test_fishers_are_those_of_autograd_and_padding_does_not_change_them(tiny_bert: Path, data: str) -> None:
    loaded = load(tiny_bert, data, text_columns=["text", "other"])
    together = fishers(loaded, [0, 1, 2, 3, 4])
    assert together.valid_B.all()
    for index in range(5):
        alone = fishers(loaded, [index])
        expected_CP, logits_C = autograd_fisher_factor(loaded, index)
        for factors_RP in (together.factors_BRD[index], alone.factors_BRD[0]):
            assert fisher_error(factors_RP, expected_CP) < 1e-5
        torch.testing.assert_close(together.logits[index], logits_C)
        torch.testing.assert_close(together.factors_BRD[index].abs(), alone.factors_BRD[0].abs(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(together.frobenius_norms_B[index], alone.frobenius_norms_B[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"text_columns": ["txt"]},
            "has no column 'txt' (did you mean 'text'?): it has key, text, other, answer, number",
        ),
        ({"label_column": "gold"}, "has no column 'gold'"),
        ({"id_column": "uid"}, "has no column 'uid'"),
        ({"label_column": "text"}, "label 'a small cat' is not one of no, neutral, yes: give label_names"),
        ({"label_column": "number", "label_names": ["a", "b"]}, "label 2 is not one of the model's 2 classes"),
        ({"data": "no-such-file.csv"}, "cannot read no-such-file.csv"),
        ({"data": "table.xlsx"}, "use a file ending in .parquet, .csv, .tsv, .jsonl"),
        ({"model": "no-such-model/at-all"}, "cannot load 'no-such-model/at-all'"),
        ({"text_columns": []}, "text_columns must be a list of one column, or of two"),
        ({"text_columns": ["text", "other", "key"]}, "text_columns must be a list of one column, or of two"),
        ({"text_columns": "text"}, "task.options.text_columns must be a list, not 'text'"),
        ({"max_len": 3}, "unexpected keyword argument 'max_len'"),
        ({"limit": -1}, "limit must not be negative"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, Any], said: str, tiny_bert: Path, data: str) -> None:
    with pytest.raises(TaskError) as caught:
        load(**{"model": tiny_bert, "data": data, **options})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


DECODERS = {
    "gpt2": GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, num_labels=3, bos_token_id=2, **tiny.SIZE),
    "llama": LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
        num_key_value_heads=1,
        max_position_embeddings=32,
        **tiny.SIZE,
    ),
    "xlnet": XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=24, num_labels=3, **tiny.SIZE),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "pad"), [("gpt2", False), ("gpt2", True), ("llama", False), ("xlnet", True)])
def test_models_that_classify_at_the_last_token_find_it(name: str, pad: bool, side: str, tmp_path: Path) -> None:
    """Also where there is no token for padding, and the end of a text has to do."""
    direct = tiny.save_model(tmp_path / "model", AutoModelForSequenceClassification, DECODERS[name])
    tiny.save_tokenizer(tmp_path / "model", "$A [SEP] [CLS]" if name == "xlnet" else "[CLS] $A", pad=pad, side=side)
    texts = ["a small cat", "the dog is in the small tree near the bird", "dog"]
    data = tiny.write(tmp_path / "data.parquet", {"text": texts})
    loaded = tiny.load("sequence-classification", tmp_path / "model", data, text_columns=["text"])
    tiny.check_batches(loaded)
    ends = [tiny.END, tiny.START] if name == "xlnet" else []
    starts = [] if name == "xlnet" else [tiny.START]
    for text, logits in zip(texts, loaded.logits(range(3)), strict=True):
        tokens = [*starts, *map(tiny.token, text.split()), *ends]
        with torch.no_grad():
            expected = direct(input_ids=torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_several_labels_at_once_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        problem_type="multi_label_classification",
        **tiny.SIZE,
    )
    tiny.save_model(tmp_path, AutoModelForSequenceClassification, config)
    tiny.save_tokenizer(tmp_path)
    data = tiny.write(tmp_path / "data.parquet", {"text": ["a cat"]})
    with pytest.raises(TaskError, match="is a model for multi_label_classification: use a model for single-label"):
        tiny.load("sequence-classification", tmp_path, data, text_columns=["text"])


def test_a_model_without_a_classifier_for_these_classes_is_found_out(tiny_bert: Path, data: str) -> None:
    """Names that do not fit the logits are not the task's to refuse: the stage compares the two."""
    examples = load_task(
        NAME, {"model": str(tiny_bert), "data": data, "text_columns": ["text"], "label_names": ["only", "two"]}
    ).examples(Path("unused"))
    assert examples.class_names == ("only", "two")


@pytest.mark.slow
def test_a_real_model_is_right_about_real_pairs_and_its_fishers_are_those_of_autograd() -> None:
    shared = Path(os.environ.get("NPEFF_SHARED_DATA", ""))
    model, pairs = shared / "models/minilm-sick", shared / "data/sick/SICK_test_annotated.txt"
    if "NPEFF_SHARED_DATA" not in os.environ or not model.is_dir() or not pairs.is_file():
        pytest.skip("NPEFF_SHARED_DATA names no folder with models/minilm-sick and data/sick/SICK_test_annotated.txt")
    loaded = load(
        model,
        pairs,
        include=("bert.encoder.layer.5.*", "bert.pooler.*", "classifier.*"),
        text_columns=["sentence_A", "sentence_B"],
        label_column="entailment_judgment",
        max_length=64,
        limit=600,
    )
    labels = loaded.examples.table()["label"].to_numpy()
    assert (logits_of(loaded, range(600)).argmax(-1).numpy() == labels).mean() >= 0.8
    assert loaded.layout.size > 1_900_000
    batch = fishers(loaded, [3, 50, 117, 198])
    for position, index in enumerate([3, 50, 117, 198]):
        expected_CP, _ = autograd_fisher_factor(loaded, index)
        assert fisher_error(batch.factors_BRD[position], expected_CP) < 1e-4
        np.testing.assert_allclose(
            batch.frobenius_norms_B[position], torch.linalg.norm(expected_CP @ expected_CP.T), rtol=1e-4
        )
    assert select_parameters(loaded.model).size > 22_000_000
