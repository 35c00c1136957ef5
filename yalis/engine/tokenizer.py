"""Text to token ids and back, and chat templates, from a model folder in Hugging Face layout.

``tokenizer.json`` is read with the `tokenizers` library alone; a folder without it goes through `transformers`, which
is imported only then and says so in the log.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from yalis.config import EngineConfig
from yalis.errors import CheckpointError, RequestError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

Message = Mapping[str, Any]
_DEFAULT_TEMPLATE = "default"


def generation_config(path: Path | str) -> dict[str, Any]:
    """Content of ``generation_config.json`` in a model folder; empty where there is none.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    return _read_json(Path(path) / "generation_config.json")


def load_tokenizer(path: Path, config: EngineConfig) -> Tokenizer | None:
    """The tokenizer in ``path``; None where dummy weights need none and there is none, which is logged.

    Raises:
        CheckpointError: there is no tokenizer although the weights are real.
    """
    named = any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    if config.load_format == "dummy" and not named:
        logger.info("%s has no tokenizer: prompts must be token ids, outputs will be", path)
        return None
    return Tokenizer.from_pretrained(path)


class Tokenizer:
    """Tokenizer of one model.

    Attributes:
        backend: the `tokenizers.Tokenizer` underneath.
        bos_token, eos_token: texts of those tokens, None where the model has none.
        bos_token_id, eos_token_id: their ids. A model may end a text with further tokens: see its generation config.
        special_ids: ids left out of text by ``skip_special_tokens``.
        chat_templates: template sources by name; ``default`` is used unless a request names another.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        origin: str = "this tokenizer",
    ):
        """Use `from_pretrained`.

        Args:
            backend: without truncation and padding.
            special_tokens: role (``bos_token``, ``eos_token``, ...) to text.
            chat_templates: template sources by name.
            origin: names the tokenizer in errors.
        """
        self.backend = backend
        self._special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self._origin = origin
        self.bos_token = self._special_tokens.get("bos_token")
        self.eos_token = self._special_tokens.get("eos_token")
        self.bos_token_id = self.token_id(self.bos_token) if self.bos_token else None
        self.eos_token_id = self.token_id(self.eos_token) if self.eos_token else None
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)

    @classmethod
    def from_pretrained(cls, path: Path | str) -> Tokenizer:
        """Read the tokenizer of a model folder.

        Raises:
            CheckpointError: no tokenizer there, or its files cannot be read.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(folder, config)
        if (folder / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises bare Exception for every kind of bad file
                raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
        else:
            backend, special = _convert_with_transformers(folder, special)
        # A checkpoint may carry its training's truncation length; cutting a user's prompt silently is never right.
        backend.no_truncation()
        backend.no_padding()
        missing = [text for text in special.values() if backend.token_to_id(text) is None]
        for text in missing:
            logger.warning("%s names the special token %r, which its vocabulary does not hold", folder, text)
        special = {role: text for role, text in special.items() if text not in missing}
        # Tokens named only in tokenizer_config.json count as special too, as in transformers.
        backend.add_special_tokens(
            [tokenizers.AddedToken(text, special=True, normalized=False) for text in special.values()]
        )
        return cls(backend, special_tokens=special, chat_templates=_chat_templates(folder, config), origin=str(folder))

    @property
    def vocab_size(self) -> int:
        """Ids go from 0 to this less one; the model's matrices may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def added_tokens(self) -> dict[str, int]:
        """Text to id of the tokens that stand for themselves in a text, special or not."""
        return {str(token): i for i, token in self.backend.get_added_tokens_decoder().items()}

    @cached_property
    def longest_token(self) -> int | None:
        """Most characters of text that one token can stand for; None where that has no limit that can be told.

        A token for what is unknown may stand for any text, other normalizers than NFC may shorten text at will, and
        some added tokens swallow the blanks beside them.
        """
        model, normalizer = self.backend.model, self.backend.normalizer
        added = self.backend.get_added_tokens_decoder().values()
        complete = isinstance(model, tokenizers.models.BPE) and (model.unk_token is None or model.byte_fallback)
        composing = isinstance(normalizer, tokenizers.normalizers.NFC)
        if not complete or not (normalizer is None or composing) or any(t.lstrip or t.rstrip for t in added):
            return None
        # NFC makes one character of four at most (a letter and three marks). In byte-level vocabularies a character of
        # the token is a byte of the text, which is at most a character.
        return (4 if composing else 1) * max(map(len, self.backend.get_vocab(with_added_tokens=True)))

    def token_id(self, token: str) -> int | None:
        """Id of a token's text, None if there is no such token."""
        return self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``.

        Args:
            add_special_tokens: let the tokenizer's post-processor add what the model was trained with, such as a
                beginning-of-sequence token. Off for text from `apply_chat_template`, which spells them out.

        Raises:
            UnicodeEncodeError: the text holds half of a surrogate pair.
        """
        text.encode()  # the library's own error would not say what is wrong
        # The call for many texts, because that for one keeps every other thread of this process waiting.
        return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids that are no tokens (padding of the model's matrices) give no text."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Text of a conversation as the model was trained to see it; encode it with ``add_special_tokens=False``.

        Args:
            messages: ``{"role": ..., "content": ...}`` in order.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: descriptions of functions as JSON schemas.
            chat_template: name of one of `chat_templates`, or a template's source; default ``tool_use`` when there are
                tools and such a template, else ``default``.
            documents: for retrieval templates.
            variables: further variables of the template, such as ``enable_thinking``.

        Raises:
            RequestError: there is no template, or it refuses the conversation.
        """
        source = self.template_source(chat_template, has_tools=bool(tools))
        values: dict[str, Any] = {
            **self._special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        try:
            return _compile_template(source).render(values)
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template of {self._origin} refuses this conversation: {error}") from error
        except (TypeError, KeyError, ValueError) as error:
            raise RequestError(
                f"the chat template of {self._origin} fails on this conversation ({type(error).__name__}: {error}); "
                "check that every message has a role and a content that it understands"
            ) from error

    def template_source(self, wanted: str | None = None, *, has_tools: bool = False) -> str:
        """The template that `apply_chat_template` uses.

        Args:
            wanted: its ``chat_template``.
            has_tools: whether there are tools.

        Raises:
            RequestError: there is none.
        """
        if wanted is not None:
            # A source is recognised by its markup: no template's name holds a brace.
            if wanted not in self.chat_templates and "{" not in wanted:
                known = ", ".join(sorted(self.chat_templates)) or "none"
                raise RequestError(f"{self._origin} has no chat template named {wanted!r}; known: {known}")
            return self.chat_templates.get(wanted, wanted)
        for name in ("tool_use", _DEFAULT_TEMPLATE) if has_tools else (_DEFAULT_TEMPLATE,):
            if name in self.chat_templates:
                return self.chat_templates[name]
        raise RequestError(
            f"{self._origin} has no chat template, so messages cannot be turned into a prompt; send a plain prompt, or "
            "put a chat_template.jinja beside its tokenizer.json"
        )


# ---- files ------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Role to text; ``tokenizer_config.json`` wins over the older ``special_tokens_map.json``."""
    merged = {**_read_json(folder / "special_tokens_map.json"), **config}
    roles = {}
    for role in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = merged.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            roles[role] = text
    return roles


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Sources by name; files beside the tokenizer win over ``tokenizer_config.json``."""
    inline = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(inline, str):
        templates[_DEFAULT_TEMPLATE] = inline
    elif isinstance(inline, list):
        templates = {entry["name"]: entry["template"] for entry in inline}
    elif isinstance(inline, dict):
        templates = dict(inline)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        templates[_DEFAULT_TEMPLATE] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return templates


def _convert_with_transformers(folder: Path, special: Mapping[str, str]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    try:
        from transformers import AutoTokenizer

        logger.warning("%s has no tokenizer.json; converting its tokenizer with transformers", folder)
        slow: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = slow.backend_tokenizer
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and transformers cannot make one from the other files there "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); add the model's "
            "tokenizer.json"
        ) from error
    roles = {role: str(text) for role, text in slow.special_tokens_map.items() if isinstance(text, str)}
    return backend, {**roles, **special}


# ---- templates --------------------------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: marks the assistant's part for training; here it only stands for its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models have never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@lru_cache(maxsize=16)
def _compile_template(source: str) -> jinja2.Template:
    """Templates come from checkpoints, so they run in a sandbox and may not change what they are given."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)
