"""Costs of the engine's own steps: small models with random weights run in it, and the cost model is solved for what
they took.

Every constant is the one with which `yalis.study.cost` gives the measured time of a calibration model, layout by
layout, so ranks that share cores, wait for each other or fill a pipeline cost what they cost in the engine. Two depths
of a tiny model isolate a layer, two vocabularies a logit, two contexts the reading of a cache, and a model larger than
any cache the products by rows. The models have shapes of their own; predictions are for others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from yalis.comm.topology import from_environment
from yalis.models.config import ModelConfig
from yalis.study.cluster import Cluster, Constant, Rates
from yalis.study.collectives import automatic
from yalis.study.cost import CHUNK_TOKENS, Layout, decode_message_bytes, decode_terms, kv_token_bytes, prefill_terms
from yalis.study.fit import isotonic, trimmed_mean
from yalis.study.shapes import Run, model_folder, model_of, models_of

# Runs of a tiny model last milliseconds: so many for each of the others.
_TINY_RUNS = 4
# First guesses: of a layer's or step's overhead, of a byte of weights.
_OVERHEAD_S, _BYTE_S = 1e-4, 1e-11
# Samples of one layout: shape -> run -> "first" or "step" -> seconds.
Samples = dict[str, dict[str, dict[str, list[float]]]]
Mean = Callable[[Sequence[float]], float]


def shapes_of(layout: Layout, device: str, *, first: bool) -> list[str]:
    """What a layout runs. The first one also measures attention, and pipelines take logits and sequences from others.

    A host's ranks all attend alike, but for the speed of their memory.
    """
    tiny = ["shallow", "deep", *(["words"] if layout.pp == 1 else [])]
    arrival = models_of(device).arrival
    attending = ["alone", "grouped"] if first else []
    return [*tiny, *([arrival] if arrival not in tiny else []), "wide", *attending]


def measure_steps(
    layout: Layout, shape: str, rounds: int, device: str, *, quick: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Run a calibration model in the engine, each of its runs once a round; collective under a launcher.

    Args:
        quick: of the wide model only what every layout needs, and of the others' warm-up only the first run: the
            attending models' runs last longest, and a later one finds all but its pages warm.

    Raises:
        ConfigError, YalisError: the engine could not be started.
    """
    from yalis.bench.latency import measure
    from yalis.engine.llm import LLM

    models = models_of(device)
    runs = models.runs(shape)[:2] if quick and shape == "wide" else models.runs(shape)
    iters = _TINY_RUNS if models.runs(shape) is models.tiny and not quick else 1
    found: dict[str, dict[str, list[float]]] = {run.name: {"first": [], "step": []} for run in runs}
    with (
        model_folder(device, shape) as folder,
        LLM(
            str(folder),
            load_format="dummy",
            enable_prefix_caching=False,
            max_model_len=models.max_model_len,
            tensor_parallel_size=layout.tp,
            pipeline_parallel_size=layout.pp,
            device=device,
            **models.options,
        ) as llm,
    ):
        for index in range(-1, rounds):
            for run in runs[:1] if quick and index < 0 and shape != "wide" else runs:
                samples, _ = measure(
                    llm,
                    batch_size=run.batch,
                    input_len=run.input_len,
                    output_len=run.output_len,
                    warmup=0,
                    iters=iters if index >= 0 else 1,
                    seed=index + 1,
                )
                if index >= 0:
                    found[run.name]["first"] += samples.first
                    found[run.name]["step"] += samples.step
    return found


def measure_models(layout: Layout, shapes: Sequence[str], rounds: int, device: str, *, quick: bool = False) -> Samples:
    """`measure_steps` of several models, one after another; collective under a launcher."""
    return {shape: measure_steps(layout, shape, rounds, device, quick=quick) for shape in shapes}


def merge(into: Samples, more: Samples) -> None:
    """Add the samples of another pass."""
    for shape, runs in more.items():
        for run, kinds in runs.items():
            for kind, values in kinds.items():
                into.setdefault(shape, {}).setdefault(run, {}).setdefault(kind, []).extend(values)


def options(layout: Layout, shapes: Sequence[str], rounds: int, device: str, *, quick: bool) -> list[str]:
    """Of `main`, for what `measure_models` would be asked for."""
    words = ["--tp", str(layout.tp), "--pp", str(layout.pp), "--nodes", str(layout.nodes), "--device", device]
    return [*words, "--shapes", ",".join(shapes), "--rounds", str(rounds), *(["--quick"] if quick else [])]


def main(argv: Sequence[str] | None = None) -> None:
    """One of the ranks that `yalis.study.calibrate` starts for a layout: measure; rank 0 writes the samples."""
    parser = argparse.ArgumentParser()
    for name in ("--tp", "--pp", "--nodes", "--rounds"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--device", "--shapes"):
        parser.add_argument(name, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    layout = Layout(args.tp, args.pp, args.nodes)
    found = measure_models(layout, args.shapes.split(","), args.rounds, args.device, quick=args.quick)
    if from_environment(os.environ).rank == 0:
        args.out.write_text(json.dumps(found))


# ---- solving the cost model -------------------------------------------------------------------------------------


def solve(seconds: Callable[[float], float], target: float, scale: float) -> float:
    """The x >= 0 at which ``seconds``, growing and piecewise linear, is ``target``; 0 where it starts above it.

    Args:
        scale: a first guess at x; the secant through 0 and it is exact where one line holds.
    """
    low, at_low = 0.0, seconds(0.0)
    if at_low >= target:
        return 0.0
    x, at = scale, seconds(scale)
    for _ in range(60):
        if abs(at - target) <= 1e-7 * target:
            break
        step = 8 * x if at <= at_low else low + (target - at_low) / (at - at_low) * (x - low)
        low, at_low = x, at
        x = max(0.0, step)
        at = seconds(x)
    return x


def _plain(value: float) -> Constant:
    return Constant(value, "measured", "calibrate", value, value)


def blank_rates(layout: Layout, flying: int) -> Rates:
    """Steps that cost nothing yet."""
    names = ("step_s", "sequence_s", "layer_s", "logit_s", "arrival_s", "kv_byte_s", "kv_query_s", "pair_s")
    zeros = dict.fromkeys(names, _plain(0.0))
    free = (0.0,)
    return Rates(layout.tp, layout.pp, flying, rows=(1.0,), s_per_weight_byte=free, low=free, high=free, **zeros)


@dataclass(frozen=True)
class Attention:
    """Seconds of attention on one rank of the first layout: see `Rates`. ``s_per_byte``: of its weights at one row."""

    kv_byte_s: float
    kv_query_s: float
    pair_s: float


def kind_of(cluster: Cluster) -> str:
    """The device that a description is of, as `yalis.study.shapes` names it: CPU ranks share theirs."""
    return "cpu" if cluster.device.shared else "cuda"


def fit_attention(device: str, samples: Samples, tp: int, mean: Mean) -> Attention:
    """From two contexts, two numbers of query heads a key, and three prompts."""
    models = models_of(device)

    def step(shape: str, run: Run) -> float:
        return mean(samples[shape][run.name]["step"])

    per_byte = {}
    for shape in ("alone", "grouped"):
        model, (short, long) = model_of(device, shape), models.contexts
        tokens = long.batch * (long.input_len - short.input_len)
        kv_bytes = tokens * model.num_layers * kv_token_bytes(model, tp)
        group = max(1.0, model.num_heads / tp / max(model.num_kv_heads / tp, 1.0))
        per_byte[group] = max(0.0, step(shape, long) - step(shape, short)) / kv_bytes
    (few, one), (many, four) = sorted(per_byte.items())
    query = max(0.0, (four - one) / (many - few))
    model = model_of(device, "alone")
    first = [mean(samples["alone"][run.name]["first"]) for run in models.prompts]
    lengths = np.array([run.input_len for run in models.prompts], float)
    # A constant, products in proportion to the tokens, and pairs.
    system = np.stack([np.ones(3), lengths, lengths * (lengths + 1) / 2], axis=1)
    per_pair = max(0.0, float(np.linalg.solve(system, np.array(first))[2]))
    work = model.num_layers * model.num_heads / tp * model.head_dim
    return Attention(max(0.0, one - few * query), query, per_pair / work)


class LayoutFit:
    """Solves the cost model for one layout and number of steps in flight.

    Args:
        cluster: all-reduces, transfers and the rates found so far.
        layout: whose steps were measured; flying: steps in flight.
        samples: of this layout. mean: of equal samples.
        attention: on a rank of the first layout, and its rates for comparison (None for itself).
        like: rates of a layout with as many ranks whose logits and sequences were measured.
    """

    def __init__(
        self,
        cluster: Cluster,
        layout: Layout,
        flying: int,
        samples: Samples,
        mean: Mean,
        attention: Attention,
        like: Rates | None,
    ):
        self.cluster, self.layout, self.flying, self.samples, self.mean = cluster, layout, flying, samples, mean
        self.attention, self.like = attention, like
        self.device = kind_of(cluster)
        self.models = models_of(self.device)
        a = attention
        blank = blank_rates(layout, flying)
        self.rates = replace(
            blank, kv_byte_s=_plain(a.kv_byte_s), kv_query_s=_plain(a.kv_query_s), pair_s=_plain(a.pair_s)
        )
        if like is not None:
            self.rates = replace(self.rates, sequence_s=like.sequence_s, logit_s=like.logit_s)

    def step_s(self, shape: str, run: Run, rates: Rates) -> float:
        """Predicted decode step."""
        cluster, model = replace(self.cluster, rates=(*self.cluster.rates, rates)), self._model(shape)
        context = run.input_len + run.output_len / 2
        return decode_terms(model, cluster, self.layout, self._name(model, run), run.batch, context).total_s

    def first_s(self, shape: str, run: Run, rates: Rates) -> float:
        """Predicted time to all first tokens."""
        cluster, model = replace(self.cluster, rates=(*self.cluster.rates, rates)), self._model(shape)
        return prefill_terms(model, cluster, self.layout, self._name(model, run), run.workload).total_s

    def _model(self, shape: str) -> ModelConfig:
        return model_of(self.device, shape)

    def _name(self, model: ModelConfig, run: Run) -> str:
        nbytes = decode_message_bytes(model, self.layout, run.workload)
        return automatic(self.cluster, nbytes, self.layout.tp, self.layout.tp_nodes)

    def measured(self, shape: str, run: Run, kind: str) -> float:
        """Mean of the samples."""
        return self.mean(self.samples[shape][run.name][kind])

    def overheads(self) -> None:
        """Layers, steps, sequences, logits and arrivals from the tiny models."""
        one, many = self.models.tiny
        more = many.batch - one.batch
        run = one if self.flying == 1 else many

        def with_(name: str, value: float) -> Rates:
            changed: dict[str, Any] = {name: _plain(value)}
            return replace(self.rates, **changed)

        layers = self.measured("deep", run, "step") - self.measured("shallow", run, "step")
        self.rates = with_(
            "layer_s",
            solve(
                lambda x: (
                    self.step_s("deep", run, with_("layer_s", x)) - self.step_s("shallow", run, with_("layer_s", x))
                ),
                layers,
                _OVERHEAD_S,
            ),
        )
        if self.like is None:
            grown = self.measured("shallow", many, "step") - self.measured("shallow", one, "step")
            self.rates = with_("sequence_s", max(0.0, (grown - self._growth(one, many)) / more))
            logits = self.measured("words", many, "step") - self.measured("words", one, "step") - grown
            words = self._model("words").vocab_size - self._model("shallow").vocab_size
            self.rates = with_("logit_s", max(0.0, logits / (more * words / self.layout.tp)))
        step = self.measured("shallow", run, "step")
        self.rates = with_(
            "step_s", solve(lambda x: self.step_s("shallow", run, with_("step_s", x)), step, _OVERHEAD_S)
        )
        if self.flying == 1:
            shape = self.models.arrival
            first = self.measured(shape, one, "first")
            self.rates = with_(
                "arrival_s", solve(lambda x: self.first_s(shape, one, with_("arrival_s", x)), first, _OVERHEAD_S)
            )

    def _growth(self, one: Run, many: Run) -> float:
        """What the model already knows of the difference between two batches: attention, all-reduces."""
        return self.step_s("shallow", many, self.rates) - self.step_s("shallow", one, self.rates)

    def products(self) -> None:
        """Seconds per weight byte by rows from the wide model; decode steps first, prefills where no step has the rows.

        Attention is as fast as on the first layout, as far as its rank reads and multiplies as fast.
        """
        table: dict[float, float] = {}

        def with_(rows: float, value: float) -> Rates:
            points = sorted((table | {rows: value}).items())
            xs, ys = tuple(x for x, _ in points), tuple(y for _, y in points)
            return replace(self.rates, rows=xs, s_per_weight_byte=ys, low=ys, high=ys)

        for kind, predicted in (("step", self.step_s), ("first", self.first_s)):
            for run in self.models.wide:
                rows = self._rows(run, kind)
                if rows is None or rows in table or run.name not in self.samples["wide"]:
                    continue
                target = self.measured("wide", run, kind)
                found = solve(lambda x, r=rows, n=run, f=predicted: f("wide", n, with_(r, x)), target, _BYTE_S)  # type: ignore[misc]
                table[rows] = max(found, 1e-15)
        xs = sorted(table)
        ys = isotonic([table[x] for x in xs])
        self.rates = replace(self.rates, rows=tuple(xs), s_per_weight_byte=tuple(ys), low=tuple(ys), high=tuple(ys))

    def _rows(self, run: Run, kind: str) -> float | None:
        """Rows of a step of this many in flight; None where the run has another number of steps in flight."""
        stages = self.layout.pp
        if min(stages, run.batch) != self.flying or (kind == "step" and run.output_len == 1):
            return None
        share = math.ceil(run.batch / self.flying)
        return float(share if kind == "step" else min(CHUNK_TOKENS, share * run.input_len))

    def scale_attention(self, first: Rates) -> None:
        """Attention as slow as this layout's memory and products beside the first layout's."""
        rows = max(set(first.rows) & set(self.rates.rows))
        reads = self.rates.weight_s(1, 1.0) / first.weight_s(1, 1.0)
        multiplies = self.rates.weight_s(rows, 1.0) / first.weight_s(rows, 1.0)
        a = self.attention
        self.rates = replace(
            self.rates,
            kv_byte_s=_plain(a.kv_byte_s * reads),
            kv_query_s=_plain(a.kv_query_s * multiplies),
            pair_s=_plain(a.pair_s * multiplies),
        )


def fit_rates(cluster: Cluster, samples: Mapping[Layout, Samples], mean: Mean) -> list[Rates]:
    """Rates of every layout, the first of which has measured attention; pipelines come after TP over as many ranks.

    Args:
        cluster: the all-reduces and transfers that the layouts use; its own rates are not looked at.
    """
    found: list[Rates] = []
    attention: Attention | None = None
    for layout, of_layout in samples.items():
        if attention is None:
            attention = fit_attention(kind_of(cluster), of_layout, layout.tp, mean)
        like = None if layout.pp == 1 else next(r for r in found if r.pp == 1 and r.ranks == layout.ranks)
        for flying in sorted({1, layout.pp}):
            mine = tuple(r for r in found if (r.tp, r.pp) == (layout.tp, layout.pp))
            fit = LayoutFit(replace(cluster, rates=mine), layout, flying, of_layout, mean, attention, like)
            fit.overheads()
            fit.products()
            if found:
                fit.scale_attention(found[0])
                fit.products()
            found.append(fit.rates)
    return found


def with_bounds(cluster: Cluster, samples: Mapping[Layout, Samples], *, draws: int = 25, seed: int = 0) -> list[Rates]:
    """`fit_rates` of trimmed means, each constant with a 95 percent interval, each rate with what 10 and 90 percent of
    the samples give.

    Args:
        draws: resamplings for the intervals.
    """
    middle = fit_rates(cluster, samples, trimmed_mean)
    ends = [fit_rates(cluster, samples, lambda x, q=q: float(np.percentile(x, q))) for q in (10, 90)]  # type: ignore[misc]
    rng = np.random.default_rng(seed)
    again = [
        fit_rates(cluster, samples, lambda x: trimmed_mean(rng.choice(np.asarray(x), len(x)).tolist()))
        for _ in range(draws)
    ]
    return [_bounded(one, [e[i] for e in ends], [a[i] for a in again]) for i, one in enumerate(middle)]


def _bounded(middle: Rates, ends: Sequence[Rates], again: Sequence[Rates]) -> Rates:
    changed: dict[str, Any] = {}
    for name, value in vars(middle).items():
        if isinstance(value, Constant):
            low, high = np.percentile([getattr(r, name).value for r in again] or [value.value], [2.5, 97.5])
            bounds = min(float(low), value.value), max(float(high), value.value)
            changed[name] = replace(value, kind="fitted", low=bounds[0], high=bounds[1])
    columns = list(zip(middle.s_per_weight_byte, *(e.s_per_weight_byte for e in ends), strict=True))
    changed["low"], changed["high"] = tuple(map(min, columns)), tuple(map(max, columns))
    return replace(middle, **changed)


if __name__ == "__main__":
    main()
