"""Tool calls of chat answers: from a template family's text to OpenAI's calls, and grammars that enforce them.

Models write calls as text, each family in its own way:

- ``hermes`` (Hermes, Qwen): ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, once per call;
- ``llama3_json`` (Llama 3.1 and later): the whole answer is ``{"name": ..., "parameters": {...}}``, perhaps after
  ``<|python_tag|>``, further ones after ``;``;
- ``mistral``: ``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]``;
- ``mistral_args`` (Mistral's templates since 2025): ``[TOOL_CALLS]NAME[ARGS]{...}``, once per call.

How a server uses this module for one request with ``tools``::

    tools = check_tools(body["tools"])                       # RequestError: 400
    choice = check_tool_choice(body["tool_choice"], tools)   # "none", "auto", "required" or a function's name
    parser = tool_parser(template, tools, choice, special_tokens=...)  # one per choice of the answer; None: 400
    messages = template_messages(body["messages"])           # arguments as objects, which templates expect
    prompt = tokenizer.apply_chat_template(messages, tools=None if choice == "none" else tools)
    grammar = call_grammar(template, tools, choice, added_ids=...)     # None unless calls are enforced
    params = SamplingParams(..., guided=GuidedParams(grammar=grammar), skip_special_tokens=False)

``skip_special_tokens`` must be off where the family's marker is a special token (`needs_special_tokens`), or the marker
would never reach the parser, which takes the other special tokens out of the content.

A call is given out when its JSON is complete and names one of the tools, as one fragment: a fragment sent early could
not be taken back when the rest turns out not to be a call. Everything that is no call is content, as it was written;
only white space next to calls is dropped. How the text is cut into deltas changes nothing.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from yalis.engine.sampling_params import JSON_WHITE_SPACE
from yalis.errors import RequestError

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_WHITE = " \t\r\n"
# Options of llguidance that travel inside a schema.
_JSON_OPTIONS = {"whitespace_pattern": JSON_WHITE_SPACE}
# Arguments that a Mistral template gets back must come from calls with ids of nine letters and digits.
_MISTRAL_ID_LENGTH = 9


class CallDelta(msgspec.Struct, frozen=True):
    """One fragment of one call; ``id`` and ``name`` come only in its first fragment."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class ToolDelta(msgspec.Struct, frozen=True):
    """What some text added to the answer."""

    content: str = ""
    calls: list[CallDelta] = []


class ToolParser(Protocol):
    """Turns the text of one answer into content and calls. Whole answers: one `feed`, one `finish`."""

    def feed(self, text: str) -> ToolDelta:
        """Take in what the answer grew by; gives what is certain by now."""
        ...

    def finish(self) -> ToolDelta:
        """The answer is over: gives what was held back."""
        ...


@dataclass(frozen=True)
class Family:
    """How a family of templates writes calls.

    Attributes:
        opening: text before a call, or before a list of them.
        closing: text after it; empty for none.
        bare: whether a call may also stand alone, at the beginning of an answer or after another and ``;``.
        listed: whether calls come as one JSON list (a lone object is understood too).
        arguments: name of the arguments in its JSON.
        named: text between a function's name and its arguments, where the name stands before the JSON; empty where it
            is in the JSON.
    """

    opening: str
    closing: str = ""
    bare: bool = False
    listed: bool = False
    arguments: str = "arguments"
    named: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """Its texts that may be tokens of their own."""
        return tuple(mark for mark in (self.opening, self.closing, self.named) if mark)


FAMILIES: dict[str, Family] = {
    "hermes": Family("<tool_call>", "</tool_call>"),
    "llama3_json": Family("<|python_tag|>", bare=True, arguments="parameters"),
    "mistral_args": Family("[TOOL_CALLS]", named="[ARGS]"),
    "mistral": Family("[TOOL_CALLS]", listed=True),
}
# What a template's source holds when it is of the family; looked at in this order.
_SIGNS = (
    ("hermes", ("<tool_call>",)),
    ("mistral_args", ("[ARGS]",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("llama3_json", ("<|python_tag|>", "Environment: ipython", '{"name": function name')),
)


# ---- requests in ------------------------------------------------------------------------------------------------


def tool_family(chat_template: str, name: str | None = None) -> str | None:
    """Name of the family of a template.

    Args:
        chat_template: its source.
        name: what ``--tool-call-parser`` says, which wins; None to find out.

    Returns:
        a key of `FAMILIES`, or None when the template does not deal with tools in a known way.

    Raises:
        RequestError: there is no family of that name.
    """
    if name is not None:
        if name not in FAMILIES:
            raise RequestError(f"tool_call_parser={name!r}: known ones are {', '.join(FAMILIES)}")
        return name
    if "tools" not in chat_template:
        return None
    return next((family for family, signs in _SIGNS if any(sign in chat_template for sign in signs)), None)


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """The ``tools`` of a request, checked: functions with distinct names and object schemas.

    Raises:
        RequestError: they are none, or too many, or one is malformed; names it.
    """
    if not isinstance(tools, list) or not tools:
        raise RequestError("tools must be a list with at least one function; leave it out for none")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries, at most {MAX_TOOLS} are allowed; send fewer")
    names = set()
    for at, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise RequestError(f'tools[{at}] must be {{"type": "function", "function": {{"name": ...}}}}')
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(
                f"tools[{at}].function.name={name!r}: must be 1 to 64 of letters, digits, underscores, dots and dashes"
            )
        if name in names:
            raise RequestError(f"tools[{at}].function.name={name!r} is taken by an earlier tool; rename one")
        names.add(name)
        if not isinstance(function.get("parameters", {}), dict):
            raise RequestError(f"tools[{at}].function.parameters must be a JSON schema (an object)")
        if not isinstance(function.get("description") or "", str):
            raise RequestError(f"tools[{at}].function.description must be a string")
    return tools


def check_tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    """The ``tool_choice`` of a request as ``none``, ``auto``, ``required`` or ``function:NAME``.

    Args:
        choice: None (which is ``auto``), one of the words, or ``{"type": "function", "function": {"name": ...}}``.
        tools: from `check_tools`.

    Raises:
        RequestError: it is malformed, or names no tool.
    """
    if choice is None:
        return "auto"
    if choice in ("none", "auto", "required") and isinstance(choice, str):
        return choice
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError(
            f'tool_choice={choice!r}: must be "none", "auto", "required" or '
            '{"type": "function", "function": {"name": ...}}'
        )
    known = [tool["function"]["name"] for tool in tools]
    if name not in known:
        raise RequestError(f"tool_choice names the function {name!r}; the tools are {', '.join(known)}")
    return f"function:{name}"


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a conversation as chat templates expect them: arguments of earlier calls as objects, no null content.

    Raises:
        RequestError: the arguments of a call are no JSON object.
    """
    return [_template_message(at, message) for at, message in enumerate(messages)]


def _template_message(at: int, message: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(message)
    if changed.get("content") is None:
        changed["content"] = ""
    calls = changed.get("tool_calls")
    if calls is None:
        changed.pop("tool_calls", None)
        return changed
    if not isinstance(calls, list):
        raise RequestError(f"messages[{at}].tool_calls must be a list")
    opened = []
    for number, call in enumerate(calls):
        where = f"messages[{at}].tool_calls[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f'{where} must be {{"id": ..., "type": "function", "function": {{"name": ...}}}}')
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        if not isinstance(arguments, dict):
            raise RequestError(f"{where}.function.arguments must be a JSON object, written as a string")
        opened.append({**call, "function": {**function, "arguments": arguments}})
    changed["tool_calls"] = opened
    return changed


def needs_special_tokens(chat_template: str, special_tokens: Collection[str], *, name: str | None = None) -> bool:
    """Whether the text must keep special tokens, because the family's marker is one of them."""
    family = tool_family(chat_template, name)
    return family is not None and any(mark in special_tokens for mark in FAMILIES[family].marks)


# ---- enforced calls ---------------------------------------------------------------------------------------------


def call_grammar(
    chat_template: str,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str,
    *,
    added_ids: Mapping[str, int],
    parallel: bool = True,
    name: str | None = None,
) -> str | None:
    """Grammar for `yalis.engine.sampling_params.GuidedParams` that has the model write calls and nothing else.

    Args:
        chat_template: its source.
        tools, tool_choice: from `check_tools` and `check_tool_choice`.
        added_ids: `yalis.engine.tokenizer.Tokenizer.added_tokens`: a mark that is one of them is no text to a grammar.
        parallel: whether more than one call may come; a named function is called once.
        name: of the family, from ``--tool-call-parser``.

    Returns:
        None when nothing is enforced (``none``, ``auto``).
    """
    key = tool_family(chat_template, name)
    if key is None or tool_choice in ("none", "auto"):
        return None
    family = FAMILIES[key]
    wanted = _wanted(tools, tool_choice)
    repeated = parallel and tool_choice == "required"

    def literal(text: str) -> str:
        return f"<[{added_ids[text]}]>" if text in added_ids else json.dumps(text)

    rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(wanted)))}"]
    for number, tool in enumerate(wanted):
        function = tool["function"]
        # A schema of its own for each tool, so that the references in it are found.
        schema = json.dumps({"type": "object", **function.get("parameters", {}), "x-guidance": _JSON_OPTIONS})
        if family.named:
            rules += [f"call_{number}: {json.dumps(function['name'])} {literal(family.named)} arguments_{number}"]
        else:
            head = json.dumps(f'{{"name": "{function["name"]}", "{family.arguments}": ')
            rules += [f'call_{number}: {head} arguments_{number} "}}"']
        rules += [f"arguments_{number}: %json {schema}"]
    if family.listed:
        more = ' (", " call)*' if repeated else ""
        start = f'{literal(family.opening)} " "? "[" call{more} "]"'
    elif family.bare:
        start = 'call ("; " call)*' if repeated else "call"
    elif family.named:
        start = f"({literal(family.opening)} call)+" if repeated else f"{literal(family.opening)} call"
    else:
        one = f'{literal(family.opening)} "\\n" call "\\n" {literal(family.closing)}'
        start = f'{one} ("\\n" {one})*' if repeated else one
    return "\n".join([f"start: {start}", *rules]) + "\n"


def _wanted(tools: Sequence[Mapping[str, Any]], tool_choice: str) -> list[Mapping[str, Any]]:
    """The tools that may be called under ``tool_choice``."""
    if tool_choice == "none":
        return []
    name = tool_choice.removeprefix("function:") if tool_choice.startswith("function:") else None
    return [tool for tool in tools if name in (None, tool["function"]["name"])]


# ---- answers out ------------------------------------------------------------------------------------------------


def tool_parser(
    chat_template: str,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str | Mapping[str, Any] = "auto",
    *,
    special_tokens: Collection[str] = (),
    name: str | None = None,
) -> ToolParser | None:
    """A parser for one answer.

    Args:
        chat_template: source of the template that rendered the conversation.
        tools: from `check_tools`.
        tool_choice: from `check_tool_choice`, or as the request has it; with ``none`` everything is content.
        special_tokens: texts of the tokenizer's special tokens, which are no content. Only where the text holds them.
        name: of the family, from ``--tool-call-parser``.

    Returns:
        None when the template defines no tool calls.

    Raises:
        RequestError: unknown ``name`` or ``tool_choice``.
    """
    key = tool_family(chat_template, name)
    if key is None:
        return None
    choice = tool_choice if isinstance(tool_choice, str) else check_tool_choice(tool_choice, tools)
    names = frozenset(tool["function"]["name"] for tool in _wanted(tools, choice))
    id_length = _MISTRAL_ID_LENGTH if key in ("mistral", "mistral_args") else None
    return _Parser(FAMILIES[key], names, special_tokens, id_length)


class _Parser:
    """Reads content until something may be a call, then holds it back until it is one or cannot be one.

    Every decision is taken at the character that makes it, so deltas may be cut anywhere.
    """

    def __init__(self, family: Family, names: frozenset[str], special_tokens: Collection[str], id_length: int | None):
        self._family = family
        self._names = names
        self._id_length = id_length
        # Longest first: one may begin with another.
        drops = {text for text in special_tokens if text and text not in family.marks}
        self._drops = sorted(drops, key=lambda text: (-len(text), text))
        self._marks = [*self._drops, family.opening] if names else self._drops
        self._buffer = ""
        self._bare = family.bare and bool(names)  # a bare call may begin here
        self._closing = False  # a call has just ended
        self._naming = False  # the buffer begins with the opening of a named call
        self._name: str | None = None  # of that call
        self._scanner: _JsonEnd | None = None  # of the JSON value in the buffer
        self._opened = 0  # characters of the buffer before that value
        self._white = ""  # at the end of the content: dropped if a call follows
        self._content: list[str] = []
        self._calls: list[CallDelta] = []
        self._num_calls = 0

    def feed(self, text: str) -> ToolDelta:
        self._buffer += text
        return self._drain(final=False)

    def finish(self) -> ToolDelta:
        delta = self._drain(final=True)
        if self._num_calls == 0 and self._white:
            delta = ToolDelta(delta.content + self._white, delta.calls)
        self._white = ""
        return delta

    def _drain(self, *, final: bool) -> ToolDelta:
        while self._buffer and self._advance(final):
            pass
        delta = ToolDelta("".join(self._content), self._calls)
        self._content, self._calls = [], []
        return delta

    def _advance(self, final: bool) -> bool:
        """Take one decision; False when it needs text that is not there yet."""
        if self._scanner is not None:
            return self._read_value(final)
        if self._naming:
            return self._read_name(final)
        if self._closing:
            return self._read_closing(final)
        if self._bare:
            return self._read_bare(final)
        return self._read_content(final)

    def _read_content(self, final: bool) -> bool:
        buffer = self._buffer
        found = [(at, -len(mark), mark) for mark in self._marks if (at := buffer.find(mark)) >= 0]
        at, _, mark = min(found, default=(len(buffer), 0, ""))
        if not final:
            # A longer mark may be under way at or before the one that was found.
            under_way = [start for m in self._marks if (start := _partial(buffer, m)) is not None and start <= at]
            at, mark = min(under_way, default=at), "" if under_way else mark
        self._say(buffer[:at])
        self._buffer = buffer[at:]
        if not mark:
            return False
        if mark == self._family.opening and self._family.named:
            self._naming = True
        elif mark == self._family.opening:
            self._begin_value(len(mark))
        else:
            self._buffer = self._buffer[len(mark) :]
        return True

    def _read_bare(self, final: bool) -> bool:
        """At the beginning: white space, then perhaps a call."""
        at = _first_black(self._buffer)
        if at is None and not final:
            return False
        self._bare = False
        if at is None:
            return True
        if self._buffer[at] == "{":
            self._say(self._buffer[:at])
            self._buffer = self._buffer[at:]
            self._begin_value(0)
        return True

    def _read_name(self, final: bool) -> bool:
        """After the opening: a function's name and what ends it."""
        opening, ending = self._family.opening, self._family.named
        found = _NAME.match(self._buffer, len(opening))
        end = found.end() if found is not None else len(opening)
        rest = self._buffer[end:]
        if not final and ending.startswith(rest) and rest != ending:
            return False
        self._naming = False
        if found is not None and rest.startswith(ending):
            self._name = found.group()
            self._begin_value(end + len(ending))
        else:
            self._say(opening)
            self._buffer = self._buffer[len(opening) :]
        return True

    def _begin_value(self, opened: int) -> None:
        self._opened = opened
        self._scanner = _JsonEnd(opened, "[{" if self._family.listed and opened else "{")

    def _read_value(self, final: bool) -> bool:
        assert self._scanner is not None
        end = self._scanner.find(self._buffer)
        if end is None and not final and not self._scanner.impossible:
            return False
        calls = None if end is None else self._read_calls(self._buffer[self._opened : end])
        if calls is None:
            # Content, and not looked at again: nested attempts would take quadratic time. A mark without a value is
            # content alone.
            end = self._opened if self._scanner.impossible else end or len(self._buffer)
            self._say(self._without_drops(self._buffer[:end]))
            self._buffer = self._buffer[end:]
            self._scanner = self._name = None
            return True
        self._scanner = self._name = None
        self._calls += calls
        self._white = ""
        self._buffer = self._buffer[end:]
        self._closing = True
        return True

    def _read_closing(self, final: bool) -> bool:
        """After a call: its closing text, or what separates bare calls."""
        expected = self._family.closing or (";" if self._family.bare else "")
        at = _first_black(self._buffer)
        if at is None:
            # White space alone: if nothing follows, it is dropped.
            return False
        rest = self._buffer[at:]
        if expected.startswith(rest) and rest != expected and not final:
            return False
        self._closing = False
        self._bare = self._family.bare
        if expected.startswith(rest):  # whole, or cut off by the answer's end
            self._buffer = ""
        elif expected and rest.startswith(expected):
            self._buffer = rest[len(expected) :]
        return True

    def _read_calls(self, text: str) -> list[CallDelta] | None:
        value = _loads(text)
        if self._name is not None:
            value = {"name": self._name, "arguments": value}
        calls = value if isinstance(value, list) else [value]
        read = [self._read_call(call) for call in calls]
        found = [call for call in read if call is not None]
        if not found or len(found) < len(read):
            return None
        deltas = [
            CallDelta(self._num_calls + number, self._new_id(), name, arguments)
            for number, (name, arguments) in enumerate(found)
        ]
        self._num_calls += len(deltas)
        return deltas

    def _read_call(self, call: Any) -> tuple[str, str] | None:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in self._names:
            return None
        # Models mix up the families' two names.
        arguments: Any = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        if not isinstance(arguments, dict):
            return None
        return call["name"], json.dumps(arguments, ensure_ascii=False)

    def _new_id(self) -> str:
        if self._id_length is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(self._id_length))

    def _without_drops(self, text: str) -> str:
        for drop in self._drops:
            text = text.replace(drop, "")
        return text

    def _say(self, text: str) -> None:
        text = self._white + text
        black = text.rstrip(_WHITE)
        self._white = text[len(black) :]
        if black:
            self._content.append(black)


class _JsonEnd:
    """Finds where a JSON object or list ends, in text that grows; whether it is valid is for others to say.

    Args:
        start: where to look, white space before the value included.
        opening: characters that the value may begin with.
    """

    def __init__(self, start: int, opening: str):
        self.impossible = False
        self._at = start
        self._opening = opening
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """Index after the value's last character, None while it is not there. ``text`` may only have grown."""
        for at in range(self._at, len(text)):
            char = text[at]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif self._depth == 0:
                if char in self._opening:
                    self._depth = 1
                elif char not in _WHITE:
                    self.impossible = True
                    return None
            elif char == '"':
                self._in_string = True
            elif char in "[{":
                self._depth += 1
            elif char in "]}":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        self._at = len(text)
        return None


def _loads(text: str) -> Any:
    """The value of strict JSON; None when it is none, or holds what JSON cannot hold (NaN, infinity)."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return value


def _first_black(text: str) -> int | None:
    """Index of the first character that is no white space."""
    return next((at for at, char in enumerate(text) if char not in _WHITE), None)


def _partial(text: str, mark: str) -> int | None:
    """Where an unfinished ``mark`` begins at the end of ``text``."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return len(text) - length
    return None
