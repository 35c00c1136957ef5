"""A measured step as a sum of terms, and what changed between two records.

The engine's clock splits a step on rank 0 into computation, collectives by tier, transfers between stages and host, and
measures what its front end takes between steps, which is the host's too. Steps that only decode are counted apart, so
prefill is out of it. How computation divides is measured where a trace is there (``--profile``), else it stays together
as *computation*. What no clock has seen stands as *unaccounted*.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yalis.errors import ConfigError
from yalis.study.terms import NAMES, Terms

# Terms that stay together where the engine's clock cannot tell them apart.
COMPUTE = ("gemm_s", "attention_s", "launch_s", "other_s")
COMPUTE_NAME = "computation"
UNACCOUNTED_NAME = "unaccounted"
# Above this share of the measured time the terms do not explain it.
MOST_UNACCOUNTED = 0.03


@dataclass(frozen=True)
class Explained:
    """One record's decode step.

    Attributes:
        label: what was measured, in words.
        tpot_s, ttft_s: as the user saw them, means over the runs.
        terms: as measured on rank 0; where ``together`` is true, all computation stands in ``other_s``.
        together: whether computation could not be divided.
        emulated: in words, empty where the network is real.
    """

    label: str
    tpot_s: float
    ttft_s: float
    terms: Terms
    together: bool
    emulated: str

    @property
    def unaccounted_s(self) -> float:
        """Measured TPOT less the sum of the terms; negative where their clocks say more than a request saw."""
        return self.tpot_s - self.terms.total_s

    @property
    def unaccounted_share(self) -> float:
        """`unaccounted_s` over the measured TPOT."""
        return self.unaccounted_s / self.tpot_s

    def named(self) -> list[tuple[str, float]]:
        """(name, seconds) of the terms that are not zero, and of what they leave unaccounted: they sum to the TPOT."""
        names = dict(NAMES)
        if self.together:
            names["other_s"] = COMPUTE_NAME
        rows = [(names[key], value) for key, value in self.terms.as_dict().items() if value]
        return [*rows, (UNACCOUNTED_NAME, self.unaccounted_s)]


def decode_split(times: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Terms of one decode step on rank 0 in seconds, as a request sees it.

    Args:
        times: the engine's `StepTimes` over its decode steps.
        tokens: of a request in these steps: runs x (output - 1).
    """

    def per(name: str) -> float:
        return times.get(name, 0.0) / tokens

    intra, inter = per("intra_s"), per("inter_s")
    # The wait inside the node also holds that of gathers, which count as computation: at most what the tier has.
    wait_intra, wait_inter = min(per("wait_intra_s"), intra), min(per("wait_inter_s"), inter)
    return {
        "other_s": per("compute_s"),
        "intra_s": intra - wait_intra,
        "inter_s": inter - wait_inter,
        "flat_s": per("flat_s"),
        "wait_s": wait_intra + wait_inter,
        "pipeline_s": per("pipeline_s"),
        "host_s": per("host_s") + per("front_s"),
    }


def divide_computation(
    split: Mapping[str, float], parts_us: Mapping[str, float], wait_us: float = 0.0
) -> dict[str, float]:
    """Divide ``other_s`` by the shares of a trace's parts (`yalis.bench.breakdown`): GEMM, attention, other, idle.

    On a GPU the trace also holds the all-reduce's share of the step, which the engine's clock has within computation;
    ``wait_us`` of it was waiting for peers.
    """
    work = dict(split)
    have = {"gemm_s": parts_us.get("GEMM", 0.0), "attention_s": parts_us.get("attention", 0.0)}
    have["launch_s"] = parts_us.get("idle", 0.0)
    if not any(split.get(name) for name in ("intra_s", "inter_s", "flat_s")):
        have["flat_s"] = parts_us.get("all-reduce", 0.0) - wait_us
        have["wait_s"] = wait_us
    have["other_s"] = parts_us.get("other", 0.0)
    total = sum(have.values())
    if total <= 0:
        return work
    compute = work.pop("other_s")
    for name, us in have.items():
        work[name] = work.get(name, 0.0) + compute * us / total
    return work


def explain(record: Mapping[str, Any], where: str) -> Explained:
    """Explain a record of ``yalis bench latency`` (with more than one output token) or a cell of a study.

    Raises:
        ConfigError: it holds no split of a decode step.
    """
    try:
        results, config = record["results"], record["config"]
        split = results["decode_split_s"]
        summary = results["summary_ms"]
        # Means: the terms are totals over all runs divided by their steps.
        tpot_s, ttft_s = summary["step"]["mean"] / 1e3, summary["first"]["mean"] / 1e3
    except (KeyError, TypeError):
        raise ConfigError(
            f"{where}: holds no split of a decode step; it must be a record of yalis bench latency with --output-json "
            "and at least two output tokens"
        ) from None
    engine = config.get("engine", {})
    breakdown = results.get("breakdown")
    if breakdown:
        split = divide_computation(split, breakdown["parts_us"], breakdown.get("wait_us") or 0.0)
    terms = Terms.from_dict(split)
    return Explained(
        label=(
            f"{engine.get('model', '?')}, TP {engine.get('tensor_parallel_size', 1)} x PP "
            f"{engine.get('pipeline_parallel_size', 1)}, {engine.get('num_nodes', 1)} node(s), all-reduce "
            f"{engine.get('all_reduce', '?')}, batch {config.get('batch_size', '?')}, {config.get('input_len', '?')}+"
            f"{config.get('output_len', '?')} tokens"
        ),
        tpot_s=tpot_s,
        ttft_s=ttft_s,
        terms=terms,
        together=breakdown is None,
        emulated=str(record.get("env", {}).get("YALIS_EMULATED_FABRIC", "")),
    )


def measured_terms(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `yalis.study.store.residuals` compares a prediction with."""
    found = explain(record, "the measurement")
    joined = {COMPUTE_NAME: list(COMPUTE)} if found.together else {}
    return {
        "ttft_s": found.ttft_s,
        "tpot_s": found.tpot_s,
        "tpot_terms_s": found.terms.as_dict(),
        "joined": joined,
    }


def read_record(path: Path) -> dict[str, Any]:
    """A JSON record.

    Raises:
        ConfigError: the file cannot be read or is no JSON object.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no record: {error}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: no record: not a JSON object")
    return record


def changes(before: Explained, after: Explained) -> list[tuple[str, float, float]]:
    """(term, before, after) in seconds, the largest change first. Computation is kept together if either has it so."""
    first, second = dict(before.terms.as_dict()), dict(after.terms.as_dict())
    names = dict(NAMES)
    if before.together or after.together:
        for terms in (first, second):
            terms["other_s"] = sum(terms.pop(name) for name in COMPUTE)
        names["other_s"] = COMPUTE_NAME
    rows = [(names[key], first[key], second[key]) for key in first if first[key] or second[key]]
    rows.append((UNACCOUNTED_NAME, before.unaccounted_s, after.unaccounted_s))
    return sorted(rows, key=lambda row: -abs(row[2] - row[1]))
