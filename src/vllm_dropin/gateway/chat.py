"""A chat request made ready for the engine: model alias, generation defaults, association id."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.errors import HttpError
from vllm_dropin.gateway.splice import association_member
from vllm_dropin.scoring.prompts import GenerationDefaults

MOST_MEMBERS = 2048  # of a list in a request: OpenAI's own bound on the length of its arrays
MOST_WITHIN = 8192  # of all lists within such a list, together
LONGEST_ID = 1024  # characters of an association id: it is repeated in every chunk of a stream
GREEDY = 1e-5  # vLLM takes a temperature below this as 0


@dataclass(frozen=True)
class Chat:
    """A chat request made ready: the bytes for the engine, and the member that is spliced into its answer."""

    body: bytes
    member: bytes


def prepare_chat(raw: bytes, config: GatewayConfig, served: str | None, max_model_len: int | None) -> Chat:
    """Apply the model alias and the generation defaults that the request leaves open (contract, section 3).

    `served` is the engine's own name for its model; None leaves every name as it is. A body that needs no change keeps
    its bytes. Raises HttpError 400 when it is not a JSON object, or asks for more completions than it may.
    """
    body = read_request(raw, config.limits.max_n)
    changed = False
    association = None
    if "datarobot_association_id" in body:
        association = body.pop("datarobot_association_id")
        changed = True
    if served is not None:
        model = body.get("model")
        if model is None or model == "" or (isinstance(model, str) and model in config.model_aliases):
            changed = changed or model != served
            body["model"] = served
    if config.chat_defaults:
        changed = _apply_defaults(body, config.generation, max_model_len) or changed
    return Chat(json.dumps(body).encode() if changed else raw, _member(association))


def read_request(raw: bytes, most: int) -> dict[str, Any]:
    """The fields of a request that generates, within its bounds (failure mode 22).

    Raises HttpError 400 when it is not a JSON object, asks for more than `most` completions of a prompt, or has a list
    of more than 2,048 members, or lists within one of more than 8,192 together. Each prompt is a request to the engine,
    and for each wrong message, tool or input item vLLM keeps up to 236 errors: 12,000 items of 27 bytes took 12.7 GB of
    it and got it killed.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        where = f": line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise HttpError(400, f"the request body is not valid JSON{where}") from None
    if not isinstance(body, dict):
        raise HttpError(400, "the request body must be a JSON object")
    for name in ("n", "best_of"):
        if _is_above(body.get(name), most):
            raise HttpError(400, f"{name} must be at most {most}: the server's --max-n")
    for name, value in body.items():
        if isinstance(value, list) and len(value) > MOST_MEMBERS and not (name == "prompt" and _is_tokens(value)):
            raise HttpError(400, f"{name[:64]} may have at most {MOST_MEMBERS} members")
        if _has_more_within(value, MOST_WITHIN):
            raise HttpError(400, f"the lists within {name[:64]} may have at most {MOST_WITHIN} members together")
    return body


def _has_more_within(value: object, most: int) -> bool:
    """Whether the lists inside of a field have more members than that; numbers, of which prompts are made, are free."""
    members = 0
    inside: list[object] = [*value] if isinstance(value, list) else [value]
    while inside:
        item = inside.pop()
        if isinstance(item, dict):
            inside += [each for each in item.values() if isinstance(each, dict | list)]
        elif isinstance(item, list):
            members += sum(not isinstance(each, int) for each in item)
            if members > most:
                return True
            inside += [each for each in item if isinstance(each, dict | list)]
    return False


def _is_tokens(prompt: list[object]) -> bool:
    """Whether it is one prompt, given as the numbers of its tokens."""
    return all(isinstance(member, int) for member in prompt)


def _is_above(value: object, most: int) -> bool:
    """Whether a number is above the bound. vLLM takes the text of a number for the number, so that counts too."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return False
    return isinstance(value, int | float) and value > most


def _member(association: object) -> bytes:
    if association in (None, ""):
        association = str(uuid.uuid4())
    # A float could be NaN, which is no JSON; a list or an object was never an id.
    if not isinstance(association, str | int) or len(str(association)) > LONGEST_ID:
        raise HttpError(400, f"datarobot_association_id must be a string of at most {LONGEST_ID} characters")
    return association_member(association)


def _apply_defaults(body: dict[str, Any], defaults: GenerationDefaults, max_model_len: int | None) -> bool:
    """Fill in what the request leaves unset or null. True when something was (decision 12).

    A default never makes vLLM refuse a request that it would take without it.
    """
    changed = False
    unbounded = body.get("max_tokens") is None and body.get("max_completion_tokens") is None
    if defaults.max_tokens is not None and unbounded:
        cap = max(1, max_model_len - 1) if max_model_len else defaults.max_tokens
        body["max_tokens"] = min(defaults.max_tokens, cap)
        changed = True
    sampling = {"temperature": defaults.temperature, "n": defaults.n}
    added = {name: value for name, value in sampling.items() if value is not None and body.get(name) is None}
    if len(added) == 1 and _several_greedy({**body, **added}):
        added.clear()  # the request chose one of the two, and vLLM refuses them together
    body.update(added)
    changed = changed or bool(added)
    messages = body.get("messages")
    if defaults.system_prompt and isinstance(messages, list) and not any(map(_instructs, messages)):
        body["messages"] = [{"role": "system", "content": defaults.system_prompt}, *messages]
        changed = True
    return changed


def _several_greedy(body: dict[str, Any]) -> bool:
    """Several completions of greedy sampling, which has only one."""
    n, temperature = body.get("n"), body.get("temperature")
    return isinstance(n, int) and n > 1 and isinstance(temperature, int | float) and temperature < GREEDY


def _instructs(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")
