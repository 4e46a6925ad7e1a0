"""Tiny random targets of the families that are supported: each a Hugging Face folder with a byte-level tokenizer, made in a second."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig

SHAPE = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "initial_context_length": 512, "rope_scaling": None}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip

FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", HEADS),
    "qwen3_moe": ("Qwen3Moe", {**HEADS, **EXPERTS}),
    "gemma2": ("Gemma2", {**HEADS, **WINDOW, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "gemma3_text": ("Gemma3", {**HEADS, **WINDOW, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3", {**HEADS, **WINDOW, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}),  # also reads images
    "mistral": ("Mistral", {**HEADS, "sliding_window": None}),
    "gpt_oss": ("GptOss", {**HEADS, **WINDOW, **GPT_OSS}),
}


def make_family(name: str, tokenizer: Path, folder: Path) -> Path:
    """A random fp32 target of the family; tokenizer: a folder to take the tokenizer from."""
    prefix, more = FAMILIES[name]
    config = getattr(transformers, prefix + ("TextConfig" if prefix == "Gemma3" else "Config"))(**{**SHAPE, **more})
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    if name == "gemma3":
        config = transformers.Gemma3Config(text_config=config, vision_config=VISION, tie_word_embeddings=True)
        model_class = transformers.Gemma3ForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape)  # so that a norm left out, or applied twice, is seen
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.float().save_pretrained(folder)
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, folder)
    return folder
