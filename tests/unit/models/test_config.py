"""Parsing of config.json, and what cannot be split."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from yalis.errors import CheckpointError, ConfigError
from yalis.models.config import ModelConfig, RopeConfig, stage_layers, validate_parallel

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}


def parse(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**LLAMA, **changes})


def test_defaults() -> None:
    config = parse()
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (8, 2, torch.float32)
    assert config.windows == (None,) * 4
    assert config.rope == RopeConfig(10000.0)
    assert not any((config.tie_word_embeddings, config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm))
    assert parse(num_key_value_heads=None).num_kv_heads == 8
    assert parse(torch_dtype="bfloat16").dtype == parse(dtype="bfloat16").dtype == torch.bfloat16


def test_end_tokens() -> None:
    assert parse().eos_token_id is None
    assert parse(eos_token_id=2).eos_token_id == 2
    assert parse(eos_token_id=[2, 7]).eos_token_id == (2, 7)


def test_rope_keys_of_both_generations() -> None:
    factors = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    expected = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 32)
    assert parse(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **factors}).rope == expected
    assert parse(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **factors}).rope == expected
    assert parse(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2}).rope == RopeConfig(5e5, "linear", 2.0)
    assert parse(rope_theta=5e5, rope_scaling=None).rope == RopeConfig(5e5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; supported: .*Qwen3ForCausalLM"),
        ({"architectures": None}, "no 'architectures'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope type 'yarn' is not supported; .*llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "'llama3' needs 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: silu"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"dtype": "int8"}, "dtype='int8' is not supported"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "chunked_attention"],
            },
            "'chunked_attention' is not supported",
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention"],
            },
            "layer_types lists 1 layers, num_hidden_layers=4",
        ),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**changes)


def test_windows() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 3}
    assert parse(**qwen).windows == (None,) * 4
    assert parse(**qwen, use_sliding_window=True).windows == (None, None, None, 8)
    types = ["sliding_attention", "full_attention"] * 2
    assert parse(**qwen, use_sliding_window=True, layer_types=types).windows == (8, None, 8, None)
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert parse(**mistral, sliding_window=8).windows == (8,) * 4
    assert parse(**mistral, sliding_window=None).windows == (None,) * 4
    assert parse(**mistral).windows == (4096,) * 4


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelConfig.from_pretrained(tmp_path) == parse()


def test_what_can_be_split() -> None:
    config = parse()
    for tp in (1, 2, 4, 8):  # above 2 the KV heads are replicated
        validate_parallel(config, tp, 4)
    validate_parallel(dataclasses.replace(config, vocab_size=1001), 8, 1)


@pytest.mark.parametrize(
    ("changes", "tp", "pp", "message"),
    [
        ({}, 3, 1, "tensor_parallel_size=3: does not divide num_attention_heads=8; sizes that work: 1, 2, 4, 8"),
        ({"num_heads": 12, "num_kv_heads": 4}, 6, 1, "neither divides num_key_value_heads=4 nor is a multiple"),
        ({"intermediate_size": 98}, 4, 1, "does not divide intermediate_size=98; sizes that work: 1, 2$"),
        ({}, 1, 5, "pipeline_parallel_size=5 exceeds the model's 4 layers"),
    ],
)
def test_what_cannot_be_split_is_named(changes: dict[str, Any], tp: int, pp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_parallel(dataclasses.replace(parse(), **changes), tp, pp)


@pytest.mark.parametrize(("layers", "stages"), [(4, 1), (4, 3), (7, 3), (80, 6)])
def test_stages_cover_all_layers_evenly(layers: int, stages: int) -> None:
    ranges = [stage_layers(layers, stage, stages) for stage in range(stages)]
    assert [i for r in ranges for i in r] == list(range(layers))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    assert len(ranges[-1]) == min(map(len, ranges))
