"""Small models of the architectures that people use, with random weights, and inputs for them.

A model is made from a configuration of one or two layers. Its logits are those of one prediction of each example: a
class, or the token after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

N, LENGTH, WORDS, CLASSES = 3, 6, 13, 3
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
EXPERTS = {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """A class of models and a configuration."""

    name: str
    kind: str
    """``classifier``, ``decoder``, ``seq2seq``, ``image`` or ``audio``."""
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    spread: float = 0.3
    """Standard deviation of the entries of matrices. Smaller ones where logits would otherwise be large."""

    def build(self) -> nn.Module:
        """Return the model, whose weights are large enough for its logits to differ."""
        config = getattr(transformers, f"{self.config}Config")(**self.options)
        if self.kind in ("classifier", "image", "audio"):
            config.num_labels = CLASSES
        config.architectures = [f"{self.config}ForImageClassification"] if self.kind == "image" else []
        factory = {
            "classifier": transformers.AutoModelForSequenceClassification,
            "decoder": transformers.AutoModelForCausalLM,
            "seq2seq": transformers.AutoModelForSeq2SeqLM,
            "image": transformers.AutoModelForImageClassification,
            "audio": transformers.AutoModelForAudioClassification,
        }[self.kind]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = factory.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, self.spread)
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Return the inputs of N examples."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, WORDS, (N, LENGTH), generator=generator)
        match self.kind:
            case "image":
                size = self.options.get("vision_config", self.options).get("image_size", 32)
                return {"pixel_values": torch.randn(N, 3, size, size, generator=generator)}
            case "audio":
                shape = (N, 8, 12) if self.config == "Whisper" else (N, 400)
                name = "input_features" if self.config == "Whisper" else "input_values"
                return {name: torch.randn(shape, generator=generator)}
            case "seq2seq":
                return {"input_ids": tokens, "decoder_input_ids": tokens[:, :3].flip(1)}
        return {"input_ids": tokens}

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits (B, C) of one prediction of each example."""
        cache = {"use_cache": False} if self.kind in ("decoder", "seq2seq") else {}
        logits: Tensor = model(**batch, **cache).logits
        return logits[:, -1] if logits.dim() == 3 else logits


def _of(kind: str, *entries: tuple[Any, ...]) -> list[Architecture]:
    return [Architecture(name, kind, *further) for name, *further in entries]


_T5 = {
    "vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    "vocab_size": WORDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_VISION = {key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}

ARCHITECTURES = [
    *_of(
        "classifier",
        ("BERT", "Bert", TEXT),
        ("RoBERTa", "Roberta", TEXT),
        ("XLM-RoBERTa", "XLMRoberta", TEXT),
        ("CamemBERT", "Camembert", TEXT),
        ("DeBERTa", "Deberta", TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
        (
            "DeBERTa-v2 and v3",
            "DebertaV2",
            TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
        ),
        ("ModernBERT", "ModernBert", TEXT | {"cls_token_id": 1, "sep_token_id": 2, "reference_compile": False}),
        ("DistilBERT", "DistilBert", {"vocab_size": WORDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
        ("ALBERT", "Albert", TEXT | {"embedding_size": 8}),
        ("ELECTRA", "Electra", TEXT | {"embedding_size": 8}),
        ("MPNet", "MPNet", TEXT),
        ("MobileBERT", "MobileBert", TEXT | {"true_hidden_size": 16, "intra_bottleneck_size": 16, "embedding_size": 8},
         0.1),
        ("Nyströmformer", "Nystromformer", TEXT | {"num_landmarks": 2, "segment_means_seq_len": LENGTH}),
        ("XLNet", "XLNet", {"vocab_size": WORDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
        ("ESM", "Esm", TEXT | {"mask_token_id": 3, "position_embedding_type": "rotary"}),
    ),
    *_of(
        "decoder",
        ("GPT-2", "GPT2", {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}),
        ("GPT-Neo", "GPTNeo", {"vocab_size": WORDS, "hidden_size": 16, "num_layers": 2, "num_heads": 2,
                               "intermediate_size": 24, "attention_types": [[["global", "local"], 1]],
                               "window_size": 4, "max_position_embeddings": 40}),
        ("GPT-NeoX and Pythia", "GPTNeoX", TEXT),
        ("GPT-J", "GPTJ", {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40,
                           "rotary_dim": 4}),
        ("OPT", "OPT", TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
        ("BLOOM", "Bloom", {"vocab_size": WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
        ("Llama", "Llama", DECODER),
        ("Mistral", "Mistral", DECODER),
        ("Qwen2", "Qwen2", DECODER),
        ("Qwen3", "Qwen3", DECODER),
        ("Gemma", "Gemma", DECODER),
        ("Gemma 2", "Gemma2", DECODER),
        ("Gemma 3", "Gemma3Text", DECODER),
        ("Phi", "Phi", TEXT),
        ("Phi-3 and 4", "Phi3", TEXT | {"num_key_value_heads": 1}),
        ("Falcon", "Falcon", TEXT | {"new_decoder_architecture": False}),
        ("StableLM", "StableLm", TEXT | {"num_key_value_heads": 2, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("StarCoder 2", "Starcoder2", TEXT | {"num_key_value_heads": 1}),
        ("OLMo 2", "Olmo2", TEXT),
        ("SmolLM 3", "SmolLM3", DECODER),
        ("Granite", "Granite", TEXT),
        ("Cohere", "Cohere", TEXT),
        ("Mixtral", "Mixtral", DECODER | EXPERTS | {"num_local_experts": 4}),
        ("Qwen3-MoE", "Qwen3Moe", DECODER | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 12}),
        ("OLMoE", "Olmoe", TEXT | EXPERTS | {"num_experts": 4}),
        ("gpt-oss", "GptOss", DECODER | EXPERTS | {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
        ("Mamba", "Mamba", {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4,
                            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    ),
    *_of(
        "seq2seq",
        ("T5", "T5", _T5),
        ("mT5", "MT5", _T5),
        ("BART", "Bart", _BART),
        ("mBART", "MBart", _BART),
        ("Marian", "Marian", _BART),
        ("Pegasus", "Pegasus", _BART),
    ),
    *_of(
        "image",
        ("ViT", "ViT", IMAGE | _VISION),
        ("DeiT", "DeiT", IMAGE | _VISION),
        ("BEiT", "Beit", IMAGE | _VISION),
        ("DINOv2", "Dinov2", IMAGE | _VISION),
        ("Swin", "Swin", {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2],
                          "window_size": 2}),
        ("ConvNeXt", "ConvNext", {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
        ("ConvNeXt V2", "ConvNextV2", {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
        ("ResNet", "ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
         0.1),
        ("MobileNetV2", "MobileNetV2", {"image_size": 32, "depth_multiplier": 0.25}, 0.15),
        ("EfficientNet", "EfficientNet", {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.25,
                                          "hidden_dim": 320}, 1.0),
        ("SegFormer", "Segformer", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2,
                                    "sr_ratios": [2, 1], "strides": [4, 2], "patch_sizes": [7, 3],
                                    "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}),
        ("CLIP vision", "CLIP", {"vision_config": IMAGE | _VISION, "text_config": TEXT, "projection_dim": 8}),
        ("SigLIP vision", "Siglip", {"vision_config": IMAGE | _VISION, "text_config": TEXT}),
    ),
    *_of(
        "audio",
        ("Whisper encoder", "Whisper", {**_BART, "num_mel_bins": 8, "max_source_positions": 6,
                                        "max_target_positions": 8, "classifier_proj_size": 8}),
        ("wav2vec 2.0", "Wav2Vec2", TEXT | {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                                            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
                                            "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
                                            "feat_extract_norm": "layer"}),
        ("HuBERT", "Hubert", TEXT | {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                                     "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
                                     "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
                                     "feat_extract_norm": "layer"}),
    ),
]  # fmt: skip
