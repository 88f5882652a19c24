"""The teacher `server`: any number of OpenAI-compatible endpoints of one model, asked over HTTP.

Requests wait in one queue, from which every endpoint takes as many at a time as it is allowed: a fast one takes more.
A request is at any moment in the queue, with one endpoint, or waiting for its retry, so none is lost and none is
answered twice. What goes wrong, and what is done:

| what | the request | the endpoint |
|---|---|---|
| no connection or a lost one, time-out, 5xx, no JSON | again, after a backoff | set aside after some in a row |
| 429, or 503 with Retry-After | again, after a backoff | rests for as long as it says |
| 400, 422, an answer without text or logprobs | failed, with the reason | – |
| 401, 403, 404 | – | the run stops: nothing would be answered |

An endpoint that is set aside is probed; its requests go to the others meanwhile. When none has lived for `give_up`
seconds the run stops with an error, and goes on when it is started again.
"""

import asyncio
import contextlib
import json
import os
import queue
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from dasd_engine.errors import InputError
from dasd_engine.server_answers import Dialect, Malformed, choose_model
from dasd_engine.teachers import Failed, Request, Sampled, TeacherChat, TeacherOptions

_PROBE_SECONDS = 10.0  # for connecting, and for listing the models
_SHOWN = 300  # characters of a server's complaint


class _Again(Exception):
    """The attempt failed and may be repeated. `fault`: the endpoint's; `rest`: seconds it asks to be left alone."""

    def __init__(self, reason: str, *, fault: bool = True, rest: float = 0.0):
        super().__init__(reason)
        self.fault, self.rest = fault, rest


@dataclass
class _Job:
    request: Request
    attempts: int = 0


class ServerTeacher:
    """Opened by asking every endpoint for its models: one at least must answer, and all must serve the same one."""

    def __init__(self, options: TeacherOptions):
        self._httpx = _httpx()
        self._options = options
        self._urls = [base_url(url) for url in options.urls]
        if not self._urls:
            raise InputError("teacher server: no URL; name one endpoint or several, e.g. http://127.0.0.1:8000/v1")
        if options.concurrency < 1 or options.retries < 0 or options.dead_after < 1 or options.timeout <= 0:
            raise InputError("teacher server: concurrency, dead_after, timeout must be above 0, and retries at least 0")
        self._key = _api_key(options.api_key_env)
        self._chat = TeacherChat(options.path) if options.path else None
        dialects: dict[str, Dialect] = {}
        silent: dict[str, str] = {}
        for url in self._urls:
            try:
                dialects[url] = self._ask_models(url)
            except _Again as error:
                silent[url] = str(error)
        if not dialects:
            raise InputError("no endpoint answers: " + "; ".join(f"{url}: {why}" for url, why in silent.items()))
        if len(models := {dialect.model for dialect in dialects.values()}) > 1:
            raise InputError(
                f"the endpoints serve different models ({', '.join(sorted(models))}); name one with --model"
            )
        usual = next(iter(dialects.values()))
        self.dialects = {url: dialects.get(url, usual) for url in self._urls}
        self.silent = silent  # until a probe finds them
        self.name: str = options.name or usual.model
        self.revision: str | None = options.revision or None

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Sampled | Failed]]:
        """In the order finished. The network has a thread of its own: it goes on while results are being used."""
        run = _Run(self, self._options)
        source, more, waiting = iter(requests), True, 0
        try:
            while more or waiting:
                while more and waiting < run.room and run.results.empty():
                    request = next(source, None)
                    more = request is not None
                    if request is not None:
                        run.submit(_Job(request))
                        waiting += 1
                if not waiting and run.results.empty():
                    return
                result = run.results.get()
                if isinstance(result, BaseException):
                    raise result
                waiting -= 1
                yield result
        finally:
            run.stop()

    def close(self) -> None:
        pass

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def complaint(self, status: int, text: str) -> str:
        """What a server says of an error, on one line, without the key."""
        try:
            answer = json.loads(text)
            found = answer.get("error", answer) if isinstance(answer, dict) else answer
            text = str(found.get("message", found) if isinstance(found, dict) else found)
        except ValueError:
            pass
        text = " ".join(text.split())
        if self._key:
            text = text.replace(self._key, "***")
        return f"HTTP {status}: {text[:_SHOWN]}"

    def judge(self, url: str, status: int, retry_after: str | None, text: str) -> None:
        """Raises what a status other than 200 means for the attempt; returns where it is the request's own fault."""
        reason = self.complaint(status, text)
        if status in (401, 403):
            raise InputError(f"{url}: {reason}; name the environment variable of the API key (api_key_env)")
        if status == 404:
            raise InputError(f"{url}: {reason}; is the URL that of an OpenAI-compatible server, and the model served?")
        if status == 429 or (status == 503 and retry_after):
            raise _Again(reason, fault=False, rest=min(_seconds(retry_after), self._options.longest_backoff))
        if status >= 500 or status in (408, 409, 425):
            raise _Again(reason)

    def dialect(self, url: str, answer: Any) -> Dialect:
        """What an endpoint's /models says. Raises _Again where it says nothing, InputError where it is no use."""
        if answer.status_code == 404 and self._options.model:
            return Dialect(self._options.model, chat=self._chat)
        if answer.status_code != 200:
            self.judge(url, answer.status_code, None, answer.text)
            raise _Again(self.complaint(answer.status_code, answer.text))
        try:
            return replace(choose_model(self._options.model, answer.json()), chat=self._chat)
        except InputError as error:
            raise InputError(f"{url}: {error}") from None
        except (ValueError, Malformed) as error:
            raise _Again(str(error)) from None

    def _ask_models(self, url: str) -> Dialect:
        try:
            answer = self._httpx.get(url + "/models", headers=self.headers(), timeout=_PROBE_SECONDS)
        except self._httpx.HTTPError as error:
            raise _Again(_words(error)) from None
        return self.dialect(url, answer)


class _Endpoint:
    """One server: alive or set aside, and until when it rests."""

    def __init__(self, url: str, dialect: Dialect, why: str | None):
        self.url, self.dialect = url, dialect
        self.failures = 0  # in a row
        self.why = why or ""  # the last of them
        self.rests_until = 0.0  # by the loop's clock
        self.alive = asyncio.Event()
        if why is None:
            self.alive.set()


class _Run:
    """One call of sample: an event loop in a thread, a worker for every request that an endpoint may have at a time."""

    def __init__(self, teacher: ServerTeacher, options: TeacherOptions):
        self.teacher, self.options = teacher, options
        self.httpx = _httpx()
        self.room = 2 * options.concurrency * len(teacher.dialects)
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._go, name="teacher-server", daemon=True)
        self._thread.start()
        self._ready.wait()

    def submit(self, job: _Job) -> None:
        self._loop.call_soon_threadsafe(self._jobs.put_nowait, job)

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: what it had to say is among the results
            self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _go(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # of ours: whoever waits for results must hear of it
            self.results.put(error)
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._stopped = asyncio.Event()
        self._lived = self._loop.time()  # when an endpoint was last known to be alive
        silent = self.teacher.silent
        self._endpoints = [_Endpoint(url, d, silent.get(url)) for url, d in self.teacher.dialects.items()]
        limits = self.httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = self.httpx.Timeout(None, connect=_PROBE_SECONDS)
        headers = self.teacher.headers()
        async with self.httpx.AsyncClient(limits=limits, timeout=timeout, headers=headers) as self._client:
            self._tasks = {asyncio.create_task(self._stopped.wait())}
            for endpoint in self._endpoints:
                if not endpoint.alive.is_set():
                    self._set_aside(endpoint)
                for _ in range(self.options.concurrency):
                    self._start(self._work(endpoint))
            self._ready.set()
            await self._stopped.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.results.put(error)

    async def _work(self, endpoint: _Endpoint) -> None:
        while True:
            await endpoint.alive.wait()
            if (rest := endpoint.rests_until - self._loop.time()) > 0:
                await asyncio.sleep(rest)
                continue
            job = await self._jobs.get()
            if not endpoint.alive.is_set() or endpoint.rests_until > self._loop.time():
                self._jobs.put_nowait(job)  # that happened while this waited for work
                continue
            job.attempts += 1
            try:
                result = await self._attempt(endpoint, job.request)
            except _Again as error:
                self._again(endpoint, job, error)
            else:
                endpoint.failures = 0
                self.results.put((job.request, result))

    def _again(self, endpoint: _Endpoint, job: _Job, error: _Again) -> None:
        """After an attempt that failed: the job waits for its retry, or has failed; the endpoint may be set aside."""
        if error.rest:
            endpoint.rests_until = max(endpoint.rests_until, self._loop.time() + error.rest)
        if error.fault:
            endpoint.failures += 1
            endpoint.why = str(error)
            if endpoint.failures >= self.options.dead_after and endpoint.alive.is_set():
                endpoint.alive.clear()
                self._lived = self._loop.time()
                self._set_aside(endpoint)
        if job.attempts > self.options.retries:
            self.results.put((job.request, Failed(f"{endpoint.url}: {error} (attempt {job.attempts}, the last)")))
            return
        delay = min(self.options.backoff * 2 ** (job.attempts - 1), self.options.longest_backoff)
        self._loop.call_later(delay * random.uniform(0.5, 1.0), self._jobs.put_nowait, job)

    def _set_aside(self, endpoint: _Endpoint) -> None:
        _tell(f"{endpoint.url}: set aside ({endpoint.why}), probed every {self.options.probe_every:g} s")
        self._start(self._probe(endpoint))

    async def _attempt(self, endpoint: _Endpoint, request: Request) -> Sampled | Failed:
        """The result; raises _Again, and InputError for what stops the run."""
        dialect = endpoint.dialect
        try:
            body = dialect.body(request)
        except ValueError as error:  # InputError is one
            return Failed(str(error))
        try:
            async with asyncio.timeout(self.options.timeout):
                answer = await self._client.post(endpoint.url + dialect.path, json=body)
        except TimeoutError:
            raise _Again(f"no answer within {self.options.timeout:g} s") from None
        except (self.httpx.HTTPError, self.httpx.StreamError) as error:
            raise _Again(_words(error)) from None
        if answer.status_code != 200:
            retry_after = answer.headers.get("retry-after")
            self.teacher.judge(endpoint.url, answer.status_code, retry_after, answer.text)
            return Failed(self.teacher.complaint(answer.status_code, answer.text))
        try:
            return dialect.read(request, answer.json())
        except (ValueError, RecursionError) as error:
            raise _Again(f"the answer is not JSON: {error}") from None
        except Malformed as error:
            raise _Again(str(error)) from None

    async def _probe(self, endpoint: _Endpoint) -> None:
        """Until an endpoint that was set aside lists its models again, or none has been alive for too long."""
        while True:
            await asyncio.sleep(self.options.probe_every)
            try:
                async with asyncio.timeout(_PROBE_SECONDS):
                    answer = await self._client.get(endpoint.url + "/models")
                dialect = self.teacher.dialect(endpoint.url, answer)
                if dialect.model != endpoint.dialect.model:
                    raise _Again(f"serves {dialect.model} now, not {endpoint.dialect.model}")
                endpoint.dialect = dialect
                endpoint.failures = 0
                endpoint.alive.set()
                _tell(f"{endpoint.url}: answers again")
                return
            except (TimeoutError, self.httpx.HTTPError, _Again) as error:
                endpoint.why = str(error) if isinstance(error, _Again) else _words(error)
            silent = self._loop.time() - self._lived
            if silent > self.options.give_up and not any(e.alive.is_set() for e in self._endpoints):
                whys = "; ".join(f"{e.url}: {e.why}" for e in self._endpoints)
                raise InputError(f"no endpoint has answered for {silent:.0f} s ({whys}); run again to go on")


def base_url(url: str) -> str:
    """http://host:8000 and http://host:8000/v1/ as http://host:8000/v1. InputError for what is no such URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"endpoint {parts.hostname or url!r}: write http://host:port or http://host:port/v1")
    if parts.username or parts.password:
        raise InputError(f"endpoint {parts.hostname}: a key in a URL ends up in logs; name its environment variable")
    url = url.rstrip("/")
    return url if url.endswith("/v1") else url + "/v1"


def _api_key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"the environment variable {variable} (api_key_env) is not set")
    return key


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header, in seconds or a date; 0 for none or nonsense."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(retry_after or "")
        return max(0.0, (until - datetime.now(until.tzinfo)).total_seconds())
    except ValueError:
        return 0.0


def _tell(what: str) -> None:
    """Whoever waits must know what for."""
    print(f"warning: {what}", file=sys.stderr, flush=True)


def _words(error: BaseException) -> str:
    """An error of the network; many have no text of their own."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _httpx() -> Any:
    try:
        import httpx2
    except ImportError:
        raise InputError("the teacher server needs the extra: pip install 'dasd-engine[server]'") from None
    return httpx2
