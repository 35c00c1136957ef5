"""`LLM` in one process against transformers: every architecture, every way to schedule, every sampling parameter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import DEMO, cached_checkpoints
from tests.support.reference import CHECKPOINT, ENGINE, VOCAB, Reference, check_logprobs, token_ids
from yalis import LLM, SamplingParams
from yalis.engine.outputs import RequestOutput
from yalis.errors import ConfigError

# Many blocks, one token, less than a block, several blocks, and one that shares its first blocks with the first.
PROMPTS = [token_ids(n, seed) for n, seed in ((70, 3), (1, 0), (5, 1), (37, 2))]
PROMPTS.append(PROMPTS[0][:50] + token_ids(9, 4))
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SCORED = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=3)
# The longest prompt with its output fills all blocks; at first the next two fit beside it.
SCARCE = {"num_kv_blocks": 21, "block_size": 4}
UNCHUNKED = {"enable_chunked_prefill": False, "max_model_len": 128, "max_num_batched_tokens": 128}
CHUNKED = {"max_num_batched_tokens": 16, "max_num_seqs": 4}


class Models:
    """Checkpoints and their references, each made once."""

    def __init__(self, root: Path):
        self._checkpoint = cached_checkpoints(root)
        self._references: dict[tuple[Path, torch.dtype], Reference] = {}

    def folder(self, variant: str, **changes: Any) -> Path:
        return self._checkpoint(variant, **CHECKPOINT, **changes)

    def reference(self, folder: Path, dtype: torch.dtype = torch.float32) -> Reference:
        key = (folder, dtype)
        if key not in self._references:
            self._references[key] = Reference(folder, dtype)
        return self._references[key]

    def llm(self, folder: Path, **options: Any) -> LLM:
        return LLM(str(folder), **{**ENGINE, **options})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def llm(models: Models) -> Iterator[LLM]:
    """One engine for everything about single requests."""
    with models.llm(models.folder("llama"), block_size=8) as made:
        yield made


@pytest.fixture(scope="module")
def reference(models: Models) -> Reference:
    return models.reference(models.folder("llama"))


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    assert all(o.error is None and len(o.outputs) == 1 for o in outputs)
    return [o.outputs[0].token_ids for o in outputs]


# ---- whole engines against transformers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "changes", "options"),
    [
        ("llama", {}, {"attention_backend": "native"}),
        ("llama", {}, {"attention_backend": "sdpa"}),
        ("llama", {"max_shard_size": "200KB"}, {**CHUNKED}),
        ("llama-tied", {}, {**SCARCE, "attention_backend": "native"}),
        ("llama-mha", {}, {**SCARCE, "overlap_scheduling": True}),
        ("llama3", {}, {**UNCHUNKED, "overlap_scheduling": True}),
        ("llama-bias", {}, {**CHUNKED, **SCARCE, "overlap_scheduling": True}),
        ("mistral", {}, {**CHUNKED, "enable_prefix_caching": False}),
        ("mistral-window", {}, {**SCARCE, "enable_prefix_caching": False, "attention_backend": "sdpa"}),
        ("qwen2", {}, {**UNCHUNKED, **SCARCE}),
        ("qwen2-window", {}, {"max_num_batched_tokens": 7, "max_num_seqs": 3, "block_size": 5}),
        ("qwen3", {"max_shard_size": "200KB"}, {"overlap_scheduling": True, **CHUNKED, "attention_backend": "sdpa"}),
        ("qwen3-bias", {}, {"enable_prefix_caching": False, "overlap_scheduling": True, "block_size": 4}),
    ],
)
def test_greedy_and_logprobs(models: Models, variant: str, changes: dict[str, Any], options: dict[str, Any]) -> None:
    """In float32: the tokens of transformers' `generate`, and its log-probabilities, twice over."""
    folder = models.folder(variant, **changes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("max_shard_size" in changes)
    reference = models.reference(folder)
    expected = [reference.greedy(p, NUM_TOKENS, eos_token_id=None) for p in PROMPTS]
    with models.llm(folder, **options) as llm:
        outputs = llm.generate(PROMPTS, SCORED)
        again = llm.generate(PROMPTS, GREEDY)
        assert llm.stats().kv_usage == 0
        assert (llm.stats().num_preemptions > 0) == ("num_kv_blocks" in options)
    assert tokens_of(outputs) == tokens_of(again) == expected
    for output in outputs:
        check_logprobs(output, reference, k=5, prompt_k=3)
        assert output.metrics.num_cached_tokens == 0, "the prompt's logits are wanted, so all of it is computed"
        assert output.outputs[0].finish_reason == "length"
    cached = [o.metrics.num_cached_tokens for o in again]
    if options.get("enable_prefix_caching", True) and "num_kv_blocks" not in options:
        block = options.get("block_size", 16)
        assert cached == [(len(p) - 1) // block * block for p in PROMPTS]
    elif not options.get("enable_prefix_caching", True):
        assert cached == [0] * len(PROMPTS)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama3", {"attention_backend": "native", **CHUNKED}),
        ("mistral", {"attention_backend": "sdpa"}),
        ("qwen2", {"overlap_scheduling": True, **SCARCE}),
        ("qwen3", {**UNCHUNKED}),
    ],
)
def test_bfloat16_logprobs(models: Models, variant: str, options: dict[str, Any]) -> None:
    """Tokens may differ where two are about as likely; given the engine's tokens, the log-probabilities agree."""
    folder = models.folder(variant, dtype=torch.bfloat16)
    reference = models.reference(folder, torch.bfloat16)
    with models.llm(folder, **options) as llm:
        assert llm.info["dtype"] == "bfloat16"
        outputs = llm.generate(PROMPTS, SCORED)
    for output in outputs:
        assert len(output.outputs[0].token_ids) == NUM_TOKENS
        check_logprobs(output, reference, k=5, prompt_k=3)


def test_float16_logprobs(models: Models) -> None:
    """Torch's own products serve float16 on a CPU; the same tolerance as in bfloat16, which has fewer digits."""
    folder = models.folder("qwen3", dtype=torch.float16)
    reference = models.reference(folder, torch.float16)
    with models.llm(folder, **CHUNKED) as llm:
        assert llm.info["dtype"] == "float16"
        outputs = llm.generate(PROMPTS, SCORED)
    for output in outputs:
        assert len(output.outputs[0].token_ids) == NUM_TOKENS
        check_logprobs(output, reference, k=5, prompt_k=3)


def test_a_reused_prefix_of_another_prompt_changes_nothing(llm: LLM, reference: Reference) -> None:
    first = token_ids(30, 50)
    second = first[:19] + token_ids(11, 51)
    [_] = llm.generate(first, GREEDY)
    [output] = llm.generate(second, GREEDY)
    assert output.metrics.num_cached_tokens == 16
    assert tokens_of([output]) == [reference.greedy(second, NUM_TOKENS, eos_token_id=None)]
    # The output of a request is a prefix too.
    longer = second + output.outputs[0].token_ids
    [follow_up] = llm.generate(longer, GREEDY)
    assert follow_up.metrics.num_cached_tokens == 40
    assert tokens_of([follow_up]) == [reference.greedy(longer, NUM_TOKENS, eos_token_id=None)]


# ---- the rules of sampling --------------------------------------------------------------------------------------

# Its greedy output repeats tokens, and some of them come first in the middle.
PROMPT = token_ids(21, 73)


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **changes})


def test_repetition_penalty_equals_transformers(llm: LLM, reference: Reference) -> None:
    expected = reference.greedy(PROMPT, NUM_TOKENS, eos_token_id=None, repetition_penalty=1.8)
    assert expected != reference.greedy(PROMPT, NUM_TOKENS, eos_token_id=None)
    assert tokens_of(llm.generate(PROMPT, greedy(repetition_penalty=1.8))) == [expected]


def test_presence_and_frequency_penalty(llm: LLM, reference: Reference) -> None:
    # A bias that makes three tokens compete, so that the penalties decide which of them comes.
    bias = {11: 2.0, 12: 1.9, 13: 1.8}

    def rule(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        for token, value in bias.items():
            logits[token] += value
        for token in set(output):
            logits[token] -= 0.3 + 0.2 * output.count(token)
        return logits

    expected = reference.greedy_by_rule(PROMPT, NUM_TOKENS, rule)
    assert set(bias) <= set(expected) and len(set(expected)) < NUM_TOKENS
    params = greedy(presence_penalty=0.3, frequency_penalty=0.2, logit_bias=bias)
    assert tokens_of(llm.generate(PROMPT, params)) == [expected]


def test_logit_bias_equals_transformers(llm: LLM, reference: Reference) -> None:
    plain = reference.greedy(PROMPT, NUM_TOKENS, eos_token_id=None)
    bias = {plain[0]: -100.0, plain[3]: -0.5, VOCAB - 1: 0.4}
    expected = reference.greedy(PROMPT, NUM_TOKENS, eos_token_id=None, sequence_bias={(t,): v for t, v in bias.items()})
    [output] = llm.generate(PROMPT, greedy(logit_bias=bias, logprobs=2))
    assert tokens_of([output]) == [expected]
    assert expected != plain
    # Log-probabilities are the model's own, before the bias.
    check_logprobs(output, reference, k=2, prompt_k=None)


def test_drawn_tokens_obey_the_filters(llm: LLM, reference: Reference) -> None:
    """Each drawn token lies in the set that top-k, top-p and min-p leave of the reference's logits."""
    params = SamplingParams(
        n=4, temperature=0.8, top_k=40, top_p=0.7, min_p=0.7, seed=5, max_tokens=20, ignore_eos=True, logprobs=0
    )
    [output] = llm.generate(PROMPT, params)
    assert len({tuple(s.token_ids) for s in output.outputs}) == 4
    ranks = set()
    for sample in output.outputs:
        logits = reference.logits(PROMPT + sample.token_ids)
        for i, token in enumerate(sample.token_ids):
            values, order = (logits[len(PROMPT) - 1 + i] / 0.8).topk(40)
            p = values.softmax(-1)
            keep = (p.cumsum(-1) - p < 0.7 + 1e-4) & (p >= 0.7 * p[0] - 1e-5)
            assert token in order[keep].tolist()
            ranks.add(order.tolist().index(token))
    assert len(ranks) > 5, "drawn, not chosen"
    check_logprobs(output, reference, k=0, prompt_k=None)


def test_end_token_min_tokens_and_ignore_eos(models: Models) -> None:
    plain = models.reference(models.folder("llama")).greedy(PROMPT, NUM_TOKENS, eos_token_id=None)
    end = plain[4]
    assert plain.index(end) == 4, "the prompt was chosen so that this token comes once"
    # The same weights, with that token as the end of text.
    folder = models.folder("llama", eos_token_id=end)
    reference = models.reference(folder)
    with models.llm(folder) as llm:
        stops, ignores, waits = llm.generate(
            [PROMPT] * 3, [greedy(ignore_eos=False), greedy(), greedy(ignore_eos=False, min_tokens=7)]
        )
    assert stops.outputs[0].token_ids == reference.greedy(PROMPT, NUM_TOKENS) == plain[:5]
    assert (stops.outputs[0].finish_reason, stops.outputs[0].stop_reason) == ("stop", None)
    assert ignores.outputs[0].token_ids == plain
    assert ignores.outputs[0].finish_reason == "length"
    expected = reference.greedy(PROMPT, NUM_TOKENS, min_new_tokens=7)
    assert waits.outputs[0].token_ids == expected
    assert end not in expected[:7] and len(expected) >= 7


def test_stop_token_ids_and_max_tokens(llm: LLM, reference: Reference) -> None:
    plain = reference.greedy(PROMPT, NUM_TOKENS, eos_token_id=None)
    stop = plain[5]
    assert plain.index(stop) == 5
    stopped, limited, one = llm.generate(
        [PROMPT] * 3, [greedy(stop_token_ids=[stop, VOCAB - 1]), greedy(max_tokens=4), greedy(max_tokens=1)]
    )
    assert stopped.outputs[0].token_ids == plain[:6]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    assert limited.outputs[0].token_ids == plain[:4]
    assert limited.outputs[0].finish_reason == "length"
    assert one.outputs[0].token_ids == plain[:1]


def test_no_max_tokens_fills_the_context(models: Models) -> None:
    with models.llm(models.folder("llama"), max_model_len=32) as llm:
        full, almost = llm.generate([PROMPT, token_ids(31, 8)], greedy(max_tokens=None))
    assert len(full.outputs[0].token_ids) == 32 - len(PROMPT)
    assert len(almost.outputs[0].token_ids) == 1
    assert full.outputs[0].finish_reason == almost.outputs[0].finish_reason == "length"


def test_stop_text_across_tokens(llm: LLM) -> None:
    [plain] = llm.generate("The library is free", greedy(max_tokens=24))
    text, ids = plain.outputs[0].text, plain.outputs[0].token_ids
    assert text == llm.tokenizer.decode(ids) and plain.prompt == "The library is free"
    # Ends of one token and starts of the next, so that no token holds the stop text.
    starts = [len(llm.tokenizer.decode(ids[:i])) for i in range(len(ids) + 1)]
    at = next(
        s for s in starts[8:-4] if text.find(text[s - 2 : s + 2]) == s - 2 and "\ufffd" not in text[s - 2 : s + 2]
    )
    stop = text[at - 2 : at + 2]
    without, kept = llm.generate(
        ["The library is free"] * 2,
        [
            greedy(max_tokens=24, stop=["never to be seen", stop]),
            greedy(max_tokens=24, stop=stop, include_stop_str_in_output=True),
        ],
    )
    assert without.outputs[0].text == text[: at - 2]
    assert kept.outputs[0].text == text[: at + 2]
    for output in (without, kept):
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
        assert output.outputs[0].token_ids == ids[: len(output.outputs[0].token_ids)]
        assert len(output.outputs[0].token_ids) < len(ids)
    assert llm.stats().num_running == 0


def test_detokenize_off(llm: LLM) -> None:
    [output] = llm.generate(PROMPT, greedy(detokenize=False, logprobs=1))
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == NUM_TOKENS
    assert all(e.decoded_token is None for entry in output.outputs[0].logprobs or [] for e in entry.values())


# ---- the same seed, the same tokens -----------------------------------------------------------------------------

DRAWN: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.8},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.1},
    "top-p": {"temperature": 0.5, "top_p": 0.3},
    "penalised": {"temperature": 0.1, "repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.3},
    "all": {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.1,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {5: 0.5},
    },
}


def seeded(name: str, **changes: Any) -> SamplingParams:
    return SamplingParams(seed=1234, max_tokens=16, ignore_eos=True, **{**DRAWN[name], **changes})


# Neighbours of every kind: greedy, unseeded, penalised, scored, of other lengths.
NEIGHBOURS: list[tuple[list[int], SamplingParams]] = [
    (token_ids(3, 20), greedy()),
    (token_ids(40, 21), SamplingParams(temperature=1.0, max_tokens=20)),
    (token_ids(17, 22), SamplingParams(temperature=1.3, top_k=5, max_tokens=9, seed=1234)),
    (token_ids(9, 23), SamplingParams(temperature=0.9, top_p=0.8, max_tokens=30)),
    (token_ids(33, 24), greedy(repetition_penalty=1.5, logprobs=3)),
    (token_ids(21, 25), greedy(prompt_logprobs=2, max_tokens=3)),
    (token_ids(50, 26), SamplingParams(temperature=0.7, min_p=0.2, frequency_penalty=0.5, max_tokens=25)),
    (token_ids(1, 27), SamplingParams(temperature=1.0, logit_bias={3: 2.0}, min_tokens=5, max_tokens=12)),
]


@pytest.fixture(scope="module")
def alone(llm: LLM) -> dict[str, list[int]]:
    """The drawn tokens of each parameter set, alone in the engine."""
    found = {name: tokens_of(llm.generate(PROMPT, seeded(name)))[0] for name in DRAWN}
    assert len({tuple(t) for t in found.values()}) == len(DRAWN)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_backend": "sdpa", "max_num_batched_tokens": 16, "max_num_seqs": 12},
        {"overlap_scheduling": True},
        {"num_kv_blocks": 12, "max_model_len": 96, "block_size": 8},
        {"num_kv_blocks": 12, "max_model_len": 96, "block_size": 8, "overlap_scheduling": True},
    ],
    ids=["batch", "chunked", "overlap", "preempted", "preempted-overlap"],
)
def test_a_seed_gives_the_same_tokens(models: Models, alone: dict[str, list[int]], options: dict[str, Any]) -> None:
    """Whatever else is in the batch, however it is scheduled, in any place of the batch."""
    with models.llm(models.folder("llama"), seed=99, **options) as llm:
        for place, name in enumerate(DRAWN):
            order = [*NEIGHBOURS[:place], (PROMPT, seeded(name)), *NEIGHBOURS[place:]]
            outputs = llm.generate([p for p, _ in order], [params for _, params in order])
            assert tokens_of(outputs)[place] == alone[name], name
            assert llm.stats().kv_usage == 0
        assert (llm.stats().num_preemptions > 0) == ("num_kv_blocks" in options)


def test_samples_of_one_request(llm: LLM, alone: dict[str, list[int]]) -> None:
    first, second = llm.generate([PROMPT] * 2, seeded("all", n=3))
    samples = [s.token_ids for s in first.outputs]
    assert [s.index for s in first.outputs] == [0, 1, 2]
    assert len({tuple(s) for s in samples}) == 3
    assert [s.token_ids for s in second.outputs] == samples
    assert samples[0] == alone["all"]


def test_no_seed_draws_anew_but_the_engine_seed_repeats(models: Models) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    found = []
    for seed in (3, 3, 4):
        with models.llm(models.folder("llama"), seed=seed) as llm:
            found.append(tokens_of(llm.generate([PROMPT, PROMPT], params)))
    assert found[0] == found[1]
    assert len({tuple(t) for t in found[0] + found[2]}) == 4


# ---- streams, failures ------------------------------------------------------------------------------------------


def test_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    for params in (greedy(max_tokens=20, logprobs=1), seeded("all"), greedy(max_tokens=30, stop=["e", "zz"])):
        [whole] = llm.generate("Free software", params)
        states = list(llm.stream("Free software", params))
        texts = [s.outputs[0].text for s in states]
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        assert [len(s.outputs[0].token_ids) for s in states] == list(range(1, len(whole.outputs[0].token_ids) + 1))
        assert [s.finished for s in states] == [False] * (len(states) - 1) + [True]
        assert states[-1].outputs == whole.outputs
        # A state handed out does not change afterwards.
        assert texts[0] == states[0].outputs[0].text and len(states[0].outputs[0].token_ids) == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_leaving_a_stream_frees_its_blocks(models: Models, overlap: bool) -> None:
    with models.llm(models.folder("llama"), overlap_scheduling=overlap) as llm:
        expected = tokens_of(llm.generate(PROMPT, greedy()))
        for count, state in enumerate(llm.stream(PROMPT, greedy(n=2, max_tokens=200)), start=1):
            assert not state.finished
            if count == 3:
                assert llm.stats().kv_usage > 0
                break
        assert (llm.stats().kv_usage, llm.stats().num_running, llm.stats().num_waiting) == (0, 0, 0)
        assert tokens_of(llm.generate(PROMPT, greedy())) == expected


def test_two_streams_at_once(llm: LLM) -> None:
    """Each gets its own states, and a generate in between is served."""
    expected = tokens_of(llm.generate([PROMPT, PROMPT[3:]], greedy()))
    first, second = llm.stream(PROMPT, greedy()), llm.stream(PROMPT[3:], greedy())
    states = [next(first), next(second)]
    assert tokens_of(llm.generate([PROMPT[3:]], greedy())) == expected[1:]
    states += [*first, *second]
    assert [s.outputs[0].token_ids for s in states if s.finished] == expected


IMPOSSIBLE: list[tuple[Any, str]] = [
    ([], "the prompt is empty"),
    (token_ids(256, 30), "the prompt has 256 tokens, the limit is 255"),
    ([5, VOCAB], f"prompt token {VOCAB} is no token of the model: ids go from 0 to {VOCAB - 1}"),
    ([-1], "prompt token -1"),
    ([2**70], f"prompt token {2**70} is no token"),
    ([5, "a"], "must be text or a list of token ids: 'str' object cannot"),
    (None, "must be text or a list of token ids: 'NoneType' object is not iterable"),
    ("half a \ud83d", "the prompt is no valid text"),
]


def test_an_impossible_request_fails_alone(llm: LLM, reference: Reference) -> None:
    bad_bias = greedy(logit_bias={VOCAB: 1.0})
    prompts = [PROMPT, *(p for p, _ in IMPOSSIBLE), PROMPT, PROMPTS[1]]
    params = [*[greedy()] * (len(IMPOSSIBLE) + 1), bad_bias, greedy()]
    outputs = llm.generate(prompts, params)
    for output, (_, message) in zip(outputs[1:], IMPOSSIBLE, strict=False):
        assert output.finished and output.error is not None and message in output.error
        assert [s.finish_reason for s in output.outputs] == ["error"]
    assert "logit_bias names token" in (outputs[-2].error or "")
    expected = [reference.greedy(p, NUM_TOKENS, eos_token_id=None) for p in (PROMPT, PROMPTS[1])]
    assert tokens_of([outputs[0], outputs[-1]]) == expected
    assert llm.stats().kv_usage == 0


def test_a_prompt_beyond_the_kv_cache_fails_alone(models: Models) -> None:
    with models.llm(models.folder("llama"), num_kv_blocks=3) as llm:
        assert llm.info["max_model_len"] == 48
        long, fits = llm.generate([token_ids(48, 31), token_ids(47, 31)], greedy())
    assert "the limit is 47" in (long.error or "")
    assert len(fits.outputs[0].token_ids) == 1


def test_arguments_of_generate(llm: LLM) -> None:
    assert llm.generate([]) == []
    with pytest.raises(ConfigError, match="1 sampling params for 2 prompts"):
        llm.generate([PROMPT, PROMPT], [greedy()])
    [one] = llm.generate(PROMPT, greedy())
    [same] = llm.generate([PROMPT], [greedy()])
    assert one.outputs == same.outputs and one.prompt is None and one.prompt_token_ids == PROMPT


@pytest.mark.parametrize("wrong", [[{"temperature": 0.0}], {"temperature": 0.0}, "greedy", [None]])
def test_other_than_params_is_refused_before_anything_is_submitted(llm: LLM, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be SamplingParams; make them with SamplingParams\(\.\.\.\)"):
        llm.generate([PROMPT], wrong)
    with pytest.raises(ConfigError, match="must be SamplingParams"):
        next(iter(llm.stream(PROMPT, wrong)))
    assert not llm.stats().num_waiting


def test_requests_before_one_that_cannot_be_submitted_are_ended(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, count = llm._handle.submit, itertools.count()

    def broken(*args: Any, **options: Any) -> None:
        if next(count) == 2:
            raise TypeError("no such type")
        submit(*args, **options)

    monkeypatch.setattr(llm._handle, "submit", broken)
    with pytest.raises(TypeError, match="no such type"):
        llm.generate([PROMPT] * 3, greedy())
    stats = llm.stats()
    assert (stats.num_waiting, stats.num_running, stats.kv_usage) == (0, 0, 0.0)
    assert not llm._handle.engine.has_unfinished_requests


def test_defaults_and_chat_of_the_demo_model() -> None:
    """The demo checkpoint's generation config and chat template are used, and its own end tokens."""
    with LLM(str(DEMO), device="cpu", cpu_threads=1, max_model_len=128) as llm:
        assert (llm.default_sampling_params.temperature, llm.default_sampling_params.top_p) == (0.7, 0.9)
        assert llm.sampling_params({"temperature": 0.0}).top_p == 0.9
        messages = [{"role": "user", "content": "Who are you?"}]
        ids = llm.render_chat(messages)
        assert llm.tokenizer.decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
        [chat] = llm.chat(messages, greedy())
        [plain] = llm.generate(ids, greedy())
    assert chat.outputs == plain.outputs and chat.prompt_token_ids == ids
