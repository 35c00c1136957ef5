"""``/v1/chat/completions``: the assistant's next message in a conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from yalis.engine.outputs import CompletionOutput, Logprob, RequestOutput
from yalis.engine.sampling_params import SamplingParams
from yalis.errors import RequestError
from yalis.server.answers import DONE, EventStream, event, while_connected
from yalis.server.errors import bad_request, json_response
from yalis.server.frontend import Frontend, Generation
from yalis.server.guided import guided_fields
from yalis.server.protocol import ChatRequest
from yalis.server.requests import beside, render_chat, sampling_params, token_name
from yalis.server.token_bytes import TokenBytes
from yalis.server.toolbox import CallReader, Toolbox
from yalis.server.usage import Usage


async def serve_chat(frontend: Frontend, http: Request, request: ChatRequest) -> Response:
    """Answer one request.

    Raises:
        ApiError: it cannot be served.
    """
    frontend.engine()  # before any work
    answer = await beside(http, _prepare, frontend, request)
    generation = await Generation.start(frontend, [answer.prompt], answer.params, stream=bool(request.stream))
    if request.stream:
        return EventStream(answer.events(generation), generation.close)
    try:
        return json_response(await while_connected(http.receive, answer.whole(generation)))
    finally:
        generation.close()


def _prepare(frontend: Frontend, request: ChatRequest) -> _Answer:
    """Everything up to the engine's work.

    Raises:
        ApiError: the request cannot be served.
    """
    model = frontend.check_model(request.model)
    toolbox = Toolbox(frontend, request)
    guided = guided_fields(request)
    if guided and "guided" in toolbox.sampling:
        raise bad_request("tool_choice enforces a call, so the output cannot have another form too", "tool_choice")
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request(
            "prompt_logprobs of a chat come with the whole answer: leave out stream, or ask /v1/completions",
            "prompt_logprobs",
            "unsupported_parameter",
        )
    if request.continue_final_message:
        raise bad_request("continue_final_message is not served", "continue_final_message", "unsupported_parameter")
    prompt = render_chat(
        frontend,
        request.messages,
        tools=toolbox.for_template,
        variables=_template_variables(frontend, request, has_tools=bool(toolbox.for_template)),
        add_generation_prompt=request.add_generation_prompt is not False,
        documents=request.documents,
    )
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    params = sampling_params(
        frontend,
        request,
        prompt_lengths=[len(prompt)],
        max_tokens=max_tokens,
        unlimited=True,
        param="messages",
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        **guided,
        **toolbox.sampling,
    )
    return _Answer(frontend, request, toolbox, params, prompt, model)


def _template_variables(frontend: Frontend, request: ChatRequest, *, has_tools: bool) -> dict[str, Any]:
    """What the chat template gets besides the conversation.

    Raises:
        ApiError: 400, the request asks for a way to answer that the template does not know.
    """
    variables = dict(request.chat_template_kwargs or {})
    for name in ("reasoning_effort", "verbosity"):
        value = getattr(request, name)
        if value is None:
            continue
        try:
            source = frontend.need_tokenizer().template_source(frontend.options.chat_template, has_tools=has_tools)
        except RequestError as error:
            raise bad_request(str(error), "messages") from None
        if name not in source:
            raise bad_request(
                f"{name}={value!r}: the model's chat template knows no {name}; leave it out",
                name,
                "unsupported_parameter",
            )
        variables.setdefault(name, value)
    return variables


class _Answer:
    """Builds the chunks, or the whole, of one answer."""

    def __init__(
        self,
        frontend: Frontend,
        request: ChatRequest,
        toolbox: Toolbox,
        params: SamplingParams,
        prompt: list[int],
        model: str,
    ):
        self._tokenizer = frontend.tokenizer
        self._bytes = None if frontend.tokenizer is None else TokenBytes(frontend.tokenizer)
        self._scores: list[dict[int, Logprob] | None] | None = None
        self._request = request
        self._toolbox = toolbox
        self._readers: dict[int, CallReader | None] = {}
        self.params = params
        self.prompt = prompt
        self._usage = Usage([prompt])
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
        }
        self._begun: set[int] = set()
        self._ended: set[int] = set()

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer when all is there."""
        choices: dict[int, dict[str, Any]] = {}
        while (item := await generation.next()) is not None:
            for sample in self._progressed(item[1]):
                content, calls = self._read(sample)
                message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
                if calls:
                    message["content"] = content or None
                    message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
                choices[sample.index] = self._choice(sample, {"message": message})
        whole = {**self._head, "choices": [choices[i] for i in sorted(choices)], "usage": self._usage.as_dict()}
        return whole if self._scores is None else {**whole, "prompt_logprobs": self._scores}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """One event per token; the usage last, if it is wanted."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        always = options is not None and bool(options.continuous_usage_stats)
        while (item := await generation.next()) is not None:
            for sample in self._progressed(item[1]):
                content, calls = self._read(sample)
                delta: dict[str, Any] = {"content": content}
                if calls:
                    delta["tool_calls"] = calls
                if sample.index not in self._begun:
                    # The role travels with the first token: an event of its own would count as a token.
                    delta = {"role": "assistant", **delta}
                chunk = {**self._head, "choices": [self._choice(sample, {"delta": delta})]}
                if with_usage or always:
                    chunk["usage"] = self._usage.as_dict() if always else None
                yield event(chunk)
        if with_usage:
            yield event({**self._head, "choices": [], "usage": self._usage.as_dict()})
        yield DONE

    def _progressed(self, output: RequestOutput) -> list[CompletionOutput]:
        self._usage.take(0, output)
        if output.prompt_logprobs is not None:
            self._scores = output.prompt_logprobs
        samples = [s for s in output.outputs if s.index not in self._ended and (s.token_ids or s.finished)]
        self._ended.update(s.index for s in samples if s.finished)
        return samples

    def _read(self, sample: CompletionOutput) -> tuple[str, list[dict[str, Any]]]:
        """Content and calls of what the choice grew by."""
        reader = self._readers.setdefault(sample.index, self._toolbox.reader())
        return (sample.text, []) if reader is None else reader.read(sample.text, last=sample.finished)

    def _choice(self, sample: CompletionOutput, content: dict[str, Any]) -> dict[str, Any]:
        reader = self._readers.get(sample.index)
        called = reader is not None and reader.num_calls > 0 and sample.finish_reason == "stop"
        choice: dict[str, Any] = {
            "index": sample.index,
            **content,
            "logprobs": self._logprobs(sample) if self._request.logprobs else None,
            "finish_reason": "tool_calls" if called else sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = sample.token_ids
            if sample.index not in self._begun:
                choice["prompt_token_ids"] = self.prompt
        self._begun.add(sample.index)
        return choice

    def _logprobs(self, sample: CompletionOutput) -> dict[str, Any]:
        content = []
        for token_id, entry in zip(sample.token_ids, sample.logprobs or [], strict=True):
            others = sorted(entry.items(), key=lambda pair: pair[1].rank)[: self._request.top_logprobs or 0]
            content.append(
                {
                    **self._entry(token_id, entry[token_id]),
                    "top_logprobs": [self._entry(other, logprob) for other, logprob in others],
                }
            )
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: Logprob) -> dict[str, Any]:
        as_id = bool(self._request.return_tokens_as_token_ids)
        text = token_name(self._tokenizer, token_id, logprob.decoded_token, as_id=as_id)
        raw = None if self._bytes is None else list(self._bytes.of(token_id))
        return {"token": text, "logprob": logprob.logprob, "bytes": raw}
