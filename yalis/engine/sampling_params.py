"""What a user may ask of one request: vLLM's names and defaults, validated when the object is built."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yalis.config import unknown_key_message
from yalis.errors import RequestError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

# Below this a temperature means "take the most likely token": dividing by it would only invite overflow.
GREEDY_TEMPERATURE = 1e-5
MAX_TEMPERATURE = 1e4
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_SAMPLES = 1024
MAX_GUIDED_CHARACTERS = 2**17
MAX_GUIDED_CHOICES = 1024
# Levels of lists and objects in a schema; llguidance refuses more than about twice as many.
MAX_SCHEMA_DEPTH = 60
# Between the tokens of guided JSON: at most one blank, or a line break and an indentation. Without a bound a model that
# likes blanks writes nothing else until its tokens are spent.
JSON_WHITE_SPACE = r"[ ]?|\n[ ]{0,20}"
_MAX_INT = 2**31 - 1

# Names of generation_config.json that become defaults of a request. ``do_sample`` is not among them: a checkpoint that
# wants greedy decoding by default says ``temperature: 0``.
_FROM_GENERATION_CONFIG = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, kw_only=True)
class GuidedParams:
    """What the output must look like; exactly one field is given. Whether it compiles shows with a tokenizer only.

    Args:
        json_object: any JSON object.
        json_schema: JSON that is valid under this schema (kept as its text).
        choice: one of these texts (kept as a tuple).
        regex: text that matches this regular expression as a whole, in the syntax of Rust's ``regex``.
        grammar: text of this context-free grammar, in llguidance's dialect of Lark. Special tokens, and added ones with
            names like ``<think>``, are written ``<name>`` or ``<[id]>``, never as a quoted text.

    Raises:
        RequestError: none or several are given, or one is of a wrong type or too large.
    """

    json_object: bool = False
    json_schema: str | Mapping[str, Any] | None = None
    choice: Sequence[str] | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise RequestError(f"guided json_object={self.json_object!r}: must be true or false")
        given = [name for name in _GUIDED_KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            known = ", ".join(_GUIDED_KINDS)
            raise RequestError(f"guided got {' and '.join(given) or 'nothing'}; give exactly one of {known}")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("json_schema", "regex", "grammar"):
            text = getattr(self, name)
            if text is not None:
                _guided_text(name, text)
                object.__setattr__(self, name, str(text))

    @property
    def kind(self) -> str:
        """Name of the field that is given."""
        return next(name for name in _GUIDED_KINDS if getattr(self, name) not in (None, False))


_GUIDED_KINDS = tuple(f.name for f in dataclasses.fields(GuidedParams))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt.

    The order of the rules: ``logit_bias``, penalties, the ``min_tokens`` mask and the grammar change the logits; then
    ``temperature``, ``top_k``, ``top_p`` and ``min_p`` in this order choose the tokens that may be drawn.

    Args:
        n: independent continuations of the prompt.
        temperature: logits are divided by it; below 1e-5 the most likely token is taken (greedy).
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this, in (0, 1].
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest, in [0, 1].
        repetition_penalty: for tokens of prompt and output, positive logits are divided by it, others multiplied.
        presence_penalty: subtracted from the logit of each token that the output holds, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        seed: of the random numbers, a signed 64-bit integer; the same seed, prompt and parameters give the same
            tokens whatever else runs. None derives one from the engine's seed and the request.
        stop: text or texts that end the output (kept as a tuple).
        stop_token_ids: tokens that end the output (kept as a tuple).
        include_stop_str_in_output: whether the output's text keeps the stop text.
        min_tokens: output tokens before the end-of-sequence token or a stop token may come.
        max_tokens: most output tokens; None for as many as the model's context leaves.
        ignore_eos: do not end at the model's end-of-sequence token.
        logprobs: log-probabilities of so many likeliest tokens at each output position, 0 to 20, beside the sampled
            token's own; 0 is the sampled token alone, None is off. They are the model's own: before bias, penalties,
            grammar and temperature.
        prompt_logprobs: the same for the tokens of the prompt.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: whether to turn the output into text; off, the text stays empty and ``stop`` is refused.
        guided: a grammar that the output follows; where it is complete, the output ends. An output that ends for
            another reason (``max_tokens``, a stop text) is a beginning of such a text. A mapping is taken too.

    Raises:
        RequestError: a value is outside its limits.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    guided: GuidedParams | None = None

    def __post_init__(self) -> None:
        self._normalise()
        _integer("n", self.n, 1, MAX_SAMPLES)
        _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _number("top_p", self.top_p, 0.0, 1.0, above=True, remedy="use 1 to keep all tokens")
        _integer("top_k", self.top_k, -1, _MAX_INT, remedy="use 0 to keep all tokens")
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True, remedy="use 1 for none")
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0, remedy="use 0 for none")
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, remedy="use 0 for none")
        if self.logit_bias is not None:
            _at_most("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS_ENTRIES)
            for token_id, bias in self.logit_bias.items():
                _integer("logit_bias token id", token_id, 0, _MAX_INT)
                _number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        _at_most("stop", len(self.stop), MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise RequestError(
                    f"stop={text!r}: a stop text must be a string of 1 to {MAX_STOP_CHARACTERS} characters"
                )
        if self.stop and not self.detokenize:
            raise RequestError(
                f"stop={self.stop!r} with detokenize=False: stop texts are found in text; use stop_token_ids, or "
                "leave detokenize on"
            )
        _at_most("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, _MAX_INT)
        _integer("min_tokens", self.min_tokens, 0, _MAX_INT)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, _MAX_INT)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; lower the first or raise "
                    "the second"
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r}: must be true or false")
        if self.guided is not None:
            self._check_guided()

    def _check_guided(self) -> None:
        if not isinstance(self.guided, GuidedParams):
            raise RequestError(f"guided={self.guided!r}: must be GuidedParams or a mapping of its fields")
        if self.ignore_eos:
            raise RequestError("guided with ignore_eos=True: a guided output ends where its grammar does; drop one")
        if self.min_tokens:
            raise RequestError(
                f"guided with min_tokens={self.min_tokens}: the grammar says how long the output is; leave min_tokens "
                "at 0 and write the length into the grammar"
            )

    def _normalise(self) -> None:
        """Bring all values into plain types and private containers, as messages between processes hold them."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        stop: Any = self.stop
        stop = (stop,) if isinstance(stop, str) else stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if value is None:
                value = ()
            if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
                raise RequestError(f"{name}={value!r}: must be a list")
            object.__setattr__(self, name, tuple(map(_plain, value)))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise RequestError(f"logit_bias={self.logit_bias!r}: must map token ids to numbers")
            # JSON has no integer keys, so clients send token ids as strings.
            items = {_token_id(token_id): _plain(bias) for token_id, bias in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", items or None)
        guided: Any = self.guided
        if isinstance(guided, Mapping):
            for key in guided:
                if key not in _GUIDED_KINDS:
                    raise RequestError(unknown_key_message("field of guided", key, list(_GUIDED_KINDS)))
            object.__setattr__(self, "guided", GuidedParams(**guided))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without drawing."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether token counts are needed to sample this request."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            RequestError: an id in ``logit_bias`` or ``stop_token_ids`` is not below ``vocab_size``.
        """
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise RequestError(
                        f"{name} names token {token_id}, but the model's vocabulary ends at {vocab_size - 1}; remove it"
                    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping of names; an unknown name raises `RequestError` with the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise RequestError(unknown_key_message("sampling parameter", key, known))
        return cls(**values)

    @classmethod
    def resolve(cls, explicit: Mapping[str, Any], generation_config: Mapping[str, Any]) -> SamplingParams:
        """Parameters of a request by precedence: the request, then ``generation_config``, then the defaults.

        Args:
            explicit: the values that the request itself names, and no others. A `SamplingParams` that a user built
                is explicit as a whole and needs no resolving.
            generation_config: the checkpoint's ``generation_config.json``; see `generation_defaults`.

        Raises:
            RequestError: unknown name, or a value outside its limits.
        """
        return cls.from_mapping({**generation_defaults(generation_config), **explicit})


def generation_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that a ``generation_config.json`` sets, under the names of `SamplingParams`; null is not set."""
    return {
        ours: generation_config[theirs]
        for theirs, ours in _FROM_GENERATION_CONFIG.items()
        if generation_config.get(theirs) is not None
    }


def log_generation_defaults(generation_config: Mapping[str, Any]) -> None:
    """Say once, at start-up, which defaults of requests the checkpoint changes."""
    defaults = generation_defaults(generation_config)
    if defaults:
        values = ", ".join(f"{name}={value!r}" for name, value in defaults.items())
        logger.info("defaults of requests from generation_config.json: %s (a request's own values win)", values)


def _schema_text(schema: Any) -> str:
    """A schema as JSON text; the order of properties is kept, because outputs follow it."""
    too_deep = f"guided json_schema is nested deeper than {MAX_SCHEMA_DEPTH} levels; use $defs and $ref"
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
    except RecursionError:
        raise RequestError(too_deep) from None
    except (ValueError, TypeError) as error:
        raise RequestError(f"guided json_schema is no valid JSON: {error}") from None
    if value is True:
        return "{}"
    if not isinstance(value, Mapping):
        raise RequestError(f"guided json_schema={value!r:.80}: must be an object, or true")
    if _depth(value, MAX_SCHEMA_DEPTH + 1) > MAX_SCHEMA_DEPTH:
        raise RequestError(too_deep)
    return text


def _depth(value: Any, most: int) -> int:
    """Levels of lists and objects in ``value``; counting stops at ``most``."""
    level = [value]
    for depth in range(most):
        inner = [v for v in level if isinstance(v, (Mapping, list, tuple))]
        if not inner:
            return depth
        level = [child for v in inner for child in (v.values() if isinstance(v, Mapping) else v)]
    return most


def _choices(choice: Any) -> tuple[str, ...]:
    if isinstance(choice, (str, bytes)) or not isinstance(choice, Sequence) or not choice:
        raise RequestError(f"guided choice={choice!r}: must be a list of at least one text")
    _at_most("guided choice", len(choice), MAX_GUIDED_CHOICES)
    for text in choice:
        if not isinstance(text, str) or not text:
            raise RequestError(f"guided choice holds {text!r}: each must be a text that is not empty")
    _guided_text("choice", "".join(choice))
    return tuple(map(str, choice))


def _guided_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text:
        raise RequestError(f"guided {name}={text!r}: must be a text that is not empty")
    if len(text) > MAX_GUIDED_CHARACTERS:
        raise RequestError(f"guided {name} has {len(text)} characters, at most {MAX_GUIDED_CHARACTERS} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"guided {name} is no valid Unicode text: it holds half of a surrogate pair") from None


def _token_id(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else _plain(value)


def _plain(value: Any) -> Any:
    """Numbers and texts of other kinds (numpy's) as Python's own; anything else as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return str(value) if isinstance(value, str) else value


def _integer(name: str, value: Any, low: int, high: int | None, *, remedy: str = "") -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not good:
        limit = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name}={value!r}: must be an integer {limit}" + (f"; {remedy}" if remedy else ""))


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False, remedy: str = "") -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (above and value == low):
        limit = f"{'above' if above else 'at least'} {low:g} and at most {high:g}"
        raise RequestError(f"{name}={value!r}: must be a number {limit}" + (f"; {remedy}" if remedy else ""))


def _at_most(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise RequestError(f"{name} has {count} entries, at most {limit} are allowed; send fewer")
