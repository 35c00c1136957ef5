"""Llama 2, 3, 3.1, 3.2: grouped-query attention, gated MLP, optional biases. The base of its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yalis.layers.attention import AttentionNames
from yalis.layers.mlp import MLPNames
from yalis.models.base import CausalLM, CheckpointNames
from yalis.models.config import ArchitectureOptions


class LlamaForCausalLM(CausalLM):
    """Llama."""

    names = CheckpointNames(
        embedding="model.embed_tokens",
        final_norm="model.norm",
        lm_head="lm_head",
        input_norm="model.layers.{layer}.input_layernorm",
        post_attention_norm="model.layers.{layer}.post_attention_layernorm",
        attention=AttentionNames(
            q="model.layers.{layer}.self_attn.q_proj",
            k="model.layers.{layer}.self_attn.k_proj",
            v="model.layers.{layer}.self_attn.v_proj",
            o="model.layers.{layer}.self_attn.o_proj",
            q_norm="model.layers.{layer}.self_attn.q_norm",
            k_norm="model.layers.{layer}.self_attn.k_norm",
        ),
        mlp=MLPNames(
            gate="model.layers.{layer}.mlp.gate_proj",
            up="model.layers.{layer}.mlp.up_proj",
            down="model.layers.{layer}.mlp.down_proj",
        ),
    )
    # Old checkpoints hold the frequencies that we compute ourselves.
    ignored = (".rotary_emb.inv_freq",)

    @classmethod
    def options(cls, raw: Mapping[str, Any]) -> ArchitectureOptions:
        """Biases are options of the config."""
        attention_bias = bool(raw.get("attention_bias", False))
        return ArchitectureOptions(
            qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=bool(raw.get("mlp_bias", False))
        )
