"""Arrivals and data sets of a load test."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from tests.support.checkpoints import DEMO
from yalis.bench.arrivals import Arrivals, RampUp
from yalis.bench.datasets import Sample, Vocabulary, burstgpt_dataset, jsonl_dataset, random_dataset
from yalis.errors import ConfigError

HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def spread(burstiness: float) -> float:
    times = Arrivals(10.0, burstiness).times(4000, seed=1)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert times[-1] == pytest.approx(400.0)  # the mean rate, exactly
    assert all(gap >= 0 for gap in gaps)
    return statistics.pstdev(gaps) / statistics.fmean(gaps)


def test_gaps_are_gamma_distributed() -> None:
    # The coefficient of variation of a gamma distribution is 1 / sqrt(shape).
    for burstiness in (0.25, 1.0, 4.0):
        assert spread(burstiness) == pytest.approx(burstiness**-0.5, rel=0.1)
    assert spread(math.inf) == pytest.approx(0.0, abs=1e-9)


def test_seeds_and_no_rate() -> None:
    assert Arrivals().times(3, seed=0) == [0.0, 0.0, 0.0]
    assert Arrivals(2.0).times(9, seed=5) == Arrivals(2.0).times(9, seed=5)
    assert Arrivals(2.0).times(9, seed=5) != Arrivals(2.0).times(9, seed=6)


def test_ramps() -> None:
    linear, exponential = RampUp("linear", 1.0, 9.0), RampUp("exponential", 1.0, 9.0)
    assert [linear.rate(i, 5) for i in range(5)] == [1, 3, 5, 7, 9]
    assert [exponential.rate(i, 3) for i in range(3)] == pytest.approx([1, 3, 9])
    even = Arrivals(burstiness=math.inf, ramp_up=linear)
    assert even.times(5, seed=0) == pytest.approx([1, 1 + 1 / 3, 1 + 1 / 3 + 1 / 5, 1.67619047, 1.78730158])
    assert "linear ramp from 1 to 9" in even.describe()


@pytest.mark.parametrize("wrong", [{"request_rate": 0.0}, {"request_rate": math.nan}, {"burstiness": 0.0}])
def test_impossible_arrivals(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Arrivals(**wrong)
    with pytest.raises(ConfigError, match="takes the place"):
        Arrivals(3.0, ramp_up=RampUp("linear", 1.0, 2.0))
    with pytest.raises(ConfigError, match="end_rps"):
        RampUp("linear", 1.0, 0.0)


def test_random_prompts_have_exact_lengths_and_no_special_token() -> None:
    vocabulary = Vocabulary(DEMO)

    def make(ratio: float, seed: int) -> list[Sample]:
        return random_dataset(
            200, vocabulary, input_len=100, output_len=20, range_ratio=ratio, prefix_len=5, chat=False, seed=seed
        ).samples

    fixed = make(0.0, 0)
    assert {len(s.prompt) for s in fixed} == {105} == {s.prompt_len for s in fixed}
    assert {s.output_len for s in fixed} == {20}
    assert len({tuple(s.prompt[:5]) for s in fixed}) == 1
    assert len({tuple(s.prompt) for s in fixed}) == 200
    assert fixed == make(0.0, 0) != make(0.0, 1)
    varied = make(0.5, 0)
    assert min(len(s.prompt) for s in varied) >= 55 and max(len(s.prompt) for s in varied) <= 155
    assert len({s.output_len for s in varied}) > 10
    special = {0, 1, 2, 3}  # models/demo
    assert not special & {t for s in varied for t in s.prompt}
    [chat] = random_dataset(
        1, vocabulary, input_len=9, output_len=3, range_ratio=0.0, prefix_len=0, chat=True, seed=0
    ).samples
    assert chat.prompt[0]["role"] == "user" and chat.prompt[0]["content"]
    assert chat.prompt_len is None


def test_vocabularies(tmp_path: Path) -> None:
    assert list(Vocabulary(None, 5).ids) == [0, 1, 2, 3, 4]
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    assert len(Vocabulary(tmp_path).ids) == 9
    with pytest.raises(ConfigError, match="need a tokenizer"):
        Vocabulary(tmp_path).text([1])
    for folder, size in ((None, None), (tmp_path / "none", None), (None, 0)):
        with pytest.raises(ConfigError, match="--vocab-size"):
            Vocabulary(folder, size)


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": "a", "output_tokens": 3}, {"prompt": [1, 2]}]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    a, b, again = jsonl_dataset(file, 3, output_len=None, chat=False).samples
    assert (a.prompt, a.output_len, a.prompt_len) == ("a", 3, None)
    assert (b.prompt, b.output_len, b.prompt_len) == ([1, 2], 256, 2)
    assert again == a
    assert jsonl_dataset(file, 2, output_len=8, chat=False).samples[1].output_len == 8
    messages = [{"role": "user", "content": "b"}]
    timed = [{"messages": messages, "timestamp": 12.5}, {"prompt": "a", "timestamp": 11}]
    file.write_text("\n".join(map(json.dumps, timed)))
    first, second = jsonl_dataset(file, 2, output_len=1, chat=True).samples
    assert (first.prompt, first.arrival_s) == ([{"role": "user", "content": "a"}], 0.0)
    assert (second.prompt, second.arrival_s) == (messages, 1.5)
    with pytest.raises(ConfigError, match="at most 2"):
        jsonl_dataset(file, 3, output_len=1, chat=True)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"prompt": 3}',
        '{"prompt": []}',
        '{"prompt": [true]}',
        '{"prompt": "a", "messages": []}',
        '{"messages": []}',
        '{"prompt": "a", "output_tokens": 0}',
        '{"prompt": "a", "timestamp": "x"}',
        "",
    ],
)
def test_jsonl_that_is_wrong(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(line)
    with pytest.raises(ConfigError, match="p.jsonl"):
        jsonl_dataset(file, 1, output_len=1, chat=False)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        jsonl_dataset(tmp_path / "none", 1, output_len=1, chat=False)
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        jsonl_dataset(tmp_path / "b", 1, output_len=1, chat=False)


def test_burstgpt_keeps_times(tmp_path: Path) -> None:
    file = tmp_path / "BurstGPT_1.csv"
    rows = ["5,ChatGPT,472,18,490,Conversation log", "45,ChatGPT,10,0,10,Conversation log", "65,GPT-4,30,6,36,API log"]
    rows += ["85,ChatGPT,5000,6,5006,API log", "105,ChatGPT,7,8,15,API log"]
    file.write_text(HEADER + "\n".join(rows) + "\n")
    options = {"time_scale": 10.0, "models": None, "max_len": 4096, "chat": False, "seed": 0}
    dataset = burstgpt_dataset(file, 3, Vocabulary(None, 50), **options)
    assert [(s.prompt_len, s.output_len, s.arrival_s) for s in dataset.samples] == [
        (472, 18, 0.0),
        (30, 6, 6.0),
        (7, 8, 10.0),
    ]
    assert [len(s.prompt) for s in dataset.samples] == [472, 30, 7]
    assert "1 failed, 1 too long" in dataset.description and "10 times as fast" in dataset.description
    [only] = burstgpt_dataset(file, 1, Vocabulary(None, 50), **options | {"models": ["GPT-4"]}).samples
    assert (only.prompt_len, only.arrival_s) == (30, 0.0)
    with pytest.raises(ConfigError, match="3 usable rows.*ask for at most 3"):
        burstgpt_dataset(file, 4, Vocabulary(None, 50), **options)
    with pytest.raises(ConfigError, match="time-scale"):
        burstgpt_dataset(file, 1, Vocabulary(None, 50), **options | {"time_scale": 0.0})


def test_no_burstgpt(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    options = {"time_scale": 1.0, "models": None, "max_len": None, "chat": False, "seed": 0}
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="'Timestamp' is missing"):
        burstgpt_dataset(file, 1, Vocabulary(None, 5), **options)
    file.write_text(HEADER + "5,ChatGPT,many,18,490,x\n")
    with pytest.raises(ConfigError, match=r"t.csv:2.*many"):
        burstgpt_dataset(file, 1, Vocabulary(None, 5), **options)
