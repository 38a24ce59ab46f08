"""extras/serve.py over real sockets of 127.0.0.1: what clients get is what the engine gives alone."""
import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import flora
from extras.blend import blend
from extras.serve_api import Text
from extras.serve_engine import MOST_BLENDS, EngineThread, Job, parse
from extras.serve_metrics import Metrics
from flora import BASE
from generate import Engine, Request, generate
from model import GPT
from plumbing.flags import EMBEDDED
from plumbing.prompts import cut_at_stop, new_text, stop_check
from plumbing.tokenizer import Tokenizer
from test_flora import HERE, random_adapter


def lacks(*modules):
    return next((name for name in modules if importlib.util.find_spec(name) is None), None)


missing = lacks("starlette", "uvicorn")
needs_server = pytest.mark.skipif(missing is not None, reason=f"needs {missing} (extras/requirements.txt)")
needs_openai = pytest.mark.skipif(lacks("openai") is not None, reason="needs openai (pip install openai)")
needs_jinja2 = pytest.mark.skipif(lacks("jinja2") is not None, reason="needs jinja2 (extras/requirements.txt)")
ADAPTERS = {"a": ("flora", 2, ["all"]), "b": ("lora", 3, None), "c": ("ia3", 1, None), "d": ("hira", 1, ["c_attn.qk"])}
TEMPLATE = ("{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no such role') }}"
            "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


# ------------------------------------------------------------------------------- a server, a client


@contextlib.contextmanager
def serving(*flags, log=None):
    """python -m extras.serve as a process -> its port and pid; ended at the end."""
    command = [sys.executable, "-m", "extras.serve", "--port", "0", *map(str, flags)]
    with subprocess.Popen(command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
                          text=True) as process:
        try:
            line = process.stderr.readline()
            assert "http://127.0.0.1:" in line, line + process.stderr.read()
            yield SimpleNamespace(port=int(line.rsplit(":", 1)[1]), process=process)
        finally:
            process.kill()


class Client:
    """Plain HTTP to one server, each request a connection of its own."""

    def __init__(self, server, **headers):
        self.port, self.headers = server.port, headers

    def open(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | self.headers | headers
        connection.request(method, path, body, headers)
        return connection, connection.getresponse()

    def call(self, method, path, body=None, **headers):
        """-> (status, the object or text)."""
        connection, response = self.open(method, path, body, **headers)
        text = response.read().decode()
        connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text

    def complete(self, **body):
        status, value = self.call("POST", "/v1/completions", body)
        assert status == 200, value
        return value

    def events(self, path="/v1/completions", **body):
        """The events of a stream, without the [DONE] that ends it."""
        connection, response = self.open("POST", path, body | dict(stream=True))
        assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = response.read().decode().split("\n\n")
        connection.close()
        assert lines[-2:] == ["data: [DONE]", ""], lines
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def stream(self, **body):
        """{index: (text, finish_reason)} of a stream."""
        texts, reasons = {}, {}
        for event in self.events(**body):
            for choice in event["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                reasons[choice["index"]] = choice["finish_reason"]
        return {i: (texts[i], reasons[i]) for i in texts}

    def gauge(self, name):
        text = self.call("GET", "/metrics")[1]
        return float(re.search(rf"^flora_{name} (\S+)$", text, re.MULTILINE)[1])

    def idle(self):
        """Wait until no request runs or waits."""
        for _ in range(600):
            if self.gauge("requests_running") == self.gauge("requests_waiting") == 0:
                return
            time.sleep(0.05)
        raise AssertionError("requests are left: " + self.call("GET", "/metrics")[1])


class Reference:
    """The same model in this process, each request alone."""

    def __init__(self, folder, files):
        self.model, self.tokenizer = GPT.from_pretrained(folder), Tokenizer(folder)
        self.ids = {"base": BASE} | {name: flora.load_adapter(self.model, file) for name, file in files.items()}

    def adapter_id(self, model):
        if model not in self.ids:
            self.ids[model] = blend(self.model, {self.ids[name]: weight for name, weight in parse(model).items()})
        return self.ids[model]

    def text(self, model, prompt, max_tokens, temperature=0, seed=0, stop=(), ignore_eos=False, **settings):
        """-> (text, finish_reason, new tokens) of one request in an engine of its own."""
        ids = self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
        adapter_id = self.adapter_id(model)
        flora.freeze_bank(self.model)
        engine, stop = Engine(self.model, slots=1), [stop] if isinstance(stop, str) else stop
        request = engine.submit(ids, adapter_id=adapter_id, max_new_tokens=max_tokens, temperature=temperature,
                                seed=seed, stopped=stop_check(self.tokenizer, stop),
                                eos_id=None if ignore_eos else self.tokenizer.eos_ids, **settings)
        engine.run()
        assert request.state == "done", request.error
        text = new_text(self.tokenizer, request.ids)
        cut = cut_at_stop(text, stop)
        stopped = cut != text or request.ids[-1] in self.tokenizer.eos_ids
        return cut, "stop" if stopped else "length", len(request.ids)


@pytest.fixture(scope="module")
def files(tiny_folder, tmp_path_factory):
    """{name: an adapter file} of the tiny model, all in one folder."""
    folder, model = tmp_path_factory.mktemp("adapters"), GPT.from_pretrained(tiny_folder)
    made = {}
    for name, how in (ADAPTERS | {"hot": ("flora", 4, ["c_attn"])}).items():
        made[name] = folder / f"{name}.safetensors"
        flora.save_adapter(model, random_adapter(model, *how), made[name])
    return made


@pytest.fixture(scope="module")
def folder(tiny_folder, files, tmp_path_factory):
    """The tiny model, called base, with a chat template, and one more end of text: what adapter b writes as the
    fifth token after "zebra"."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model, tokenizer = GPT.from_pretrained(folder), Tokenizer(folder)
    i = flora.load_adapter(model, files["b"])
    end = generate(model, [tokenizer.encode("zebra")], [i], max_new_tokens=5)[0][-1]
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[tokenizer.eos_id, end])))
    return folder


@pytest.fixture(scope="module")
def flags(folder, files):
    named = [flag for name in ADAPTERS for flag in ("--adapter", f"{name}={files[name]}")]
    return ["--weights", folder, *named, "--slots", 4, "--adapter-root", files["hot"].parent]


@pytest.fixture(scope="module")
def server(flags):
    if missing:
        pytest.skip(f"needs {missing} (extras/requirements.txt)")
    with serving(*flags) as server:
        yield server


@pytest.fixture
def client(server):
    client = Client(server)
    client.idle()
    return client


@pytest.fixture(scope="module")
def reference(folder, files):
    return Reference(folder, {name: files[name] for name in ADAPTERS})


# ------------------------------------------------------------------------------------------- answers


MODELS = ["base", *ADAPTERS, "a:0.5", "a:0.7+b:0.3", "c:1e-1+d:-2", "base:0.5+a:0.5"]


@needs_server
def test_every_model_gives_the_text_that_the_engine_gives_alone(client, reference):
    """Streamed or not, greedy or sampled by a seed, texts or token ids, several choices, ends by a stop."""
    seen = set()
    for number, model in enumerate(MODELS):
        for settings in [dict(temperature=0), dict(temperature=0.8, seed=5, top_p=0.9, top_k=20)]:
            body = dict(model=model, prompt=f"def f{number}(", max_tokens=20) | settings
            text, reason, tokens = reference.text(**body)
            got = client.complete(**body)
            choice, = got["choices"]
            assert (choice["text"], choice["finish_reason"], choice["index"]) == (text, reason, 0)
            assert got["usage"]["completion_tokens"] == tokens and got["model"] == model
            assert client.stream(**body) == {0: (text, reason)}
            seen.add(text)
    assert len(seen) > 12

    prompts = ["class A", "x = ", "import os"]
    ids = [reference.tokenizer.encode(prompt) for prompt in prompts]
    for prompt in (prompts, ids):
        body = dict(model="a", prompt=prompt, n=2, temperature=1.0, seed=40, max_tokens=9)
        want = [reference.text("a", p, 9, temperature=1.0, seed=40 + i)[:2] for p in prompts for i in range(2)]
        choices = client.complete(**body)["choices"]
        assert [(c["text"], c["finish_reason"]) for c in choices] == want
        assert [c["index"] for c in choices] == [*range(6)]
        assert client.stream(**body) == dict(enumerate(want))
    assert client.complete(model="a", prompt=ids[0], max_tokens=9, temperature=0)["choices"][0]["text"] == \
        client.complete(model="a", prompt=prompts[0], max_tokens=9, temperature=0)["choices"][0]["text"]

    whole = reference.text("a", "def f(", 20)[0]
    for stop in (whole[5:8], ["never", whole[7:9], whole[12:14]]):
        want = reference.text("a", "def f(", 20, stop=stop)
        assert want[1] == "stop" and want[0] != whole
        body = dict(model="a", prompt="def f(", max_tokens=20, temperature=0, stop=stop)
        assert client.stream(**body) == {0: want[:2]}
        got = client.complete(**body)
        assert (got["choices"][0]["text"], got["usage"]["completion_tokens"]) == (want[0], want[2])


def test_a_growing_text_holds_back_half_characters_and_what_may_become_a_stop():
    tokenizer = Tokenizer(EMBEDDED)
    for text, stops in [("naïve 🙂 日本", []), ("x = 1\n\ndef g(y):", ["\n\ndef"]), ("a\n\nb\n\nccc ddd", ["\n\ndef"])]:
        ids, grown, deltas = tokenizer.encode(text), Text(tokenizer, stops), []
        for n, i in enumerate(ids, 1):
            delta, reason = grown.more([i], n == len(ids))
            deltas.append(delta)
            assert "\ufffd" not in delta and (reason is None) == (n < len(ids))
        whole = cut_at_stop(new_text(tokenizer, ids), stops)
        assert "".join(deltas) == whole == grown.shown and len([d for d in deltas if d]) > 1
        assert reason == ("length" if whole == new_text(tokenizer, ids) else "stop")


@needs_server
def test_a_stream_tells_usage_if_asked_and_draws_anew_without_a_seed(client):
    body = dict(model="a", prompt="def f(", max_tokens=7, temperature=0)
    events = client.events(**body, stream_options=dict(include_usage=True))
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 7
    assert all(event["usage"] is None for event in events[:-1])
    assert all("usage" not in event for event in client.events(**body))
    texts = {client.complete(model="a", prompt="def f(", max_tokens=12)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) > 1
    for ignored, reason in [(False, "stop"), (True, "length")]:
        got = client.complete(model="b", prompt="zebra", max_tokens=20, temperature=0, ignore_eos=ignored)
        assert got["choices"][0]["finish_reason"] == reason
        assert got["usage"]["completion_tokens"] == 20 if ignored else got["usage"]["completion_tokens"] <= 5
    long = client.complete(model="b", prompt="x", max_tokens=10**6, temperature=0, ignore_eos=True)
    assert long["usage"]["total_tokens"] == 64   # the context


@needs_server
def test_models_health_and_metrics_are_told(client):
    status, models = client.call("GET", "/v1/models")
    assert status == 200 and [(m["id"], m["parent"]) for m in models["data"]] == [
        ("base", None), *((name, "base") for name in ADAPTERS)]
    assert client.call("GET", "/health") == (200, "")
    before = client.call("GET", "/metrics")[1]
    client.complete(model="c", prompt="class A:", max_tokens=5, temperature=0, ignore_eos=True)
    client.idle()
    after = client.call("GET", "/metrics")[1]

    def number(text, key):
        found = re.search(rf"^{re.escape(key)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0
    for key, more in [('flora_requests_total{model="c",outcome="done"}', 1),
                      ('flora_generation_tokens_total{model="c"}', 5),
                      ('flora_seconds_per_output_token_count{model="c"}', 1),
                      ('flora_time_to_first_token_seconds_bucket{model="c",le="+Inf"}', 1)]:
        assert number(after, key) == number(before, key) + more, key
    assert "flora_slots 4\n" in after and "flora_requests_running 0\n" in after


def test_histograms_are_cumulative_and_labels_are_quoted():
    metrics = Metrics()
    for arrived, first, ended in [(0.0, 0.002, 1.0), (0.0, 0.3, 30.0)]:
        times = dict(arrived=arrived, first_token=first, ended=ended)
        metrics.ended(Request([1, 2], ids=[3] * 10, state="done", **times), 'x"\\y')
    metrics.ended(Request([1], ids=[3], state="cancelled"), "z")
    text = metrics.text(4, 2, [("x", 7)])
    for line in ['flora_time_to_first_token_seconds_bucket{model="x\\"\\\\y",le="0.001"} 0',
                 'flora_time_to_first_token_seconds_bucket{model="x\\"\\\\y",le="0.0025"} 1',
                 'flora_time_to_first_token_seconds_bucket{model="x\\"\\\\y",le="0.5"} 2',
                 'flora_seconds_per_output_token_sum{model="x\\"\\\\y"} 3.100000',
                 'flora_seconds_per_output_token_bucket{model="x\\"\\\\y",le="0.1"} 1',
                 'flora_seconds_per_output_token_bucket{model="x\\"\\\\y",le="2.5"} 1',
                 'flora_seconds_per_output_token_bucket{model="x\\"\\\\y",le="+Inf"} 2',
                 'flora_requests_total{model="z",outcome="cancelled"} 1', 'flora_slot_tokens{slot="0",model="x"} 7',
                 "flora_requests_waiting 2"]:
        assert line in text.splitlines(), text
    assert 'count{model="z"}' not in text
    metrics.forget("z")
    assert '"z"' not in metrics.text(4, 2, [])


@needs_server
@needs_jinja2
def test_a_chat_is_the_completion_of_its_template(client, reference):
    turns = [("user", "write f"), ("assistant", "def f("), ("user", "x")]
    messages = [dict(role=role, content=content) for role, content in turns]
    text, reason, _ = reference.text("b", "<user>write f<assistant>def f(<user>x<assistant>", 8)
    body = dict(model="b", messages=messages, max_completion_tokens=8, temperature=0)
    status, got = client.call("POST", "/v1/chat/completions", body)
    assert status == 200 and got["object"] == "chat.completion"
    assert got["choices"][0]["message"] == dict(role="assistant", content=text)
    events = client.events("/v1/chat/completions", **body)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == dict(role="assistant", content="") and "".join(d.get("content", "") for d in deltas) == text
    assert events[-1]["choices"][0]["finish_reason"] == reason and events[0]["object"] == "chat.completion.chunk"
    body["messages"] = [dict(role="robot", content="x")]
    status, got = client.call("POST", "/v1/chat/completions", body)
    assert status == 400 and "the chat template refuses these messages (no such role)" in got["error"]["message"]


# ------------------------------------------------------------------------------------------ refusals


OK = dict(model="a", prompt="x", max_tokens=2)
BAD = [   # body, status, what its message says
    (b"{", 400, "not JSON"), (b"[1]", 400, "must be a JSON object"), (b"\xff", 400, "not JSON"),
    (b"[" * 100000, 400, "JSON"),
    (OK | dict(model="nobody"), 404, "no such model"), (OK | dict(model="a:0.5+nobody:0.5"), 404, "'nobody'"),
    (OK | dict(model="a:0.5+"), 404, "no such model"), (OK | dict(model="a:nan"), 404, "no such model"),
    (OK | dict(model="a:1e9"), 400, "use a number from -100 to 100"), (OK | dict(model=7), 400, "model is 7"),
    (OK | dict(model="+".join(f"x{i}:1" for i in range(9))), 400, "at most 8"), (dict(prompt="x"), 400, "has no model"),
    (dict(model="a"), 400, "prompt must be"), (OK | dict(prompt=[]), 400, "prompt must be"),
    (OK | dict(prompt=[1, "x"]), 400, "prompt must be"), (OK | dict(prompt=[True]), 400, "prompt must be"),
    (OK | dict(prompt=[4096]), 400, "outside 0 to 4095"), (OK | dict(prompt=[-1]), 400, "outside 0 to 4095"),
    (OK | dict(prompt=[10**30]), 400, "outside"), (OK | dict(prompt="\ud800"), 400, "surrogate"),
    (OK | dict(prompt="x " * 500), 413, "more than the model's context of 64"),
    (OK | dict(max_tokens=0), 400, "max_new_tokens"),
    (OK | dict(max_tokens=1.5), 400, "max_tokens is 1.5"), (OK | dict(max_tokens="9"), 400, "whole number"),
    (OK | dict(temperature=-1), 400, "at least 0"),
    (b'{"model": "a", "prompt": "x", "temperature": NaN}', 400, "finite"),
    (OK | dict(top_p=0), 400, "top_p"), (OK | dict(top_k=-2), 400, "top_k"), (OK | dict(seed=2**63), 400, "seed"),
    (OK | dict(n=0), 400, "n is 0"), (OK | dict(n=200), 400, "1 to 128"), (OK | dict(stop=""), 400, "stop must be"),
    (OK | dict(stop=[1]), 400, "stop must be"), (OK | dict(stop=["x"] * 17), 400, "stop must be"),
    (OK | dict(stream="yes"), 400, "true or false"), (OK | dict(logprobs=1), 400, "logprobs is not supported"),
    (OK | dict(echo=True), 400, "echo is not supported"), (OK | dict(presence_penalty=1.0), 400, "presence_penalty"),
    (OK | dict(temprature=1), 400, "unknown field 'temprature'"),
    (OK | dict(messages=[]), 400, "unknown field 'messages'"), (b" " * (5 << 20), 413, "bytes")]


@needs_server
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_openais_error_object_and_fail_alone(client, reference, stream):
    """Beside a request that goes on, and gets the text that it gets alone."""
    body = dict(model="a", prompt="def f(", max_tokens=50, temperature=0, ignore_eos=True)
    connection, response = client.open("POST", "/v1/completions", body | dict(stream=True))
    first = response.readline()
    for bad, status, sentence in BAD:
        if stream and isinstance(bad, dict):
            bad = dict(stream=True) | bad
        got, value = client.call("POST", "/v1/completions", bad)
        assert got == status and sentence in value["error"]["message"], (bad, got, value)
        assert set(value["error"]) == {"message", "type", "param", "code"}
        assert value["error"]["type"] == "invalid_request_error"
        assert "Traceback" not in value["error"]["message"]
    text = (first + response.read()).decode()
    connection.close()
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    got = "".join(event["choices"][0]["text"] for event in events)
    assert got == reference.text("a", "def f(", 50, ignore_eos=True)[0]
    for path, method, status in [("/v1/nothing", "GET", 404), ("/v1/completions", "GET", 405), ("/", "POST", 405)]:
        got, value = client.call(method, path)
        assert got == status and path in value["error"]["message"]
    got, value = client.call("POST", "/v1/completions", OK, **{"Content-Type": "text/plain"})
    assert got == 400 and "Content-Type" in value["error"]["message"]
    # neutral values of what is not there change nothing
    assert client.complete(**OK, logprobs=None, echo=False, presence_penalty=0.0, best_of=1, user="me", logit_bias={})
    if not stream:
        client.idle()


@needs_server
def test_a_request_that_diverges_fails_alone(client, reference, files, folder):
    """Its adapter's weights are 100 times too large and overflow; an answer and a stream say so."""
    model = GPT.from_pretrained(folder)
    i = flora.load_adapter(model, files["a"])
    for p in flora.adapter_parameters(model, i).values():
        p.data *= 1e15
    flora.save_adapter(model, i, files["hot"].parent / "wild.safetensors")
    assert client.call("POST", "/v1/load_lora_adapter", dict(lora_name="wild", lora_path="wild.safetensors"))[0] == 200
    status, value = client.call("POST", "/v1/completions", OK | dict(model="wild"))
    assert status == 400 and "not finite" in value["error"]["message"]
    connection, response = client.open("POST", "/v1/completions", OK | dict(model="wild", stream=True))
    assert "not finite" in json.loads(response.read().decode().removeprefix("data: "))["error"]["message"]
    connection.close()
    assert client.complete(model="a", prompt="x", max_tokens=9, temperature=0)["choices"][0]["text"] == \
        reference.text("a", "x", 9)[0]
    assert client.call("POST", "/v1/unload_lora_adapter", dict(lora_name="wild"))[0] == 200


@needs_server
def test_a_client_that_goes_away_frees_its_slots(client, reference):
    """Waiting or running, streamed or not: the others get their texts, and no slot is lost."""
    def cancelled():
        found = re.search(r'^flora_requests_total{model="a",outcome="cancelled"} (\d+)$',
                          client.call("GET", "/metrics")[1], re.MULTILINE)
        return int(found[1]) if found else 0
    for stream in (True, False):
        before = cancelled()
        bodies = [dict(model="a", prompt="def f(", max_tokens=10**6, n=6, stream=stream, ignore_eos=True)] * 2
        open_ones = []
        for body in bodies:
            connection = socket.create_connection(("127.0.0.1", client.port))
            text = json.dumps(body)
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                               f"Content-Length: {len(text)}\r\n\r\n{text}".encode())
            open_ones.append(connection)
        if stream:
            open_ones[0].recv(100)
        for connection in open_ones:
            connection.close()
        choice, = client.complete(model="b", prompt="def f(", max_tokens=12, temperature=0)["choices"]
        assert choice["text"] == reference.text("b", "def f(", 12)[0]
        client.idle()
        assert cancelled() >= before + 6   # of the 12; 4 run at once


@needs_server
def test_a_full_queue_is_429_with_retry_after_and_a_key_is_asked_for(flags, files):
    """Without --adapter-root nothing is loaded by HTTP, and without --grace SIGTERM ends what runs."""
    with serving(*flags[:-2], "--slots", 1, "--max-waiting", 7, "--api-key", "secret", "--grace", 0) as server:
        nobody, client = Client(server), Client(server, Authorization="Bearer secret")
        for method, path in [("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/load_lora_adapter")]:
            status, value = nobody.call(method, path, {})
            assert status == 401 and value["error"]["code"] == "invalid_api_key"
            assert Client(server, Authorization="Bearer secre").call(method, path, {})[0] == 401
        assert [nobody.call("GET", path)[0] for path in ("/health", "/metrics", "/")] == [200] * 3
        assert client.complete(**OK)
        body = dict(model="a", prompt="x", max_tokens=10**6, ignore_eos=True, stream=True)
        connection, response = client.open("POST", "/v1/completions", body | dict(n=8))
        status, value = client.call("POST", "/v1/completions", body | dict(n=9))
        assert status == 400 and "1 to 8 texts" in value["error"]["message"]   # which never could be served
        connection2, refused = client.open("POST", "/v1/completions", body)
        assert refused.status == 429 and refused.headers["Retry-After"] == "1"
        assert json.loads(refused.read())["error"]["code"] == "queue_full"
        assert response.read().endswith(b"data: [DONE]\n\n")
        client.idle()
        assert client.complete(**OK)
        for path in ("load", "unload"):
            body = dict(lora_name="x", lora_path=str(files["hot"]))
            status, value = client.call("POST", f"/v1/{path}_lora_adapter", body)
            assert status == 403 and "--adapter-root" in value["error"]["message"]
        check_sigterm(server, client, whole=False, n=8)


# ---------------------------------------------------------------------------------- adapters by HTTP


@needs_server
def test_adapters_come_and_go_by_http_and_no_path_escapes_the_root(client, reference, files, folder, tmp_path):
    load, unload = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    root = files["hot"].parent
    own = Reference(folder, {"hot": files["hot"], "a": files["a"]})
    for path in (files["hot"], "hot.safetensors"):
        assert client.call("POST", load, dict(lora_name="hot", lora_path=str(path)))[0] == 200
        assert client.call("GET", "/v1/models")[1]["data"][-1]["id"] == "hot"
        for model in ("hot", "hot:0.5+a:0.5"):
            got = client.complete(model=model, prompt="def f(", max_tokens=12, temperature=0)
            assert got["choices"][0]["text"] == own.text(model, "def f(", 12)[0]
        status, value = client.call("POST", load, dict(lora_name="hot", lora_path=str(path)))
        assert status == 400 and "is a model already" in value["error"]["message"]
        # unloaded while in use: the name is gone at once, the request ends as if nothing had been
        body = dict(model="hot", prompt="def f(", max_tokens=40, temperature=0, ignore_eos=True, stream=True)
        connection, response = client.open("POST", "/v1/completions", body)
        first = response.readline()
        assert client.call("POST", unload, dict(lora_name="hot"))[0] == 200
        for model in ("hot", "hot:0.5+a:0.5"):
            assert client.call("POST", "/v1/completions", OK | dict(model=model))[0] == 404
        text = (first + response.read()).decode()
        connection.close()
        texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in text.split("\n\n")[:-2]]
        assert "".join(texts) == own.text("hot", "def f(", 40, ignore_eos=True)[0]

    outside = tmp_path / "hot.safetensors"
    shutil.copy(files["hot"], outside)
    (root / "link.safetensors").symlink_to(outside)
    (root / "folder").mkdir(exist_ok=True)
    (root / "folder" / "adapter_model.safetensors").symlink_to(outside)
    (root / "text.safetensors").write_text("no adapter")
    up = "../" * len(root.parts) + str(outside.relative_to("/"))
    for path in (outside, up, "link.safetensors", "folder", "/etc/passwd", "..", "x\0y", "missing", f"{root}x",
                 "x" * 5000):
        status, value = client.call("POST", load, dict(lora_name="hot", lora_path=str(path)))
        assert status == 400 and "no such adapter within --adapter-root" in value["error"]["message"], (path, value)
    for name in ("a:b", "a+b", "", "x" * 101, "a b", "é\n"):
        status, value = client.call("POST", load, dict(lora_name=name, lora_path=str(files["hot"])))
        assert status == 400 and "the adapter name" in value["error"]["message"]
    status, value = client.call("POST", load, dict(lora_name="text", lora_path="text.safetensors"))
    assert status == 400 and "not a readable safetensors file" in value["error"]["message"]
    assert client.call("POST", unload, dict(lora_name="base"))[0] == 404
    assert client.call("POST", unload, dict(lora_name="nobody"))[0] == 404
    assert [m["id"] for m in client.call("GET", "/v1/models")[1]["data"]] == ["base", *ADAPTERS]
    assert client.complete(model="a", prompt="x", max_tokens=9, temperature=0)["choices"][0]["text"] == \
        reference.text("a", "x", 9)[0]


# ---------------------------------------------------------------------------------------- the process


def check_sigterm(server, client, whole, n):
    """Running requests end within the grace, or at once where there is none; the exit status is 0. n: rows, so many
    that the end does not come before the signal. -> what the server said."""
    body = dict(model="a", prompt="x", max_tokens=60, temperature=0, ignore_eos=True, stream=True, n=n)
    connection, response = client.open("POST", "/v1/completions", body)
    response.readline()
    server.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(http.client.IncompleteRead):
        text = response.read().decode()
        assert text.endswith("data: [DONE]\n\n") == whole
        assert ("the server is shutting down" in text) != whole
    with pytest.raises(OSError):   # nobody listens any more
        client.call("GET", "/health")
    errors = server.process.communicate()[1]
    assert server.process.returncode == 0 and "Traceback" not in errors, errors
    return errors


@needs_server
def test_flags_that_cannot_be_are_refused_in_a_sentence(folder, files, run_here, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)   # this process keeps its own
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, sentence in [
                (["--adapter", "x"], "write NAME=FILE"), (["--adapter", f"a b={files['a']}"], "the adapter name 'a b'"),
                (["--adapter", f"base={files['a']}"], "two models of this name"),
                (["--adapter", "x=nothing"], "no such adapter file"),
                (["--adapter-root", "nothing"], "no such folder"),
                (["--port", taken.getsockname()[1]], "cannot listen there"),
                (["--port", 70000], "at most 65535"), (["--slots", 0], "--slots is 0"),
                (["--host", "203.0.113.1"], "cannot listen there")]:
            run = run_here("extras.serve", "--weights", folder, "--port", 0, *flags)
            assert run.returncode == 2 and sentence in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_without_starlette_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError(name='starlette')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "starlette"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", SimpleNamespace(Server=object))
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(HERE / "extras" / "serve.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "needs starlette; pip install -r extras/requirements.txt" in error


def test_unloaded_adapters_and_old_blends_leave_the_model_when_no_request_uses_them(folder, files):
    """EngineThread by hand: only so many blends are kept, the last used."""
    model = GPT.from_pretrained(folder)
    names = {"base": BASE} | {name: flora.load_adapter(model, files[name]) for name in ("a", "b")}
    flora.freeze_bank(model)
    thread = EngineThread(lambda: Engine(model, slots=2), names)
    thread.loop = SimpleNamespace(call_soon_threadsafe=lambda *args: None)

    def held():
        return {int(i) for _, layer in flora.adapter_layers(model) for i in layer.adapters}

    job = Job([1, 2], dict(max_new_tokens=9), 0, None, 0.0)
    thread._submit([job], "a:0.5")
    kept = thread._find("b:0.25")[0]
    for n in range(MOST_BLENDS + 5):
        assert thread._find("b:0.25")[0] == kept   # used now and then, so never the oldest
        thread._find(f"a:{n / 100 + 1}+b:1")
    assert len(thread.blends) == MOST_BLENDS and len(held()) == 2 + MOST_BLENDS
    assert job.request.adapter_id in held()
    thread._load("hot", files["hot"])
    hot, mixed = thread._find("hot")[0], thread._find("hot:0.5+b:0.5")[0]
    assert {hot, mixed} <= held()
    job2 = Job([1], dict(max_new_tokens=3), 0, None, 0.0)
    thread._submit([job2], "hot:0.5+b:0.5")
    thread._unload("hot")
    assert "hot" not in thread.names and hot not in held() and mixed in held()
    while thread.engine.busy:
        thread._report(thread._step())
    assert job2.request.state == "done" and mixed not in held() and not thread.retired and not thread.jobs
    for name in ("a", "b"):
        thread._unload(name)
    assert held() == set() and thread.blends == {} and list(thread.names) == ["base"]


@needs_server
def test_an_engine_that_breaks_fails_what_it_held_and_is_made_anew(folder):
    """As for want of memory: requests fail with the reason, the next one runs."""
    model = GPT.from_pretrained(folder)
    made = []

    def new_engine():
        made.append(Engine(model, slots=2))
        return made[-1]

    async def go():
        thread = EngineThread(new_engine, {"base": BASE})
        thread.loop = asyncio.get_running_loop()
        made[0].decode = lambda: 1 / 0
        thread.start()
        for broken in (True, False):
            jobs = [Job([1, 2], dict(max_new_tokens=5), i, asyncio.Queue(), 0.0) for i in range(3)]
            await thread.do(thread._submit, jobs, "base")
            for job in jobs:
                ended = False
                while not ended:
                    _, ids, ended = await asyncio.wait_for(job.events.get(), 60)
                assert (job.error is not None) == broken
                assert not broken or "division by zero" in job.error and job.status == 500
        assert not thread.jobs and thread.is_alive() and len(made) == 2
        thread.stop()

    asyncio.run(go())


# --------------------------------------------------------------------------------------- real clients


@needs_server
@needs_openai
def test_the_openai_client_completes_streams_chats_and_raises(server, client, reference):
    import openai
    api = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in api.models.list()] == ["base", *ADAPTERS]
    for model in ("a", "a:0.7+b:0.3"):
        want = [reference.text(model, "def f(", 16, temperature=0.7, seed=3 + i)[0] for i in range(3)]
        body = dict(model=model, prompt="def f(", max_tokens=16, temperature=0.7, seed=3, n=3)
        got = api.completions.create(**body)
        assert [choice.text for choice in got.choices] == want and got.usage.prompt_tokens == 3
        texts = [""] * 3
        for event in api.completions.create(**body, stream=True):
            texts[event.choices[0].index] += event.choices[0].text
        assert texts == want
    messages = [dict(role="user", content="x")]
    chat = api.chat.completions.create(model="b", messages=messages, max_tokens=5, temperature=0)
    assert chat.choices[0].message.content == reference.text("b", "<user>x<assistant>", 5)[0]
    for body, error in [(dict(model="x", prompt="x"), openai.NotFoundError), (dict(model="a", prompt=""), None),
                        (dict(model="a", prompt="x", temperature=-1), openai.BadRequestError),
                        (dict(model="a", prompt="x " * 900), openai.APIStatusError)]:
        with pytest.raises(error) if error else contextlib.nullcontext():
            api.completions.create(**body)


# ---------------------------------------------------------------------------------------------- load


def memory(process):
    """Bytes that a process holds; its peak would not fall."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024


def hit(client, pool, number, seed, faults):
    """One client: `number` requests drawn from the pool, among disconnects, bad requests and hot loads."""
    rng = random.Random(seed)
    try:
        for i in range(number):
            fate = rng.random()
            body, want, want_hot = rng.choice(pool)
            if fate < 0.4:
                choice, = client.complete(**body)["choices"]
                assert (choice["text"], choice["finish_reason"]) == want, (body, choice, want)
            elif fate < 0.8:
                assert client.stream(**body) == {0: want}, (body, want)
            elif fate < 0.88:
                long = body | dict(stream=True, n=3, max_tokens=50)
                connection, response = client.open("POST", "/v1/completions", long)
                response.readline()
                connection.close()
                response.close()
            elif fate < 0.9:   # it goes before it has sent all
                with socket.create_connection(("127.0.0.1", client.port)) as connection:
                    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
                                       b"Content-Type: application/json\r\n\r\n{")
            elif fate < 0.96:
                bad, status, _ = rng.choice(BAD[4:-1])
                assert client.call("POST", "/v1/completions", bad)[0] == status
            else:
                name = f"hot{seed}.{i}"
                file = dict(lora_name=name, lora_path="hot.safetensors")
                assert client.call("POST", "/v1/load_lora_adapter", file)[0] == 200
                assert client.stream(**body | dict(model=f"{name}:1"))[0] == want_hot, body
                assert client.call("POST", "/v1/unload_lora_adapter", dict(lora_name=name))[0] == 200
    except Exception as e:
        faults.append(e)


@needs_server
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc: memory of the server")
def test_under_load_every_healthy_answer_is_that_of_the_engine_alone(flags, folder, files):
    """8 clients with adapters, blends, disconnects, bad requests, hot loads: no slot leaks, and memory stays.

    FLORA_SERVE_LOAD=N asks for N requests in the place of 240."""
    number, rng = int(os.environ.get("FLORA_SERVE_LOAD", 240)), random.Random(0)
    reference = Reference(folder, {name: files[name] for name in [*ADAPTERS, "hot"]})
    bodies = []
    for i in range(40):
        model = rng.choice([*MODELS, *(f"a:{rng.random():.2f}+{other}:{rng.random():.2f}" for other in "bcd")])
        sampled = dict(temperature=0.9, seed=i) if i % 2 else dict(temperature=0)
        bodies.append(dict(model=model, prompt=f"def f{i}(x" * (1 + i % 3), max_tokens=rng.randint(1, 24)) | sampled)
    pool = [(body, *(reference.text(**body | more)[:2] for more in ({}, dict(model="hot:1")))) for body in bodies]
    faults, held = [], []
    with serving(*flags, "--grace", 60) as server:
        client = Client(server)
        for part in range(2):   # the first fills what is filled once
            threads = [threading.Thread(target=hit, args=(client, pool, number // 16, 8 * part + i, faults))
                       for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not faults, faults[:3]
            client.idle()
            held.append(memory(server.process))
        models = [m["id"] for m in client.call("GET", "/v1/models")[1]["data"]]
        assert models == ["base", *ADAPTERS]
        assert held[1] - held[0] < number * (100 << 10), held
        body, want, _ = pool[0]
        assert client.stream(**body) == {0: want}
        assert check_sigterm(server, client, whole=True, n=24) == ""
    print(f"{number} requests, memory {held[0] >> 20} MiB half way, {held[1] >> 20} MiB at the end")
