"""Tools in one chat request: the template's way to write calls, applied to prompt, sampling and answer."""

from __future__ import annotations

from typing import Any

from yalis.engine.sampling_params import GuidedParams
from yalis.errors import RequestError
from yalis.server.errors import bad_request
from yalis.server.frontend import Frontend
from yalis.server.protocol import ChatRequest
from yalis.server.tools import (
    CallDelta,
    ToolDelta,
    ToolParser,
    call_grammar,
    check_tool_choice,
    check_tools,
    needs_special_tokens,
    tool_parser,
)


class Toolbox:
    """The tools of a request; empty where it has none.

    Raises:
        ApiError: 400, they are malformed, or the template has no tool calls.

    Attributes:
        for_template: what the template gets; None for no tools.
        sampling: fields of `SamplingParams` that calls need.
    """

    def __init__(self, frontend: Frontend, request: ChatRequest):
        self.for_template: list[dict[str, Any]] | None = None
        self.sampling: dict[str, Any] = {}
        self._parallel = request.parallel_tool_calls is not False
        self._make: Any = None
        if request.tools is None:
            if request.tool_choice not in (None, "none", "auto"):
                raise bad_request("tool_choice needs tools", "tool_choice")
            return
        name = frontend.options.tool_call_parser
        param = "tools"
        try:
            tools = check_tools(request.tools)
            param = "tool_choice"
            choice = check_tool_choice(request.tool_choice, tools)
            if choice == "none":
                return
            param = "tools"
            tokenizer = frontend.need_tokenizer()
            template = tokenizer.template_source(frontend.options.chat_template, has_tools=True)
            added = tokenizer.added_tokens
            special = {text for text, token_id in added.items() if token_id in tokenizer.special_ids}
            keep = needs_special_tokens(template, special, name=name)
            if tool_parser(template, tools, choice, name=name) is None:
                raise RequestError(
                    "the model's chat template defines no tool calls that are known here; use another model, or name "
                    "its way with --tool-call-parser"
                )
            grammar = call_grammar(template, tools, choice, added_ids=added, parallel=self._parallel, name=name)
        except RequestError as error:
            raise bad_request(str(error), param) from None
        self.for_template = tools
        if keep:
            self.sampling["skip_special_tokens"] = False
        if grammar is not None:
            self.sampling["guided"] = GuidedParams(grammar=grammar)
        texts = special if keep else set()
        self._make = lambda: tool_parser(template, tools, choice, special_tokens=texts, name=name)

    def reader(self) -> CallReader | None:
        """A reader for one choice of the answer; None without tools."""
        return None if self._make is None else CallReader(self._make(), parallel=self._parallel)


class CallReader:
    """Reads the text of one choice: content, and calls in OpenAI's shape.

    Attributes:
        num_calls: calls so far.
    """

    def __init__(self, parser: ToolParser, *, parallel: bool):
        self.num_calls = 0
        self._parser = parser
        self._parallel = parallel

    def read(self, text: str, *, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """What the text that was added holds."""
        deltas = [self._parser.feed(text)]
        if last:
            deltas.append(self._parser.finish())
        return "".join(d.content for d in deltas), [c for d in deltas for c in self._calls(d)]

    def _calls(self, delta: ToolDelta) -> list[dict[str, Any]]:
        wanted = [call for call in delta.calls if self._parallel or call.index == 0]
        self.num_calls += sum(call.id is not None for call in wanted)
        return [_as_dict(call) for call in wanted]


def _as_dict(call: CallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is not None:
        function = {"name": call.name, **function}
    fragment: dict[str, Any] = {"index": call.index, "function": function}
    if call.id is not None:
        fragment = {"index": call.index, "id": call.id, "type": "function", "function": function}
    return fragment
