"""A model's shape, parsed from a Hugging Face ``config.json`` with plain json.

Keys that mean the same in every architecture are read here; what differs between architectures (biases, norms on q and
k, sliding windows) is decided by the architecture's own class, see `yalis.models.base.CausalLM.options`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yalis.errors import CheckpointError, ConfigError

ROPE_TYPES = ("default", "linear", "llama3")
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. The factors are those of ``type``; unused ones keep their default.

    Attributes:
        theta: base of the wavelengths.
        type: one of `ROPE_TYPES`.
        factor: stretch of the positions (linear, llama3).
        low_freq_factor, high_freq_factor, original_max_position_embeddings: band limits of llama3 scaling.
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ArchitectureOptions:
    """What an architecture's class decides from the raw config.

    Attributes:
        qkv_bias, o_bias, mlp_bias: whether these linears have a bias.
        qk_norm: RMSNorm over each head of q and k before the rotation.
        windows: sliding window in tokens (or None) of each layer; an empty tuple means full attention everywhere.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one model. Sizes are those of the whole model, not of a rank.

    Attributes:
        dtype: the checkpoint's own dtype; float32 when the config does not say.
        windows: sliding window in tokens of each layer, None for full attention; ``num_layers`` entries.
        eos_token_id: what ``config.json`` says: one token, several, or none. A generation config may say otherwise.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    dtype: torch.dtype
    hidden_act: str = "silu"

    @classmethod
    def from_pretrained(cls, path: Path | str) -> ModelConfig:
        """Read ``config.json`` in folder ``path``.

        Raises:
            CheckpointError: no such file, or it is not a JSON object.
            ConfigError: a key is missing, or its value is not supported.
        """
        return cls.from_dict(_read_json(Path(path) / "config.json"))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Parse the content of ``config.json``.

        Raises:
            ConfigError: a key is missing, or its value is not supported; names both and what is supported.
        """
        from yalis.models.registry import architecture_class

        architecture = _architecture(raw)
        options = architecture_class(architecture).options(raw)
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise ConfigError(
                f"quantization_config: quant_method={method!r} is not supported; use an unquantized checkpoint "
                f"({', '.join(_TORCH_DTYPES)})"
            )
        act = raw.get("hidden_act", "silu")
        if act != "silu":
            raise ConfigError(f"hidden_act={act!r} is not supported; supported: silu")
        hidden = _int(raw, "hidden_size")
        layers = _int(raw, "num_hidden_layers")
        heads = _int(raw, "num_attention_heads")
        kv_heads = _int(raw, "num_key_value_heads", heads)
        head_dim = _int(raw, "head_dim", hidden // heads)
        if heads % kv_heads:
            raise ConfigError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        if head_dim % 2:
            raise ConfigError(f"head_dim={head_dim}: rotary embedding needs an even number")
        if options.windows and len(options.windows) != layers:
            raise ConfigError(f"layer_types lists {len(options.windows)} layers, num_hidden_layers={layers}")
        max_positions = _int(raw, "max_position_embeddings")
        eos = raw.get("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=_int(raw, "vocab_size"),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=_int(raw, "intermediate_size"),
            rms_norm_eps=float(_required(raw, "rms_norm_eps")),
            rope=_rope(raw, max_positions),
            max_position_embeddings=max_positions,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=options.qkv_bias,
            o_bias=options.o_bias,
            mlp_bias=options.mlp_bias,
            qk_norm=options.qk_norm,
            windows=options.windows or (None,) * layers,
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            dtype=_dtype(raw),
        )


def validate_parallel(config: ModelConfig, tp: int, pp: int) -> None:
    """Check that ``config`` can be split over ``tp`` ranks per layer and ``pp`` stages.

    The vocabulary always can (the last shard is padded).

    Raises:
        ConfigError: names the size, the degree and degrees that work.
    """
    if pp > config.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={pp} exceeds the model's {config.num_layers} layers; use at most that many"
        )
    fitting = [n for n in range(1, config.num_heads + 1) if not _tp_problem(config, n)]
    problem = _tp_problem(config, tp)
    if problem:
        raise ConfigError(f"tensor_parallel_size={tp}: {problem}; sizes that work: {', '.join(map(str, fitting))}")


def _tp_problem(config: ModelConfig, tp: int) -> str:
    if config.num_heads % tp:
        return f"does not divide num_attention_heads={config.num_heads}"
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        return f"neither divides num_key_value_heads={config.num_kv_heads} nor is a multiple of it"
    if config.intermediate_size % tp:
        return f"does not divide intermediate_size={config.intermediate_size}"
    return ""


def stage_layers(num_layers: int, stage: int, num_stages: int) -> range:
    """Layers of ``stage``: contiguous, lengths differing by at most one.

    The longer stages come first: the last stage also computes the logits.
    """
    short, extra = divmod(num_layers, num_stages)
    start = stage * short + min(stage, extra)
    return range(start, start + short + (stage < extra))


def sliding_windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Windows by the keys ``layer_types``, or ``use_sliding_window`` and ``max_window_layers`` (Qwen2, Qwen3)."""
    window = raw.get("sliding_window") if raw.get("use_sliding_window", False) else None
    if window is None:
        return ()
    types = raw.get("layer_types")
    if types is None:
        # The layers from max_window_layers on have the window, those below attend to everything.
        full = _int(raw, "max_window_layers")
        return tuple(None if i < full else int(window) for i in range(_int(raw, "num_hidden_layers")))
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"layer_types: {kind!r} is not supported; supported: full_attention, sliding_attention")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in types)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist; a checkpoint folder in Hugging Face layout has one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return content


def _required(raw: Mapping[str, Any], key: str) -> Any:
    value = raw.get(key)
    if value is None:
        raise ConfigError(f"config.json has no {key!r}, which every supported architecture needs")
    return value


def _int(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _required(raw, key) if default is None else raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {key}={value!r} must be an integer of at least 1")
    return value


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise ConfigError("config.json has no 'architectures', so the model's class is unknown")
    return str(names[0])


def _dtype(raw: Mapping[str, Any]) -> torch.dtype:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _TORCH_DTYPES:
        raise ConfigError(f"config.json: dtype={name!r} is not supported; supported: {', '.join(_TORCH_DTYPES)}")
    return _TORCH_DTYPES[name]


def _rope(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
    # transformers 5 writes one mapping, rope_parameters; before it, rope_theta beside an optional rope_scaling.
    scaling = dict(raw.get("rope_scaling") or {})
    scaling.update(raw.get("rope_parameters") or {})
    theta = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if float(scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1.0 is not supported")
    if kind == "default":
        return RopeConfig(float(theta))
    needed = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    for key in needed:
        if key not in scaling:
            raise ConfigError(f"rope type {kind!r} needs {key!r}, which config.json does not give")
    if kind == "linear":
        return RopeConfig(float(theta), kind, float(scaling["factor"]))
    return RopeConfig(
        float(theta),
        kind,
        float(scaling["factor"]),
        float(scaling["low_freq_factor"]),
        float(scaling["high_freq_factor"]),
        int(scaling.get("original_max_position_embeddings", max_positions)),
    )
