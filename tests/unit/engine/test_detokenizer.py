"""Text token by token equals the text of all tokens, and stop texts are found wherever tokens cut them."""

from __future__ import annotations

from functools import cache

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from yalis.engine.detokenizer import IncrementalDetokenizer
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

CORPUS = [
    "the quick brown fox jumps over the lazy dog. ",
    "héllo wörld 日本語 テスト 😀 👩‍👩‍👧 e\u0301 ",
    "END STOP\n\n",
]


@cache
def byte_level() -> Tokenizer:
    """Tokens are runs of bytes, as in GPT-2, Llama 3 and Qwen."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend)


@cache
def byte_fallback() -> Tokenizer:
    """Pieces with a mark for spaces, and bytes for what is in no piece, as in Llama 2 and Mistral."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab.update({f"<0x{byte:02X}>": 3 + byte for byte in range(256)})
    letters = "▁abcdefghijklmnopqrstuvwxyzENDSTOP.,é"
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("E", "N"), ("EN", "D"), ("▁", "a")]
    for piece in [*letters, *("".join(pair) for pair in merges)]:
        vocab.setdefault(piece, len(vocab))
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return Tokenizer(backend)


BOTH = pytest.mark.parametrize("make", [byte_level, byte_fallback])
TEXTS = st.text(
    st.one_of(
        st.characters(codec="utf-8", exclude_characters="\ufffd"),
        st.sampled_from(" the END.\n😀👩‍👩‍👧日本語e\u0301é\u200d\ufe0f"),
    ),
    max_size=60,
)


def deltas(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, params)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


@BOTH
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_deltas_of_a_text_join_to_it(make, text: str) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = deltas(tokenizer, ids, SamplingParams())
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, 345), max_size=150),
    skip=st.booleans(),
)
def test_deltas_of_any_tokens_join_to_the_text_of_all(ids: list[int], skip: bool) -> None:
    """Broken bytes, special tokens and ids without a token included."""
    tokenizer = byte_level()
    pieces = deltas(tokenizer, ids, SamplingParams(skip_special_tokens=skip))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.one_of(TEXTS, st.sampled_from(["<s>", "</s>"])), max_size=12),
    skip=st.booleans(),
)
def test_special_tokens_between_texts(parts: list[str], skip: bool) -> None:
    tokenizer = byte_fallback()
    ids = [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]
    pieces = deltas(tokenizer, ids, SamplingParams(skip_special_tokens=skip))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@BOTH
def test_a_long_run_of_special_tokens_does_not_eat_the_next_space(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    special = tokenizer.token_id("<s>")
    ids = [*tokenizer.encode("the the"), *[special] * 40, *tokenizer.encode(" the")]
    assert "".join(deltas(tokenizer, ids, SamplingParams())) == tokenizer.decode(ids)


def test_characters_come_as_soon_as_they_are_whole() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    pieces = deltas(tokenizer, ids, SamplingParams())
    assert pieces[-1] == ""
    assert [piece for piece in pieces if piece] == ["a", "😀", "b"]


@pytest.mark.parametrize("byte", ["<0xFF>", "<0xE2>"])
def test_broken_bytes_do_not_hold_text_back_for_ever(byte: str) -> None:
    tokenizer = byte_fallback()
    token = tokenizer.token_id(byte)
    assert token is not None
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams())
    shown = "".join(detokenizer.add(token) for _ in range(300))
    assert len(shown) > 280
    assert len(detokenizer._window) < 100, "the cost of a token must not grow with the text"
    assert shown + detokenizer.finish() == "\ufffd" * 300


def test_half_a_character_at_the_end_is_shown_by_finish() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("ok 🦊")[:-1]
    pieces = deltas(tokenizer, ids, SamplingParams())
    assert pieces[-1].endswith("\ufffd")
    assert "".join(pieces) == tokenizer.decode(ids)


# ---- stop texts -------------------------------------------------------------------------------------------------


def run_until_stop(tokenizer: Tokenizer, text: str, params: SamplingParams) -> tuple[str, str | None, list[str]]:
    detokenizer = IncrementalDetokenizer(tokenizer, params)
    pieces = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        pieces.append(detokenizer.add(token))
        if detokenizer.stop_reason is not None:
            break
    pieces.append(detokenizer.finish())
    return "".join(pieces), detokenizer.stop_reason, pieces


@BOTH
@pytest.mark.parametrize(
    ("text", "stop", "shown", "found"),
    [
        ("the fox END dog", "END", "the fox ", "END"),
        ("the fox EN dog", "END", "the fox EN dog", None),
        ("the ENEND", "END", "the EN", "END"),
        ("aab aaab", "aaab", "aab ", "aaab"),
        ("the fox", ["x", "fo"], "the ", "fo"),
        ("abcd", ["bcd", "c"], "ab", "c"),
        ("abc", ["bc", "abc"], "", "abc"),
        ("日本語 the", "本語", "日", "本語"),
        ("a 😀 b", "😀", "a ", "😀"),
        ("the END", "END. ", "the END", None),
    ],
)
def test_stop_texts(make, text: str, stop: str | list[str], shown: str, found: str | None) -> None:  # type: ignore[no-untyped-def]
    output, reason, _ = run_until_stop(make(), text, SamplingParams(stop=stop))
    assert (output, reason) == (shown, found)
    output, _, _ = run_until_stop(make(), text, SamplingParams(stop=stop, include_stop_str_in_output=True))
    assert output == (shown + found if found else shown)


@BOTH
@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab E", max_size=40), stops=st.lists(st.text("ab E", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_stop_texts_do_not_depend_on_how_tokens_cut_them(make, text: str, stops: list[str]) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    whole = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    ends = [(at + len(s), at) for s in stops if (at := whole.find(s)) >= 0]
    expected = whole[: min(ends)[1]] if ends else whole
    output, reason, pieces = run_until_stop(tokenizer, text, SamplingParams(stop=stops))
    assert output == expected
    assert (reason is not None) == bool(ends)
    # What was shown at any time stays true: no piece is ever taken back.
    assert all(expected.startswith("".join(pieces[:n])) for n in range(len(pieces)))


def test_text_after_the_stop_is_dropped() -> None:
    tokenizer = byte_level()
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(stop="END"))
    for token in tokenizer.encode("the END"):
        detokenizer.add(token)
    assert detokenizer.stop_reason == "END"
    assert detokenizer.add(tokenizer.encode("x")[0]) == ""
    assert detokenizer.finish() == ""


def test_stop_texts_are_not_looked_for_in_the_first_min_tokens() -> None:
    tokenizer = byte_level()
    text = "END the END"
    first = len(tokenizer.encode("END"))
    assert run_until_stop(tokenizer, text, SamplingParams(stop="END", min_tokens=0))[0] == ""
    assert run_until_stop(tokenizer, text, SamplingParams(stop="END", min_tokens=first))[:2] == ("END the ", "END")
