"""Captions by a server with OpenAI's chat completions: vLLM (`vllm serve`), `transformers serve` and others.

Requests ask for a stream of events (`transformers serve` 4.57 sends nothing else), greedy decoding (temperature 0) and PNG images
in the request itself. Answers are kept in a file (`granvit.data.annotate.answer_cache`).

A request that times out, breaks off, or is answered with 408, 429, 5xx or nonsense is sent again, at most `attempts` times in
all, after 1, 2, 4, ... seconds, at most 60, of which up to a half is left out at random so that requests do not return together.
The wait is at least as long as a Retry-After of the server asks, up to 10 minutes. Nonsense is what is no stream of events of
JSON with choices, an answer that is empty or too long, or one that ends early.
"""
import base64
import hashlib
import io
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from granvit.data.annotate.annotator import Failed, fingerprint, needed
from granvit.data.annotate.answer_cache import AnswerCache
from granvit.data.annotate.caption import Answer, Captioner, Question, plain_text

CONNECT_SECONDS = 10
LONGEST_WAIT, LONGEST_ASKED_WAIT = 60, 600  # seconds: of our own back-off, and of a Retry-After
CHARACTERS, BYTES = 16, 4096  # of an answer's text and of its whole stream, per token asked for


class _Again(Exception):
    """An attempt failed in a way that another may not: the reason, and the seconds that the server asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Unreachable(_Again):
    """The server does not accept connections."""


@dataclass(frozen=True, kw_only=True)
class EndpointCaptioner(Captioner):
    """Asks the server at `endpoint` (such as http://localhost:8000/v1) for captions by `model`, the name it is served under.

    `cache` is the file of answers. What the server computes with is not known here: state in `revision` what tells the weights
    apart, and change it when they change; it is part of `version` and of the answers' keys. `concurrent` requests are under way
    at a time; `timeout` seconds is the limit for each. `key_variable` names the environment variable that holds the server's key.

    A server that refuses one request (400, 413, 422) fails that part of the image. One that cannot be reached after all attempts
    raises `ConnectionError`; any other answer, such as 401 or 404, raises `ValueError`. `transformers serve` does not tell that
    an answer was cut off at the limit of tokens, vLLM does. Nor does it keep requests about Qwen2.5-VL apart that it answers at
    the same time (4.57): use `concurrent` 1 with it.
    """

    endpoint: str
    model: str
    cache: str | Path
    revision: str = ""
    concurrent: int = 8
    timeout: float = 120.0
    attempts: int = 6
    key_variable: str | None = None

    @cached_property
    def version(self) -> str:
        return fingerprint(self._settings() | {"endpoint": 1, "model": self.model, "revision": self.revision})

    @cached_property
    def _answered(self) -> AnswerCache:
        return AnswerCache(self.cache)

    @cached_property
    def _pool(self) -> Any:
        return needed("urllib3").PoolManager(maxsize=self.concurrent, block=True)

    @cached_property
    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self.key_variable is not None:
            if not os.environ.get(self.key_variable):
                raise ValueError(f"key_variable {self.key_variable}: no such environment variable, or it is empty")
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        return headers

    def _answers(self, asked: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        _ = self._answered, self._pool, self._headers  # made here, not by several threads at once
        with ThreadPoolExecutor(self.concurrent) as threads:
            futures = [[threads.submit(self._answer, question) for question in questions] for questions in asked]
            try:
                return [[future.result() for future in about_image] for about_image in futures]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _answer(self, question: Question) -> Answer:
        try:
            picture = question.picture(self.margin, self.max_pixels)
            key = self._key(picture, question)
            text = self._answered.get(key)
            if text is None:
                text = self._asked(picture, question)
                self._answered.put(key, text)
            return text
        except Failed as error:
            return error

    def _key(self, picture: Image.Image, question: Question) -> str:
        """Identifies a question by all that the server's answer depends on: pixels, not the bytes of the PNG file."""
        about = [1, self.model, self.revision, question.prompt, question.max_tokens, picture.size]
        return hashlib.sha256(json.dumps(about).encode() + picture.tobytes()).hexdigest()

    def _asked(self, picture: Image.Image, question: Question) -> str:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.prompt}]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": question.max_tokens,
            "temperature": 0.0,
            "stream": True,
        }
        body = json.dumps(request).encode()
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._attempt(body, question.max_tokens)
            except _Again as error:
                if attempt >= self.attempts:
                    if isinstance(error, _Unreachable):
                        raise ConnectionError(f"endpoint {self.endpoint}: {error}; start it and run this again") from None
                    raise Failed(str(error)) from None
                wait = min(2.0 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1)
                time.sleep(max(wait, min(error.wait, LONGEST_ASKED_WAIT)))

    def _attempt(self, body: bytes, max_tokens: int) -> str:
        """One request. `_Again` if another may succeed, `Failed` if this one is refused, `ValueError` if all will be."""
        errors = needed("urllib3").exceptions
        deadline = time.monotonic() + self.timeout
        try:
            response = self._pool.request(
                "POST",
                self.endpoint.rstrip("/") + "/chat/completions",
                body=body,
                headers=self._headers,
                timeout=needed("urllib3").Timeout(connect=min(CONNECT_SECONDS, self.timeout), read=self.timeout),
                retries=False,
                redirect=False,
                preload_content=False,
                pool_timeout=self.timeout,
            )
            try:
                self._check(response)
                return read_answer(_chunks(response, deadline), max_tokens)
            finally:
                response.close()  # the connection is used again if the answer was read to its end
                response.release_conn()  # makes room in the pool, which close alone does not
        except (errors.NewConnectionError, errors.ConnectTimeoutError):
            raise _Unreachable("the server cannot be reached") from None
        except errors.TimeoutError:
            raise _Again("server did not answer in time") from None
        except errors.LocationValueError as error:
            raise ValueError(f"endpoint {self.endpoint}: {error}") from None
        except errors.HTTPError:
            raise _Again("connection to the server broke") from None

    def _check(self, response: Any) -> None:
        """Raises what the status of a response means, unless it is a stream of events."""
        status = response.status
        if status in (408, 429) or status >= 500:
            try:
                wait = needed("urllib3").Retry().get_retry_after(response) or 0.0
            except needed("urllib3").exceptions.InvalidHeader:
                wait = 0.0
            raise _Again("server has too many requests" if status == 429 else "server failed", wait)
        if status in (400, 413, 422):
            raise Failed("server refused the request")
        if status != 200:
            raise ValueError(f"endpoint {self.endpoint}: answers {status}; check it, model ({self.model}) and key_variable")
        if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise _Again("answer is not a stream of events")


def _chunks(response: Any, deadline: float) -> Iterator[bytes]:
    """A response's body as it comes, until `deadline` of the monotonic clock."""
    while data := response.read1(65536):
        yield data
        if time.monotonic() > deadline:
            raise _Again("server did not answer in time")


def read_answer(chunks: Iterator[bytes], max_tokens: int) -> str:
    """The text in a stream of chat completion events. `_Again` with the reason if it is not a complete answer."""
    text, ended, seen, rest = "", None, 0, b""
    for data in chunks:
        seen += len(data)
        if seen > BYTES * (max_tokens + 16):
            raise _Again("answer is too long")
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            added, finish = _event(line)
            text, ended = text + added, finish or ended
            if len(text) > CHARACTERS * max_tokens:
                raise _Again("answer is too long")
    if rest:
        added, finish = _event(rest)
        text, ended = text + added, finish or ended
    if ended == "length":
        raise _Again("answer is too long")
    if ended != "stop":
        raise _Again("answer ended early")
    try:
        return plain_text(text)
    except Failed as error:
        raise _Again(str(error)) from None


def _event(line: bytes) -> tuple[str, str | None]:
    """The text that a line of the stream adds, and the reason for the end if it states one."""
    if not line.startswith(b"data:"):
        return "", None
    payload = line.removeprefix(b"data:").strip()
    if payload == b"[DONE]":
        return "", None
    try:
        tree = json.loads(payload)
    except (ValueError, RecursionError):
        raise _Again("answer is not JSON") from None
    choices = tree.get("choices") if isinstance(tree, dict) else None
    if choices == []:  # the event with the count of tokens
        return "", None
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise _Again("answer has no choices")
    delta, finish = choices[0].get("delta") or {}, choices[0].get("finish_reason")
    content = (delta.get("content") if isinstance(delta, dict) else None) or ""
    if not isinstance(content, str) or not isinstance(finish, str | None):
        raise _Again("answer is not text")
    return content, finish
