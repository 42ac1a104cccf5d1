"""Contract, section 3: which routes there are, what they look like, and what they say while there is no engine."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest

from tests.contract.conftest import READY, Start
from tests.contract.drivers import Service

CSV = "promptText\nHello\n"
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}

ROUTES: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/", {}),
    ("GET", "/ping", {}),
    ("GET", "/health", {}),
    ("GET", "/info", {}),
    ("GET", "/capabilities", {}),
    ("GET", "/stats", {}),
    ("POST", "/predict", {"content": CSV}),
    ("POST", "/predictions", {"content": CSV}),
]
UNSLASHED: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/invocations", {"content": CSV}),
    ("POST", "/chat/completions", {"json": CHAT}),
    ("POST", "/v1/chat/completions", {"json": CHAT}),
    ("GET", "/models", {}),
    ("GET", "/v1/models", {}),
    ("GET", "/directAccess/v1/models", {}),
    ("GET", "/nim/v1/models", {}),
]


def named(routes: list[tuple[str, str, dict[str, Any]]]) -> list[Any]:
    return [pytest.param(*route, id=f"{route[0]} {route[1]}") for route in routes]


@pytest.mark.parametrize(("method", "path", "body"), named(ROUTES))
@pytest.mark.parametrize("slash", ["", "/"], ids=["bare", "slash"])
def test_route_with_and_without_slash(
    service: Service, method: str, path: str, body: dict[str, Any], slash: str
) -> None:
    """3: each route of the platform answers 200 with and without its trailing slash."""
    with service.client(120) as client:
        answer = client.request(method, path.rstrip("/") + slash, follow_redirects=True, **body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("method", "path", "body"), named(UNSLASHED))
def test_route_of_the_engine(service: Service, method: str, path: str, body: dict[str, Any]) -> None:
    """3: the OpenAI routes, /invocations and the pass-through routes answer 200."""
    with service.client(120) as client:
        assert client.request(method, path, **body).status_code == 200


@pytest.mark.parametrize("path", ["/predict", "/health", "/info"])
def test_no_redirect_for_a_missing_slash(service: Service, path: str) -> None:
    """3: a missing slash is answered at once, not by a redirect that makes a client send its body twice."""
    with service.client(120) as client:
        answer = client.post(path, content=CSV) if path == "/predict" else client.get(path)
    assert answer.status_code == 200


def test_models(service: Service) -> None:
    """3: /models and /v1/models are the same OpenAI list."""
    with service.client() as client:
        lists = [client.get(path).json() for path in ("/models", "/v1/models")]
    for models in lists:
        assert models["object"] == "list"
        assert [card["object"] for card in models["data"]] == ["model"] * len(models["data"])
    assert [card["id"] for card in lists[0]["data"]] == [card["id"] for card in lists[1]["data"]]
    assert "datarobot-deployed-llm" in [card["id"] for card in lists[0]["data"]]


def test_info(service: Service) -> None:
    """3: /info/ has the platform's six keys and the folder's metadata."""
    with service.client() as client:
        info = client.get("/info/").json()
    keys = {"codeDir", "targetType", "language", "drumVersion", "drumServer", "modelMetadata"}
    assert info.keys() == keys
    assert (info["targetType"], info["language"]) == ("textgeneration", "other")
    assert info["modelMetadata"]["type"] == "inference"


def test_capabilities(service: Service) -> None:
    """3: /capabilities/ says CSV and chat."""
    with service.client() as client:
        assert client.get("/capabilities/").json() == {
            "supported_payload_formats": {"csv": None},
            "supported_methods": {"chat": True},
        }


def test_stats(service: Service) -> None:
    """3: /stats/ has memory, processes and times."""
    with service.client() as client:
        stats = client.get("/stats/").json()
    assert stats.keys() >= {"mem_info", "drum_info", "time_info"}
    assert isinstance(stats["mem_info"], dict)
    assert isinstance(stats["drum_info"], list)
    assert isinstance(stats["time_info"], dict)


@pytest.mark.parametrize("path", ["/ping", "/v1/models", "/nowhere"])
def test_headers(service: Service, path: str) -> None:
    """3: every response echoes X-Request-ID as X_Request_ID, or makes a uuid4, and names a DRUM version."""
    with service.client() as client:
        echoed = client.get(path, headers={"X-Request-ID": "mine-1"}).headers
        made = client.get(path).headers
    assert echoed["X_Request_ID"] == "mine-1"
    assert uuid.UUID(made["X_Request_ID"]).version == 4
    version = tuple(map(int, made["X-Drum-Version"].split(".")))
    assert version > (1, 17, 12), "an older version means: the model reports its own chat statistics"


def test_unknown_route(service: Service) -> None:
    """3: an unknown route is 404."""
    with service.client() as client:
        assert client.get("/nowhere").status_code == 404


@pytest.mark.parametrize("path", ["/predictUnstructured/", "/predictionsUnstructured/", "/transform/"])
def test_other_target_types(service: Service, path: str) -> None:
    """3: the routes of other target types give a client error that names /predict/."""
    with service.client() as client:
        answer = client.post(path, content="x", headers={"Content-Type": "text/plain"})
    assert 400 <= answer.status_code < 500
    assert "/predict/" in answer.json()["message"]


@pytest.mark.parametrize("prefix", ["/directAccess", "/nim"])
def test_direct_access_keeps_query_and_body(controlled: Service, prefix: str) -> None:
    """3: /directAccess and /nim hand query, body and content type to the engine's path."""
    body = b'{"prompt": "direct access", "model": null}'
    with controlled.client() as client:
        answer = client.post(f"{prefix}/tokenize?a=1&b=%20", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["count"] == 2
    seen = controlled.asked("direct access")[-1]
    assert re.fullmatch(r"/tokenize\?a=1&b=(%20|\+)", seen["target"])
    assert (seen["body"], seen["headers"]["content-type"]) == (body.decode(), "application/json")


def test_direct_access_by_put(controlled: Service) -> None:
    """3: /directAccess passes PUT."""
    with controlled.client() as client:
        client.put("/directAccess/v1/models", content=b"put by direct access")
    assert [seen["method"] for seen in controlled.asked("put by direct access")] == ["PUT"]


@pytest.mark.parametrize("path", ["/pause", "/collective_rpc", "/update_weights", "/scale_elastic_ep"])
def test_direct_access_keeps_admin_routes_shut(controlled: Service, path: str) -> None:
    """3: /directAccess lets only inference paths through: the engine's admin routes are not reached."""
    with controlled.client() as client:
        answer = client.post("/directAccess" + path, content=b"admin by direct access" + path.encode())
    assert answer.status_code == 404
    assert controlled.engine_requests("admin by direct access" + path) == []


def test_url_prefix(launch: Start) -> None:
    """1, 3: with URL_PREFIX every route is under it."""
    service = launch(environ={"URL_PREFIX": "/a/b"})
    with service.client() as client:

        def ready() -> bool:
            try:
                return client.get("/a/b/ping").status_code == 200
            except OSError:
                return False
            except Exception as error:  # the client's own class for a refused connection
                assert "onnect" in repr(error)
                return False

        service.wait_for(ready, READY, "not ready under the prefix")
        for method, path, body in [*ROUTES, *UNSLASHED]:
            answer = client.request(method, "/a/b" + path, follow_redirects=True, **body)
            assert answer.status_code == 200, path
        assert client.post("/predict/", content=CSV).status_code == 404


PROBES = ["/", "/ping", "/ping/", "/health/"]


def test_probes_while_loading(launch: Start) -> None:
    """3, 4: HTTP answers while the engine loads: 503 with a message."""
    service = launch(load_seconds=60)
    service.launch()
    with service.client() as client:
        for path in PROBES:
            answer = client.get(path)
            assert (answer.status_code, list(answer.json())) == (503, ["message"]), path


def test_first_answer_within_four_seconds(launch: Start) -> None:
    """4, 6: the port answers within four seconds of the start, whatever is being loaded."""
    service = launch(load_seconds=60)

    def answers() -> bool:
        with service.client(1) as client:
            try:
                return client.get("/ping").status_code == 503
            except Exception as error:  # the client's own class for a refused connection
                assert "onnect" in repr(error)
                return False

    service.wait_for(answers, 4, "no answer")


def test_probes_after_a_crash_for_good(launch: Start) -> None:
    """3: 513 with a message once the engine has crashed for good (error server asked for)."""
    service = launch(
        load_seconds=-1,
        environ={"WITH_ERROR_SERVER": "1"},
        parameters={"max_watchdog_restarts": ("numeric", 0)},
    )
    service.launch()
    with service.client() as client:
        service.wait_for(lambda: client.get("/ping").status_code == 513, 15, "not 513")
        for path in PROBES:
            answer = client.get(path)
            assert (answer.status_code, list(answer.json())) == (513, ["message"]), path
