"""Tiny random checkpoints of every supported architecture, made with transformers, and transformers' answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

_SHAPE: dict[str, Any] = {
    "vocab_size": 515,  # odd on purpose: vocabulary shards need padding
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (model class in transformers, changes to the shape)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-bias": ("Qwen3", {"head_dim": 32, "attention_bias": True}),
}


def make_checkpoint(
    folder: Path,
    variant: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "1GB",
    seed: int = 0,
    tokenizer: bool = False,
    **changes: Any,
) -> Path:
    """Write a random model of ``variant`` (a key of `VARIANTS`) to ``folder``, in Hugging Face layout; returns it.

    Args:
        dtype: of the saved weights.
        max_shard_size: a small one, such as ``"60KB"``, gives several files and an index.
        tokenizer: also copy the demo model's tokenizer and use its vocabulary size.
        changes: to the config's keys.
    """
    import transformers

    kind, own = VARIANTS[variant]
    shape = {**_SHAPE, **own, **changes}
    if tokenizer:
        shape["vocab_size"] = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    config = getattr(transformers, f"{kind}Config")(**shape)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that every part of the model leaves its mark on the logits (transformers' own start leaves
            # them nearly uniform), small enough that bf16's rounding of the logits stays well under a percent.
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "embed" in name or "lm_head" in name:
                parameter.normal_(std=0.03)
            else:  # q and k: attention that is not uniform, so that positions and windows matter
                gain = 1.0 if "q_proj" in name or "k_proj" in name else 0.5
                parameter.normal_(std=gain * parameter.shape[1] ** -0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        for name in _TOKENIZER_FILES:
            if (DEMO / name).is_file():
                shutil.copy(DEMO / name, folder / name)
    return folder


def cached_checkpoints(root: Path) -> Callable[..., Path]:
    """`make_checkpoint` into subfolders of ``root``, each combination of arguments once. For a session's fixture."""

    def get(variant: str = "llama", **arguments: Any) -> Path:
        key = "-".join([variant, *(f"{name}={value}" for name, value in sorted(arguments.items()))])
        folder = root / key.replace("/", "_").replace(" ", "")
        if not (folder / "config.json").is_file():
            make_checkpoint(folder, variant, **arguments)
        return folder

    return get


@torch.no_grad()
def reference_logprobs(folder: Path, token_ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """transformers' log-probabilities after each of ``token_ids``, given in one pass: [T, vocab] float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    return model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)


@torch.no_grad()
def reference_greedy(folder: Path, token_ids: list[int], count: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """transformers' next ``count`` greedy tokens, whatever the end token."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    tokens = list(token_ids)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(token_ids) :]
