"""Row scoring on the real engine."""

import csv
import io

import httpx2
import pytest

pytestmark = pytest.mark.e2e

BROKEN = {7: "", 50: "word " * 5000, 120: "   ", 199: "many " * 4000}


def as_csv(prompts: list[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("id", "promptText"))
    writer.writerows(enumerate(prompts))
    return text.getvalue().encode()


def test_200_rows_of_which_four_are_broken(real_service):
    prompts = [BROKEN.get(index, f"What is {index} plus 1?") for index in range(200)]
    answer = httpx2.post(
        f"{real_service.url}/predict/", content=as_csv(prompts), headers={"Content-Type": "text/csv"}, timeout=300
    )
    assert answer.status_code == 200, answer.text[:500]
    assert answer.headers["X-Row-Errors"] == "4"
    predictions = answer.json()["predictions"]
    assert len(predictions) == 200
    assert {index for index, text in enumerate(predictions) if text == ""} == set(BROKEN)
    extra = answer.json()["extraModelOutput"]
    assert extra["columns"] == ["error"]
    assert {index for index, (error,) in enumerate(extra["data"]) if error} == set(BROKEN)


def test_good_rows_carry_no_extra_output(real_service):
    answer = httpx2.post(f"{real_service.url}/predict/", files={"X": as_csv(["Say hi."] * 3)}, timeout=60)
    assert answer.status_code == 200
    assert set(answer.json()) == {"predictions"}
    assert all(answer.json()["predictions"])
    assert "X-Row-Errors" not in answer.headers
