"""Tokenizer files, special tokens and chat templates; transformers is the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from yalis.engine.tokenizer import Tokenizer, generation_config
from yalis.errors import CheckpointError, RequestError

pytestmark = pytest.mark.unit

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Hello world, how are you?",
    "numbers 0123456789 and (brackets)",
]


def save_tokenizer(folder: Path, *, bos: bool = True, **config: Any) -> Path:
    """A small byte-level tokenizer in Hugging Face layout."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**defaults, **config}))
    return folder


def test_special_tokens_and_round_trip(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(tmp_path))
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 1)
    assert tokenizer.special_ids == {0, 1, 2}
    text = "Hello <|user|> é 😀"
    ids = tokenizer.encode(text)
    assert ids[0] == 0
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert 2 in ids
    assert tokenizer.decode(ids) == "Hello  é 😀"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + text
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""
    assert tokenizer.token_id("nowhere") is None


def test_the_post_processor_decides_about_bos(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(tmp_path, bos=False))
    assert tokenizer.encode("the") == tokenizer.encode("the", add_special_tokens=False)


def test_truncation_saved_with_the_tokenizer_is_not_applied(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_truncation(3)
    saved.enable_padding(length=50)
    saved.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox " * 10
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 2


def test_special_tokens_map_is_the_older_source(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, eos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "x"}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_folder_without_tokenizer_json_goes_through_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The older layout of byte-level models: vocab.json and merges.txt."""
    source = save_tokenizer(tmp_path / "new")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    tokenizer = Tokenizer.from_pretrained(old)
    assert "no tokenizer.json" in caplog.text
    text = "the quick brown 😀"
    assert tokenizer.encode(text) == Tokenizer.from_pretrained(source).encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == 1


def test_reading_a_tokenizer_does_not_import_transformers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    code = (
        "import sys; from yalis.engine.tokenizer import Tokenizer\n"
        f"t = Tokenizer.from_pretrained({str(tmp_path)!r})\n"
        "t.apply_chat_template([{'role': 'user', 'content': 'x'}])\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_generation_config(tmp_path: Path) -> None:
    assert generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [1, 3]}')
    assert generation_config(tmp_path) == {"temperature": 0.6, "eos_token_id": [1, 3]}
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object"):
        generation_config(tmp_path)


# ---- chat templates ---------------------------------------------------------------------------------------------

# In the shapes that published checkpoints have: marked turns, system prompt rules, tool lists, reasoning blocks.
TURNS = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
ALTERNATING = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] | trim %}{% set loop_messages = messages[1:] %}
{% else %}
{% set system = false %}{% set loop_messages = messages %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + (('<<SYS>>' + system + '<</SYS>>') if loop.first and system else '') + message['content'] + ' [/INST]' }}
    {% else %}
{{ ' ' + message['content'] + eos_token }}
    {% endif %}
{% endfor %}"""
TOOLS = """{%- if tools is not none and tools %}
{{- "# Tools\\n" }}
{%- for tool in tools %}
{{- tool | tojson }}
{{- "\\n" + tool | tojson(indent=4) }}
{%- endfor %}
{%- endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if loop.index0 == ns.last_user %}{{ '>>' }}{% endif %}
    {%- if message.content is string %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {%- for part in message.content %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{%- endfor %}
    {%- endif %}
    {%- if message.tool_calls is defined %}{{ message.tool_calls | tojson }}{% endif %}
    {%- if message.role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- strftime_now('%Y') }}"""
TALK = [
    {"role": "system", "content": " Be <brief> & kind. "},
    {"role": "user", "content": "Hi 😀 <b>"},
    {"role": "assistant", "content": "<think>x</think>\nHello"},
    {"role": "user", "content": "Bye"},
]
FUNCTIONS = [{"type": "function", "function": {"name": "f", "description": "<é> & 'x'", "parameters": {"a": [1, 2.5]}}}]


@pytest.mark.parametrize("template", [TURNS, ALTERNATING, TOOLS], ids=["turns", "alternating", "tools"])
@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": False}, {"tools": FUNCTIONS, "enable_thinking": False}]
)
def test_templates_render_as_in_transformers(tmp_path: Path, template: str, options: dict[str, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = save_tokenizer(tmp_path, eos_token="</s>")
    (folder / "chat_template.jinja").write_text(template)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    expected = theirs.apply_chat_template(TALK, tokenize=False, **{"add_generation_prompt": True, **options})
    assert Tokenizer.from_pretrained(folder).apply_chat_template(TALK, **options) == expected


def test_rich_messages_render_as_in_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    talk = [
        {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "é"}}}]},
        {"role": "tool", "content": "42"},
    ]
    folder = save_tokenizer(tmp_path, eos_token="</s>", chat_template=TOOLS)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert Tokenizer.from_pretrained(folder).apply_chat_template(talk, add_generation_prompt=False) == (
        theirs.apply_chat_template(talk, tokenize=False)
    )


def test_sources_of_templates_and_their_precedence(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "inline"}, {"name": "tool_use", "template": "with tools"}]
    folder = save_tokenizer(tmp_path, chat_template=named)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(TALK) == "inline"
    assert tokenizer.apply_chat_template(TALK, tools=FUNCTIONS) == "with tools"
    assert tokenizer.apply_chat_template(TALK, chat_template="tool_use") == "with tools"
    assert tokenizer.apply_chat_template(TALK, chat_template="{{ messages | length }}") == "4"
    with pytest.raises(RequestError, match="no chat template named 'rag'; known: default, tool_use"):
        tokenizer.apply_chat_template(TALK, chat_template="rag")
    (folder / "chat_template.jinja").write_text("file")
    extra = folder / "additional_chat_templates"
    extra.mkdir()
    (extra / "rag.jinja").write_text("{{ documents[0] }}")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(TALK) == "file"
    assert tokenizer.apply_chat_template(TALK, chat_template="rag", documents=[{"a": 1}]) == "{'a': 1}"


def test_failures_of_templates_are_request_errors(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path)
    with pytest.raises(RequestError, match=r"has no chat template.*chat_template\.jinja"):
        Tokenizer.from_pretrained(folder).apply_chat_template(TALK)
    (folder / "chat_template.jinja").write_text(ALTERNATING)
    tokenizer = Tokenizer.from_pretrained(folder)
    with pytest.raises(RequestError, match="roles must alternate"):
        tokenizer.apply_chat_template([TALK[1], TALK[1]])
    with pytest.raises(RequestError, match="fails on this conversation"):
        tokenizer.apply_chat_template([{"role": "user", "content": None}])
    with pytest.raises(RequestError, match="refuses"):
        tokenizer.apply_chat_template(TALK, chat_template="{% for %}")


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(tmp_path))
    for attack in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages.__init__.__globals__ }}"):
        with pytest.raises(RequestError, match="refuses"):
            tokenizer.apply_chat_template(list(TALK), chat_template=attack)


def test_tokens_added_as_special_only_in_the_config(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.add_tokens([AddedToken("<|end|>", special=False)])
    saved.save(str(tmp_path / "tokenizer.json"))
    assert (
        Tokenizer.from_pretrained(tmp_path).token_id("<|end|>") not in Tokenizer.from_pretrained(tmp_path).special_ids
    )
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|end|>"}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("the<|end|>")) == "the"


def test_a_special_token_outside_the_vocabulary_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(tmp_path, pad_token="<nowhere>"))
    assert "'<nowhere>'" in caplog.text
    assert tokenizer.token_id("<nowhere>") is None


def test_longest_token_where_there_is_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(tmp_path))
    longest = max(len(tokenizer.decode([i], skip_special_tokens=False)) for i in range(tokenizer.vocab_size))
    assert tokenizer.longest_token is not None and tokenizer.longest_token >= longest
    assert len(tokenizer.encode("x" * 10_000)) >= 10_000 // tokenizer.longest_token
    backend = tokenizer.backend
    backend.normalizer = tokenizers.normalizers.NFC()
    assert Tokenizer(backend).longest_token == 4 * tokenizer.longest_token
    backend.normalizer = tokenizers.normalizers.Strip()
    assert Tokenizer(backend).longest_token is None
    backend.normalizer = None  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    assert Tokenizer(backend).longest_token is None
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    assert Tokenizer(words).longest_token is None
