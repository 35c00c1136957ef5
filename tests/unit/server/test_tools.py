"""Tool calls: every family parsed however the text is cut, what is no call stays content, enforced calls parse."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import DEMO
from yalis.engine.guided import GuideCompiler
from yalis.engine.sampling_params import GuidedParams
from yalis.engine.tokenizer import Tokenizer
from yalis.errors import RequestError
from yalis.server.tools import (
    FAMILIES,
    MAX_TOOLS,
    call_grammar,
    check_tool_choice,
    check_tools,
    needs_special_tokens,
    template_messages,
    tool_family,
    tool_parser,
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "what it does", "parameters": schema}}


TOOLS = [
    tool("weather", city={"type": "string", "maxLength": 8}, unit={"enum": ["C", "F"]}),
    tool("add", a={"type": "integer", "minimum": 0, "maximum": 99}, b={"$ref": "#/$defs/b"}),
    {"type": "function", "function": {"name": "now"}},
]
TOOLS[1]["function"]["parameters"]["$defs"] = {"b": {"type": "boolean"}}

# Templates as checkpoints of the families have them, cut down to how they write calls.
HERMES = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
For each function call return <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>{% endfor %}"""
LLAMA = """{%- if tools is not none %}Environment: ipython
{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}
{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}<|eot_id|>
{%- endfor %}"""
MISTRAL = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}
{{- c.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]</s>{% endif %}{% endfor %}"""
MISTRAL_ARGS = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]
{{- c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"""
TEMPLATES = {"hermes": HERMES, "llama3_json": LLAMA, "mistral": MISTRAL, "mistral_args": MISTRAL_ARGS}
SPECIAL = ("<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "</s>", "[TOOL_CALLS]", "[ARGS]")

Parsed = tuple[str, list[tuple[str, dict[str, Any]]]]


def parse(family: str, parts: list[str], choice: Any = "auto", special: tuple[str, ...] = SPECIAL) -> Parsed:
    """Content and calls of an answer that comes in ``parts``."""
    parser = tool_parser(TEMPLATES[family], TOOLS, choice, special_tokens=special)
    assert parser is not None
    deltas = [parser.feed(part) for part in parts] + [parser.finish()]
    found = [call for delta in deltas for call in delta.calls]
    assert [call.index for call in found] == list(range(len(found)))
    assert len({call.id for call in found}) == len(found)
    form = r"[a-zA-Z0-9]{9}" if family.startswith("mistral") else r"call_[0-9a-f]{24}"
    assert all(re.fullmatch(form, call.id or "") for call in found)
    calls = [(call.name or "", json.loads(call.arguments)) for call in found]
    return "".join(delta.content for delta in deltas), calls


def written(family: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as a model of the family writes them."""
    if family == "mistral_args":
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(values)}" for name, values in calls)
    key = FAMILIES[family].arguments
    objects = [json.dumps({"name": name, key: values}) for name, values in calls]
    if family == "hermes":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
    if family == "mistral":
        return f"[TOOL_CALLS] [{', '.join(objects)}]"
    return "; ".join(objects)


# ---- any cut gives the same -------------------------------------------------------------------------------------

PIECES = [
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        "<|eom_id|>",
        "</s>",
        "<tool_",
        "[TOOL",
        "[ARGS]",
        "[TOOL_CALLS]add[ARGS]",
        "[TOOL_CALLS]now[AR",
        "{",
        "}",
    ),
    *("[", "]", " ", "\n", ";", '"', "\\", "Let me see.", "\u00e9\U0001f600", '{"name": "now"}'),
    *(
        '{"name": "other"}',
        '{"name": "add", "arguments": {"a": 1, "b": "</tool_call>"}}',
        '{"name": "now", "parameters": "{}"}',
        "null",
        "<",
    ),
]


@settings(max_examples=300)
@given(st.data())
def test_the_cut_does_not_matter(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(family, [text])
    assert parse(family, parts) == whole
    assert parse(family, list(text)) == whole


NAMES = st.sampled_from(["weather", "add", "now"])
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(st.text(max_size=8), VALUES, max_size=3)), min_size=1, max_size=3)


@settings(max_examples=150)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    calls=CALLS,
    content=st.sampled_from(["", "Let me see.", "a < b [T {"]),
    cut=st.integers(0, 10),
)
def test_calls_come_back_as_they_were_written(family: str, calls: Any, content: str, cut: int) -> None:
    if family == "llama3_json":
        content = ""
    text = f"{content}\n{written(family, calls)}\n"
    assert parse(family, [text[:cut], text[cut:]]) == (content, [(name, values) for name, values in calls])


@settings(max_examples=100)
@given(st.sampled_from(sorted(FAMILIES)), st.text(alphabet="ab<{[ \n;\"'", max_size=40), st.integers(0, 40))
def test_text_without_calls_is_content_to_the_letter(family: str, text: str, cut: int) -> None:
    assert parse(family, [text[:cut], text[cut:]]) == (text, [])


def test_content_is_given_out_at_once_and_markup_never() -> None:
    parser = tool_parser(HERMES, TOOLS)
    assert parser is not None
    seen = []
    for char in 'One moment. <b> <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>':
        delta = parser.feed(char)
        seen.append(delta.content)
        assert "<tool" not in "".join(seen)
        assert not delta.calls or char == "}"
    # One character behind at most, where it may begin a mark, and white space that may stand before a call.
    assert "".join(seen[:11]) == "One moment."
    assert "".join(seen) + parser.finish().content == "One moment. <b>"


# ---- what is a call and what is not -----------------------------------------------------------------------------

CALL, PARSED = '{"name": "add", "arguments": {"a": 1}}', ("add", {"a": 1})


@pytest.mark.parametrize(
    ("family", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>{CALL}", "", [PARSED]),  # the closing mark may be missing
        ("hermes", f"<tool_call>{CALL}</tool_", "", [PARSED]),
        ("hermes", f"<tool_call>{CALL}<|eot_id|>", "", [PARSED]),
        ("hermes", f"a <tool_call>{CALL}</tool_call> b <tool_call>{CALL}</tool_call>", "a b", [PARSED] * 2),
        ("hermes", f"<tool_call> oops <tool_call>{CALL}</tool_call>", "<tool_call> oops", [PARSED]),
        ("hermes", '<tool_call>{"name": "add", "arg', '<tool_call>{"name": "add", "arg', []),
        ("hermes", '<tool_call>{"name": "add" "a"}</tool_call>', '<tool_call>{"name": "add" "a"}</tool_call>', []),
        ("hermes", '<tool_call>{"name": "none"}</tool_call>', '<tool_call>{"name": "none"}</tool_call>', []),
        ("hermes", '<tool_call>{"name": "add", "arguments": 3}', '<tool_call>{"name": "add", "arguments": 3}', []),
        ("hermes", '<tool_call>{"name": "now", "x": NaN}', '<tool_call>{"name": "now", "x": NaN}', []),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [PARSED]),
        ("hermes", f"<tool_call>[{CALL}]</tool_call>", f"<tool_call>[{CALL}]</tool_call>", []),
        ("hermes", CALL, CALL, []),
        ("llama3_json", f"{CALL}<|eom_id|>", "", [PARSED]),
        ("llama3_json", f" \n<|python_tag|>{CALL}; {CALL}\n{CALL}", "", [PARSED] * 3),
        ("llama3_json", "<|python_tag|>print(1)<|eom_id|>", "<|python_tag|>print(1)", []),
        ("llama3_json", f"Call: {CALL}", f"Call: {CALL}", []),
        ("llama3_json", f"{CALL} is how", " is how", [PARSED]),
        ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
        ("llama3_json", '{"answer": {', '{"answer": {', []),
        ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]</s>", "", [PARSED] * 2),
        ("mistral", f"[TOOL_CALLS]{CALL}", "", [PARSED]),
        ("mistral", f"[TOOL_CALLS] [{CALL}, 3]", f"[TOOL_CALLS] [{CALL}, 3]", []),
        ("mistral", "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
        ("mistral", f"[{CALL}]", f"[{CALL}]", []),
        ("mistral_args", '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]now[ARGS] {}</s>', "", [PARSED, ("now", {})]),
        ("mistral_args", "[TOOL_CALLS]none[ARGS]{}", "[TOOL_CALLS]none[ARGS]{}", []),
        ("mistral_args", "[TOOL_CALLS]now[ARGS]{", "[TOOL_CALLS]now[ARGS]{", []),
        ("mistral_args", "[TOOL_CALLS]now[ARGS]3", "[TOOL_CALLS]now[ARGS]3", []),
        ("mistral_args", "[TOOL_CALLS]now[AR", "[TOOL_CALLS]now[AR", []),
        ("mistral_args", "[TOOL_CALLS][ARGS]{}", "[TOOL_CALLS][ARGS]{}", []),
        ("mistral_args", f"[TOOL_CALLS]{'x' * 65}[ARGS]{{}}", f"[TOOL_CALLS]{'x' * 65}[ARGS]{{}}", []),
    ],
)  # fmt: skip
def test_cases(family: str, text: str, content: str, calls: list[Any]) -> None:
    assert parse(family, [text]) == (content, calls)


def test_choices_limit_what_is_a_call() -> None:
    text = written("hermes", [("add", {"a": 1})])
    assert parse("hermes", [text], "none") == (text, [])
    assert parse("hermes", [text], "function:now") == (text, [])
    assert parse("hermes", [text], {"type": "function", "function": {"name": "add"}})[1] == [PARSED]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text", ["<tool_call>{" * 20_000, "<tool_call>{" * 20_000 + "}" * 20_000, "<tool_call" * 20_000]
)
def test_nonsense_takes_linear_time(text: str) -> None:
    parts = [text[i : i + 50] for i in range(0, len(text), 50)]
    assert parse("hermes", parts) == (text, [])


# ---- enforced calls ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The demo model's, with the marks as tokens: Mistral's and Llama's special ones, Hermes' plain ones."""
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<tool_call>", "</tool_call>")])
    return Tokenizer(backend)


def draw(tokenizer: Tokenizer, grammar: str, seed: int) -> tuple[str, bool]:
    eos = tokenizer.token_id("<|eot_id|>")
    assert eos is not None
    compiler = GuideCompiler(tokenizer, tokenizer.vocab_size, [eos])
    guide, rng, output = compiler.compile(GuidedParams(grammar=grammar)), np.random.default_rng(seed), []
    while len(output) < 200:
        bits = np.zeros(compiler.num_words, np.int32)
        guide.fill(output, bits)
        assert guide.error == ""
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0]
        if eos in allowed and (len(allowed) == 1 or rng.integers(2)):
            return tokenizer.decode(output, skip_special_tokens=False), True
        output.append(int(rng.choice(allowed[allowed != eos])))
    return tokenizer.decode(output, skip_special_tokens=False), False


@pytest.mark.parametrize("choice", ["required", "function:add", "function:weather"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_enforced_calls_parse(tokenizer: Tokenizer, family: str, choice: str) -> None:
    ids = tokenizer.added_tokens
    grammar = call_grammar(TEMPLATES[family], TOOLS, choice, added_ids=ids)
    assert grammar is not None
    counts = []
    for seed in range(12):
        text, ended = draw(tokenizer, grammar, seed)
        if not ended:
            continue
        content, calls = parse(family, [text], choice)
        assert content == "" and calls
        counts.append(len(calls))
        for name, arguments in calls:
            assert choice in ("required", f"function:{name}")
            if name == "add":
                assert set(arguments) == {"a", "b"} and 0 <= arguments["a"] <= 99 and type(arguments["b"]) is bool
            if name == "weather":
                assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("C", "F")
    assert len(counts) >= 6
    assert (max(counts) > 1) == (choice == "required")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_call_where_parallel_ones_are_not_wanted(tokenizer: Tokenizer, family: str) -> None:
    ids = tokenizer.added_tokens
    grammar = call_grammar(TEMPLATES[family], TOOLS[2:], "required", added_ids=ids, parallel=False)
    assert grammar is not None
    found = [
        parse(family, [text])[1] for text, ended in (draw(tokenizer, grammar, seed) for seed in range(20)) if ended
    ]
    assert found and {len(calls) for calls in found} == {1}


def test_nothing_is_enforced_without_need() -> None:
    assert call_grammar(HERMES, TOOLS, "auto", added_ids={}) is None
    assert call_grammar(HERMES, TOOLS, "none", added_ids={}) is None
    assert call_grammar("no such thing", TOOLS, "required", added_ids={}) is None


# ---- requests ---------------------------------------------------------------------------------------------------


def test_families() -> None:
    assert {name: tool_family(template) for name, template in TEMPLATES.items()} == {name: name for name in TEMPLATES}
    assert tool_family("{% for m in messages %}{{ m.content }}{% endfor %}") is None
    assert tool_parser("{{ messages }}", TOOLS) is None
    assert tool_family("{{ messages }}", "mistral") == "mistral"
    with pytest.raises(RequestError, match="known ones are hermes"):
        tool_parser(HERMES, TOOLS, name="pythonic")
    assert needs_special_tokens(MISTRAL, SPECIAL) and not needs_special_tokens(HERMES, SPECIAL)
    assert not needs_special_tokens("{{ messages }}", SPECIAL)


def test_conversations_with_calls_render(tokenizer: Tokenizer) -> None:
    """What a client sends back after a call, through each template, is what the model had written."""
    calls = [("add", {"a": 1, "b": True}), ("now", {})]
    sent = [
        {"id": f"call{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for n, (name, arguments) in enumerate(calls)
    ]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": sent}]
    for family, template in TEMPLATES.items():
        text = tokenizer.apply_chat_template(template_messages(messages), tools=TOOLS, chat_template=template)
        assert "what it does" in text and "None" not in text
        answer = text[text.rindex("?") + 1 :].removeprefix("<|im_end|><|im_start|>assistant\n")
        answer = answer.removeprefix("<|eot_id|>")
        assert parse(family, [answer], special=(*SPECIAL, "<|im_end|>")) == ("", calls)
    assert messages[1]["content"] is None and isinstance(sent[0]["function"]["arguments"], str)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([], "at least one"),
        ({}, "must be a list"),
        ([tool(f"t{i}") for i in range(MAX_TOOLS + 1)], f"at most {MAX_TOOLS}"),
        ([3], r"tools\[0\] must be"),
        ([{"type": "retrieval"}], r"tools\[0\] must be"),
        ([{"type": "function", "function": {}}], "name=None"),
        ([tool("a b")], "name='a b'"),
        ([tool("a"), tool("a")], "taken by an earlier"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], "must be a JSON schema"),
        ([{"type": "function", "function": {"name": "a", "description": 3}}], "must be a string"),
    ],
)
def test_bad_tools(tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_tools(tools)
    assert check_tools(TOOLS) == TOOLS


@pytest.mark.parametrize(
    "choice", ["any", 3, {}, {"type": "function"}, {"type": "function", "function": {"name": "x"}}]
)
def test_bad_choices(choice: Any) -> None:
    with pytest.raises(RequestError, match="tool_choice"):
        check_tool_choice(choice, TOOLS)


@pytest.mark.parametrize("arguments", ["{", "[1]", 3, "NaN"])
def test_bad_earlier_calls(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls\[0\].function.arguments"):
        template_messages([{"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls"):
        template_messages([{"role": "assistant", "tool_calls": {}}])
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls\[0\]"):
        template_messages([{"role": "assistant", "tool_calls": [3]}])
