"""``/v1/completions``: text continues text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from yalis.engine.outputs import CompletionOutput, Logprob, RequestOutput
from yalis.engine.sampling_params import SamplingParams
from yalis.server.answers import DONE, EventStream, event, while_connected
from yalis.server.errors import bad_request, json_response
from yalis.server.frontend import Frontend, Generation
from yalis.server.guided import guided_fields
from yalis.server.protocol import CompletionRequest
from yalis.server.requests import as_prompts, beside, encode, sampling_params, token_name
from yalis.server.usage import Usage

_Logprobs = dict[int, Logprob] | None


async def serve_completion(frontend: Frontend, http: Request, request: CompletionRequest) -> Response:
    """Answer one request.

    Raises:
        ApiError: it cannot be served.
    """
    frontend.engine()  # before any work
    answer = await beside(http, _prepare, frontend, request)
    generation = await Generation.start(frontend, answer.prompts, answer.params, stream=bool(request.stream))
    if request.stream:
        return EventStream(answer.events(generation), generation.close)
    try:
        return json_response(await while_connected(http.receive, answer.whole(generation)))
    finally:
        generation.close()


def _prepare(frontend: Frontend, request: CompletionRequest) -> _Answer:
    """Everything up to the engine's work.

    Raises:
        ApiError: the request cannot be served.
    """
    model = frontend.check_model(request.model)
    if request.suffix:
        raise bad_request("suffix is not served: the models continue text, they do not fill gaps", "suffix")
    n = 1 if request.n is None else request.n
    if request.best_of is not None and request.best_of != n:
        raise bad_request(f"best_of={request.best_of} is not served; leave it out, or equal to n={n}", "best_of")
    if isinstance(request.prompt, list) and not isinstance(next(iter(request.prompt), 0), int):
        frontend.check_count(len(request.prompt))  # before they are looked at one by one
    special = request.add_special_tokens is not False
    prompts = [encode(frontend, p, add_special_tokens=special) for p in as_prompts(request.prompt)]
    # Nothing but the prompt is asked for; the engine generates at least one token, which is then left out.
    prompt_only = bool(request.echo) and request.max_tokens == 0
    prompt_logprobs = request.prompt_logprobs
    if prompt_logprobs is None and request.echo:
        prompt_logprobs = request.logprobs
    params = sampling_params(
        frontend,
        request,
        prompt_lengths=[len(p) for p in prompts],
        max_tokens=1 if prompt_only else request.max_tokens,
        unlimited=False,
        param="prompt",
        logprobs=request.logprobs,
        prompt_logprobs=prompt_logprobs,
        **guided_fields(request),
    )
    return _Answer(frontend, request, params, prompts, model, prompt_only=prompt_only)


class _Answer:
    """Builds the chunks, or the whole, of one answer."""

    def __init__(
        self,
        frontend: Frontend,
        request: CompletionRequest,
        params: SamplingParams,
        prompts: list[list[int]],
        model: str,
        *,
        prompt_only: bool,
    ):
        self._tokenizer = frontend.tokenizer
        self._request = request
        self.params = params
        self.prompts = prompts
        self._prompt_only = prompt_only
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._usage = Usage(prompts)
        self._scores: list[list[_Logprobs] | None] = [None] * len(prompts)
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._offsets: dict[int, int] = {}

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer when all is there."""
        choices: dict[int, dict[str, Any]] = {}
        while (item := await generation.next()) is not None:
            for choice in self._choices(*item):
                choices[choice["index"]] = choice
        return {**self._head, "choices": [choices[i] for i in sorted(choices)], "usage": self._usage.as_dict()}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """One event per token; the usage last, if it is wanted."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        always = options is not None and bool(options.continuous_usage_stats)
        held: dict[int, list[RequestOutput]] = {}
        while (item := await generation.next()) is not None:
            index, output = item
            # The prompt's scores belong into the first event; in rare cases (a preempted prompt) they come later.
            waiting = held.setdefault(index, [])
            waiting.append(output)
            if self.params.prompt_logprobs is not None and self._scores[index] is None:
                if output.prompt_logprobs is None:
                    continue
                self._scores[index] = output.prompt_logprobs
            held[index] = []
            for ready in waiting:
                for choice in self._choices(index, ready):
                    chunk = {**self._head, "choices": [choice]}
                    if with_usage or always:
                        chunk["usage"] = self._usage.as_dict() if always else None
                    yield event(chunk)
        if with_usage:
            yield event({**self._head, "choices": [], "usage": self._usage.as_dict()})
        yield DONE

    def _choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        if output.prompt_logprobs is not None:
            self._scores[index] = output.prompt_logprobs
        self._usage.take(index, output)
        choices = []
        for sample in output.outputs:
            number = index * self.params.n + sample.index
            if number in self._ended or (not sample.token_ids and not sample.finished):
                continue
            choices.append(self._choice(index, number, sample))
        return choices

    def _choice(self, index: int, number: int, sample: CompletionOutput) -> dict[str, Any]:
        request = self._request
        first = number not in self._begun
        self._begun.add(number)
        if sample.finished:
            self._ended.add(number)
        text = "" if self._prompt_only else sample.text
        tokens = [] if self._prompt_only else sample.token_ids
        entries: list[tuple[int, _Logprobs]] = []
        prompt = self.prompts[index]
        if request.echo and first:
            text = self._prompt_text(index) + text
            if request.logprobs is not None:
                entries = list(zip(prompt, self._scores[index] or [], strict=True))
        if request.logprobs is not None and not self._prompt_only:
            entries += list(zip(sample.token_ids, sample.logprobs or [], strict=True))
        choice: dict[str, Any] = {
            "index": number,
            "text": text,
            "logprobs": self._logprobs(number, entries) if request.logprobs is not None else None,
            "finish_reason": "length" if self._prompt_only else sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if request.return_token_ids:
            choice["token_ids"] = tokens
            if first:
                choice["prompt_token_ids"] = prompt
        if request.prompt_logprobs is not None and first:
            choice["prompt_logprobs"] = [_plain(entry) for entry in self._scores[index] or []]
        return choice

    def _prompt_text(self, index: int) -> str:
        prompt = self._request.prompt
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt[index], str):
            return str(prompt[index])
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(self.prompts[index], skip_special_tokens=False)

    def _logprobs(self, number: int, entries: list[tuple[int, _Logprobs]]) -> dict[str, Any]:
        tokens: list[str] = []
        own: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        offset = self._offsets.get(number, 0)
        for token_id, entry in entries:
            name = self._name(token_id, entry[token_id].decoded_token if entry is not None else self._text(token_id))
            tokens.append(name)
            offsets.append(offset)
            if not (number not in self._offsets and self._is_added(token_id, name, number, len(tokens))):
                offset += len(name)
            if entry is None:  # nothing precedes the first token
                own.append(None)
                top.append(None)
                continue
            own.append(entry[token_id].logprob)
            table: dict[str, float] = {}
            for other, logprob in sorted(entry.items(), key=lambda pair: pair[1].rank):
                # Several tokens may have the same text (half characters); the likeliest speaks for them.
                table.setdefault(self._name(other, logprob.decoded_token), logprob.logprob)
            top.append(table)
        self._offsets[number] = offset
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}

    def _is_added(self, token_id: int, name: str, number: int, position: int) -> bool:
        """Whether the tokenizer put this token before a prompt that came as text, so that the text lacks it."""
        prompt = self._request.prompt
        if not self._request.echo or position > 1 or self._tokenizer is None:
            return False
        text = prompt if isinstance(prompt, str) else prompt[number // self.params.n]
        return isinstance(text, str) and token_id in self._tokenizer.special_ids and not text.startswith(name)

    def _text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _name(self, token_id: int, text: str | None) -> str:
        return token_name(self._tokenizer, token_id, text, as_id=bool(self._request.return_tokens_as_token_ids))


def _plain(entry: _Logprobs) -> dict[str, Any] | None:
    return None if entry is None else {str(token): msgspec.to_builtins(logprob) for token, logprob in entry.items()}
