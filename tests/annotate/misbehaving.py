"""A server of chat completions that answers as it is told, for tests of what can go wrong."""
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


def events(*pieces: str, finish: str | None = "stop", done: bool = True) -> Reply:
    """An answer in pieces, as vLLM streams it."""
    deltas = [({"role": "assistant", "content": ""}, None), *(({"content": piece}, None) for piece in pieces), ({}, finish)]
    choices = [{"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]} for delta, reason in deltas]
    lines = [f"data: {json.dumps(choice)}\n\n" for choice in choices] + ["data: [DONE]\n\n"] * done
    return 200, {"Content-Type": "text/event-stream; charset=utf-8"}, "".join(lines).encode()


def raw(body: bytes, kind: str = "text/event-stream") -> Reply:
    return 200, {"Content-Type": kind}, body


def status(code: int, **headers: str) -> Reply:
    return code, {name.replace("_", "-"): value for name, value in headers.items()}, b"{}"


class Server:
    """`replies[i]` answers request i, the last all after it; a function is called with the request's JSON and returns a reply.

    None closes the connection without an answer. `requests` holds what was sent, `headers` with what, `most` how many requests
    were under way at a time.
    """

    def __init__(self, *replies: Reply | Callable[[dict], Reply | None] | None):
        self.replies = replies
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        self.url = ""

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            reply = self.replies[min(len(self.requests), len(self.replies) - 1)]
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            answer = reply(body) if callable(reply) else reply
        finally:
            with self._lock:
                self._now -= 1
        if answer is None or handler.path != "/v1/chat/completions":
            handler.close_connection = True
            return
        code, headers, data = answer
        handler.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


@contextmanager
def serving(*replies: Reply | Callable[[dict], Reply | None] | None) -> Iterator[Server]:
    """A `Server` that listens on a free port until the end of the block."""
    server = Server(*replies)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            server.respond(self)

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    listening.block_on_close = False
    listening.handle_error = lambda *_: None  # a client that hangs up is not an error
    server.url = f"http://127.0.0.1:{listening.server_port}/v1"
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        thread.join(30)
        listening.server_close()
