"""The http captioner against a server that answers, fails, stalls and lies."""

import itertools
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
from PIL import Image

from data_tools.caption.captioners import Answer, Question, server
from data_tools.caption.captioners.server import KEY_VARIABLE, Server, Settings
from tests.unit.caption.fake_server import CaptionServer, Reply, completion, serve
from train.errors import ConfigError, MachineError

COLOURS = {"red": (200, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 250)}
FAST = Settings(concurrency=2, timeout=20, retries=2, back_off=0.001)


def questions(names: Iterable[str] = COLOURS) -> list[Question]:
    """One about a plain picture of each colour."""
    pictures = {name: Image.new("RGB", (40, 30), COLOURS[name]) for name in names}
    return [Question(name, "be brief", ("what?", image)) for name, image in pictures.items()]


def ask(target: CaptionServer, *, names: Iterable[str] = COLOURS, **changes: Any) -> dict:
    """Answers by name."""
    settings = Settings(**{**vars(FAST), **changes})
    captioner = Server(target.url, settings=settings)
    return {question.name: answer for question, answer in captioner.answers(questions(names))}


def colour_of(request: Any) -> str:
    return next(name for name, value in COLOURS.items() if [value] == request.colours)


def test_each_picture_gets_its_own_answer() -> None:
    with serve(lambda request, _: completion(f"all {colour_of(request)}")) as target:
        assert ask(target) == {name: Answer(f"all {name}") for name in COLOURS}
    body = target.requests[0].body
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 512, 0)
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert target.requests[0].words == "what?"
    assert "Authorization" not in target.requests[0].headers


def test_pictures_keep_their_order() -> None:
    parts = ("first", Image.new("RGB", (30, 30), COLOURS["blue"]), "then")
    question = Question("x", "", (*parts, Image.new("RGB", (30, 30), COLOURS["red"])))
    with serve(lambda *_: completion("fine")) as target:
        list(Server(target.url, settings=FAST).answers([question]))
    assert target.requests[0].colours == [COLOURS["blue"], COLOURS["red"]]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_failure_that_passes_is_not_seen(status: int) -> None:
    def answer(_: Any, before: int) -> Reply:
        return completion("fine") if before == 2 else Reply({"error": "busy"}, status=status)

    with serve(answer) as target:
        assert set(ask(target).values()) == {Answer("fine")}
    assert len(target.requests) == 9


LIES = {
    "status 500 (out of memory)": Reply({"error": {"message": "out of memory"}}, status=500),
    "broken JSON": Reply(b'{"choices": [{"mess'),
    "a web page instead of JSON": Reply(b"<!doctype html><title>Welcome</title>"),
    "JSON that is no completion (no model loaded)": Reply({"error": "no model loaded"}),
    "JSON that is no completion": Reply([1, 2]),
    "its content is no text": completion(["a", "b"]),
    "no whole answer within 0.3 s": Reply(None, stall=True),
    "within 0.3 s": Reply(None, drip=True),
    "an answer of over 4 MB": Reply(b" " * 4_100_000),
    "compression is broken": Reply(b"plain", headers={"Content-Encoding": "gzip"}),
    "broken JSON ": Reply(b"[" * 100_000),
}


@pytest.mark.parametrize("problem", LIES)
def test_a_failure_that_stays_is_an_answer(problem: str) -> None:
    started = time.monotonic()
    with serve(lambda *_: LIES[problem]) as target:
        waits = LIES[problem].stall or LIES[problem].drip
        answer = ask(target, names=["red"], timeout=0.3 if waits else 20)["red"]
    assert answer.text == ""
    assert problem.strip() in answer.problem
    assert answer.problem.startswith("the server failed 3 times; at last: ")
    assert len(target.requests) == FAST.retries + 1
    assert time.monotonic() - started < 5


def test_a_connection_that_breaks_off_is_tried_again() -> None:
    broken = Reply(b"{}", headers={"Content-Length": "100"})
    with serve(lambda _, before: completion("fine") if before else broken) as target:
        assert ask(target, names=["red"])["red"] == Answer("fine")


NOT_AGAIN = {
    "cut off at the token limit; raise --max-tokens": completion("A fox in", reason="length"),
    "refused by the server's content filter": completion("", reason="content_filter"),
    "refused: 'not this one'": Reply(
        {"choices": [{"message": {"content": None, "refusal": "not this one"}}]}
    ),
    "the server won't have it: status 400 (too many pixels)": Reply(
        {"error": {"message": "too many pixels"}}, status=400
    ),
    "the server won't have it: status 413": Reply(b"<html>", status=413),
    "the server won't have it: status 422 (no images)": Reply({"detail": "no images"}, status=422),
}


@pytest.mark.parametrize("problem", NOT_AGAIN)
def test_an_answer_of_no_use_is_not_asked_again(problem: str) -> None:
    with serve(lambda *_: NOT_AGAIN[problem]) as target:
        assert ask(target, names=["red"])["red"] == Answer(problem=problem)
    assert len(target.requests) == 1


def test_an_empty_answer_stays_empty() -> None:
    with serve(lambda *_: completion(None)) as target:
        assert ask(target, names=["red"])["red"] == Answer("")


def test_one_bad_picture_doesnt_hold_up_the_others() -> None:
    def answer(request: Any, _: int) -> Reply:
        return Reply(None, stall=True) if colour_of(request) == "red" else completion("fine")

    with serve(answer) as target:
        found = ask(target, timeout=0.5)
    assert [name for name, answer in found.items() if answer.text] == ["green", "blue"]
    assert list(found)[-1] == "red"


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, KEY_VARIABLE), (403, KEY_VARIABLE), (404, "--model"), (307, "--model")],
)
def test_a_hopeless_status_ends_it_all(status: int, hint: str) -> None:
    reply = Reply({"error": {"message": "no such thing"}}, status=status, headers={"Location": "/"})
    with serve(lambda *_: reply) as target, pytest.raises(MachineError) as error:
        ask(target, concurrency=1)
    assert f"status {status} (no such thing)" in str(error.value)
    assert hint in str(error.value)
    assert len(target.requests) == 1


def test_answers_that_came_with_the_error_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = Server("http://x", model="y", settings=Settings(concurrency=3))

    async def answer(question: Question) -> Answer:
        if question.name == "red":
            raise MachineError("over")
        return Answer("fine")

    monkeypatch.setattr(captioner, "_ask", answer)
    found = []
    with pytest.raises(MachineError, match="over"):
        found.extend(question.name for question, _ in captioner.answers(questions()))
    assert sorted(found) == ["blue", "green"]


@pytest.mark.parametrize(
    ("after", "waits"), [("0.4", 0.4), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", 0.0)]
)
def test_retry_after(after: str, waits: float) -> None:
    busy = Reply({}, status=429, headers={"Retry-After": after})
    with serve(lambda _, before: completion("fine") if before else busy) as target:
        assert ask(target, names=["red"])["red"] == Answer("fine")
    first, second = target.requests
    assert waits <= second.time - first.time < waits + 2


@pytest.mark.parametrize("after", ["3600", "Wed, 21 Oct 2122 07:28:00 GMT", "inf"])
def test_a_server_that_wants_an_hour_ends_it(after: str) -> None:
    busy = Reply({}, status=429, headers={"Retry-After": after})
    with serve(lambda *_: busy) as target, pytest.raises(MachineError, match="Start again then"):
        ask(target, names=["red"])
    assert len(target.requests) == 1


def test_waits_double() -> None:
    with serve(lambda *_: Reply({}, status=500)) as target:
        ask(target, names=["red"], back_off=0.1, retries=3)
    times = [request.time for request in target.requests]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(wait >= 0.05 * 2**number for number, wait in enumerate(waits))
    assert len(waits) == 3


def test_requests_run_side_by_side_and_no_more_of_them_than_told() -> None:
    """The first two are answered only when the other is there, too."""
    both = threading.Barrier(2, timeout=5)

    def answer(request: Any, _: int) -> Reply:
        if colour_of(request) != "blue":
            both.wait()
        return completion("fine")

    with serve(answer) as target:
        assert set(ask(target).values()) == {Answer("fine")}


def test_pictures_are_taken_only_as_they_can_be_sent() -> None:
    taken = []

    def source() -> Iterable[Question]:
        for question in questions():
            taken.append(question.name)
            yield question

    with serve(lambda *_: completion("fine")) as target:
        stream = Server(target.url, settings=Settings(concurrency=1)).answers(source())
        next(iter(stream))
        assert taken == ["red"]


def test_the_key_is_sent_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    reply = Reply({"error": {"message": "wrong key sk-secret given"}}, status=401)
    with serve(lambda *_: reply) as target:
        captioner = Server(target.url, settings=FAST)
        assert "secret" not in captioner.identity + repr(captioner)
        with pytest.raises(MachineError, match=r"wrong key \*\*\* given"):
            list(captioner.answers(questions()))
    assert target.requests[0].headers["Authorization"] == "Bearer sk-secret"
    assert "secret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "url",
    ["http://me:secret@host/v1", "http://host/v1?key=secret", "http://host/#secret"],
)
def test_a_secret_in_the_url_is_refused_unshown(url: str) -> None:
    with pytest.raises(ConfigError, match=KEY_VARIABLE) as error:
        Server(url, model="x", settings=FAST)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://host", "http://", "http://host:port/v1"])
def test_not_a_url(url: str) -> None:
    with pytest.raises(ConfigError, match="is no URL"):
        Server(url, model="x", settings=FAST)


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("https://host/api/v1/", "https://host/api/v1"),
        ("http://host/v1/chat/completions", "http://host/v1"),
    ],
)
def test_root(url: str, root: str) -> None:
    assert server._root(url) == root


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (Reply({"data": [{"id": "a"}, {"id": "b"}]}), "name one .* it has a, b"),
        (Reply({"data": []}), "it lists none"),
        (Reply({"models": []}), "doesn't list its models"),
        (Reply({}, status=404), "status 404"),
        (Reply(b"<html>"), "a web page instead of JSON.* Is the server running"),
    ],
)
def test_the_model_must_be_clear(models: Reply, message: str) -> None:
    with serve(lambda *_: completion("fine"), models=models) as target:
        with pytest.raises((ConfigError, MachineError), match=message):
            Server(target.url, settings=FAST)
        assert Server(target.url, model="a", settings=FAST).identity == f"{target.url} a"


def test_no_server() -> None:
    with serve(lambda *_: completion("fine")) as target:
        url = target.url
    with pytest.raises(MachineError, match=r"no connection .* Is the server running"):
        Server(url, settings=FAST)
