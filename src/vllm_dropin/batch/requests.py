"""From a record to the chat completion request that asks about it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from vllm_dropin.batch.kinds import Format, listed
from vllm_dropin.batch.parameters import WrongValue, check_name, is_unset, parsed, read_object
from vllm_dropin.batch.records import Record
from vllm_dropin.batch.templates import PromptTemplate, TemplateFault
from vllm_dropin.batch.values import as_json, as_text
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.scoring.prompts import GenerationDefaults
from vllm_dropin.scoring.rows import EMPTY

MESSAGES = "messages"
CHAT_URL = "/v1/chat/completions"
_INSTRUCT = ("system", "developer")
Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class RequestOptions:
    """What a row's request is made of.

    The prompt is the template's, where there is one; else the chat in `messages_column`, where that is given; else the
    text in `prompt_column` (None: as the generation defaults say, or the chat in a column `messages` where only that is
    there). `params` holds for all rows; the columns `row_params` override them by name, where a cell is not empty.
    `keep_model` lets a request of an OpenAI Batch file name the model that it asks.
    """

    prompt_column: str | None = None
    template: PromptTemplate | None = None
    messages_column: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    row_params: tuple[str, ...] = ()
    response_format: Mapping[str, Any] | None = None
    keep_model: bool = False


@dataclass(frozen=True, slots=True)
class Composed:
    """A request as JSON, and the text of its prompt, by which rows are ordered and echoes found; or an `error`."""

    body: bytes = b""
    text: str = ""
    error: str | None = None


class RowFault(Exception):
    """This row can't be asked; its text says why."""


class Composer:
    """Makes requests of rows of one format for one model (None: none is named).

    Raises ConfigurationError when the options contradict each other.
    """

    def __init__(
        self, options: RequestOptions, defaults: GenerationDefaults, model: str | None, format: Format
    ) -> None:
        self._options = options
        self._defaults = defaults
        self._model = model
        self._batch = format == "openai-batch"
        self._refuse_contradictions()
        self._prompt_column = options.prompt_column or defaults.prompt_column_name
        self._messages_column = options.messages_column
        self._params = self._fixed()
        self._row_params = dict.fromkeys(options.row_params)

    @property
    def many(self) -> bool:
        """Whether a row may have more than one completion."""
        return "n" in self._row_params or int(self._params.get("n") or 1) > 1

    def check(self, columns: Sequence[str] | None) -> None:
        """Refuse columns in which what the requests are made of is missing. Raises ConfigurationError, naming them.

        None, of JSON Lines: each record is looked at when its turn comes.
        """
        if columns is None:
            return
        if self._options.template is not None:
            self._options.template.check(columns)
        else:
            self._require_prompt(columns)
        missing = [name for name in self._row_params if name not in columns]
        if missing:
            raise ConfigurationError(
                f"--row-params: the input has no column {listed(missing)}; it has {listed(columns)}",
                "Correct the names.",
            )

    def compose(self, record: Record) -> Composed:
        """The request of one row."""
        if record.error is not None:
            return Composed(error=record.error)
        try:
            body, text = self._taken(record.values) if self._batch else self._made(record.values)
            return Composed(json.dumps(body).encode("ascii"), text)
        except RowFault as fault:
            return Composed(error=str(fault))
        except RecursionError:
            return Composed(error="a value is nested too deeply")

    def fingerprint(self) -> dict[str, str]:
        """Everything that shapes the requests, by names that a message can use."""
        if self._batch:
            prompt = {"prompt": "OpenAI Batch"}
        elif self._options.template is not None:
            prompt = {"template": _digest(self._options.template.text)}
        elif self._messages_column is not None:
            prompt = {"messages column": self._messages_column}
        else:
            prompt = {"prompt column": self._prompt_column}
        if self._model is not None:
            prompt["model"] = self._model
        if self._defaults.system_prompt and not self._batch:
            prompt["system prompt"] = _digest(self._defaults.system_prompt)
        fixed = {name: json.dumps(value, sort_keys=True) for name, value in sorted(self._params.items())}
        if "response_format" in fixed:
            fixed["response_format"] = _digest(fixed["response_format"])
        chosen = {"row parameters": ", ".join(sorted(self._row_params))} if self._row_params else {}
        return {**prompt, **fixed, **chosen}

    def _refuse_contradictions(self) -> None:
        options = self._options
        prompts = {
            "--template": options.template,
            "--messages-column": options.messages_column,
            "--prompt-column": options.prompt_column,
        }
        given = [name for name, value in prompts.items() if value is not None]
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} both say what the prompt is", "Give one of them.")
        others = {
            "--params": options.params,
            "--row-params": options.row_params,
            "--response-format": options.response_format,
        }
        given += [name for name, value in others.items() if value]
        if self._batch and given:
            raise ConfigurationError(
                f"{given[0]} has no effect on an OpenAI Batch file, whose requests are sent as they are",
                "Leave it out, or read the file as plain records with --format jsonl.",
            )
        if options.response_format and "response_format" in options.params:
            raise ConfigurationError("--response-format and --params both set response_format", "Give one of them.")
        for name in options.row_params:
            check_name(name)

    def _fixed(self) -> dict[str, Any]:
        if self._batch:
            return {}
        fixed: dict[str, Any] = {}
        for name in ("max_tokens", "n", "temperature"):
            value = getattr(self._defaults, name)
            if value is not None:
                fixed[name] = value
        if "max_completion_tokens" in self._options.params:
            fixed.pop("max_tokens", None)  # a default must not stand beside the same bound by its newer name
        fixed |= self._options.params
        if self._options.response_format is not None:
            fixed["response_format"] = dict(self._options.response_format)
        return fixed

    def _require_prompt(self, columns: Sequence[str]) -> None:
        if self._batch or (self._messages_column or self._prompt_column) in columns:
            return
        explicit = self._options.prompt_column is not None or self._messages_column is not None
        if not explicit and MESSAGES in columns:
            self._messages_column = MESSAGES
            return
        raise ConfigurationError(
            f"the input has no column {self._messages_column or self._prompt_column!r}; it has {listed(columns)}",
            "Name the prompt's column with --prompt-column, or write a --template.",
        )

    def _made(self, values: Mapping[str, object]) -> tuple[dict[str, Any], str]:
        chat, text = self._chat(values)
        body: dict[str, Any] = {"messages": chat}
        if self._model is not None:
            body["model"] = self._model
        body |= self._params
        for name in self._row_params:
            value = values.get(name)
            if is_unset(value):
                continue
            try:
                body[name] = parsed(name, as_json(value))
            except WrongValue as error:
                raise RowFault(f"the column {name!r} {error}: it is {as_text(value)[:60]!r}") from error
            if name == "max_completion_tokens" and "max_tokens" not in self._options.params:
                body.pop("max_tokens", None)
        return body, text

    def _chat(self, values: Mapping[str, object]) -> tuple[Chat, str]:
        """The messages, and their text."""
        system = self._defaults.system_prompt or None
        if self._options.template is not None:
            try:
                rendered = self._options.template.render(values)
            except TemplateFault as fault:
                raise RowFault(f"the template fails on this row: {fault}") from fault
            _refuse_empty(rendered.user)
            text = rendered.user if rendered.system is None else f"{rendered.system}\n{rendered.user}"
            return _said(system if rendered.system is None else rendered.system, rendered.user), text
        column = self._messages_column
        if column is None and self._options.prompt_column is None and self._prompt_column not in values:
            column = MESSAGES if MESSAGES in values else None
        if column is not None:
            chat = _messages(_present(values, column), column)
            if system and not any(message["role"] in _INSTRUCT for message in chat):
                chat.insert(0, {"role": "system", "content": system})
            return chat, _spoken(chat)
        prompt = _prompt(_present(values, self._prompt_column), self._prompt_column)
        return _said(system, prompt), prompt

    def _taken(self, values: Mapping[str, object]) -> tuple[dict[str, Any], str]:
        """The request that a row of an OpenAI Batch file holds."""
        url = values.get("url", CHAT_URL)
        if url != CHAT_URL:
            raise RowFault(f"the url is {as_text(url)[:60]!r}; only {CHAT_URL} is served")
        if values.get("method", "POST") != "POST":
            raise RowFault(f"the method is {as_text(values.get('method'))[:20]!r}; it must be POST")
        body = as_json(_present(values, "body"))
        if not isinstance(body, dict):
            raise RowFault("the body is no JSON object")
        if self._model is not None and not (self._options.keep_model and body.get("model")):
            body["model"] = self._model
        # Answers are read as a whole; they are the same.
        body.pop("stream", None)
        body.pop("stream_options", None)
        chat = body.get("messages")
        return body, _spoken(chat) if isinstance(chat, list) else ""


def read_response_format(path: Path) -> dict[str, Any]:
    """The `response_format` that `--response-format` names: a JSON Schema, or one as OpenAI writes it.

    Raises ConfigurationError.
    """
    document = read_object(path, "--response-format")
    if document.get("type") in ("json_object", "text") or (
        document.get("type") == "json_schema" and isinstance(document.get("json_schema"), dict)
    ):
        return document
    title = document.get("title")
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", title if isinstance(title, str) and title else path.stem)[:64]
    return {"type": "json_schema", "json_schema": {"name": name, "schema": document, "strict": True}}


def _said(system: str | None, prompt: str) -> Chat:
    chat: Chat = [{"role": "user", "content": prompt}]
    if system:
        chat.insert(0, {"role": "system", "content": system})
    return chat


def _present(values: Mapping[str, object], column: str) -> object:
    if column not in values:
        raise RowFault(f"the row has no {column!r}")
    return values[column]


def _prompt(value: object, column: str) -> str:
    if isinstance(value, Mapping | list | tuple | bytes):
        raise RowFault(f"{column!r} is no text")
    text = as_text(value)
    _refuse_empty(text)
    return text


def _refuse_empty(text: str) -> None:
    if not text or text.isspace():
        raise RowFault(EMPTY)


def _messages(value: object, column: str) -> Chat:
    """A chat: a list of messages, or the JSON text of one."""
    if is_unset(value):
        raise RowFault(EMPTY)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowFault(f"{column!r} is not valid JSON") from error
    if value is None or value == []:
        raise RowFault(EMPTY)
    chat = as_json(value)
    if not isinstance(chat, list):
        raise RowFault(f"{column!r} is no list of messages")
    for place, message in enumerate(chat):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowFault(f"{column!r}: message {place} is no object with a role")
        # A Parquet column gives every message every field, most of them null.
        chat[place] = {name: item for name, item in message.items() if item is not None or name == "content"}
    return cast(Chat, chat)


def _spoken(chat: Sequence[object]) -> str:
    """What the messages say, one after the other."""
    texts: list[str] = []
    for message in chat:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            texts += [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(texts)


def _digest(text: str) -> str:
    return f"blake2b:{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"
