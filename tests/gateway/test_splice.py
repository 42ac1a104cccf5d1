from __future__ import annotations

import json
import random

import pytest

from vllm_dropin.gateway.splice import EventStream, association_member, error_frame, splice_object

MEMBER = association_member("a-1")
ERROR = b'data: {"error":{"message":"dead"}}\n\n'
DONE = b"data: [DONE]\n\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def through(stream: EventStream, chunks: list[bytes]) -> bytes:
    return b"".join([stream.feed(chunk) for chunk in chunks]) + stream.finish()


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_member_is_escaped() -> None:
    assert association_member('x"\n') == b'"datarobot_association_id":"x\\"\\n",'


@pytest.mark.parametrize(
    ("body", "spliced"),
    [
        (b'{"id":1}', b'{"datarobot_association_id":"a-1","id":1}'),
        (b' \n{ "id": 1 }', b' \n{"datarobot_association_id":"a-1", "id": 1 }'),
        (b"{}", b'{"datarobot_association_id":"a-1"}'),
        (b"{ \n}", b'{"datarobot_association_id":"a-1" \n}'),
        (b"[1]", b"[1]"),
        (b"", b""),
    ],
)
def test_splice_object(body: bytes, spliced: bytes) -> None:
    assert splice_object(body, MEMBER) == spliced


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_every_event_gets_the_id_whatever_the_chunks_are(size: int) -> None:
    source = event(id="x", text='data: {"a":1}\n\n{') + event(id="y") + b"data: {}\n\n" + DONE
    out = through(EventStream(MEMBER), pieces(source, size))
    frames = out.split(b"\n\n")
    assert frames[-1] == b""
    assert frames[-2] == b"data: [DONE]"
    payloads = [json.loads(frame.removeprefix(b"data: ")) for frame in frames[:-2]]
    assert [payload.pop("datarobot_association_id") for payload in payloads] == ["a-1"] * 3
    assert payloads == [{"id": "x", "text": 'data: {"a":1}\n\n{'}, {"id": "y"}, {}]


def test_random_chunks_of_random_events_lose_nothing() -> None:
    chance = random.Random(7)
    for _ in range(300):
        words = ["{", "}", '"', "\\", "data: {", "\n", "é", "[DONE]", " ", "x"]
        texts = ["".join(chance.choices(words, k=chance.randrange(9))) for _ in range(chance.randrange(1, 5))]
        source = b"".join(event(text=text) for text in texts) + DONE
        cuts = sorted(chance.choices(range(len(source)), k=chance.randrange(8)))
        chunks = [source[a:b] for a, b in zip([0, *cuts], [*cuts, len(source)], strict=True)]
        assert through(EventStream(), chunks) == source
        out = through(EventStream(MEMBER), chunks)
        assert out.replace(MEMBER, b"") == source
        assert out.count(MEMBER) == len(texts)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_other_protocols_pass_unchanged(size: int) -> None:
    source = b": comment\r\n\r\nevent: a\r\nid: 1\r\ndata: {}\r\n\r\n\n\nretry: 3\n\ndata: x\ndata: {y\n\ndata: {no end"
    assert through(EventStream(), pieces(source, size)) == source


def test_second_data_line_of_an_event_is_no_event() -> None:
    source = b"event: x\ndata: {\ndata: {}}\n\n"
    out = through(EventStream(MEMBER), [source])
    assert out == b"event: x\ndata: {" + MEMBER + b"\ndata: {}}\n\n"


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_error_is_not_edited_and_no_done_follows_it(size: int) -> None:
    out = through(EventStream(MEMBER), pieces(event(id=1) + ERROR + DONE, size))
    assert out == b'data: {"datarobot_association_id":"a-1","id":1}\n\n' + ERROR


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_aborted_completion_ends_in_an_error(size: int) -> None:
    aborted = event(choices=[{"finish_reason": "abort"}])
    out = through(EventStream(), pieces(aborted + DONE, size))
    assert out.startswith(aborted + b'data: {"error":')
    assert b"[DONE]" not in out


def test_words_of_the_model_are_not_an_abort() -> None:
    source = event(text='"finish_reason":"abort"') + DONE
    assert through(EventStream(), [source]) == source


@pytest.mark.parametrize("broken", [b'data: {"half', b"data: {}\n", b""])
def test_break_off_leaves_whole_events(broken: bytes) -> None:
    stream = EventStream()
    out = stream.feed(event(id=1) + broken) + stream.break_off(error_frame("gone"))
    events = out.decode().split("\n\n")
    assert events[-1] == ""
    assert all(json.loads(one.removeprefix("data: ")) is not None for one in events[:-1])
    assert json.loads(events[-2].removeprefix("data: "))["error"]["message"] == "gone"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_named_protocols_get_a_named_error(path: str) -> None:
    head, data, *_ = error_frame("gone", path).decode().split("\n")
    assert head == "event: error"
    assert json.loads(data.removeprefix("data: "))["type"] == "error"
