"""Guided decoding: outputs follow their grammar whatever the temperature, bad grammars fail alone, limits hold."""

from __future__ import annotations

import json
import re
import string
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import tokenizers
import tokenizers.models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import DEMO
from yalis import LLM, SamplingParams
from yalis.engine import guided as guided_module
from yalis.engine import guided_check
from yalis.engine.guided import GuideCompiler, Guides, _columns
from yalis.engine.request import Sequence as EngineSequence
from yalis.engine.sampling_params import MAX_GUIDED_CHARACTERS, MAX_SCHEMA_DEPTH, GuidedParams
from yalis.engine.scheduler import ScheduledSequence
from yalis.engine.tokenizer import Tokenizer
from yalis.errors import RequestError

VOCAB, EOS = 2048, 1
ALL_EOS = (1, 3)  # the demo model's generation config names both
PROMPT = "This program is free software"


def guided(max_tokens: int = 80, **fields: Any) -> SamplingParams:
    """Parameters of a guided request; fields of `GuidedParams` and of `SamplingParams` together."""
    kinds = {name: fields.pop(name) for name in tuple(fields) if name in GuidedParams.__dataclass_fields__}
    return SamplingParams(guided=GuidedParams(**kinds), max_tokens=max_tokens, **fields)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(DEMO), cpu_threads=1, dtype="float32", max_num_seqs=16, max_num_batched_tokens=16) as made:
        yield made


@pytest.fixture(scope="module")
def compiler() -> GuideCompiler:
    return GuideCompiler(Tokenizer.from_pretrained(DEMO), VOCAB, [EOS])


def draw(compiler: GuideCompiler, params: GuidedParams, seed: int, most: int = 150) -> tuple[list[int], bool]:
    """Tokens drawn evenly from those that the grammar allows, and whether it ended by itself."""
    guide, rng, output = compiler.compile(params), np.random.default_rng(seed), []
    while len(output) < most:
        bits = np.zeros(compiler.num_words, np.int32)
        guide.fill(output, bits)
        assert guide.error == ""
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0]
        assert len(allowed) > 0 and allowed.max() < VOCAB
        # To an end: where the grammar may end, it does so every second time.
        token = EOS if EOS in allowed and rng.integers(2) else int(rng.choice(allowed))
        if token == EOS:
            return output, True
        output.append(token)
    return output, False


# ---- outputs follow the grammar ---------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "\u00e9"]}, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"inner": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
}


def is_valid(text: str) -> bool:
    value = json.loads(text)
    assert set(value) <= set(SCHEMA["properties"]) and {"name", "age"} <= set(value)
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    tags = value.get("tags", [])
    assert len(tags) <= 3 and set(tags) <= {"a", "b\n", "\u00e9"}
    assert value.get("inner") in (None, True, False)
    return True


REGEX = "[A-Z][a-z]{1,5} ([0-9]{3}|[\u00e0-\u00f6\u4e00-\u4eff]{2})[.]?"
CHOICES = ("yes", "no", "perhaps \u00e9\U0001f600", 'a "quoted"\\ \n text', "no way")
LARK = 'start: "<" item ("," item)* ">"\nitem: /[a-c]+/ | "(" item ")"'


def follows_lark(text: str) -> bool:
    item = r"\(*[a-c]+\)*"
    inner = text[1:-1].split(",")
    balanced = all(part.count("(") == part.count(")") for part in inner)
    return re.fullmatch(f"<{item}(,{item})*>", text) is not None and balanced


KINDS: list[tuple[dict[str, Any], Any]] = [
    ({"json_schema": SCHEMA}, is_valid),
    ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    ({"regex": REGEX}, lambda text: re.fullmatch(REGEX, text)),
    ({"choice": CHOICES}, lambda text: text in CHOICES),
    ({"grammar": LARK}, follows_lark),
]


@pytest.mark.parametrize(("fields", "follows"), KINDS, ids=[next(iter(fields)) for fields, _ in KINDS])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 2.0])
def test_outputs_of_the_model_follow_the_grammar(llm: LLM, fields: Any, follows: Any, temperature: float) -> None:
    extra = {"top_p": 0.9, "min_p": 0.05} if temperature == 0.8 else {}
    params = guided(**fields, **extra, temperature=temperature, n=3 if temperature else 1, seed=3)
    outputs = llm.generate([PROMPT, "{", "Yes"], params)
    finished = 0
    for sample in (s for output in outputs for s in output.outputs):
        assert sample.finish_reason in ("stop", "length")
        if sample.finish_reason == "stop":
            finished += 1
            assert sample.token_ids[-1] in ALL_EOS
            assert follows(sample.text), sample.text
    # An object without a bound may well fill the tokens with one string.
    assert finished > 0 or "json_object" in fields
    assert llm.stats().kv_usage == 0


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), kind=st.integers(0, len(KINDS) - 1))
def test_any_path_through_the_masks_follows_the_grammar(compiler: GuideCompiler, seed: int, kind: int) -> None:
    fields, follows = KINDS[kind]
    output, ended = draw(compiler, GuidedParams(**fields), seed)
    if ended:
        text = Tokenizer.from_pretrained(DEMO).decode(output)
        assert follows(text), text


@settings(max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_any_texts_can_be_choices(compiler: GuideCompiler, choices: list[str], seed: int) -> None:
    try:
        params = GuidedParams(choice=choices)
    except RequestError:
        assert any("\ud800" <= char <= "\udfff" for char in "".join(choices))
        return
    output, ended = draw(compiler, params, seed)
    assert ended
    assert Tokenizer.from_pretrained(DEMO).decode(output) in choices


# ---- together with everything else ------------------------------------------------------------------------------


def mixed(llm: LLM) -> list[list[list[int]]]:
    """Tokens of guided and free requests in one batch."""
    free = SamplingParams(temperature=1.0, seed=9, max_tokens=30, ignore_eos=True)
    params = [guided(**fields, temperature=1.5, seed=i, n=2, max_tokens=60) for i, (fields, _) in enumerate(KINDS)]
    outputs = llm.generate([PROMPT] * (len(params) + 1), [free, *params])
    assert [o.error for o in outputs] == [None] * len(outputs)
    return [[s.token_ids for s in o.outputs] for o in outputs]


@pytest.mark.parametrize(
    "options",
    [
        {"overlap_scheduling": True},
        {"block_size": 4, "num_kv_blocks": 34, "max_num_seqs": 8, "max_num_batched_tokens": 8},
        {"overlap_scheduling": True, "block_size": 4, "num_kv_blocks": 34, "enable_prefix_caching": False},
    ],
    ids=["one step ahead", "preemption", "both"],
)
def test_the_engine_s_options_do_not_change_the_tokens(llm: LLM, options: dict[str, Any]) -> None:
    expected = mixed(llm)
    with LLM(str(DEMO), cpu_threads=1, dtype="float32", max_model_len=128, **options) as other:
        assert mixed(other) == expected
        stats = other.stats()
        assert (stats.num_preemptions > 0) == ("num_kv_blocks" in options)
        assert stats.kv_usage == 0


def test_alone_as_among_others(llm: LLM) -> None:
    together = mixed(llm)
    for i, (fields, _) in enumerate(KINDS):
        [alone] = llm.generate(PROMPT, guided(**fields, temperature=1.5, seed=i, n=2, max_tokens=60))
        assert [s.token_ids for s in alone.outputs] == together[i + 1]


def test_logprobs_are_the_model_s_own(llm: LLM) -> None:
    """The mask does not change them: what free scoring of the same text gives."""
    [output] = llm.generate(PROMPT, guided(choice=["no", "yes"], temperature=0.0, logprobs=3))
    tokens = output.outputs[0].token_ids
    scored = llm.generate(
        [output.prompt_token_ids + tokens], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    )[0].prompt_logprobs
    assert output.outputs[0].logprobs is not None and scored is not None
    for token, mine, other in zip(tokens, output.outputs[0].logprobs, scored[-len(tokens) :], strict=True):
        assert other is not None
        assert len(mine) in (3, 4)
        assert mine[token].logprob == pytest.approx(other[token].logprob, abs=1e-4)
        assert mine[token].rank == other[token].rank


def test_bias_and_penalties_act_within_the_grammar(llm: LLM) -> None:
    token = {word: Tokenizer.from_pretrained(DEMO).encode(word, add_special_tokens=False) for word in "ab"}
    for word in "ab":
        params = guided(regex="a{5}|b{5}", temperature=0.0, logit_bias={token[word][0]: 100.0}, repetition_penalty=50.0)
        assert llm.generate(PROMPT, params)[0].outputs[0].text == word * 5


def test_a_stop_text_ends_a_guided_output_early(llm: LLM) -> None:
    [output] = llm.generate(PROMPT, guided(regex="ab+c{3}", stop="bc", temperature=0.0, logit_bias={}))
    assert output.outputs[0].finish_reason == "stop"
    assert re.fullmatch("ab*", output.outputs[0].text)


# ---- bad grammars -----------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"regex": "("}, "unclosed group"),
    ({"regex": "(?=x)a"}, "look-around"),
    ({"regex": "(" * 50_000 + ")" * 50_000}, "guided regex cannot be used"),
    ({"choice": ["yes", "no<|end_of_text|>"]}, "special token"),
    ({"grammar": "start: undefined"}, "undefined"),
    ({"grammar": "start: " + "(" * 10_000 + '"a"' + ")" * 10_000}, "too deeply nested"),
    ({"grammar": "start: start"}, "NoExtension"),
    ({"grammar": "start: \x00"}, "lexer error"),
    ({"json_schema": {"type": "objekt"}}, "objekt"),
    ({"json_schema": {"not": {}}}, "not"),
    ({"json_schema": {"$ref": "http://localhost:1/schema.json"}}, "localhost"),
    ({"json_schema": {"$ref": "#"}}, "guided json_schema cannot be used"),
    ({"json_schema": {"allOf": [{"properties": {f"p{i}": {}}} for i in range(500)]}}, "too large"),
]


def test_bad_grammars_fail_alone_and_soon(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=5)
    [expected] = llm.generate(PROMPT, free)
    params = [free, *(guided(**fields) for fields, _ in BAD), free]
    outputs = llm.generate([PROMPT] * len(params), params)
    for output, (fields, message) in zip(outputs[1:-1], BAD, strict=True):
        assert output.error is not None and message in output.error, (str(fields)[:80], output.error)
        assert next(iter(fields)) in output.error and len(output.error) < 500
    assert outputs[0].outputs == outputs[-1].outputs == expected.outputs
    assert llm.stats().kv_usage == 0


def chain(rules: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(rules)) + f'\nr{rules}: "a"'


# What would end the process that compiles it, or keep it busy for hours.
DEADLY: list[tuple[dict[str, Any], str]] = [
    ({"grammar": chain(8000)}, "too deep"),
    (
        {"json_schema": {"allOf": [{"type": "string", "pattern": f"a{i}b*(c|d){{1,30}}"} for i in range(40)]}},
        "longer than",
    ),
]


def test_grammars_that_kill_or_never_end_are_refused(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=5)
    [expected] = llm.generate(PROMPT, free)
    params = [free, *(guided(**fields) for fields, _ in DEADLY), guided(grammar=chain(200)), free]
    outputs = llm.generate([PROMPT] * len(params), params)
    for output, (_, message) in zip(outputs[1:3], DEADLY, strict=True):
        assert output.error is not None and message in output.error
    assert outputs[3].outputs[0].text == "a"
    assert outputs[0].outputs == outputs[-1].outputs == expected.outputs


def test_the_checking_process_is_started_anew_and_leaves_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    others = set(psutil.Process().children())
    owned = [GuideCompiler(Tokenizer.from_pretrained(DEMO), VOCAB, [EOS])]

    def checker() -> psutil.Process:
        owned[0].check(GuidedParams(regex="a"))
        [process] = set(psutil.Process().children()) - others
        return process

    first = checker()
    assert checker() == first
    with pytest.raises(RequestError, match="too deep"):
        owned[0].check(GuidedParams(grammar=chain(8000)))
    assert not first.is_running()
    second = checker()
    second.suspend()  # one that does not answer at all
    with monkeypatch.context() as patched:
        patched.setattr(guided_check, "WAIT_LIMIT_S", 0.2)
        with pytest.raises(RequestError, match="longer than"):
            owned[0].check(GuidedParams(regex="a"))
    assert not second.is_running()
    third = checker()
    owned[0].close()
    owned[0].close()
    assert not third.is_running()
    fourth = checker()
    owned.clear()
    assert not fourth.is_running()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "got nothing; give exactly one"),
        ({"json_object": True, "regex": "a"}, "json_object and regex"),
        ({"json_object": 1}, "must be true or false"),
        ({"json_schema": "{"}, "no valid JSON"),
        ({"json_schema": "[1]"}, "must be an object"),
        ({"json_schema": "false"}, "must be an object"),
        ({"json_schema": {"a": {1, 2}}}, "no valid JSON"),
        ({"json_schema": {"minimum": float("nan")}}, "no valid JSON"),
        ({"json_schema": '{"a":' * 100_000 + "1" + "}" * 100_000}, "nested deeper"),
        ({"json_schema": '{"a":' * (MAX_SCHEMA_DEPTH + 1) + "1" + "}" * (MAX_SCHEMA_DEPTH + 1)}, "nested deeper"),
        ({"json_schema": {"title": "x" * MAX_GUIDED_CHARACTERS}}, f"at most {MAX_GUIDED_CHARACTERS}"),
        ({"choice": []}, "at least one"),
        ({"choice": "yes"}, "must be a list"),
        ({"choice": ["yes", ""]}, "must be a text"),
        ({"choice": ["yes", 3]}, "must be a text"),
        ({"choice": ["x"] * 1025}, "at most 1024"),
        ({"choice": ["x" * 500] * 300}, "characters"),
        ({"choice": ["\ud800"]}, "surrogate"),
        ({"regex": ""}, "must be a text"),
        ({"regex": 3}, "must be a text"),
        ({"regex": "\udfff"}, "surrogate"),
        ({"grammar": "x" * (MAX_GUIDED_CHARACTERS + 1)}, "characters"),
    ],
)
def test_values_outside_their_limits(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        GuidedParams(**fields)


def test_conflicts_and_unknown_fields() -> None:
    for conflict in ({"ignore_eos": True}, {"min_tokens": 3}):
        with pytest.raises(RequestError, match=next(iter(conflict))):
            guided(regex="a", **conflict)
    with pytest.raises(RequestError, match="regex"):
        SamplingParams(guided={"regexp": "a"})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="GuidedParams"):
        SamplingParams(guided="a")  # type: ignore[arg-type]
    assert SamplingParams(guided={"regex": "a"}) == guided(16, regex="a")  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [fields for fields, _ in KINDS] + [{"json_schema": True}, {"json_schema": "true"}])
def test_they_travel(fields: dict[str, Any]) -> None:
    params = guided(**fields)
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert decoded == params
    assert decoded.guided is not None and decoded.guided.kind == next(iter(fields))


# ---- limits while generating ------------------------------------------------------------------------------------

# Their first token is allowed; what comes then is too much.
TOO_COMPLEX: list[dict[str, Any]] = [
    {"regex": "(a{1000}){1000}"},
    {"grammar": "start: " + " | ".join(f'"x{i}"' for i in range(5000))},
    {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(500)) + '\nr500: "a"'},
]


def test_grammars_that_are_too_complex_end_alone_and_soon(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=5)
    [expected] = llm.generate(PROMPT, free)
    started = time.perf_counter()
    outputs = llm.generate([PROMPT] * 4, [free, *(guided(**fields) for fields in TOO_COMPLEX)])
    # Well under a second each; the margin is for busy machines.
    assert time.perf_counter() - started < 20
    assert outputs[0].outputs == expected.outputs
    for output in outputs[1:]:
        assert [(s.finish_reason, len(s.token_ids)) for s in output.outputs] == [("error", 1)]
    assert llm.stats().kv_usage == 0


def test_a_grammar_that_grows_too_complex_ends_its_sequence_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(guided_module._LIMITS, "max_lexer_states", 60)
    with LLM(str(DEMO), cpu_threads=1, dtype="float32", max_model_len=128) as strict:
        free = SamplingParams(temperature=0.0, max_tokens=20)
        hungry = guided(regex=".*a.{200}b", temperature=1.0, seed=1, logprobs=2)
        plain = guided(choice=["yes", "no"], temperature=0.0)
        outputs = strict.generate([PROMPT] * 3, [free, hungry, plain])
        assert strict.stats().kv_usage == 0
    [ended] = outputs[1].outputs
    assert ended.finish_reason == "error" and "too complex" in str(ended.stop_reason)
    assert all(token >= 0 for token in ended.token_ids) and ended.logprobs is not None
    assert len(ended.logprobs) == len(ended.token_ids)
    assert outputs[0].outputs == llm.generate(PROMPT, free)[0].outputs
    assert outputs[2].outputs == llm.generate(PROMPT, plain)[0].outputs


def test_sequences_share_no_limits(compiler: GuideCompiler) -> None:
    """The same grammar again and again: what one used up is not missing for the next."""
    params = GuidedParams(regex=".*a.{200}b")
    lengths = []
    for _ in range(2):
        guide, output, rng = compiler.compile(params), [], np.random.default_rng(0)
        bits = np.zeros(compiler.num_words, np.int32)
        guide.fill(output, bits)
        while not guide.error and len(output) < 150:
            allowed = np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0]
            output.append(int(rng.choice(allowed[allowed != EOS])))
            guide.fill(output, bits)
        lengths.append(len(output))
    assert lengths[0] == lengths[1] > 20


# ---- masks of shards --------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_columns_of_a_shard(shards: int, vocab: int, seed: int) -> None:
    allowed = np.random.default_rng(seed).integers(0, 2, (2, -(-vocab // 32) * 32)).astype(bool)
    allowed[:, vocab:] = False
    packed = torch.from_numpy(np.packbits(allowed, axis=1, bitorder="little"))
    size = -(-vocab // shards)
    padded = np.pad(allowed, ((0, 0), (0, size * shards)))
    for shard in range(shards):
        found = _columns(packed, shard * size, size)
        assert torch.equal(found, torch.from_numpy(padded[:, shard * size : (shard + 1) * size]))


def test_a_sequence_scheduled_ahead_is_a_mistake() -> None:
    guides = Guides(DEMO, VOCAB, [EOS])
    seq = EngineSequence(0, [5, 6], 1, guided(regex="a"), 0, 10)
    item = ScheduledSequence(seq, 0, 3, True)
    with pytest.raises(AssertionError, match="scheduled ahead"):
        guides.masks([item], 0, VOCAB, torch.device("cpu"))
    free = EngineSequence(1, [5], 1, SamplingParams(), 0, 10)
    assert guides.masks([ScheduledSequence(free, 0, 1, True)], 0, VOCAB, torch.device("cpu")) is None


# ---- tokenizers -------------------------------------------------------------------------------------------------


def sentencepiece_like() -> Tokenizer:
    """Byte fallback and a visible space, as Llama 2 and Mistral have them."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}}
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("y", "e"), ("ye", "s")]
    for text in ("\u2581", *string.ascii_letters, *string.punctuation, *(a + b for a, b in merges)):
        vocab.setdefault(text, len(vocab))
    model = tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


@pytest.mark.parametrize("fields", [{"choice": ["yes the", "no \u00e9"]}, {"regex": "[ a-z]{3}\u00e9!"}])
def test_tokenizers_with_byte_fallback(fields: dict[str, Any]) -> None:
    tokenizer = sentencepiece_like()
    compiler = GuideCompiler(tokenizer, tokenizer.vocab_size, [2])
    for seed in range(5):
        guide, rng, output = compiler.compile(GuidedParams(**fields)), np.random.default_rng(seed), [1]
        bits = np.zeros(compiler.num_words, np.int32)
        while output[-1] != 2:
            guide.fill(output[1:], bits)
            assert guide.error == ""
            output.append(int(rng.choice(np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0])))
        # Decoders of this kind drop a blank at the start of a text, as they do for every output.
        text = tokenizer.decode(output)
        if "choice" in fields:
            assert text in fields["choice"]
        else:
            assert re.fullmatch("[ a-z]{2,3}\u00e9!", text)


def test_a_tokenizer_that_is_not_made_of_bytes_is_refused() -> None:
    model = tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "[SEP]": 3}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.WordPiece()
    refused = GuideCompiler(Tokenizer(backend), 4, [3])
    for use in (refused.compile, refused.check, refused.check):
        with pytest.raises(RequestError, match="does not work with this model's tokenizer"):
            use(GuidedParams(regex="a"))


# ---- what may be missing ----------------------------------------------------------------------------------------


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with LLM(str(DEMO), cpu_threads=1, dtype="float32", max_model_len=64) as engine:
        outputs = engine.generate([PROMPT] * 2, [guided(regex="a"), SamplingParams(max_tokens=2)])
    assert outputs[0].error is not None and "pip install llguidance" in outputs[0].error
    assert outputs[1].error is None


def test_without_an_end_of_sequence_token() -> None:
    with pytest.raises(RequestError, match="end-of-sequence"):
        GuideCompiler(Tokenizer.from_pretrained(DEMO), VOCAB, [])


def test_a_vocabulary_smaller_than_the_tokenizer_s() -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        GuideCompiler(Tokenizer.from_pretrained(DEMO), 100, [EOS]).check(GuidedParams(regex="a"))
