"""The teacher `server` against a fake one with scripted faults: nothing lost, nothing doubled, nothing made up."""

import json
import random
import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest
from fake_server import STUDENT, FakeServer, answer_logprobs, answer_text

from dasd_engine.errors import InputError
from dasd_engine.server_answers import Malformed, choose_model
from dasd_engine.teacher_server import ServerTeacher, _seconds, base_url
from dasd_engine.teachers import Failed, Request, Sampled, TeacherOptions, open_teacher

FAST = TeacherOptions(
    kind="server", path=str(STUDENT), backoff=1e-3, longest_backoff=2e-3, probe_every=5e-3, retries=30, concurrency=4,
    dead_after=3, give_up=60.0, timeout=60.0,
)  # fmt: skip


def requests(count: int, **changes: object) -> list[Request]:
    first = Request("", [{"role": "user", "content": "Double it"}], 1.0, 0, 200)
    return [replace(first, key=f"k{seed}", seed=seed, **changes) for seed in range(count)]


def ask(options: TeacherOptions, asked: list[Request], *servers: FakeServer) -> dict[str, Sampled | Failed]:
    """Every request's result: each comes exactly once."""
    with closing(open_teacher(replace(options, urls=tuple(server.url for server in servers)))) as teacher:
        results = list(teacher.sample(iter(asked)))
    keys = [request.key for request, _ in results]
    assert sorted(keys) == sorted(request.key for request in asked)  # none lost, none doubled
    return dict(zip(keys, [result for _, result in results], strict=True))


def check_answer(result: Sampled | Failed, seed: int, *, ids: bool = True) -> None:
    assert isinstance(result, Sampled), result
    assert result.text == answer_text(seed) and result.opened == 0 and result.finish_reason == "stop"
    raw, ends = result.text.encode(), result.token_ends
    assert ends[-1] == ends[-2] == len(raw)  # the end of the turn gives no text
    assert result.logprobs == answer_logprobs(len(ends), seed)
    assert (result.token_ids is not None) == ids
    assert raw.index("🙂".encode()) + 2 in ends  # a token ends inside the smiley
    assert ends == sorted(ends)


@pytest.mark.parametrize("directory", [str(STUDENT), ""], ids=["completions", "chat"])
@pytest.mark.parametrize("tell_ids", [True, False], ids=["ids", "no ids"])
def test_answers_of_both_interfaces(directory, tell_ids):
    """Without ids /completions tells its tokens as text, in which a character that is cut is lost: then the answer
    must be refused rather than misaligned."""
    with FakeServer(tell_ids=tell_ids) as server:
        results = ask(replace(FAST, path=directory), requests(12), server)
        path_has_prompt = ["prompt" in body for body in server.asked]
    assert all(path_has_prompt) if directory else not any(path_has_prompt)
    for seed in range(12):
        if directory and not tell_ids:
            assert "do not spell" in results[f"k{seed}"].reason
        else:
            check_answer(results[f"k{seed}"], seed, ids=tell_ids)


def test_what_is_asked():
    """Token ids of the template, the request's own sampling, none of the server's defaults; a prefix is a prefill."""
    plain = Request("a", [{"role": "user", "content": "Hi"}], 0.6, 11, 50, top_p=0.9, top_k=20)
    with FakeServer() as server:
        ask(FAST, [plain, replace(plain, key="b", seed=12, prefix="<think>\nSo")], server)
        ask(replace(FAST, path=""), [replace(plain, key="c", seed=13, prefix="<think>\nSo")], server)
        tokenizer = server.tokenizer
        bodies = {body["seed"]: body for body in server.asked}
    assert bodies[11] | {"prompt": 0} == {
        "model": "fake", "temperature": 0.6, "top_p": 0.9, "top_k": 20, "seed": 11, "max_tokens": 50, "min_p": 0.0,
        "repetition_penalty": 1.0, "skip_special_tokens": False, "return_token_ids": True, "logprobs": 1, "prompt": 0,
        "stop_token_ids": [2],
    }  # fmt: skip
    prompt = tokenizer.decode(bodies[11]["prompt"], skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(bodies[12]["prompt"], skip_special_tokens=False) == prompt + "<think>\nSo"
    assert bodies[13]["messages"][-1] == {"role": "assistant", "content": "<think>\nSo"}
    assert bodies[13]["continue_final_message"] is True and bodies[13]["add_generation_prompt"] is False


def test_a_server_of_another_kind_is_asked_in_plain_openai():
    with FakeServer(owner="openai") as server:
        results = ask(replace(FAST, path=""), requests(3), server)
        ask(replace(FAST, path=""), [replace(requests(1)[0], seed=9, prefix="<think>\nSo")], server)
        first, *_, last = server.asked
    assert set(first) == {"model", "messages", "temperature", "top_p", "seed", "max_tokens", "logprobs"}
    assert [message["role"] for message in last["messages"]] == ["user", "assistant", "user"]  # asked to go on
    check_answer(results["k1"], 1, ids=False)


def test_thinking_that_the_server_keeps_apart():
    with FakeServer(reasoning=True) as server:
        results = ask(replace(FAST, path=""), requests(4), server)
        cut = ask(replace(FAST, path=""), requests(4, max_new_tokens=10), server)
    check_answer(results["k3"], 3)
    assert isinstance(cut["k3"], Sampled) and cut["k3"].finish_reason == "length"
    assert len(cut["k3"].logprobs) == 10  # the last of them ends inside the smiley
    assert cut["k3"].text == answer_text(3).partition("🙂")[0] + "\ufffd"


TRANSIENT = ["500", "502", "503:0.001", "429", "429:0.001", "reset", "garbage", "not an answer"]


@pytest.mark.parametrize("servers", [1, 3])
def test_every_transient_fault_is_outlived(servers):
    """Seventy requests, most of which meet one to three faults: each is answered once, as if there had been none."""
    rng = random.Random(servers)
    faults = {seed: rng.choices(TRANSIENT, k=rng.randint(0, 3)) for seed in range(70)}
    faults[5] = TRANSIENT
    running = [FakeServer(faults=faults) for _ in range(servers)]
    try:
        for server in running:
            server.__enter__()
        results = ask(FAST, requests(70), *running)
    finally:
        for server in running:
            server.__exit__()
    for seed in range(70):
        check_answer(results[f"k{seed}"], seed)
    assert sum((server.answered for server in running), start=Counter()).total() == 70
    assert all(server.most <= FAST.concurrency for server in running)
    assert sum(len(server.asked) for server in running) > 100


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("400", "HTTP 400: fault 400"),
        ("422", "HTTP 422: fault 422"),
        ("no logprobs", "gives no logprobs"),
        ("nan", "logprob of token 1 is nan"),
        ("null logprob", "logprob of token 1 is nan"),
        ("empty", "the text is empty"),
        ("surrogate", "half a surrogate pair at character 1"),
    ],
)
@pytest.mark.parametrize("directory", [str(STUDENT), ""], ids=["completions", "chat"])
def test_what_fails_for_good_says_why_and_is_asked_once(directory, fault, reason):
    with FakeServer(faults={1: [fault]}) as server:
        results = ask(replace(FAST, path=directory), requests(3), server)
        assert len(server.asked) == 3
    assert reason in results["k1"].reason
    check_answer(results["k0"], 0)
    check_answer(results["k2"], 2)


def test_a_request_that_never_succeeds_fails_after_its_retries():
    with FakeServer(faults={1: ["500"] * 100}) as server:
        results = ask(replace(FAST, retries=4, dead_after=100), requests(6), server)
        assert sum(body["seed"] == 1 for body in server.asked) == 5
    assert "HTTP 500: fault 500 (attempt 5, the last)" in results["k1"].reason
    check_answer(results["k5"], 5)


def test_a_server_that_hangs_times_out():
    with FakeServer(faults={2: ["hang", "hang"]}) as server:
        results = ask(replace(FAST, timeout=0.3), requests(5), server)
    for seed in range(5):
        check_answer(results[f"k{seed}"], seed)


def test_a_dead_endpoint_hands_its_requests_to_the_others():
    """One of two dies for good after ten requests. It is set aside: further requests go to the other only."""

    def die(server: FakeServer, body: dict) -> None:
        server.dead = server.dead or len(server.asked) > 10

    with FakeServer(on_request=die) as dying, FakeServer() as living:
        results = ask(FAST, requests(80), dying, living)
        for seed in range(80):
            check_answer(results[f"k{seed}"], seed)
        assert (dying.answered + living.answered).total() == 80
        # Ten answers, those in flight, and what was asked until three had failed in a row.
        assert len(dying.asked) <= 10 + FAST.dead_after + 2 * FAST.concurrency
        assert dying.probes > 0 or living.answered.total() < 80


@pytest.mark.parametrize("back_after", [1, 4])
def test_the_only_server_dies_half_way_and_comes_back(back_after, capsys):
    """While it is away nothing is asked and nothing fails; it is answered on once a probe finds it. Both are told."""

    def die(server: FakeServer, body: dict) -> None:
        server.dead = server.dead or (len(server.asked) > 20 and not server.probes)

    def come_back(server: FakeServer) -> None:
        server.dead = server.dead and server.probes < back_after

    with FakeServer(on_request=die, on_probe=come_back) as server:
        results = ask(replace(FAST, retries=4), requests(60), server)
        for seed in range(60):
            check_answer(results[f"k{seed}"], seed)
        assert server.answered.total() == 60 and server.probes == back_after
        away, back = capsys.readouterr().err.splitlines()
        assert away.startswith(f"warning: {server.url}") and "set aside" in away and back.endswith("answers again")
        assert len(server.asked) <= 60 + FAST.dead_after + 2 * FAST.concurrency


def test_when_no_server_comes_back_the_run_stops():
    def die(server: FakeServer, body: dict) -> None:
        server.dead = server.dead or len(server.asked) > 5

    with FakeServer(on_request=die) as server:
        teacher = ServerTeacher(replace(FAST, urls=(server.url,), give_up=0.02))
        got = []
        with pytest.raises(InputError, match="no endpoint has answered .* run again to go on"):
            for request, result in teacher.sample(iter(requests(60))):
                got.append((request.key, result))
    assert 1 <= len(got) <= 5 and all(isinstance(result, Sampled) for _, result in got)


def test_an_endpoint_that_asks_for_rest_is_left_alone():
    """It wants a thousand seconds after its first requests; the other answers everything else."""
    busy = {seed: ["429:1000"] for seed in range(60)}
    with FakeServer(faults=busy) as resting, FakeServer() as living:
        results = ask(replace(FAST, longest_backoff=1000.0), requests(60), resting, living)
        assert len(resting.asked) <= FAST.concurrency and not resting.answered
        assert living.answered.total() == 60
    check_answer(results["k59"], 59)


def test_a_server_that_is_silent_at_first_is_found_later():
    def wake(server: FakeServer) -> None:
        server.dead = server.probes < 2

    with FakeServer() as other, FakeServer(on_probe=wake) as late:
        late.dead = True
        everything = replace(FAST, urls=(other.url, late.url), concurrency=1)
        with closing(open_teacher(everything)) as teacher:
            source = iter(requests(10_000))
            done = 0
            for _, result in teacher.sample(source):
                assert isinstance(result, Sampled)
                done += 1
                if late.answered:
                    break
    assert done < 10_000


def test_stopping_half_way_leaves_nothing_running():
    with FakeServer() as server, closing(open_teacher(replace(FAST, urls=(server.url,)))) as teacher:
        results = teacher.sample(iter(requests(1000)))
        next(results)
        results.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "teacher-server"]
        assert len(list(teacher.sample(iter(requests(5))))) == 5  # and it may be asked again


def test_an_error_of_the_questions_is_not_swallowed():
    def broken():
        yield from requests(3)
        raise InputError("questions.jsonl:4: is not JSON")

    with FakeServer() as server, pytest.raises(InputError, match=r"questions\.jsonl:4"):
        list(open_teacher(replace(FAST, urls=(server.url,))).sample(broken()))


def test_an_error_before_anything_is_asked_is_not_the_end_of_the_requests(monkeypatch):
    with FakeServer() as server, closing(open_teacher(replace(FAST, urls=(server.url,)))) as teacher:

        def broken() -> dict[str, str]:
            raise RuntimeError("no headers")

        monkeypatch.setattr(teacher, "headers", broken)
        with pytest.raises(RuntimeError, match="no headers"):
            list(teacher.sample(requests(3)))


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(monkeypatch):
    monkeypatch.setenv("FAKE_KEY", "sk-secret-1")
    with FakeServer(key="sk-secret-1") as server:
        ask(replace(FAST, api_key_env="FAKE_KEY"), requests(2), server)
        monkeypatch.setenv("FAKE_KEY", "sk-secret-2")
        with pytest.raises(InputError, match="HTTP 401") as error:
            ServerTeacher(replace(FAST, api_key_env="FAKE_KEY", urls=(server.url,)))
        assert "sk-secret" not in str(error.value)  # the server's complaint repeats it
        assert "sk-secret" not in json.dumps(server.asked)
    monkeypatch.delenv("FAKE_KEY")
    with pytest.raises(InputError, match="FAKE_KEY .* is not set"):
        ServerTeacher(replace(FAST, api_key_env="FAKE_KEY", urls=("http://localhost:1",)))


def test_bad_options_are_named():
    with pytest.raises(InputError, match="no URL"):
        ServerTeacher(FAST)
    with pytest.raises(InputError, match="no endpoint answers: http://127.0.0.1:9/v1: ConnectError"):
        ServerTeacher(replace(FAST, urls=("http://127.0.0.1:9",)))
    with FakeServer(model="a") as a, FakeServer(model="b") as b:
        with pytest.raises(InputError, match=r"different models \(a, b\)"):
            ServerTeacher(replace(FAST, urls=(a.url, b.url)))
        with pytest.raises(InputError, match="serves a, not b"):
            ServerTeacher(replace(FAST, urls=(a.url, b.url), model="b"))


@pytest.mark.parametrize("wanted", ["", "a"])
def test_an_endpoint_that_lists_no_model_yet_is_asked_again_and_stops_no_run(wanted):
    with pytest.raises(Malformed, match="/models lists no model"):
        choose_model(wanted, {"data": []})


def test_urls():
    assert base_url("http://a:8000") == base_url("http://a:8000/v1/") == "http://a:8000/v1"
    assert base_url("https://x.org/api/v1") == "https://x.org/api/v1"
    for bad in ("a:8000", "ftp://a", "http://", "http://a/v1?key=1"):
        with pytest.raises(InputError, match="write http://"):
            base_url(bad)
    with pytest.raises(InputError, match="environment variable") as error:
        base_url("http://user:secret@a:8000")
    assert "secret" not in str(error.value)


def test_retry_after_is_seconds_or_a_date():
    assert _seconds("2.5") == 2.5 and _seconds(None) == 0 and _seconds("soon") == 0 and _seconds("-3") == 0
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _seconds("Wed, 21 Oct 2125 07:28:00 GMT") > 1e9
