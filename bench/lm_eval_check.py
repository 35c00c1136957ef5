"""lm-evaluation-harness itself against a server: its scores must be those of the engine offline.

The harness lives in a virtual environment of its own (pip install 'lm_eval[api]'); it takes the tokenizer from the
server.

    python bench/lm_eval_check.py --lm-eval /path/to/venv/bin/lm_eval [--tp 2] [--output-json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from serve_process import ROOT, serving

from yalis import LLM, SamplingParams
from yalis.utils.machine import machine_record

# Other batches, other rounding of bf16 sums; a wrong alignment is off by whole units.
TOLERANCE = 0.1
TASK = ROOT / "bench" / "lm_eval"


def harness_scores(program: str, url: str, folder: Path) -> list[dict[str, Any]]:
    """Run the harness; its samples, each with the (log-likelihood, is greedy) of its choices."""
    task = (TASK / "licences.yaml").read_text().replace("licences.jsonl", str(TASK / "licences.jsonl"))
    (folder / "licences.yaml").write_text(task)
    arguments = f"base_url={url}/v1/completions,model=demo,tokenizer_backend=remote,num_concurrent=2,max_retries=1"
    command = [program, "--model", "local-completions", "--model_args", arguments, "--tasks", "licences"]
    command += [
        "--include_path",
        str(folder),
        "--batch_size",
        "4",
        "--log_samples",
        "--output_path",
        str(folder / "out"),
    ]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"lm_eval failed:\n{done.stderr[-3000:]}")
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("|")))
    [samples] = (folder / "out").rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def harness_version(program: str) -> str:
    """Version of the harness in the environment of ``program``."""
    question = "import importlib.metadata as m; print(m.version('lm_eval'))"
    try:
        done = subprocess.run(
            [str(Path(program).parent / "python"), "-c", question], capture_output=True, text=True, timeout=60
        )
    except OSError:  # the program is no part of a virtual environment
        return "unknown"
    return done.stdout.strip() or "unknown"


def offline_scores(llm: LLM, context: str, choice: str) -> tuple[float, bool]:
    """Sum of the choice's log-probabilities after the context, and whether each of its tokens is the likeliest."""
    # As the harness does: no beginning-of-sequence token unless its add_bos_token says so.
    before = len(llm.tokenizer.encode(context, add_special_tokens=False))
    ids = llm.tokenizer.encode(context + choice, add_special_tokens=False)
    [output] = llm.generate([ids], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
    assert output.prompt_logprobs is not None
    entries = [(token, entry) for token, entry in zip(ids, output.prompt_logprobs, strict=True) if entry is not None]
    scored = entries[before - 1 :]
    return sum(e[token].logprob for token, e in scored), all(e[token].rank == 1 for token, e in scored)


def compared(scores: list[dict[str, Any]]) -> tuple[float, int]:
    """Largest difference of the log-likelihoods, and how many scores are wrong."""
    differences = [abs(s["served"]["loglikelihood"] - s["offline"]["loglikelihood"]) for s in scores]
    wrong = sum(
        difference > TOLERANCE or s["served"]["is_greedy"] != s["offline"]["is_greedy"]
        for difference, s in zip(differences, scores, strict=True)
    )
    return max(differences, default=0.0), wrong


def main() -> int:
    """1 if a score differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", required=True, metavar="PROGRAM")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="every score of both, with what was run")
    args = parser.parse_args()
    model = str(ROOT / "models" / "demo")
    options = ("--served-model-name", "demo", "-tp", str(args.tp))
    with tempfile.TemporaryDirectory() as folder, serving(model, *options) as server:
        samples = harness_scores(args.lm_eval, server.url, Path(folder))
    scores = []
    with LLM(model, tensor_parallel_size=args.tp) as llm:
        for sample in samples:
            for choice, [response] in zip(sample["doc"]["choices"], sample["resps"], strict=True):
                score, greedy = offline_scores(llm, sample["doc"]["q"], choice)
                served = {"loglikelihood": float(response[0]), "is_greedy": str(response[1]) == "True"}
                offline = {"loglikelihood": score, "is_greedy": greedy}
                scores.append({"question": sample["doc"]["q"], "choice": choice, "served": served, "offline": offline})
    worst, wrong = compared(scores)
    print(f"{len(samples)} questions; largest difference to the engine offline {worst:.4f}, wrong: {wrong}")
    if args.output_json is not None:
        record = {
            "kind": "lm_eval_check",
            "config": {"model": "models/demo", "tp": args.tp, "tolerance": TOLERANCE},
            "lm_eval": harness_version(args.lm_eval),
            "results": {"questions": len(samples), "largest_difference": worst, "wrong": wrong},
            "scores": scores,
            "machine": machine_record(),
        }
        args.output_json.parent.mkdir(parents=True, exist_ok=True)
        args.output_json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
