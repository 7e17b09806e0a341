"""Texts, tokenizers and models that do not fit each other are refused when the examples are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.models.loaded import ModelSpec
from npeff.tasks import TaskError

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
import transformers
import yaml
from in_process import command
from npeff.gradients import LabelSpec, check_coverage
from npeff.sketches import SketchSpec
from npeff.stages.fishers.inspection import TaskWorker
from npeff.tasks.huggingface.limits import Limits
from npeff.tasks.huggingface.options import PretrainedOptions
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

N = 12
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, **tiny.SIZE}
PLACES = {"max_position_embeddings": N}
SPECIAL = {"pad_token_id": tiny.PAD, "eos_token_id": tiny.END, "decoder_start_token_id": tiny.START}
BART = {
    "d_model": 8,
    **{f"{part}_ffn_dim": 12 for part in ("encoder", "decoder")},
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    "bos_token_id": tiny.START,
    **SPECIAL,
    **tiny.SIZE,
}
SPECIAL_TOKENS = {"bos_token_id": tiny.START, "eos_token_id": tiny.END}
BERT = transformers.BertConfig(**SMALL, **PLACES, num_labels=3)
GPT2 = transformers.GPT2Config(
    n_layer=1, n_head=2, n_embd=8, n_positions=N, bos_token_id=2, eos_token_id=3, **tiny.SIZE
)
T5 = transformers.T5Config(d_model=8, d_ff=12, d_kv=4, num_layers=1, num_heads=2, num_labels=3, **SPECIAL, **tiny.SIZE)
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
TABLES: dict[str, tuple[str, Any]] = {
    "bert": ("TokenClassification", BERT),
    "roberta": ("TokenClassification", transformers.RobertaConfig(**SMALL, **PLACES)),
    "mpnet": ("TokenClassification", transformers.MPNetConfig(**SMALL, **PLACES)),
    "nystromformer": ("TokenClassification", transformers.NystromformerConfig(**SMALL, **PLACES)),
    "deberta": ("TokenClassification", transformers.DebertaV2Config(**SMALL, **PLACES)),
    "deberta, relative": (
        "TokenClassification",
        transformers.DebertaV2Config(position_biased_input=False, **DEBERTA, **SMALL, **PLACES),
    ),
    "gpt2": ("CausalLM", GPT2),
    "opt": ("CausalLM", transformers.OPTConfig(ffn_dim=12, word_embed_proj_dim=8, **SMALL, **PLACES)),
    "llama": ("CausalLM", transformers.LlamaConfig(**SMALL, **PLACES)),
    "bart": ("SequenceClassification", transformers.BartConfig(**BART, **PLACES)),
}
"""Models with tables of positions of every form, and models without one."""


@pytest.mark.parametrize("name", TABLES)
def test_the_limit_is_the_length_of_the_longest_text_that_the_model_reads(name: str, tmp_path: Path) -> None:
    head, config = TABLES[name]
    factory = getattr(transformers, f"AutoModelFor{head}")
    config.save_pretrained(tmp_path)
    limits = Limits.of(PretrainedOptions(data="", model=str(tmp_path)), factory)
    model = factory.from_config(config).eval()
    assert limits.vocabulary == len(tiny.VOCABULARY)

    def reads(length: int) -> bool:
        ids = torch.full((1, length), tiny.END)
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            return False
        return True

    assert reads(limits.positions or 2 * N)
    assert limits.positions is None or not reads(limits.positions + 1)


def test_sources_and_targets_have_their_own_limits(tmp_path: Path) -> None:
    lengths = {"max_encoder_position_embeddings": 16, "max_decoder_position_embeddings": 8, "attention_window": 4}
    transformers.LEDConfig(**BART, **lengths).save_pretrained(tmp_path)
    options, factory = PretrainedOptions(data="", model=str(tmp_path)), transformers.AutoModelForSeq2SeqLM
    assert Limits.of(options, factory) == Limits(16, len(tiny.VOCABULARY), None)
    assert Limits.of(options, factory, target=True).positions == 8


LONG = "the dog sleeps and the cat sings near the small tree in a tree"
TASKS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "sequence-classification": ("SequenceClassification", BERT, {"text_columns": ["text"]}),
    "token-classification": ("TokenClassification", BERT, {"words_column": "text"}),
    "multiple-choice": ("MultipleChoice", BERT, {"prompt_column": "text", "choice_columns": ["short", "other"]}),
    "causal-lm": ("CausalLM", GPT2, {"text_column": "text"}),
    "seq2seq-lm": (
        "Seq2SeqLM",
        transformers.BartConfig(**BART, **PLACES),
        {"source_column": "short", "target_column": "text"},
    ),
}


ALIKE = [
    pytest.param(name, marks=() if name in ("token-classification", "seq2seq-lm") else pytest.mark.slow)
    for name in TASKS
]
"""All tasks, for checks that have the same code in each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each task, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, (head, config, _) in TASKS.items():
        tiny.save_model(folder / name, getattr(transformers, f"AutoModelFor{head}"), config)
        tiny.save_tokenizer(folder / name, types=config is BERT)
    return folder


def load(name: str, model: Path, folder: Path, texts: list[str], **options: Any) -> tiny.Loaded:
    columns = {"text": texts, "same": texts, "short": ["a cat"] * len(texts), "other": ["a dog"] * len(texts)}
    data = tiny.write(folder / "data.parquet", columns)
    return tiny.load(name, model, data, **{**TASKS[name][2], **options})


def check_refused(said: str, call: Callable[[], Any]) -> None:
    with pytest.raises(TaskError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TASKS)
def test_a_text_longer_than_the_models_positions_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    said = f"but '{folder / name}' has {N} positions: set max_length to at most {N}"
    check_refused(said, lambda: load(name, folder / name, tmp_path, ["a cat", LONG]))
    assert load(name, folder / name, tmp_path, ["a cat", LONG], max_length=N).logits([0, 1]).isfinite().all()


@pytest.mark.parametrize("name", ALIKE)
def test_a_model_without_a_tokenizer_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    for file in (folder / name).iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    said = f"'{tmp_path}' has no tokenizer, or one without a vocabulary"
    check_refused(said, lambda: load(name, tmp_path, tmp_path, ["a cat"]))
    processor = str(folder / name)
    assert load(name, tmp_path, tmp_path, ["a cat"], processor=processor).logits([0]).isfinite().all()


@pytest.mark.parametrize("name", ALIKE)
def test_texts_that_the_tokenizer_does_not_know_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    """More than half of all tokens; a single text may be unknown."""
    said = "set processor to the tokenizer of the model, or choose other columns"
    options = {"choice_columns": ["text", "same"]} if name == "multiple-choice" else {}
    check_refused(said, lambda: load(name, folder / name, tmp_path, ["lorem ipsum", "dolor cat"], **options))
    assert len(load(name, folder / name, tmp_path, ["🙂 🙂 🙂", "the dog sleeps"], **options).examples) == 2


@pytest.mark.parametrize("name", ALIKE)
def test_a_tokenizer_of_another_model_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    """With more tokens than the table of the model."""
    vocabulary = tiny.VOCABULARY | {"zebra": len(tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    said = f"row '1' has token {len(tiny.VOCABULARY)}, but '{folder / name}' has {len(tiny.VOCABULARY)} tokens"
    options = {"processor": str(tmp_path)}
    check_refused(said, lambda: load(name, folder / name, tmp_path, ["a cat", "a zebra"], **options))
    assert len(load(name, folder / name, tmp_path, ["a cat", "a dog"], **options).examples) > 0


def test_token_types_that_the_model_does_not_have_are_refused(folder: Path, tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=32, type_vocab_size=1)
    tiny.save_model(tmp_path, transformers.AutoModelForSequenceClassification, config)
    name, processor = "sequence-classification", {"processor": str(folder / "sequence-classification")}
    assert len(load(name, tmp_path, tmp_path, ["a cat"], **processor).examples) == 1
    said = "row '0' has token type 1, but "
    pairs = {"text_columns": ["text", "short"], **processor}
    check_refused(said, lambda: load(name, tmp_path, tmp_path, ["a cat"], **pairs))


def test_a_model_of_masked_tokens_is_no_causal_language_model(tmp_path: Path) -> None:
    """Its logits at a position depend on the token that they predict."""
    tiny.save_model(tmp_path, transformers.AutoModelForMaskedLM, BERT)
    tiny.save_tokenizer(tmp_path)
    check_refused("is not a causal language model", lambda: load("causal-lm", tmp_path, tmp_path, ["a cat"]))
    transformers.BertConfig.from_dict(BERT.to_dict() | {"is_decoder": True}).save_pretrained(tmp_path)
    assert load("causal-lm", tmp_path, tmp_path, ["a cat"]).logits([0]).isfinite().all()


@pytest.mark.parametrize("pad", [None, tiny.token("a")])
def test_a_text_that_ends_with_the_padding_is_classified_at_its_last_token_or_refused(
    pad: int | None, tmp_path: Path
) -> None:
    """The tokenizer ends every text with [SEP], which is the padding if nothing else is."""
    config = transformers.GPT2Config.from_dict(GPT2.to_dict() | {"num_labels": 3, "pad_token_id": pad})
    direct = tiny.save_model(tmp_path, transformers.AutoModelForSequenceClassification, config)
    tiny.save_tokenizer(tmp_path, "[CLS] $A [SEP]", pad=False)
    texts, name = ["the cat", "the small bird sings"], "sequence-classification"
    if pad is None:
        check_refused("ends with '[SEP]', which is also the padding", lambda: load(name, tmp_path, tmp_path, texts))
        return
    loaded = load(name, tmp_path, tmp_path, texts)
    for text, logits in zip(texts, loaded.logits([0, 1]), strict=True):
        ids = torch.tensor([[tiny.START, *tiny.ids_of(text), tiny.END]])
        with torch.no_grad():
            torch.testing.assert_close(logits, direct(input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [T5, transformers.BartConfig(**BART, num_labels=3)], ids=["t5", "bart"])
def test_an_encoder_decoder_model_classifies_texts_and_its_gradients_are_those_of_autograd(
    config: Any, tmp_path: Path
) -> None:
    """Its encoder and its decoder share the table of tokens."""
    direct = tiny.save_model(tmp_path / "model", transformers.AutoModelForSequenceClassification, config)
    tiny.save_tokenizer(tmp_path / "model", "$A [SEP]")
    texts = ["the cat", "the small bird sings"]
    data = tiny.write(tmp_path / "data.parquet", {"text": texts})
    options = {"model": str(tmp_path / "model"), "data": data, "text_columns": ["text"]}
    loaded = ModelSpec("huggingface-sequence-classification", options, tmp_path, ("*",), (), "cpu").load()
    batch = loaded.batch([0, 1])
    for text, logits in zip(texts, loaded.logits(loaded.model, batch), strict=True):
        with torch.no_grad():
            expected = direct(input_ids=torch.tensor([[*tiny.ids_of(text), tiny.END]])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    check_coverage(loaded.model, loaded.logits, batch, loaded.layout, labels=LabelSpec(), examples=[0, 1])
    assert not loaded.left_out


def test_an_encoder_decoder_model_needs_the_same_number_of_ends(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, transformers.AutoModelForSequenceClassification, T5)
    tiny.save_tokenizer(tmp_path, "$A")
    said = "the text of row '0' has 0 end-of-text tokens"
    check_refused(said, lambda: load("sequence-classification", tmp_path, tmp_path, ["a cat"]))
    tiny.save_tokenizer(tmp_path, "$A [SEP]")
    said = "the text of row '1' has 2 end-of-text tokens, and row '0' has 1"
    check_refused(said, lambda: load("sequence-classification", tmp_path, tmp_path, ["a cat", "a [SEP] cat"]))


@pytest.mark.parametrize("name", ["sequence-classification", "token-classification"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_labels": 1}, "is a model for regression, with one output"),
        ({"problem_type": "regression"}, "is a model for regression: use a model for single-label classification"),
        ({"problem_type": "multi_label_classification"}, "is a model for multi_label_classification"),
    ],
)
def test_outputs_that_are_not_logits_of_classes_are_refused(
    changes: dict[str, Any], said: str, name: str, folder: Path, tmp_path: Path
) -> None:
    config = transformers.BertConfig(**SMALL, **PLACES, **changes)
    tiny.save_model(tmp_path, getattr(transformers, f"AutoModelFor{TASKS[name][0]}"), config)
    tiny.save_tokenizer(tmp_path)
    check_refused(said, lambda: load(name, tmp_path, tmp_path, ["a cat"]))


def test_the_longest_example_is_tried_before_the_first_shard(tmp_path: Path) -> None:
    """A model whose positions are not in a table that the task can see."""
    config = transformers.GPTJConfig(
        n_embd=8, n_layer=1, n_head=2, rotary_dim=4, n_positions=N, **SPECIAL_TOKENS, **tiny.SIZE
    )
    tiny.save_model(tmp_path / "model", transformers.AutoModelForCausalLM, config)
    tiny.save_tokenizer(tmp_path / "model", "[CLS] $A")
    data = tiny.write(tmp_path / "data.parquet", {"text": ["a cat", "the dog", LONG]})
    options = {"model": str(tmp_path / "model"), "data": data, "text_column": "text"}

    def inspect(**changes: Any) -> Any:
        spec = ModelSpec("huggingface-causal-lm", options | changes, tmp_path / "task", ("*ln_f*",), (), "cpu")
        return TaskWorker(spec, LabelSpec("sampled", rank=1), 0).inspect((SketchSpec("identity"), 1, 1 << 30))

    said = "on the longest example, number 2, of size 16: shorten or exclude such examples (Hugging Face tasks: lower"
    check_refused(said, inspect)
    assert inspect(max_length=N).n_classes == len(tiny.VOCABULARY)


def test_the_command_refuses_a_text_that_is_too_long_before_any_shard(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = folder / "sequence-classification"
    data = tiny.write(tmp_path / "data.parquet", {"text": ["a cat", LONG]})
    tree = {
        "run_dir": str(tmp_path / "run"),
        "task": {
            "name": "huggingface-sequence-classification",
            "options": {"model": str(model), "data": data, "text_columns": ["text"]},
        },
        "fishers": {"sketch": {"kind": "identity"}},
        "factorization": {"n_components": 2},
        "executor": {"kind": "serial"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert command("fishers", tmp_path / "run.yaml") == 2
    line = capfd.readouterr().err.splitlines()[-1]  # after the progress of loading the model
    assert line.endswith(f"row '1' has 17 tokens, but '{model}' has {N} positions: set max_length to at most {N}")
    assert not list((tmp_path / "run").rglob("shard*"))
