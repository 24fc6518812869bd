"""A real server on this machine that speaks the chat-completions protocol, well or badly as a test wants it."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, *, reason="stop", refusal=None, usage=(7, 5)):
    """The body of a good answer."""
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": reason,
                "message": {"role": "assistant", "content": text, "refusal": refusal},
            }
        ],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)},
    }


def echo(body):
    """Answers with the last message, in capitals."""
    return completion(body["messages"][-1]["content"].upper())


class Served:
    """What the server saw, and how it behaves.

    ``script`` gives the behaviour of the n-th call, or is a function that gives that of a body. A behaviour is None or
    a function of the body for a good answer; a number for that status, or ``(number, headers)``; ``"drop"`` closes the
    connection without an answer, ``"half"`` in the middle of one; ``"garbage"`` sends half a JSON text in whole; bytes
    are sent as they are, with status 200.
    """

    def __init__(self, answer=echo, script=(), hold=None):
        self.answer, self.hold = answer, hold
        self.script = script if callable(script) else list(script)
        self.bodies, self.headers, self.most_at_once, self.url = [], [], 0, ""
        self.models = []  # names that a GET is answered with, whatever its path
        self._lock, self._running = threading.Lock(), 0

    def enter(self, body, headers):
        with self._lock:
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
            self.bodies.append(body)
            self.headers.append(headers)
            if callable(self.script):
                return self.script(body)
            return self.script.pop(0) if self.script else None

    def leave(self):
        with self._lock:
            self._running -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; without this each answer takes 40 ms

    def do_GET(self):
        rows = [{"id": name, "object": "model"} for name in self.server.served.models]
        self._send(200, json.dumps({"object": "list", "data": rows}).encode())

    def do_POST(self):
        served = self.server.served
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        do = served.enter(body, {name.lower(): value for name, value in self.headers.items()})
        try:
            if served.hold is not None:
                served.hold()
            self._behave(do, body, served)
        finally:
            served.leave()

    def _behave(self, do, body, served):
        if do in ("drop", "half"):
            if do == "half":
                whole = json.dumps(served.answer(body)).encode()
                self._send(200, whole[: len(whole) // 2], length=len(whole))
                self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if do == "garbage":
            self._send(200, json.dumps(served.answer(body)).encode()[:-20])
            return
        if isinstance(do, bytes):
            self._send(200, do)
            return
        status, headers = do if isinstance(do, tuple) else (do, {}) if isinstance(do, int) else (200, {})
        if status == 200:
            self._send(200, json.dumps((do or served.answer)(body)).encode())
        else:
            self._send(status, json.dumps({"error": {"message": f"status {status}, key sk-secret"}}).encode(), headers)

    def _send(self, status, data, headers=(), *, length=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that gave up waiting is no news."""


@contextmanager
def serving(**behaviour):
    """Run the server in a thread; yields what it sees."""
    served = Served(**behaviour)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.served = served
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shaped(text, **changes):
    """A good answer with other values, as bytes: content, usage, or anything else of the body."""
    body = completion(text)
    body["choices"][0]["message"]["content"] = changes.pop("content", text)
    return json.dumps({**body, **changes}).encode()


def faults(text):
    """Behaviours of a bad server that asks for another attempt, and those whose answer of ``text`` is worth keeping."""
    waits = ("inf", "1e12", "nan", "-5", "soon", "Fri, 31 Dec 9999 23:59:59 GMT")
    again = [
        429, 500, 503, "drop", "half", "garbage",
        *((429, {"Retry-After": wait}) for wait in waits),
        (503, {"retry-after-ms": "1e300"}), b"", b"\xff\xfe", b"nonsense", b'{"choices": ', b"9" * 5000,
    ]  # fmt: skip
    usages = (
        {"prompt_tokens": "7", "completion_tokens": "5"},
        {"prompt_tokens": [1]},
        "none",
        {"prompt_tokens": 1e300},
    )
    kept = [
        *(shaped(text, usage=usage) for usage in usages),
        shaped(text, content=[{"type": "text", "text": text}]),
        shaped(text, content=f"<think>Well, {text[::-1]}</think>\n{text}"),
        shaped(text, usage={"prompt_tokens": 10**30}, model=None, id=[{}]),
        b"\xef\xbb\xbf" + shaped(text),
        shaped(text).replace(b'"index"', b'"index": 1, "index"'),
    ]
    return again, kept


class Bad:
    """Up to three faults a text, then an answer in one of many shapes; counts the answers that were given."""

    def __init__(self):
        self.asked, self.paid = Counter(), Counter()

    def __call__(self, body):
        text = body["messages"][-1]["content"]
        tries, self.asked[text] = self.asked[text], self.asked[text] + 1
        again, kept = faults(f"answer to {text}")
        own = random.Random(text)  # noqa: S311 - a behaviour, no secrets
        if tries < own.randint(0, 3):
            return random.Random(f"{text} {tries}").choice(again)  # noqa: S311
        self.paid[text] += 1
        return own.choice([shaped(f"answer to {text}"), *kept])
