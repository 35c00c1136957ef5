"""The frame that all architectures share: embedding, one stage's decoder layers, output head.

An architecture is a subclass in a file of its own. It says what the raw config means (`CausalLM.options`) and how the
checkpoint calls its tensors (`CausalLM.names`), and overrides `CausalLM.build_layer` where its layers have other parts.
Nothing is allocated until the weights are installed (`yalis.weights`), so describing a model is cheap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from yalis.attention.base import AttentionBackend, AttentionSpec, LayerKV
from yalis.comm.communicator import Communicator
from yalis.errors import ConfigError
from yalis.kernels import ops
from yalis.layers.attention import AttentionBlock, AttentionNames, HeadShard
from yalis.layers.decoder import DecoderLayer, DecoderStack
from yalis.layers.embedding import OutputHead, VocabEmbedding, VocabMatrix
from yalis.layers.mlp import GatedMLP, MLPNames
from yalis.layers.norm import RMSNorm
from yalis.layers.rope import cos_sin_table, inverse_frequencies
from yalis.layers.weight import Slot
from yalis.models.config import ArchitectureOptions, ModelConfig, stage_layers, validate_parallel


@dataclass(frozen=True)
class ModelContext:
    """Where a model runs: this rank's place and means.

    Attributes:
        tp: group that shares every layer.
        stage, num_stages: this rank's pipeline stage, of how many.
        dtype, device: of weights and activations.
        attention: backend for this rank's heads (`attention_spec`).
        max_model_len: highest number of positions in a sequence; default the model's own limit.
    """

    tp: Communicator
    stage: int
    num_stages: int
    dtype: torch.dtype
    device: torch.device
    attention: AttentionBackend
    max_model_len: int | None = None


@dataclass(frozen=True)
class CheckpointNames:
    """How a checkpoint calls its tensors, without ``.weight`` or ``.bias``. ``{layer}`` stands for the layer number."""

    embedding: str
    final_norm: str
    lm_head: str
    input_norm: str
    post_attention_norm: str
    attention: AttentionNames
    mlp: MLPNames


def attention_spec(
    config: ModelConfig, tp: Communicator, *, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionSpec:
    """What this rank's attention looks like, for `yalis.attention.registry.create_backend`."""
    shard = HeadShard.of(config.num_heads, config.num_kv_heads, tp.rank, tp.size)
    return AttentionSpec(
        num_heads=shard.num_heads,
        num_kv_heads=shard.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        block_size=block_size,
        dtype=dtype,
        device=device,
    )


class CausalLM:
    """One rank's part of a decoder-only language model, for inference.

    Args:
        config: the whole model.
        context: where it runs.

    Raises:
        ConfigError: the model cannot be split that way, or ``max_model_len`` exceeds what the model knows.

    Attributes:
        layers_of_stage: layers on this rank.
        vocab_start: first token of this rank's shard of the logits.
        vocab_shard_size: columns of `logits`, the same on every rank; those past the vocabulary are -inf.
        vocab_valid: columns of this rank's shard that are tokens.
    """

    names: ClassVar[CheckpointNames]
    ignored: ClassVar[tuple[str, ...]] = ()
    """Suffixes of tensors that checkpoints may hold and no rank needs."""

    @classmethod
    def options(cls, raw: Mapping[str, Any]) -> ArchitectureOptions:
        """What the raw ``config.json`` means for this architecture."""
        raise NotImplementedError

    def __init__(self, config: ModelConfig, context: ModelContext):
        validate_parallel(config, context.tp.size, context.num_stages)
        self.config = config
        self.context = context
        self.layers_of_stage = stage_layers(config.num_layers, context.stage, context.num_stages)
        self._first = context.stage == 0
        self._last = context.stage == context.num_stages - 1
        self._cos_sin = self._rope_table()

        self._embedding_matrix = self._vocab_matrix(self.names.embedding)
        tied = config.tie_word_embeddings
        self._head_matrix = self._embedding_matrix if tied else self._vocab_matrix(self.names.lm_head)
        self.vocab_start = self._head_matrix.start
        self.vocab_shard_size = self._head_matrix.shard_size
        self.vocab_valid = self._head_matrix.valid
        self._embedding = VocabEmbedding(self._embedding_matrix, context.tp)
        self._head = OutputHead(self._head_matrix)
        layers = [self.build_layer(i) for i in self.layers_of_stage]
        self._final_norm = RMSNorm(self.names.final_norm, config.hidden_size, config.rms_norm_eps)
        self._stack = DecoderStack(layers, self._final_norm if self._last else None, context.tp)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.context.dtype

    @property
    def device(self) -> torch.device:
        """Of weights and activations."""
        return self.context.device

    def build_layer(self, index: int) -> DecoderLayer:
        """The parts of layer ``index``, for any layer of the model, on this stage or not; allocates nothing."""
        config, names = self.config, self.names

        def name(pattern: str) -> str:
            return pattern.format(layer=index)

        attention = AttentionBlock(
            AttentionNames(*(name(pattern) for pattern in vars(names.attention).values())),
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
            window=config.windows[index],
            cos_sin=self._cos_sin,
            tp=self.context.tp,
            backend=self.context.attention,
        )
        mlp = GatedMLP(
            MLPNames(*(name(pattern) for pattern in vars(names.mlp).values())),
            config.hidden_size,
            config.intermediate_size,
            bias=config.mlp_bias,
            tp=self.context.tp,
        )
        norms = [
            RMSNorm(name(pattern), config.hidden_size, config.rms_norm_eps)
            for pattern in (names.input_norm, names.post_attention_norm)
        ]
        return DecoderLayer(index, norms[0], attention, norms[1], mlp)

    def forward(
        self,
        token_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_in: torch.Tensor | None,
        kv: Sequence[LayerKV],
        plan: Any,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run this stage's layers over T tokens.

        Args:
            token_ids: [T] int64 on the first stage, else unused.
            positions: [T] int64.
            hidden_in: [T, hidden] from the stage before, else unused; may be overwritten.
            kv: pages of each layer in `layers_of_stage`.
            plan: what the attention backend planned for this step.
            rows: [R] int64, the rows whose final hidden states are wanted; default all.

        Returns:
            on the last stage [R, hidden], the final normed hidden states of ``rows``; else [T, hidden], the residual
            stream, which is all that the next stage needs.
        """
        residual = self._embedding.forward(token_ids) if self._first else hidden_in  # type: ignore[arg-type]
        return self._stack.forward(residual, positions, kv, plan, rows)  # type: ignore[arg-type]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] of the last stage -> [R, vocab_shard_size] float32; column c is token ``vocab_start + c``."""
        return self.widen_logits(self.raw_logits(hidden))

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`logits` in the model's dtype; only the first ``vocab_valid`` columns mean something."""
        return self._head.forward(hidden)

    def widen_logits(self, raw: torch.Tensor) -> torch.Tensor:
        """`logits` from `raw_logits`; ``raw`` stays as it is."""
        return self._head.widen(raw)

    def products(self) -> Iterator[ops.LinearUse]:
        """Every linear of this rank; the weights must have been installed."""
        reduced = self.context.tp.size > 1
        for layer in self._stack.layers:
            yield ops.LinearUse(layer.attention.qkv.packed, waits=reduced)
            yield ops.LinearUse(layer.attention.o.packed, waits=True)
            yield ops.LinearUse(layer.mlp.gate_up.packed, gated=True, waits=reduced)
            yield ops.LinearUse(layer.mlp.down.packed)
        if self._last:
            yield ops.LinearUse(self._head_matrix.packed, waits=reduced)

    def slots(self) -> list[Slot]:
        """Every weight of this rank, in the order of use."""
        slots = self._embedding_matrix.slots() if self._first else []
        slots += self._stack.slots()
        if self._last and not (self._first and self._head_matrix is self._embedding_matrix):
            slots += self._head_matrix.slots()
        return slots

    def known_tensors(self) -> set[str]:
        """Names of all tensors that some rank or stage of this model may need."""
        slots = self._embedding_matrix.slots() + self._head_matrix.slots() + self._final_norm.slots()
        for index in range(self.config.num_layers):
            slots += self.build_layer(index).slots()
        return {piece.name for slot in slots for piece in slot.pieces()}

    def is_harmless(self, name: str) -> bool:
        """Whether a checkpoint may hold tensor ``name`` although no rank needs it."""
        tied_head = self.config.tie_word_embeddings and name == self.names.lm_head + ".weight"
        return tied_head or name.endswith(self.ignored)

    def _vocab_matrix(self, stem: str) -> VocabMatrix:
        return VocabMatrix(stem, self.config.vocab_size, self.config.hidden_size, self.context.tp)

    def _rope_table(self) -> torch.Tensor:
        config, rope = self.config, self.config.rope
        length = self.context.max_model_len or config.max_position_embeddings
        if length > config.max_position_embeddings:
            raise ConfigError(
                f"max_model_len={length} exceeds the model's max_position_embeddings={config.max_position_embeddings}; "
                "use at most that"
            )
        frequencies = inverse_frequencies(
            config.head_dim,
            rope.theta,
            type=rope.type,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_position_embeddings=rope.original_max_position_embeddings,
        )
        return cos_sin_table(frequencies, length, self.context.device)
