"""Contract, section 3: row scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import Start
from tests.contract.drivers import Service

ROWS = b"id,promptText\n1,Hello\n2,Good day\n3,Farewell\n"


def predictions(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    found: list[str] = answer.json()["predictions"]
    assert all(isinstance(text, str) for text in found)
    return found


@pytest.mark.parametrize("path", ["/predict/", "/predictions/", "/invocations"])
@pytest.mark.parametrize("kind", [None, "text/csv", "text/plain", "text/csv; charset=utf-8"])
def test_raw_body(service: Service, path: str, kind: str | None) -> None:
    """3: a raw CSV body, Content-Type absent, text/csv or text/plain, is answered row by row."""
    headers = {"Content-Type": kind} if kind else {}
    with service.client(120) as client:
        assert len(predictions(client.post(path, content=ROWS, headers=headers))) == 3


@pytest.mark.parametrize("name", ["rows.csv", "X"])
def test_multipart(service: Service, name: str) -> None:
    """3: a multipart file part X is answered row by row."""
    with service.client(120) as client:
        assert len(predictions(client.post("/predict/", files={"X": (name, ROWS)}))) == 3


def test_answers_are_in_order(controlled: Service) -> None:
    """3: answers are in the order of the rows."""
    prompts = [f"order {i}" for i in range(20)]
    with controlled.client() as client:
        found = predictions(client.post("/predict/", content="\n".join(["promptText", *prompts])))
    assert found == [f"echo: {prompt}" for prompt in prompts]


def test_response_shape(service: Service) -> None:
    """3: the response of good rows is JSON with `predictions` and nothing else."""
    with service.client(120) as client:
        answer = client.post("/predict/", content=ROWS)
    assert answer.headers["Content-Type"].startswith("application/json")
    assert list(answer.json()) == ["predictions"]


def test_header_only(service: Service) -> None:
    """3: a CSV of a header alone gives an empty list."""
    with service.client() as client:
        assert predictions(client.post("/predict/", content=b"promptText\n")) == []


@pytest.mark.parametrize("kind", ["application/json", "image/png", "application/octet-stream"])
def test_other_content_types(service: Service, kind: str) -> None:
    """3: another content type is 422 with an ERROR message."""
    with service.client() as client:
        answer = client.post("/predict/", content=ROWS, headers={"Content-Type": kind})
    assert answer.status_code == 422
    assert answer.json()["message"].startswith("ERROR: ")


def test_empty_body(service: Service) -> None:
    """3: an empty body is 422 with an ERROR message."""
    with service.client() as client:
        answer = client.post("/predict/", content=b"")
    assert answer.status_code == 422
    assert answer.json()["message"].startswith("ERROR: ")


def test_multipart_without_x(service: Service) -> None:
    """3: a multipart body without the part X is 422."""
    with service.client() as client:
        assert client.post("/predict/", files={"Y": ("rows.csv", ROWS)}).status_code == 422


def test_quoted_newline_and_comma(controlled: Service) -> None:
    """3: quoted cells keep their commas, quotes and line breaks."""
    body = 'promptText,other\n"a, ""b""\nsecond line",x\n'
    with controlled.client() as client:
        assert predictions(client.post("/predict/", content=body)) == ['echo: a, "b"\nsecond line']


def test_charset(controlled: Service) -> None:
    """3: the charset of the content type is honoured."""
    body = "promptText\ncafé\n".encode("latin-1")
    with controlled.client() as client:
        answer = client.post("/predict/", content=body, headers={"Content-Type": "text/csv; charset=latin-1"})
    assert predictions(answer) == ["echo: café"]


def test_missing_column(service: Service) -> None:
    """3: a CSV without the prompt column is 422 and the message names the column expected and those seen."""
    with service.client() as client:
        answer = client.post("/predict/", content=b"question,id\nHello,1\n")
    assert answer.status_code == 422
    assert "promptText" in answer.json()["message"]
    assert "question" in answer.json()["message"]


def test_wrong_target_type(launch: Start) -> None:
    """3: a folder of another target type is never scored: refused at the start, or 422 on /predict/."""
    service = launch(target_type="unstructured")
    if service.exit_code(12) is None:
        with service.client() as client:
            assert client.post("/predict/", content=ROWS).status_code == 422
    else:
        assert service.exit_code(0) != 0
        assert "unstructured" in service.output()


def test_parameters_shape_the_rows(launch: Start) -> None:
    """1, 3: system_prompt, prompt_column_name, max_tokens, temperature and n go into each row's request."""
    service = launch(
        ready=True,
        parameters={
            "system_prompt": ("string", "Be brief."),
            "prompt_column_name": ("string", "question"),
            "max_tokens": ("numeric", 7),
            "temperature": ("numeric", 0.5),
            "n": ("numeric", 1),
        },
    )
    with service.client() as client:
        predictions(client.post("/predict/", content=b"question,promptText\nright,wrong\n"))
    asked = json.loads(service.asked("Be brief.")[-1]["body"])
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "right"},
    ]
    assert (asked["max_tokens"], asked["temperature"], asked["n"]) == (7, 0.5, 1)


def test_values_file(launch: Start, tmp_path: Path) -> None:
    """1: parameters come from a RUNTIME_PARAMS_FILE too, for names that the metadata defines."""
    values = tmp_path / "values.yaml"
    values.write_text("system_prompt: From a file.\n")
    definitions = "runtimeParameterDefinitions:\n  - fieldName: system_prompt\n    type: string\n"
    service = launch(ready=True, environ={"RUNTIME_PARAMS_FILE": str(values)}, metadata=definitions)
    with service.client() as client:
        predictions(client.post("/predict/", content=b"promptText\nHello\n"))
    assert service.asked("From a file.")


def test_deployment_config(launch: Start, tmp_path: Path) -> None:
    """3: with DEPLOYMENT_CONFIG (a JSON file) the answer has one record a row."""
    config = tmp_path / "deployment.json"
    config.write_text(json.dumps({"target": {"name": "resultText", "class_mapping": None}}))
    service = launch(ready=True, environ={"DEPLOYMENT_CONFIG": str(config)})
    with service.client() as client:
        answer = client.post("/predict/", content=b"promptText\nHello\nBye\n")
    assert answer.json() == {
        "data": [
            {
                "prediction": text,
                "predictionValues": [{"label": "resultText", "value": text}],
                "rowId": row,
            }
            for row, text in enumerate(["echo: Hello", "echo: Bye"])
        ]
    }
