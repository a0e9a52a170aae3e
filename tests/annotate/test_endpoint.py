"""Captions by a server: what is sent, what is kept, and what happens when the server misbehaves."""
import base64
import io
import os
import socket
import sqlite3
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from granvit.data.annotate import endpoint
from granvit.data.annotate.annotator import FoundRegion, KnownImage, Result
from granvit.data.annotate.endpoint import EndpointCaptioner
from tests.annotate.images import noise
from tests.annotate.misbehaving import events, raw, serving, status

pytest.importorskip("urllib3")

CUT = 200, {"Content-Type": "text/event-stream", "Content-Length": "900", "Connection": "close"}, b"data: {"


@pytest.fixture
def waits(monkeypatch):
    """The waits between attempts, which are not waited for; the random part of a wait is all of it."""
    waited = []
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
    monkeypatch.setattr(endpoint, "random", SimpleNamespace(uniform=lambda low, high: high))
    return waited


@pytest.fixture
def captioner(tmp_path):
    """Makes a captioner of a server that asks about whole images only."""

    def make(server, **options):
        url = server if isinstance(server, str) else server.url
        fixed = {"endpoint": url, "model": "m", "cache": tmp_path / "cache" / "answers.sqlite", "region_prompt": None}
        fixed |= {"timeout": 10.0}
        return EndpointCaptioner(**(fixed | options))

    return make


def only(captioner, image=None) -> Result:
    (result,) = captioner.annotate([image or noise(40, 50)])
    return result


def sent(request: dict) -> tuple[np.ndarray, str]:
    """Pixels and prompt of a request."""
    image, text = request["messages"][0]["content"]
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), text["text"]


def test_what_is_sent_and_what_comes_back(captioner):
    image = KnownImage(noise(100, 200).pixels_HW3, (FoundRegion((0.25, 0.4, 0.75, 0.8), "old", 0.7),), "old")
    by_prompt = {"all?": events("A red", " cup.<|im_end|>"), "part?": events("  the\nhandle ")}
    with serving(lambda request: by_prompt[sent(request)[1]]) as server:
        result = only(captioner(server, global_prompt="all?", region_prompt="part?"), image)
    assert result == Result((FoundRegion((0.25, 0.4, 0.75, 0.8), "the\nhandle", 0.7),), "A red cup.<|im_end|>")
    requests = {sent(request)[1]: request for request in server.requests}
    np.testing.assert_array_equal(sent(requests["all?"])[0], image.pixels_HW3)
    # 10% of 100 x 40 pixels on each side
    np.testing.assert_array_equal(sent(requests["part?"])[0], image.pixels_HW3[36:84, 40:160])
    settings = {key: value for key, value in requests["all?"].items() if key != "messages"}
    assert settings == {"model": "m", "max_tokens": 512, "temperature": 0.0, "stream": True}
    assert requests["part?"]["max_tokens"] == 64 and "Authorization" not in server.headers[0]


def test_answers_are_kept_over_restarts(captioner, waits):
    images = [noise(40, 50, seed) for seed in range(3)]
    with serving(lambda request: events(f"mean {sent(request)[0].mean():.3f}")) as server:
        first = captioner(server).annotate(images)
        assert len(server.requests) == 3 and len({result.global_caption for result in first}) == 3
        assert captioner(server).annotate(images[::-1]) == first[::-1] and len(server.requests) == 3
        for changed in ({"model": "n"}, {"global_prompt": "else?"}, {"revision": "2"}, {"global_tokens": 9}):
            before = len(server.requests)
            only(captioner(server, **changed), images[0])
            assert len(server.requests) == before + 1
    assert captioner(server).annotate(images) == first  # the server is gone


@pytest.mark.parametrize(
    "reply, reason",
    [
        (status(429), "server has too many requests"),
        (status(500), "server failed"),
        (status(503, Retry_After="soon"), "server failed"),
        (status(408), "server failed"),
        (None, "connection to the server broke"),
        (CUT, "connection to the server broke"),
        (raw(b'{"choices": []}', "application/json"), "answer is not a stream of events"),
        (raw(b"<html>", "text/html"), "answer is not a stream of events"),
        (raw(b"data: {nonsense\n\n"), "answer is not JSON"),
        (raw(b"data: " + b"[" * 100_000 + b"\n\n"), "answer is not JSON"),
        (raw(b'data: {"error": {"message": "no memory"}}\n\n'), "answer has no choices"),
        (raw(b'data: {"choices": [7]}\n\n'), "answer has no choices"),
        (raw(b'data: {"choices": [{"delta": {"content": ["a"]}}]}\n\n'), "answer is not text"),
        (raw(b'data: {"choices": [{"delta": {"content": "\\ud800"}, "finish_reason": "stop"}]}'), "answer is not valid Unicode"),
        (raw(b"data: [DONE]\n\n"), "answer ended early"),
        (events("A cup", finish=None), "answer ended early"),
        (events("A cup", finish="content_filter"), "answer ended early"),
        (events(finish="stop"), "answer is empty"),
        (events(" \n"), "answer is empty"),
        (events("A cup and", finish="length"), "answer is too long"),
        (events("A cup " * 40), "answer is too long"),
        (raw(b": still there\n" * 40_000), "answer is too long"),
    ],
)  # fmt: skip
def test_bad_answers_are_asked_for_again_and_then_fail(captioner, waits, reply, reason):
    with serving(reply) as server:
        made = captioner(server, attempts=3, global_tokens=10, concurrent=1)  # each attempt gives its connection back
        assert only(made) == Result(refused=(("global", reason),))
        assert len(server.requests) == 3 and waits == [1.0, 2.0]
    with serving(reply, reply, events("A cup.")) as server:
        made = captioner(server, attempts=3, global_tokens=10)
        assert only(made) == Result(global_caption="A cup.")
        assert only(made) == Result(global_caption="A cup.") and len(server.requests) == 3


def test_waits_double_up_to_a_minute(captioner, waits):
    with serving(status(500)) as server:
        only(captioner(server, attempts=9))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_waits_have_a_random_part(captioner, monkeypatch):
    waited = []
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
    with serving(status(500)) as server:
        only(captioner(server, attempts=4))
    assert all(longest / 2 <= wait <= longest for longest, wait in zip((1, 2, 4), waited, strict=True))


def test_retry_after_is_honoured_within_bounds(captioner, waits):
    asked = [status(code, Retry_After=value) for code, value in ((429, "7"), (503, "0"), (429, "86400"), (429, "-1"))]
    with serving(*asked, events("A cup.")) as server:
        assert only(captioner(server)).global_caption == "A cup."
    assert waits == [7, 2, 600, 8]


def test_slow_answers_are_given_up(captioner, waits):
    gone = threading.Event()

    def never(request):
        gone.wait(30)

    with serving(never, events("A cup.")) as server:
        assert only(captioner(server, timeout=1.5)) == Result(global_caption="A cup.")
        gone.set()
    assert len(server.requests) == 2 and waits == [1.0]


def test_answers_that_drip_are_given_up(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    class Dripping:
        def read1(self, amount):
            return b": ping\n"

    with pytest.raises(endpoint._Again, match="in time"):
        endpoint.read_answer(endpoint._chunks(Dripping(), 20), 1000)
    assert next(clock) < 25


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_refused_request_fails_one_image(captioner, waits, code):
    def reply(request):
        return status(code) if sent(request)[0].shape[0] == 40 else events("A cup.")

    with serving(reply) as server:
        results = captioner(server).annotate([noise(30, 30), noise(40, 50), noise(50, 30)])
    assert [result.global_caption for result in results] == ["A cup.", None, "A cup."]
    assert results[1].refused == (("global", "server refused the request"),) and len(server.requests) == 3 and not waits


@pytest.mark.parametrize("code", [301, 401, 403, 404])
def test_a_wrong_address_model_or_key_is_named(captioner, waits, code):
    with serving(status(code, Location="http://127.0.0.1:9/")) as server:
        with pytest.raises(ValueError, match=rf"{server.url}.*{code}.*\(m\)"):
            captioner(server).annotate([noise(40, 50)])
        assert len(server.requests) == 1 and not waits


def test_a_server_that_is_not_there_is_named(captioner, waits):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    with pytest.raises(ConnectionError, match=url):
        captioner(url, attempts=3, concurrent=1).annotate([noise(40, 50)])
    assert waits == [1.0, 2.0]


def test_requests_are_concurrent_within_bounds(captioner):
    together = threading.Barrier(3)  # breaks unless three requests are under way at a time

    def reply(request):
        together.wait(30)
        return events("A cup.")

    with serving(reply) as server:
        results = captioner(server, concurrent=3, attempts=1).annotate([noise(30, 30, seed) for seed in range(9)])
    assert all(result == Result(global_caption="A cup.") for result in results)
    assert len(server.requests) == 9 and server.most == 3


def test_results_do_not_depend_on_the_batch(captioner, tmp_path):
    images = [KnownImage(noise(60, 90, seed).pixels_HW3, (FoundRegion((0.1, 0.1, 0.5, 0.6)),)) for seed in range(4)]
    with serving(lambda request: events(f"mean {sent(request)[0].mean():.3f}")) as server:
        together = captioner(server, region_prompt="part?").annotate(images)
        alone = [only(captioner(server, region_prompt="part?", cache=tmp_path / str(i)), image) for i, image in enumerate(images)]
    assert together == alone and len({result.regions[0].caption for result in together}) == 4


def test_the_key_is_sent_and_kept_nowhere(captioner, monkeypatch, tmp_path):
    monkeypatch.setenv("CAPTION_KEY", "abc123")
    with serving(events("A cup.")) as server:
        made = captioner(server, key_variable="CAPTION_KEY")
        only(made)
        assert server.headers[0]["Authorization"] == "Bearer abc123" and made.version == captioner(server).version
        monkeypatch.delenv("CAPTION_KEY")
        with pytest.raises(ValueError, match="CAPTION_KEY"):
            only(captioner(server, key_variable="CAPTION_KEY"))
    assert all(b"abc123" not in path.read_bytes() for path in (tmp_path / "cache").iterdir())


def test_version_knows_what_answers_depend_on(captioner):
    first = captioner("http://a/v1")
    same = captioner("http://b/v1", concurrent=2, timeout=9.0, attempts=2, cache="elsewhere")
    others = [
        captioner("http://a/v1", **{key: value})
        for key, value in {
            "model": "n", "revision": "2", "global_prompt": "all?", "region_prompt": "part?", "global_tokens": 9,
            "region_tokens": 9, "margin": 0.2, "max_pixels": 9,
        }.items()
    ]  # fmt: skip
    assert first.version == same.version and len({made.version for made in (first, *others)}) == 1 + len(others)


def test_caches_of_another_kind_are_named(captioner, tmp_path):
    (tmp_path / "text").write_text("not a database " * 100)
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE mine (x)")
    with sqlite3.connect(tmp_path / "later") as later:
        later.execute("PRAGMA user_version = 2")
    for name in ("text", "other", "later"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match=name):
            only(captioner("http://127.0.0.1:9/v1", cache=tmp_path / name))
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(ValueError, match=os.fspath(tmp_path)):
        only(captioner("http://127.0.0.1:9/v1", cache=tmp_path))


def test_events_split_anywhere_are_read():
    _, _, body = events("Eine Tasse für", " «Tee»")
    expected = "Eine Tasse für «Tee»"
    for size in (1, 7, 64):
        assert endpoint.read_answer((body[i : i + size] for i in range(0, len(body), size)), 10) == expected
