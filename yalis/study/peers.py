"""Measures an engine other than yalis for one cell of a study: ``python -m yalis.study.peers --engine NAME ...``.

transformers and vLLM run offline in this process and give t(1) and t(N) of the same prompts; TTFT is t(1), TPOT
(t(N) - t(1)) / (N - 1). ``openai`` asks a running server (vLLM, SGLang, yalis) by its streaming completions.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yalis.errors import ConfigError

if TYPE_CHECKING:
    from yalis.bench.datasets import Sample
    from yalis.bench.openai_client import RequestResult

Prompts = list[list[int]]
Run = Callable[[Prompts, int], None]


def _transformers(args: argparse.Namespace) -> tuple[Run, int]:
    import os

    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config: Any = transformers.AutoConfig.from_pretrained(args.model)
    auto: Any = transformers.AutoModelForCausalLM
    if args.load_format == "dummy":
        lm = auto.from_config(config, dtype=torch.bfloat16).eval()
    else:
        lm = auto.from_pretrained(args.model, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(prompts: Prompts, tokens: int) -> None:
        ids = torch.tensor(prompts)
        out = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        if out.shape[1] != ids.shape[1] + tokens:
            raise ConfigError(f"transformers gave {out.shape[1] - ids.shape[1]} tokens, not {tokens}")

    return run, int(config.vocab_size)


def _vllm(args: argparse.Namespace) -> tuple[Run, int]:
    import importlib

    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(
        args.model,
        load_format=args.load_format,
        tensor_parallel_size=args.tp,
        pipeline_parallel_size=args.pp,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def run(prompts: Prompts, tokens: int) -> None:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        for output in outputs:
            got = len(output.outputs[0].token_ids)
            if got != tokens:
                raise ConfigError(f"vllm gave {got} tokens, not {tokens}")

    return run, int(llm.llm_engine.model_config.get_vocab_size())


def offline(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """(seconds to the first tokens, seconds per later token), one sample an iteration."""
    run, vocab = _transformers(args) if args.engine == "transformers" else _vllm(args)
    rng = random.Random(0)
    first, step = [], []
    for i in range(-args.num_iters_warmup, args.num_iters):
        prompts = [[rng.randrange(vocab) for _ in range(args.input_len)] for _ in range(args.batch_size)]
        start = time.perf_counter()
        run(prompts, 1)
        one = time.perf_counter() - start
        start = time.perf_counter()
        run(prompts, args.output_len)
        whole = time.perf_counter() - start
        if i >= 0:
            first.append(one)
            if args.output_len > 1:
                step.append((whole - one) / (args.output_len - 1))
    return first, step


def served(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """The same from a server: the batch's requests are sent at once.

    Raises:
        ConfigError: a request failed or ended early, or the server tells no count of tokens.
    """
    from yalis.bench.datasets import Sample, Vocabulary
    from yalis.bench.openai_client import Target
    from yalis.bench.serve import checked_url, run_load

    folder = Path(args.model)
    vocabulary = Vocabulary(folder if folder.is_dir() else None, args.vocab)
    url = f"{checked_url(args.url)}/v1/completions"
    greedy = {"temperature": 0.0}
    target = Target(url, chat=False, model=args.served_name or args.model, ignore_eos=True, extra=greedy)
    rng = random.Random(0)
    first, step = [], []
    for i in range(-args.num_iters_warmup, args.num_iters):
        prompts = [vocabulary.draw(rng, args.input_len) for _ in range(args.batch_size)]
        samples = [Sample(prompt, args.input_len, args.output_len) for prompt in prompts]
        results = asyncio.run(run_load(target, samples, [0.0] * len(samples))).results
        check_answers(url, samples, results)
        start = min(r.start_s for r in results)
        all_first = max(r.start_s + r.ttft_s for r in results)
        if i >= 0:
            first.append(all_first - start)
            if args.output_len > 1:
                step.append((max(r.start_s + r.latency_s for r in results) - all_first) / (args.output_len - 1))
    return first, step


def check_answers(url: str, samples: Sequence[Sample], results: Sequence[RequestResult]) -> None:
    """Every request was answered in full, by the server's own count.

    Raises:
        ConfigError: one failed or ended early, or the server tells no count of tokens.
    """
    for sample, result in zip(samples, results, strict=True):
        if not result.success:
            raise ConfigError(f"{url}: a request failed: {result.kind}: {result.error}")
        if result.counted != "usage":
            raise ConfigError(f"{url} tells no usage at the end of a stream, so nobody knows what it generated")
        if result.output_len != sample.output_len:
            raise ConfigError(
                f"{url} gave {result.output_len} of {sample.output_len} tokens; the times would mean nothing. Does it "
                "know ignore_eos, and are its context and limits long enough?"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the record of a cell."""
    parser = argparse.ArgumentParser()
    for name in ("engine", "model", "load-format", "url", "served-name"):
        parser.add_argument(f"--{name}", default="")
    for name, default in (("tp", 1), ("pp", 1), ("vocab", None), ("num-iters", 5), ("num-iters-warmup", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("batch-size", "input-len", "output-len"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--output-json", type=Path, required=True)
    args = parser.parse_args(argv)
    from yalis.bench.harness import write_record
    from yalis.bench.latency import summary

    first, step = served(args) if args.engine == "openai" else offline(args)
    engine = {"model": args.model, "engine": args.engine, "tensor_parallel_size": args.tp}
    config = {name: getattr(args, name) for name in ("batch_size", "input_len", "output_len")}
    write_record(
        args.output_json,
        "latency",
        config={**config, "iters": args.num_iters, "warmup": args.num_iters_warmup, "engine": engine},
        results={"summary_ms": {"first": summary(first), "step": summary(step)}},
        samples={"first_s": first, "step_s": step},
    )


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"yalis: {error}") from None
