"""Captions from an OpenAI-compatible server: vLLM, Ollama, LM Studio and their like.

Owns the protocol (/v1/chat/completions with pictures as data URLs), concurrency, retries and every
way in which a server can fail. The key comes from the environment and goes nowhere but into the
request's header.

Bounds: an attempt ends after `timeout` seconds or 4 MB, however slowly the server drips; a question
after `retries` + 1 attempts, with waits that double up to a minute, or as long as Retry-After says
up to ten.
"""

import asyncio
import base64
import io
import json
import os
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from PIL import Image

from data_tools.caption.captioners import Answer, Question
from train.errors import ConfigError, MachineError

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "KINDLING_CAPTION_KEY"
"""A name of our own: another program's key would go to whatever URL is given."""
MAX_BYTES = 4_000_000
MAX_WAIT = 600.0
"""Seconds; a server that says to come back later than that isn't waited for."""
BACK_OFF = 60.0
"""Seconds that doubling stops at."""
SHOWN = 200
"""Characters of a server's own words that are shown."""
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_HOPELESS = {401, 402, 403, 404, 405, 501}
"""The next picture would get the same answer."""


T = TypeVar("T")


class _TryAgainError(Exception):
    """An attempt that failed and may work later; `after` is the server's own wish, in seconds."""

    def __init__(self, reason: str, *, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _RefusedError(Exception):
    """The server won't have this very question."""


@dataclass(frozen=True)
class Settings:
    """How a server is asked. Seconds, counts and tokens."""

    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 5
    back_off: float = 1.0
    """The first wait; doubled each time."""
    max_tokens: int = 512


class Server:
    """A captioner behind a URL."""

    def __init__(self, url: str, *, model: str | None = None, settings: Settings) -> None:
        """Finds out the server's model if none is named. Raises ConfigError or MachineError."""
        import httpx

        self._settings = settings
        self._root = _root(url)
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not self._key.isascii():
            raise ConfigError(f"{KEY_VARIABLE}: a key has plain ASCII characters only")
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=None,  # asyncio bounds the whole attempt, which httpx can't
            # a proxy can't reach this machine's own ports
            trust_env=urlsplit(self._root).hostname not in ("localhost", "127.0.0.1", "::1"),
        )
        self._runner = asyncio.Runner()
        self.model = model or self._only_model()

    @property
    def identity(self) -> str:
        """URL and model."""
        return f"{self._root} {self.model}"

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        """`concurrency` questions are on their way at once. Can be called once."""
        source = iter(questions)
        flying: dict[asyncio.Task[Answer], Question] = {}

        async def send_and_wait() -> set[asyncio.Task[Answer]]:
            for question in islice(source, self._settings.concurrency - len(flying)):
                flying[asyncio.ensure_future(self._ask(question))] = question
            if not flying:
                return set()
            done, _ = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
            return done

        try:
            while done := self._runner.run(send_and_wait()):
                # an error ends everything: first keep what has come
                for task in sorted(done, key=lambda task: task.exception() is not None):
                    yield flying.pop(task), task.result()
        finally:
            self._runner.run(self._hang_up(list(flying)))
            self._runner.close()

    async def _hang_up(self, flying: list[asyncio.Task[Answer]]) -> None:
        for task in flying:
            task.cancel()
        # what some of them raised meanwhile is said already
        await asyncio.gather(*flying, return_exceptions=True)
        await self._client.aclose()

    async def _ask(self, question: Question) -> Answer:
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": question.system},
                {"role": "user", "content": [_part(part) for part in question.parts]},
            ],
            "max_tokens": self._settings.max_tokens,
            "temperature": 0,
        }

        async def attempt() -> Answer:
            return _answer(await self._send("POST", "chat/completions", body))

        try:
            return await self._repeat(attempt)
        except _TryAgainError as error:
            times = self._settings.retries + 1
            return Answer(problem=f"the server failed {times} times; at last: {error}")
        except _RefusedError as error:
            return Answer(problem=f"the server won't have it: {error}")

    async def _repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run an attempt until it works; the last _TryAgainError is raised."""
        number = 0
        while True:
            try:
                return await attempt()
            except _TryAgainError as error:
                after = error.after or 0.0
                if after > MAX_WAIT:
                    raise MachineError(
                        f"{self._root}: {error}; it wants to be left alone for "
                        f"{after / 60:.0f} minutes. Start again then: finished captions are kept"
                    ) from None
                if number == self._settings.retries:
                    raise
            # jitter, lest all requests that failed together come back together
            pause = min(BACK_OFF, self._settings.back_off * 2**number) * random.uniform(0.5, 1.0)
            await asyncio.sleep(max(pause, after))
            number += 1

    async def _send(self, method: str, path: str, body: dict | None = None) -> Any:
        """One attempt; the JSON that came back. See `_parse` for the errors."""
        import httpx

        data = bytearray()
        url = f"{self._root}/{path}"
        try:
            async with (
                asyncio.timeout(self._settings.timeout),
                self._client.stream(method, url, json=body) as response,
            ):
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > MAX_BYTES:
                        raise _TryAgainError(f"an answer of over {MAX_BYTES // 10**6} MB")
        except TimeoutError:
            seconds = f"{self._settings.timeout:g} s"
            raise _TryAgainError(f"no whole answer within {seconds} (--timeout)") from None
        except httpx.TransportError as error:
            why = self._safe(str(error)) or type(error).__name__
            raise _TryAgainError(f"no connection ({why})") from None
        except httpx.DecodingError:
            raise _TryAgainError("an answer whose compression is broken") from None
        return self._parse(response, bytes(data))

    def _parse(self, response: "httpx.Response", data: bytes) -> Any:
        """The JSON of a response.

        Raises _TryAgainError, _RefusedError for this question, or MachineError if all are hopeless.
        """
        status = response.status_code
        text = data.decode("utf-8", "replace")
        said = f"status {status}{self._safe(_message(text))}"
        if status in _AGAIN:
            raise _TryAgainError(said, after=_retry_after(response.headers.get("Retry-After")))
        if status in _HOPELESS or 300 <= status < 400:
            raise MachineError(f"{response.url}: {said}. {_hint(status)}")
        if status >= 400:
            raise _RefusedError(said)
        if text.lstrip()[:1] == "<":
            raise _TryAgainError("a web page instead of JSON; is the URL an API's?")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise _TryAgainError("broken JSON") from None

    def _only_model(self) -> str:
        """The server's model if it has just one."""
        try:
            found = self._runner.run(self._repeat(lambda: self._send("GET", "models")))
            names = [str(entry["id"]) for entry in found["data"]]
        except _TryAgainError as error:
            raise MachineError(
                f"{self._root}: {error}. Is the server running, and is this its URL?"
            ) from None
        except (_RefusedError, KeyError, TypeError):
            raise MachineError(
                f"{self._root}: the server doesn't list its models; name one with --model"
            ) from None
        if len(names) != 1:
            has = f"it has {', '.join(names[:20])}" if names else "it lists none"
            raise ConfigError(f"{self._root}: name one of the server's models with --model; {has}")
        return names[0]

    def _safe(self, text: str) -> str:
        """A server's words without the key, which it may repeat."""
        return text.replace(self._key, "***") if self._key else text


def _root(url: str) -> str:
    """The API's root, without a slash at its end: `http://host:8000` means `.../v1`.

    Raises ConfigError; never repeats a URL that may hold a secret.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
        parts = urlsplit("")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "--captioner: the URL holds a login or a query. Give the plain URL, and the key in the "
            f"environment variable {KEY_VARIABLE}"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(
            f"--captioner: {url!r} is no URL; it looks like http:http://127.0.0.1:8000/v1"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _part(part: str | Image.Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    buffer = io.BytesIO()
    part.save(buffer, "JPEG", quality=92)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def _answer(found: Any) -> Answer:
    """The answer in a completion. Raises _TryAgainError if it isn't one."""
    try:
        choice = found["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
        refusal = choice["message"].get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _TryAgainError(f"JSON that is no completion{_message(json.dumps(found))}") from None
    if refusal:
        return Answer(problem=f"refused: {str(refusal)[:SHOWN]!r}")
    if reason == "length":
        return Answer(problem="cut off at the token limit; raise --max-tokens")
    if reason == "content_filter":
        return Answer(problem="refused by the server's content filter")
    if text is not None and not isinstance(text, str):
        raise _TryAgainError("JSON that is no completion (its content is no text)")
    return Answer(text or "")


def _message(text: str) -> str:
    """What the server says of an error: ` (...)`, or nothing."""
    try:
        found = json.loads(text)
        error = found.get("error", found.get("message", found.get("detail", "")))
        words = error.get("message", "") if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        words = "" if text.lstrip()[:1] in "<{[" else text
    shown = " ".join(str(words).split())[:SHOWN]
    return f" ({shown})" if shown else ""


def _hint(status: int) -> str:
    if status in (401, 402, 403):
        return f"The key comes from the environment variable {KEY_VARIABLE}"
    return "Check the URL and the model's name (--model)"


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or an HTTP date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
