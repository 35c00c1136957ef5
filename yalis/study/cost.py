"""What a step and a request cost: pure functions of the model's shape, the cluster and how ranks are laid out.

Sizes are bytes, times seconds, ``rows`` tokens that go through the weights together. Prefill and decode apart: decode
reads every weight and every cached key for few rows; prefill is bound by products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from yalis.engine.prefill_steps import padded_tokens
from yalis.errors import ConfigError
from yalis.models.config import ModelConfig, stage_layers, validate_parallel
from yalis.study.cluster import Cluster, Rates
from yalis.study.collectives import Choice, all_reduce
from yalis.study.terms import Terms
from yalis.study.workload import Workload

# Of a device's memory: what the engine leaves to others, see EngineConfig.gpu_memory_utilization.
MEMORY_SHARE = 0.9
# Tokens of one prefill step, see EngineConfig.max_num_batched_tokens.
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Layout:
    """TP inside a stage, PP over stages; ranks fill nodes one after the other, TP neighbours together.

    Attributes:
        nodes: nodes of the whole world, declared or real; ``tp_nodes`` of them hold one stage.
    """

    tp: int
    pp: int
    nodes: int

    @property
    def ranks(self) -> int:
        """Of the world."""
        return self.tp * self.pp

    @property
    def tp_nodes(self) -> int:
        """Nodes over which one all-reduce goes."""
        return max(1, self.tp * self.nodes // self.ranks)

    def crosses(self, stage: int) -> bool:
        """Whether the border behind ``stage`` lies between nodes for any rank; behind the last one, the way back."""
        per_node = max(1, self.ranks // self.nodes)
        after = (stage + 1) % self.pp
        return any((stage * self.tp + i) // per_node != (after * self.tp + i) // per_node for i in range(self.tp))

    @property
    def name(self) -> str:
        """As ``TP8 PP2``."""
        return f"TP{self.tp}" if self.pp == 1 else f"TP{self.tp} PP{self.pp}"


@dataclass(frozen=True)
class Step:
    """What goes through a stage together.

    Attributes:
        rows: tokens. sequences: requests. kv_tokens: cached tokens read, over all requests (decode).
        pairs: (query, key) pairs that a prefill attends to, over all requests; 0 in decode.
        sampled: rows whose logits are computed.
    """

    rows: int
    sequences: int
    kv_tokens: float
    pairs: float
    sampled: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: float
    kv: float
    activations: float
    available: float

    @property
    def total(self) -> float:
        """What is needed."""
        return self.weights + self.kv + self.activations

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.total <= self.available


@dataclass(frozen=True)
class Prediction:
    """Of one layout, all-reduce and workload.

    Attributes:
        ttft: terms of the time until all requests of the batch have their first token.
        tpot: terms of one decode step at the middle of the output, as a request sees it.
        memory: on the fullest rank.
        decode_choice: the all-reduce of a decode step, of ``decode_bytes``.
    """

    layout: Layout
    algorithm: str
    workload: Workload
    ttft: Terms
    tpot: Terms
    memory: Memory
    decode_choice: Choice
    decode_bytes: int

    @property
    def e2e_s(self) -> float:
        """From the batch's arrival to its last token."""
        return self.ttft.total_s + (self.workload.output_len - 1) * self.tpot.total_s

    @property
    def throughput(self) -> float:
        """Output tokens per second of the batch."""
        return self.workload.tokens_out / self.e2e_s

    @property
    def communication_share(self) -> float:
        """Share of a decode step that communication takes and nothing hides."""
        return self.tpot.communication_s / self.tpot.total_s if self.tpot.total_s else 0.0


# ---- sizes ------------------------------------------------------------------------------------------------------


def element_bytes(model: ModelConfig) -> int:
    """Bytes of one weight or activation."""
    return int(model.dtype.itemsize)


def layer_weight_bytes(model: ModelConfig, tp: int) -> float:
    """Bytes of one layer's matrices on a rank; keys and values are copied where there are fewer heads than ranks."""
    kv_heads = max(model.num_kv_heads / tp, 1.0)
    heads = model.num_heads / tp
    attention = model.hidden_size * model.head_dim * (2 * heads + 2 * kv_heads)
    mlp = 3 * model.hidden_size * model.intermediate_size / tp
    return (attention + mlp) * element_bytes(model)


def weight_bytes_behind_attention(model: ModelConfig, tp: int) -> float:
    """Of `layer_weight_bytes`, the o product and the MLP."""
    per_column = model.num_heads / tp * model.head_dim + 3 * model.intermediate_size / tp
    return model.hidden_size * per_column * element_bytes(model)


def head_bytes(model: ModelConfig, tp: int) -> float:
    """Bytes of the logits' matrix on a rank (the embedding's too)."""
    return model.vocab_size * model.hidden_size / tp * element_bytes(model)


def total_weight_bytes(model: ModelConfig) -> float:
    """Bytes of the whole model."""
    return model.num_layers * layer_weight_bytes(model, 1) + head_bytes(model, 1) * (
        1 if model.tie_word_embeddings else 2
    )


def kv_token_bytes(model: ModelConfig, tp: int) -> float:
    """Bytes of keys and values of one token in one layer on a rank."""
    return 2 * max(model.num_kv_heads / tp, 1.0) * model.head_dim * element_bytes(model)


def message_bytes(model: ModelConfig, rows: int) -> int:
    """Bytes of one all-reduce: the hidden states of ``rows`` tokens."""
    return rows * model.hidden_size * element_bytes(model)


def decode_message_bytes(model: ModelConfig, layout: Layout, workload: Workload) -> int:
    """Bytes of one all-reduce of a decode step: with stages, a step holds a share of the requests."""
    return message_bytes(model, math.ceil(workload.batch / min(layout.pp, workload.batch)))


def memory(model: ModelConfig, cluster: Cluster, layout: Layout, workload: Workload) -> Memory:
    """What the fullest rank (a first or last stage) needs, and what it has."""
    layers = math.ceil(model.num_layers / layout.pp)
    heads = 2 if layout.pp == 1 and not model.tie_word_embeddings else 1
    weights = layers * layer_weight_bytes(model, layout.tp) + heads * head_bytes(model, layout.tp)
    tokens = workload.batch * (workload.input_len + workload.output_len)
    kv = tokens * layers * kv_token_bytes(model, layout.tp)
    rows = min(CHUNK_TOKENS, workload.batch * workload.input_len)
    wide = 2 * model.hidden_size + 3 * model.intermediate_size / layout.tp + model.vocab_size / layout.tp * 0.05
    available = cluster.device.memory_bytes.value * MEMORY_SHARE
    if cluster.device.shared:
        available /= layout.ranks
    return Memory(weights, kv, 2 * rows * wide * element_bytes(model), available)


# ---- a stage ----------------------------------------------------------------------------------------------------


def weight_s(cluster: Cluster, rates: Rates | None, rows: float, weight_bytes: float, itemsize: int) -> float:
    """Products of ``rows`` rows with ``weight_bytes`` of weights: bound by reading them or by multiplying."""
    if rates is not None:
        return rates.weight_s(rows, weight_bytes)
    device = cluster.device
    flops = 2 * rows * weight_bytes / itemsize
    return max(weight_bytes / device.memory_bytes_per_s.value, flops / device.flops_per_s.value)


def attention_s(cluster: Cluster, rates: Rates | None, model: ModelConfig, tp: int, step: Step) -> float:
    """Attention of one layer on a rank: reading the cache (decode), or products (prefill)."""
    device = cluster.device
    kv_bytes = step.kv_tokens * kv_token_bytes(model, tp)
    work = step.pairs * model.num_heads / tp * model.head_dim
    if rates is not None:
        queries = max(1.0, model.num_heads / tp / max(model.num_kv_heads / tp, 1.0))
        return kv_bytes * (rates.kv_byte_s.value + queries * rates.kv_query_s.value) + work * rates.pair_s.value
    flops_per_s = device.flops_per_s.value * device.attention_flops_share.value
    return kv_bytes / device.memory_bytes_per_s.value + 4 * work / flops_per_s


def activation_bytes(model: ModelConfig, tp: int, rows: float, *, norms: bool = True) -> float:
    """Bytes that residual adds, norms and activations of a layer move: each row is read and written a few times.

    ``norms``: off where the two residuals and norms are priced elsewhere.
    """
    return rows * element_bytes(model) * (8 * model.hidden_size * norms + 5 * model.intermediate_size / tp)


def stage_terms(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    algorithm: str,
    step: Step,
    stage: int,
    flying: int | None = None,
) -> Terms:
    """One step of one stage, transfers not counted.

    Args:
        flying: steps in flight, each on a stage of its own; they compete where ranks share one device. Default: one a
            stage.

    Raises:
        ConfigError: ranks share a device, and no layout like this one was measured there.
    """
    device, tp = cluster.device, layout.tp
    flying = layout.pp if flying is None else flying
    layers = len(stage_layers(model.num_layers, stage, layout.pp))
    itemsize = element_bytes(model)
    rates = rates_of(cluster, layout, flying)
    # Without measurements a shared device is taken to be divided evenly among the ranks at work, cores first.
    active = flying * tp if device.shared and rates is None else 1
    crowd = max(1.0, active / device.cores)
    last = stage == layout.pp - 1
    # Behind the last layer's attention only the sampled rows go on (`yalis.layers.decoder.DecoderStack`).
    passes = [(layers, step.rows)]
    if last and step.sampled < step.rows:
        passes = [(layers - 1, step.rows), (1, step.sampled)]
    behind = weight_bytes_behind_attention(model, tp)
    gemm = layers * weight_s(cluster, rates, step.rows, layer_weight_bytes(model, tp) - behind, itemsize)
    if last:
        gemm += weight_s(cluster, rates, step.sampled, head_bytes(model, tp), itemsize)
    attention = layers * attention_s(cluster, rates, model, tp, step)
    reduced, moved = Terms(), 0.0
    for count, rows in passes:
        gemm += count * weight_s(cluster, rates, rows, behind, itemsize)
        choice = all_reduce(cluster, algorithm, message_bytes(model, rows), tp, layout.tp_nodes, norm=True)
        cost = choice.cost
        reduced += Terms(intra_s=cost.intra_s, inter_s=cost.inter_s, flat_s=cost.flat_s).scaled(2 * count)
        moved += count * activation_bytes(model, tp, rows, norms=not choice.norm)
    if rates is None:
        launch = layers * device.kernels_per_layer.value * device.kernel_s.value * crowd
        other = moved / device.memory_bytes_per_s.value * active + device.pass_s.value
        host = device.step_s.value + step.sequences * device.sequence_s.value
    else:
        launch = layers * rates.layer_s.value
        other = moved / rates.bytes_per_s
        other += step.sampled * model.vocab_size / tp * rates.logit_s.value if last else 0.0
        host = rates.step_s.value + step.sequences * rates.sequence_s.value
    return reduced + Terms(
        gemm_s=gemm * active,
        attention_s=attention * active,
        launch_s=launch,
        host_s=host,
        other_s=other,
    )


def rates_of(cluster: Cluster, layout: Layout, flying: int) -> Rates | None:
    """What was measured of such steps; None where the description rests on its constants alone.

    Raises:
        ConfigError: something was measured, but nothing like this.
    """
    if not cluster.rates:
        return None
    found = cluster.rates_for(layout.tp, layout.pp, flying)
    if found is None:
        have = ", ".join(sorted({f"TP{r.tp} PP{r.pp}" for r in cluster.rates}))
        raise ConfigError(
            f"cluster {cluster.name}: no steps like those of {layout.name} with {flying * layout.tp} ranks at work on "
            f"{cluster.device.cores} cores were measured (there: {have}); yalis calibrate --max-ranks {layout.ranks}"
        )
    return found


def transfer_s(cluster: Cluster, nbytes: float, *, across: bool) -> float:
    """One transfer between stages: as measured between two ranks, else by the library's constants."""
    fit = cluster.transfer(across=across)
    if fit is not None:
        return fit.seconds(nbytes)
    bandwidth = (
        cluster.bus_inter_bytes_per_s.value / cluster.nics_per_node if across else cluster.bus_intra_bytes_per_s.value
    )
    return cluster.library_p2p_s.value + nbytes / bandwidth


def hops_s(cluster: Cluster, layout: Layout, nbytes: float) -> float:
    """One message of ``nbytes`` from the first stage through all others."""
    return sum(transfer_s(cluster, nbytes, across=layout.crosses(stage)) for stage in range(layout.pp - 1))


# ---- steps and requests -----------------------------------------------------------------------------------------


def decode_terms(
    model: ModelConfig, cluster: Cluster, layout: Layout, algorithm: str, batch: int, context: float
) -> Terms:
    """Time per output token of ``batch`` requests with ``context`` cached tokens each.

    With S stages the requests are dealt out to S steps in flight. A request's next token waits for its step to pass all
    stages; where the pipeline is full, S steps of the slowest stage pass meanwhile.
    """
    stages = layout.pp
    flying = min(stages, batch)
    share = math.ceil(batch / flying)
    step = Step(share, share, share * context, 0.0, share)
    parts = [stage_terms(model, cluster, layout, algorithm, step, s, flying) for s in range(stages)]
    if stages == 1:
        return parts[0]
    back = transfer_s(cluster, 8 * share, across=layout.crosses(stages - 1))
    transfers = Terms(pipeline_s=hops_s(cluster, layout, message_bytes(model, share)) + back)
    through = sum(parts, Terms()) + transfers
    slowest = max(part.total_s for part in parts)
    bubble = flying * slowest - through.total_s if flying == stages else 0.0
    return through + Terms(wait_s=max(0.0, bubble))


def prefill_terms(model: ModelConfig, cluster: Cluster, layout: Layout, algorithm: str, workload: Workload) -> Terms:
    """Until all requests have their first token. Prompts go in steps of up to `CHUNK_TOKENS` tokens.

    With S stages the steps follow each other through the pipeline: n steps take n + S - 1 times the slowest stage.
    """
    total = workload.batch * workload.input_len
    stages = layout.pp
    flying = min(stages, workload.batch)
    # With stages, requests are dealt out evenly, so a step holds no more than its share.
    share = math.ceil(workload.batch / flying) * workload.input_len
    rows = min(CHUNK_TOKENS, share, total)
    chunks = math.ceil(total / rows)
    rows_mean = total / chunks
    # Causal: on average half of the prompt is visible to a token.
    pairs = workload.batch * workload.input_len * (workload.input_len + 1) / 2 / chunks
    sequences = max(1, round(rows_mean / workload.input_len))
    # On GPUs such steps are CUDA graphs of padded sizes.
    computed = round(rows_mean) if cluster.device.shared else padded_tokens(round(rows_mean), CHUNK_TOKENS)
    step = Step(computed, sequences, 0.0, pairs, sequences)
    rates = rates_of(cluster, layout, 1)
    arrival = Terms(host_s=rates.arrival_s.value) if rates is not None else Terms()
    if stages == 1:
        return stage_terms(model, cluster, layout, algorithm, step, 0).scaled(chunks) + arrival
    total_terms = arrival + Terms(pipeline_s=hops_s(cluster, layout, message_bytes(model, step.rows)))
    # Slot by slot: while the pipeline fills and drains, fewer stages compete for a device that they share.
    for slot in range(1, chunks + stages):
        working = min(slot, stages, chunks, chunks + stages - slot)
        parts = [stage_terms(model, cluster, layout, algorithm, step, s, working) for s in range(stages)]
        total_terms += max(parts, key=lambda part: part.total_s)
    return total_terms


def predict(model: ModelConfig, cluster: Cluster, layout: Layout, algorithm: str, workload: Workload) -> Prediction:
    """Everything about one layout and all-reduce.

    Raises:
        ConfigError: the model cannot be split so, or the algorithm does not serve the shape.
    """
    validate_parallel(model, layout.tp, layout.pp)
    context = workload.input_len + workload.output_len / 2
    nbytes = decode_message_bytes(model, layout, workload)
    return Prediction(
        layout,
        algorithm,
        workload,
        prefill_terms(model, cluster, layout, algorithm, workload),
        decode_terms(model, cluster, layout, algorithm, workload.batch, context),
        memory(model, cluster, layout, workload),
        all_reduce(cluster, algorithm, nbytes, layout.tp, layout.tp_nodes),
        nbytes,
    )
