"""What a load test asks: random prompts of exact lengths, prompts of a JSONL file, lengths and times of BurstGPT."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from yalis.errors import ConfigError

BURSTGPT_COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens")


@dataclass(frozen=True)
class Sample:
    """One request of a load test.

    Attributes:
        prompt: text, token ids (their count is exact), or chat messages.
        prompt_len: tokens of the prompt; None where only the server can tell.
        output_len: most tokens to generate.
        arrival_s: seconds after the start by the data set's own clock; None without one.
    """

    prompt: str | list[int] | list[dict[str, Any]]
    prompt_len: int | None
    output_len: int
    arrival_s: float | None = None


@dataclass(frozen=True)
class Dataset:
    """Samples, and in words what they are."""

    samples: list[Sample]
    description: str


class Vocabulary:
    """Token ids that a random prompt may hold: every one but special ones, which would change what the model does.

    Args:
        folder: of the model or tokenizer; None when ``size`` is given.
        size: of the vocabulary; the ids 0 to size - 1 are taken as they are.

    Raises:
        ConfigError: there is nothing to learn the vocabulary from.
    """

    def __init__(self, folder: Path | None, size: int | None = None):
        self._tokenizer: Any = None
        if size is not None:
            if size < 1:
                raise ConfigError(f"--vocab-size {size}: must be at least 1")
            self.ids: Sequence[int] = range(size)
            return
        if folder is None or not folder.is_dir():
            where = "no model folder is known here" if folder is None else f"{folder} is no folder here"
            raise ConfigError(
                f"{where}, so the vocabulary of random prompts is unknown; name --tokenizer FOLDER or --vocab-size N"
            )
        if (folder / "tokenizer.json").exists():
            import tokenizers

            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
            self.ids = [i for i in range(self._tokenizer.get_vocab_size()) if i not in special]
        elif (folder / "config.json").exists():
            config = json.loads((folder / "config.json").read_text())
            self.ids = range(int(config["vocab_size"]))
        else:
            raise ConfigError(f"{folder} has neither tokenizer.json nor config.json; name --vocab-size N")

    def draw(self, rng: random.Random, length: int) -> list[int]:
        """``length`` token ids, each as likely as the others."""
        return rng.choices(self.ids, k=length)

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of these tokens; tokenized again it may count a few tokens more or less.

        Raises:
            ConfigError: there is no tokenizer.
        """
        if self._tokenizer is None:
            raise ConfigError("chat prompts are text, so random ones need a tokenizer; name --tokenizer FOLDER")
        return str(self._tokenizer.decode(list(token_ids)))


def random_dataset(
    count: int,
    vocabulary: Vocabulary,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float,
    prefix_len: int,
    chat: bool,
    seed: int,
) -> Dataset:
    """Prompts of random tokens: exact counts for completions, text for chat.

    Args:
        input_len, output_len: mean lengths in tokens.
        range_ratio: lengths are uniform in [floor(length * (1 - r)), ceil(length * (1 + r))], at least 1.
        prefix_len: further tokens in front, the same in all prompts (for prefix reuse).
    """
    for name, value, least in (("input-len", input_len, 1), ("output-len", output_len, 1), ("prefix", prefix_len, 0)):
        if value < least:
            raise ConfigError(f"random {name} {value}: must be at least {least}")
    if not 0 <= range_ratio < 1:
        raise ConfigError(f"--random-range-ratio {range_ratio}: must be in [0, 1)")
    rng = random.Random(seed)
    prefix = vocabulary.draw(rng, prefix_len)
    samples = []
    for _ in range(count):
        ids = prefix + vocabulary.draw(rng, _length(rng, input_len, range_ratio))
        out = _length(rng, output_len, range_ratio)
        samples.append(Sample(_as_chat(vocabulary.text(ids)), None, out) if chat else Sample(ids, len(ids), out))
    kind = "text decoded from them" if chat else "sent as token ids, so counts are exact"
    return Dataset(samples, f"random tokens ({kind})")


def jsonl_dataset(path: Path, count: int, *, output_len: int | None, chat: bool) -> Dataset:
    """Lines ``{"prompt": text or token ids}`` or ``{"messages": [...]}`` in file order, again from the top when short.

    Optional keys: ``output_tokens`` (else ``output_len``, else 256) and ``timestamp`` in seconds.

    Raises:
        ConfigError: a line is something else; names it.
    """
    samples: list[Sample] = []
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if len(samples) == count:
                break
            if line.strip():
                samples.append(_jsonl_sample(f"{path}:{number}", line, output_len=output_len, chat=chat))
    if not samples:
        raise ConfigError(f"{path} holds no prompt")
    own = len(samples)
    if own < count and all(s.arrival_s is not None for s in samples):
        raise ConfigError(f"{path} has {own} lines with times, fewer than --num-prompts {count}; ask for at most {own}")
    again = f", each {count / own:.3g} times in turn" if own < count else ""
    samples = [samples[i % own] for i in range(count)]
    return Dataset(_from_first(samples), f"{min(own, count)} prompts of {path.name} in file order{again}")


def burstgpt_dataset(
    path: Path,
    count: int,
    vocabulary: Vocabulary,
    *,
    time_scale: float,
    models: Sequence[str] | None,
    max_len: int | None,
    chat: bool,
    seed: int,
) -> Dataset:
    """The first ``count`` usable rows of a BurstGPT CSV, with their own times; the prompts are random tokens.

    Rows without response tokens (failed requests) are left out, as are rows of other ``models`` and rows longer than
    ``max_len`` tokens in all.

    Args:
        time_scale: the trace is played so many times faster than it was recorded.
    """
    if not 0 < time_scale < math.inf:
        raise ConfigError(f"--burstgpt-time-scale {time_scale}: must be a positive number; 1 plays it as recorded")
    rng = random.Random(seed)
    samples: list[Sample] = []
    skipped = {"failed": 0, "other model": 0, "too long": 0}
    for where, row in _burstgpt_rows(path):
        if len(samples) == count:
            break
        try:
            at, asked, answered = float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}; expected numbers in {', '.join(BURSTGPT_COLUMNS)}") from None
        if models is not None and row["Model"] not in models:
            skipped["other model"] += 1
        elif answered < 1 or asked < 1:
            skipped["failed"] += 1
        elif max_len is not None and asked + answered > max_len:
            skipped["too long"] += 1
        else:
            ids = vocabulary.draw(rng, asked)
            when = at / time_scale
            samples.append(
                Sample(_as_chat(vocabulary.text(ids)), None, answered, when)
                if chat
                else Sample(ids, asked, answered, when)
            )
    if len(samples) < count:
        raise ConfigError(
            f"{path} has {len(samples)} usable rows, fewer than --num-prompts {count} (left out: "
            + ", ".join(f"{n} {why}" for why, n in skipped.items())
            + f"); ask for at most {len(samples)}"
        )
    left_out = ", ".join(f"{n} {why}" for why, n in skipped.items() if n) or "none"
    return Dataset(
        _from_first(samples),
        f"lengths of consecutive rows of {path.name} (rows left out: {left_out}); random tokens; the trace's clock "
        f"{time_scale:g} times as fast",
    )


def _length(rng: random.Random, mean: int, ratio: float) -> int:
    return rng.randint(max(1, math.floor(mean * (1 - ratio))), max(1, math.ceil(mean * (1 + ratio))))


def _as_chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _from_first(samples: Sequence[Sample]) -> list[Sample]:
    """Times count from the first sample, and ascend."""
    timed = [s for s in samples if s.arrival_s is not None]
    if len(timed) < len(samples):
        return list(samples)
    ordered = sorted(samples, key=lambda s: s.arrival_s or 0.0)
    zero = ordered[0].arrival_s or 0.0
    return [Sample(s.prompt, s.prompt_len, s.output_len, (s.arrival_s or 0.0) - zero) for s in ordered]


def _jsonl_sample(where: str, line: str, *, output_len: int | None, chat: bool) -> Sample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON: {error}") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ConfigError(f'{where}: expected an object with either "prompt" or "messages"')
    prompt: Any = row.get("prompt", row.get("messages"))
    if "messages" in row:
        if not chat:
            raise ConfigError(f'{where}: "messages" go to a chat endpoint; use --backend openai-chat')
        prompt_len = None
    elif isinstance(prompt, str):
        prompt, prompt_len = (_as_chat(prompt) if chat else prompt), None
    elif not chat and isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt):
        prompt_len = len(prompt)
    else:
        raise ConfigError(f'{where}: "prompt" must be text' + ("" if chat else " or a list of token ids"))
    out = row.get("output_tokens", output_len if output_len is not None else 256)
    at = row.get("timestamp")
    if type(out) is not int or out < 1:
        raise ConfigError(f'{where}: "output_tokens" {out!r} must be a whole number of at least 1')
    if at is not None and (isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at)):
        raise ConfigError(f'{where}: "timestamp" {at!r} must be seconds')
    return Sample(prompt, prompt_len, out, at)


def _burstgpt_rows(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    with _opened(path) as file:
        reader = csv.DictReader(file)
        missing = [name for name in BURSTGPT_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(f"{path} is no BurstGPT trace: column {missing[0]!r} is missing")
        for number, row in enumerate(reader, 2):
            yield f"{path}:{number}", row


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"cannot read --dataset-path {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--dataset-path {path} is no UTF-8 text: {error}") from error
