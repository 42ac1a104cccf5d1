"""Our routes as an OpenAPI 3.1 document, for people, client generators and fuzzers.

Which routes there are comes from the application; what each takes and gives is said here. The bodies of the engine's
routes are described as far as the gateway reads them: the rest is vLLM's to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dropin import __version__
from vllm_dropin.gateway.access import PUBLIC
from vllm_dropin.gateway.chat import LONGEST_ID, MOST_MEMBERS
from vllm_dropin.gateway.config import GatewayConfig, SettingReport
from vllm_dropin.gateway.state import Status

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_NUMBER_OR_NULL: Schema = {"type": ["number", "null"]}


@dataclass(frozen=True)
class Described:
    """What a route takes and gives. `probe` statuses have the body of the 200 too; `stream`: or server-sent events."""

    summary: str
    answer: Schema
    media: str = "application/json"
    body: Mapping[str, Schema] | None = None
    probe: tuple[int, ...] = ()
    stream: bool = False


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _fields(required: Iterable[str] = (), /, **properties: Schema) -> Schema:
    """An object with at least these members; those that are not `required` may be absent."""
    return {"type": "object", "properties": properties, "required": list(required)}


def _whole(**properties: Schema) -> Schema:
    """An object with these members and no others."""
    return {**_fields(properties, **properties), "additionalProperties": False}


def _array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


_ROWS = {
    "text/csv": {"type": "string", "description": "Rows with a header; the prompts' column is prompt_column_name."},
    "multipart/form-data": _fields(["X"], X={"type": "string", "contentMediaType": "text/csv"}),
}
_HEALTH = Described("Is the service ready?", _ref("Message"), probe=(503, 513))
_PREDICT = Described("Score the rows of a CSV.", _ref("Predictions"), body=_ROWS)
_OTHER_TYPES = Described("Only to say that rows go to /predict/ (422).", _ref("Message"), body={"text/csv": _TEXT})


def _json(schema: Schema) -> dict[str, Schema]:
    return {"application/json": schema}


def _engine(summary: str, body: Schema | None = _OBJECT, *, stream: bool = False, form: bool = False) -> Described:
    media = None if body is None else {"multipart/form-data": body} if form else _json(body)
    return Described(summary, _OBJECT, body=media, stream=stream)


_CHAT = _engine("A chat completion.", _ref("ChatRequest"), stream=True)
_MODELS = _engine("The models that the engine serves.", None)
_RERANK = _engine("Order documents by what they have to do with a query.")
_SCORE = _engine("How much two texts have to do with each other.")
_AUDIO = _fields(["file"], file={"type": "string", "contentMediaType": "application/octet-stream"})

DESCRIBED: dict[str, Described] = {
    "/": _HEALTH,
    "/ping": _HEALTH,
    "/health": _HEALTH,
    "/livez": Described("Does the supervisor live?", _ref("Message"), probe=(503,)),
    "/readyz": Described("Is new work taken?", _ref("Phase"), probe=(503,)),
    "/startupz": Described("Has the engine been ready once?", _ref("Phase"), probe=(503,)),
    "/status": Described("Phase, timeline, load, settings.", _ref("Status")),
    "/metrics": Described("Counters for Prometheus.", _TEXT, media="text/plain"),
    "/version": Described("Of this service and of its engine.", _ref("Version")),
    "/openapi.json": Described("This document.", _fields(["openapi", "paths"], openapi=_TEXT, paths=_OBJECT)),
    "/info": Described("The model folder.", _ref("Info")),
    "/capabilities": Described("What can be asked.", _ref("Capabilities")),
    "/stats": Described("Memory, processes, times.", _ref("Stats")),
    "/predict": _PREDICT,
    "/predictions": _PREDICT,
    "/invocations": _PREDICT,
    "/predictUnstructured": _OTHER_TYPES,
    "/predictionsUnstructured": _OTHER_TYPES,
    "/transform": _OTHER_TYPES,
    "/chat/completions": _CHAT,
    "/v1/chat/completions": _CHAT,
    "/models": _MODELS,
    "/v1/models": _MODELS,
    "/v1/completions": _engine("A completion of each prompt.", _ref("CompletionRequest"), stream=True),
    "/v1/embeddings": _engine("A vector of each text."),
    "/v1/responses": _engine("OpenAI's responses.", stream=True),
    "/v1/responses/{id}": _engine("A stored response.", None),
    "/v1/responses/{id}/cancel": _engine("End a response that runs.", None),
    "/v1/messages": _engine("Anthropic's messages.", stream=True),
    "/v1/messages/count_tokens": _engine("How many tokens a message would take."),
    "/v1/audio/transcriptions": _engine("Speech to text.", _AUDIO, form=True, stream=True),
    "/v1/audio/translations": _engine("Speech to English text.", _AUDIO, form=True, stream=True),
    "/v1/audio/speech": _engine("Text to speech."),
    "/tokenize": _engine("The tokens of a text."),
    "/detokenize": _engine("The text of tokens."),
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/score": _SCORE,
    "/v1/score": _SCORE,
}


def document(methods: Mapping[str, Iterable[str]], direct: Iterable[str], config: GatewayConfig) -> dict[str, Any]:
    """The document for paths with their methods, and for the direct paths, which are all alike.

    Raises KeyError for a path that is not described here.
    """
    items = {path: _item(path, allowed, config) for path, allowed in methods.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vllm-dropin",
            "version": __version__,
            "description": "A trailing slash may be there or not. Operations answer at the root too.",
        },
        "servers": [{"url": config.url_prefix or "/"}],
        "security": [{"key": []}] if config.api_keys else [],
        "paths": {**items, **{path: _direct(path) for path in direct}},
        "components": {
            "schemas": _schemas(config.limits.max_n),
            "responses": {
                "Error": _response("An error.", _ref("Message")),
                "OpenAIError": _response("An error in OpenAI's shape.", _ref("OpenAIError")),
            },
            "pathItems": {"direct": _direct_item()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _item(path: str, allowed: Iterable[str], config: GatewayConfig) -> dict[str, Any]:
    described = DESCRIBED[path]
    item: dict[str, Any] = {method.lower(): _operation(path, method, described, config) for method in sorted(allowed)}
    return {**item, **_parameters(path)}


def _parameters(path: str) -> dict[str, Any]:
    if "{id}" not in path:
        return {}
    identifier = {"type": "string", "pattern": "^resp[A-Za-z0-9_-]{1,128}$"}
    return {"parameters": [{"name": "id", "in": "path", "required": True, "schema": identifier}]}


def _operation(path: str, method: str, described: Described, config: GatewayConfig) -> dict[str, Any]:
    headless = method == "HEAD"
    openai = path.startswith("/v1/") or described.answer is _OBJECT
    content = {} if headless else {described.media: {"schema": described.answer}}
    if described.stream:
        content["text/event-stream"] = {}
    responses: dict[str, Any] = {"200": {"description": "The answer.", **({"content": content} if content else {})}}
    for status in described.probe:
        responses[str(status)] = {**responses["200"], "description": "No."}
    if headless:
        responses["default"] = {"description": "An error."}
    else:
        responses["default"] = {"$ref": f"#/components/responses/{'OpenAIError' if openai else 'Error'}"}
    operation: dict[str, Any] = {"summary": described.summary, "responses": responses}
    if described.body is not None:
        content = {media: {"schema": schema} for media, schema in described.body.items()}
        operation["requestBody"] = {"required": True, "content": content}
    if config.api_keys and path in PUBLIC:
        operation["security"] = []
    return operation


def _direct(path: str) -> dict[str, Any]:
    parameters = _parameters(path)
    return {**_direct_item(), **parameters} if parameters else {"$ref": "#/components/pathItems/direct"}


def _direct_item() -> dict[str, Any]:
    """The engine's own route, with the methods of the contract; which of them it takes is up to it."""
    answer = {"description": "The engine's answer.", "content": {"*/*": {}}}
    operation = {"responses": {"200": answer, "default": {"$ref": "#/components/responses/OpenAIError"}}}
    body = {"content": {"application/json": {"schema": _OBJECT}}}
    return {
        "summary": "The engine's own route.",
        "get": operation,
        "post": {**operation, "requestBody": body},
        "put": {**operation, "requestBody": body},
    }


def _response(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _schemas(max_n: int) -> dict[str, Schema]:
    several: Schema = {"type": ["integer", "null"], "minimum": 1, "maximum": max_n}
    positive: Schema = {"type": ["integer", "null"], "minimum": 1}
    error = _fields(["message", "type", "code"], message=_TEXT, type=_TEXT, param={}, code={})
    status = Status.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    setting = SettingReport.model_json_schema(mode="serialization")
    parts: dict[str, Schema] = status.pop("$defs")
    load = _whole(in_flight={"type": "integer"}, queued={"type": "integer"})
    status["properties"] |= {"load": load, "settings": _array(_ref("SettingReport"))}
    status["required"] = [*status["required"], "load", "settings"]
    memory = ("total", "avail", "free", "container_limit", "container_max_used", "container_used", "drum_rss")
    process = _whole(pid={"type": "integer"}, cmdline=_array(_TEXT), mem={"type": "number"})
    times = dict.fromkeys(("avg", "min", "max", "total", "samples"), _NUMBER_OR_NULL)
    table = _whole(columns=_array(_TEXT), index=_array({"type": "integer"}), data=_array(_array({})))
    record = _fields(
        ["prediction", "predictionValues", "rowId"],
        prediction=_TEXT,
        predictionValues=_array(_whole(label=_TEXT, value=_TEXT)),
        rowId={"type": "integer"},
        extraModelOutput=_OBJECT,
    )
    return {
        "Message": _whole(message=_TEXT),
        "Phase": _whole(message=_TEXT, phase=_TEXT),
        "OpenAIError": _fields(["error"], error=error),
        "Version": _whole(version=_TEXT, engine=_whole(version={"type": ["string", "null"]})),
        "Status": status,
        "SettingReport": setting,
        **parts,
        "Info": _whole(
            codeDir=_TEXT,
            targetType=_TEXT,
            language=_TEXT,
            drumVersion=_TEXT,
            drumServer=_TEXT,
            modelMetadata={"type": ["object", "null"]},
        ),
        "Capabilities": _fields(
            ["supported_payload_formats", "supported_methods"],
            supported_payload_formats=_OBJECT,
            supported_methods=_OBJECT,
        ),
        "Stats": _whole(
            mem_info=_whole(**dict.fromkeys(memory, _NUMBER_OR_NULL)),
            drum_info=_array(process),
            time_info=_whole(run_predictor_total=_whole(**times)),
        ),
        "Predictions": {
            "oneOf": [
                _fields(["predictions"], predictions=_array(_TEXT), extraModelOutput=table),
                _fields(["data"], data=_array(record)),
            ]
        },
        "ChatRequest": _fields(
            ["messages"],
            messages=_array(
                _fields(["role", "content"], role={"enum": ["system", "user", "assistant"]}, content=_TEXT), minItems=1
            ),
            model={"type": ["string", "null"]},
            stream={"type": ["boolean", "null"]},
            n=several,
            max_tokens=positive,
            temperature={"type": ["number", "null"], "minimum": 0, "maximum": 2},
            datarobot_association_id={"type": "string", "maxLength": LONGEST_ID},
        ),
        "CompletionRequest": _fields(
            ["prompt"],
            prompt={"anyOf": [_TEXT, _array(_TEXT, minItems=1, maxItems=MOST_MEMBERS)]},
            model={"type": ["string", "null"]},
            stream={"type": ["boolean", "null"]},
            n=several,
            max_tokens=positive,
        ),
    }
