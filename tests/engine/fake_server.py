"""An OpenAI-compatible server in a thread, whose answers are a function of the request and whose faults are scripted.

    with FakeServer(faults={7: ["500", "reset"]}) as server:      # the request of seed 7 fails twice, then is answered
        ... server.url, server.asked, server.answered

Faults: a status ("500", "429:1.5" with that Retry-After), "reset" (the connection is reset half way through the body),
"hang" (no answer until the client has gone), "garbage" (no JSON), "not an answer" (JSON of another form); and answers
that are of no use: "no logprobs", "nan", "null logprob", "empty", "surrogate".
"""

import json
import math
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tokenizers

from dasd_engine.token_text import token_bytes

STUDENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "student"


def answer_text(seed: int) -> str:
    """What is answered to the request of this seed: characters of several bytes too."""
    return f"<think>\n{seed} + {seed} = {2 * seed} 🙂\n</think>\nNaïvely: {2 * seed}."


def answer_logprobs(count: int, seed: int) -> list[float]:
    return [-(seed % 7 + i + 1) / 64 for i in range(count)]


class FakeServer:
    """`asked`: the bodies in order of arrival. `answered`: how often each seed was answered well. `most`: requests
    there were at once. `dead`: connections are reset, `probes` are those of them that asked for the models."""

    def __init__(
        self,
        *,
        faults: dict[int, list[str]] | None = None,
        owner: str = "vllm",
        model: str = "fake",
        key: str = "",
        tell_ids: bool = True,
        reasoning: bool = False,
        on_request: Callable[["FakeServer", dict[str, Any]], None] | None = None,
        on_probe: Callable[["FakeServer"], None] | None = None,
    ):
        self.faults = {seed: list(names) for seed, names in (faults or {}).items()}
        self.owner, self.model, self.key = owner, model, key
        self.tell_ids, self.reasoning = tell_ids, reasoning
        self.on_request, self.on_probe = on_request, on_probe
        self.tokenizer = tokenizers.Tokenizer.from_file(str(STUDENT / "tokenizer.json"))
        self.end = self.tokenizer.token_to_id("<|im_end|>")
        self.asked: list[dict[str, Any]] = []
        self.answered: Counter[int] = Counter()
        self.dead = False
        self.probes = 0
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.leaving = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                server.models(self)

            def do_POST(self) -> None:
                server.completion(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # resets are meant
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.leaving.set()
        self.http.shutdown()
        self.http.server_close()

    # ------------------------------------------------------------------------------------------ requests

    def models(self, handler: BaseHTTPRequestHandler) -> None:
        with self.lock:
            self.probes += self.dead
            if self.on_probe is not None:
                self.on_probe(self)
            dead = self.dead
        if dead:
            return reset(handler)
        if self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
            return send(handler, 401, {"error": {"message": f"wrong key: {handler.headers.get('Authorization')}"}})
        send(handler, 200, {"data": [{"id": self.model, "owned_by": self.owner, "max_model_len": 1024}]})

    def completion(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.asked.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
            if self.on_request is not None:
                self.on_request(self, body)
            dead = self.dead
            left = self.faults.get(body["seed"], [])
            fault = left.pop(0) if left and not dead else ""
        try:
            if dead:
                return reset(handler)
            self.answer(handler, body, fault)
        finally:
            with self.lock:
                self.now -= 1

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], fault: str) -> None:
        status, _, after = fault.partition(":")
        if status.isdigit():
            message = {"error": {"message": f"fault {status}"}}
            return send(handler, int(status), message, {"Retry-After": after} if after else {})
        if fault == "hang":
            self.leaving.wait()
            return reset(handler)
        if fault == "garbage":
            return send(handler, 200, b'{"choices": [')
        if fault == "not an answer":
            return send(handler, 200, {"detail": "nothing here"})
        data = json.dumps(self.result(handler.path, body, fault)).encode()
        if fault == "reset":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data[: len(data) // 2])
            return reset(handler)
        with self.lock:
            self.answered[body["seed"]] += 1
        send(handler, 200, data)

    def result(self, path: str, body: dict[str, Any], fault: str) -> dict[str, Any]:
        seed = body["seed"]
        text = {"empty": " ", "surrogate": "a\ud800"}.get(fault, answer_text(seed))
        ids = [*self.tokenizer.encode(text.replace("\ud800", "?"), add_special_tokens=False).ids, self.end]
        reason = "stop"
        if len(ids) > body["max_tokens"]:
            ids, reason = ids[: body["max_tokens"]], "length"
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
        logprobs: list[float | None] = [*answer_logprobs(len(ids), seed)]
        if fault in ("nan", "null logprob"):
            logprobs[1] = math.nan if fault == "nan" else None
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        tokens = [token_bytes(self.tokenizer.id_to_token(token)) for token in ids]
        if path.endswith("/chat/completions"):
            thinking, _, said = text.removeprefix("<think>\n").partition("\n</think>\n")
            message = {"content": said.strip(), "reasoning_content": thinking} if self.reasoning else {"content": text}
            choice["message"] = {"role": "assistant", **message}
            content = [
                {"token": t.decode(errors="replace"), "logprob": logprob, "bytes": list(t)}
                for t, logprob in zip(tokens, logprobs, strict=True)
            ]
            choice["logprobs"] = {"content": content}
        else:
            choice["text"] = text
            shown = [t.decode(errors="replace") for t in tokens]
            choice["logprobs"] = {"tokens": shown, "token_logprobs": logprobs}
        if body.get("return_token_ids") and self.tell_ids:
            choice["token_ids"] = ids
        if fault == "no logprobs":
            choice["logprobs"] = None
        return {"id": "x", "choices": [choice]}


def send(handler: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection as a process that was killed does: the client sees a reset."""
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()
