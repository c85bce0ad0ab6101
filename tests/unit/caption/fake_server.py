"""A server with OpenAI's protocol on 127.0.0.1 that answers, fails, stalls and lies as told."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Reply:
    """One response; `stall` and `drip` last until the server is closed."""

    body: Any
    """Sent as JSON, or as it is if it is bytes."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stall: bool = False
    drip: bool = False


@dataclass(frozen=True)
class Request:
    """One that came."""

    body: dict
    headers: dict[str, str]
    time: float

    @property
    def words(self) -> str:
        """All text of the user's turn."""
        return "\n".join(p["text"] for p in self.body["messages"][1]["content"] if "text" in p)

    @property
    def colours(self) -> list[tuple[int, int, int]]:
        """The mean colour of each picture, in steps of 50, in order."""
        found = []
        for part in self.body["messages"][1]["content"]:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                pixel = Image.open(io.BytesIO(data)).convert("RGB").resize((1, 1)).getpixel((0, 0))
                assert isinstance(pixel, tuple)
                found.append(tuple(round(value / 50) * 50 for value in pixel))
        return found


class CaptionServer:
    """`answer` decides on each request, given how many with the same pictures came before."""

    def __init__(self, answer: Callable[[Request, int], Reply], models: Reply) -> None:
        self.answer = answer
        self.models = models
        self.requests: list[Request] = []
        self.arrived = threading.Semaphore(0)
        self.closed = threading.Event()
        self._lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def take(self, request: Request) -> Reply:
        """Note a request and choose its reply."""
        with self._lock:
            before = sum(other.colours == request.colours for other in self.requests)
            self.requests.append(request)
        reply = self.answer(request, before)
        self.arrived.release()
        return reply


@contextmanager
def serve(
    answer: Callable[[Request, int], Reply], *, models: Reply | None = None
) -> Iterator[CaptionServer]:
    """A running server."""
    server = CaptionServer(answer, models or Reply({"data": [{"id": "tiny"}]}))
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closed.set()
        server.http.shutdown()
        thread.join()
        server.http.server_close()


def completion(text: Any, *, reason: str = "stop") -> Reply:
    """A well-formed answer."""
    return Reply({"choices": [{"message": {"content": text}, "finish_reason": reason}]})


def _handler(server: CaptionServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(server.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = Request(body, dict(self.headers.items()), time.monotonic())
            self._send(server.take(request))

        def _send(self, reply: Reply) -> None:
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            if reply.stall:
                server.closed.wait()
                return
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                while reply.drip and not server.closed.wait(0.02):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                self.wfile.write(data)
            except OSError:
                pass  # the client has left

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
