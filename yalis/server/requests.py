"""From what a client sent to what the engine takes: prompts as token ids, and sampling parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from yalis.engine.sampling_params import SamplingParams
from yalis.engine.tokenizer import Tokenizer
from yalis.errors import RequestError
from yalis.server.errors import bad_request, context_overflow, refused
from yalis.server.frontend import Frontend
from yalis.server.protocol import SAMPLING_FIELDS, ChatMessage, SamplingRequest
from yalis.server.tools import template_messages

T = TypeVar("T")
# Of the body, in bytes: smaller ones are prepared in less time than the change to another thread is worth.
_THREAD_FROM = 4096


async def beside(http: Request, work: Callable[..., T], *args: Any) -> T:
    """``work(*args)``, in another thread if the request's body is large: that may take seconds, and others wait.

    The library calls that take long in there leave other threads their turn.
    """
    if http.state.body_bytes < _THREAD_FROM:
        return work(*args)
    return await asyncio.to_thread(work, *args)


def as_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a completion: one text, texts, one list of token ids, or lists of them.

    Raises:
        ApiError: 400, anything else.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("prompt is an empty list; send at least one prompt", "prompt")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if _are_ids(prompt):
        return [list(prompt)]
    if all(isinstance(item, list) and _are_ids(item) for item in prompt):
        return list(prompt)
    raise bad_request("prompt must be a string, a list of strings, token ids, or a list of lists of them", "prompt")


def _are_ids(items: Sequence[Any]) -> bool:
    return all(type(item) is int for item in items)


def encode(frontend: Frontend, prompt: str | list[int], *, add_special_tokens: bool) -> list[int]:
    """Token ids of a prompt.

    Raises:
        ApiError: 400, text without a tokenizer, ids that no token has, or more than the context holds.
    """
    if isinstance(prompt, str):
        tokenizer = frontend.need_tokenizer()
        refuse_far_too_long(frontend, tokenizer, len(prompt), "prompt")
        try:
            return tokenizer.encode(prompt, add_special_tokens)
        except UnicodeEncodeError as error:
            raise bad_request(f"the prompt is no valid text: {error}", "prompt") from None
    if len(prompt) >= frontend.max_model_len:
        raise context_overflow(frontend.max_model_len, len(prompt), None, "prompt")
    check_ids(frontend, prompt, "prompt")
    return prompt


def check_ids(frontend: Frontend, ids: Sequence[int], param: str) -> None:
    """Refuse ids that no token has.

    Raises:
        ApiError: 400.
    """
    limit = int(frontend.loaded().info["vocab_size"])
    for token in ids:
        if not 0 <= token < limit:
            raise bad_request(f"{param} token {token} is no token of the model: ids go from 0 to {limit - 1}", param)


def refuse_far_too_long(frontend: Frontend, tokenizer: Tokenizer, characters: int, param: str) -> None:
    """Refuse text that cannot fit the context, whatever its tokens are: tokenizing megabytes takes seconds of a core.

    Raises:
        ApiError: 400.
    """
    if tokenizer.longest_token is None:
        return
    at_least = -(-characters // tokenizer.longest_token)
    if at_least >= frontend.max_model_len:
        raise context_overflow(frontend.max_model_len, at_least, None, param)


def render_chat(
    frontend: Frontend,
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None,
    add_generation_prompt: bool = True,
    **further: Any,
) -> list[int]:
    """Token ids of a conversation.

    Raises:
        ApiError: 400, there is no template or it refuses the conversation, or the context cannot hold it.
    """
    tokenizer = frontend.need_tokenizer()
    if not messages:
        raise bad_request("messages is an empty list; send at least one message", "messages")
    # Before any work on them: every template writes a token or more for each message, and all of its content.
    if len(messages) >= frontend.max_model_len:
        raise context_overflow(frontend.max_model_len, len(messages), None, "messages")
    options = dict(variables or {})
    reserved = {"messages", "tools", "add_generation_prompt", "chat_template"} & options.keys()
    if reserved:
        raise bad_request(
            f"chat_template_kwargs may not hold {', '.join(sorted(reserved))}; these are fields of the request",
            "chat_template_kwargs",
        )
    try:
        plain = template_messages([_plain_message(index, message) for index, message in enumerate(messages)])
        refuse_far_too_long(frontend, tokenizer, sum(len(m["content"] or "") for m in plain), "messages")
        text = tokenizer.apply_chat_template(
            plain,
            add_generation_prompt,
            list(tools) if tools else None,
            chat_template=frontend.options.chat_template,
            **options,
            **further,
        )
        refuse_far_too_long(frontend, tokenizer, len(text), "messages")  # roles, names, tools, documents
        return tokenizer.encode(text, add_special_tokens=False)
    except RequestError as error:
        raise bad_request(str(error), "messages") from None
    except (UnicodeEncodeError, RecursionError) as error:
        raise bad_request(f"the messages are no valid text: {error}", "messages") from None


def _plain_message(index: int, message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it: plain text, and only the keys that it has."""
    content = message.content
    if isinstance(content, list):
        texts = []
        for part in content:
            if part.get("type") not in ("text", "input_text") or not isinstance(part.get("text"), str):
                raise bad_request(
                    f"messages[{index}].content: only parts of type text are served, not {part.get('type')!r}",
                    f"messages[{index}].content",
                )
            texts.append(part["text"])
        content = "".join(texts)
    plain: dict[str, Any] = {"role": message.role, "content": content if content is not None else ""}
    for name in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    return plain


def sampling_params(
    frontend: Frontend,
    request: SamplingRequest,
    *,
    prompt_lengths: Sequence[int],
    max_tokens: int | None,
    unlimited: bool,
    param: str,
    **further: Any,
) -> SamplingParams:
    """Parameters by precedence: the request, then the checkpoint's generation config, then the defaults.

    Args:
        prompt_lengths: tokens of each prompt, checked against the model's context.
        max_tokens: what the request says.
        unlimited: whether no word on ``max_tokens`` means as many as the context leaves.
        param: the field that holds the prompt, for errors.
        further: fields that the request spells in another way.

    Raises:
        ApiError: 400, a value is outside its limits, or prompt and output do not fit.
    """
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        raise bad_request(
            "stream_options.include_obfuscation is not served: events carry nothing but the answer; send false, or "
            "leave it out",
            "stream_options.include_obfuscation",
            "unsupported_parameter",
        )
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    given = {name: getattr(request, name) for name in SAMPLING_FIELDS if getattr(request, name) is not None}
    given.update({name: value for name, value in further.items() if value is not None})
    limit = frontend.max_model_len
    longest = max(prompt_lengths)
    if min(prompt_lengths) == 0:
        raise bad_request(f"{param} is empty: it must hold at least one token", param)
    if longest >= limit:
        raise context_overflow(limit, longest, None, param)
    if frontend.tokenizer is None:
        given["detokenize"] = False
    try:
        if max_tokens is not None:
            given["max_tokens"] = max_tokens
        elif unlimited:
            given.setdefault("max_tokens", frontend.generation_config.get("max_new_tokens"))
        params = SamplingParams.resolve(given, frontend.generation_config)
        params.check_vocabulary(int(frontend.loaded().info["vocab_size"]))
    except RequestError as error:
        raise refused(error) from None
    if max_tokens is not None and longest + max_tokens > limit:
        raise context_overflow(limit, longest, max_tokens, param)
    return params


def token_name(tokenizer: Tokenizer | None, token_id: int, text: str | None, *, as_id: bool) -> str:
    """How a token is written in log-probabilities."""
    if as_id or text is None or tokenizer is None:
        return f"token_id:{token_id}"
    return text
