"""An OpenAI-compatible server: `model` names the adapter, and all requests share one batch.

  pip install -r extras/requirements.txt
  python -m extras.serve --adapter perl=base/adapters/perl.safetensors --adapter bash=base/adapters/bash.safetensors
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "perl", "prompt": "sub f {", "max_tokens": 32, "temperature": 0}'

A model is the base (the name of its folder), an adapter, or a blend of these, perl:0.7+bash:0.3 (extras/blend.py).
GET / is a page that shows the batch at work, /v1/models, /health, and /metrics for Prometheus. POST /v1/completions,
/v1/chat/completions (where the folder has a chat template), and, with --adapter-root, /v1/load_lora_adapter and
/v1/unload_lora_adapter as vLLM has them, for adapters of any kind.

A request has OpenAI's fields and top_k, ignore_eos; without temperature it samples at 1, without seed anew each time.
What would change the text and is not there (logprobs, penalties, echo, ...) is refused, not ignored. Refusals are
OpenAI's error objects: 400 bad input, 401 key, 404 model, 413 too long, 429 queue full. A client that goes away leaves
its slot at the next step. SIGTERM: no new requests, running ones have --grace seconds, exit status 0.
"""
import argparse
import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import torch

import flora
import generate
from extras.serve_api import (MOST_CHOICES, ChatShape, Refused, Shape, Text, check_fields, error_object, event,
                              prompts_of, read_body, read_chat_template, render_chat, stops_of, usage)
from extras.serve_engine import NAME, EngineThread, Job, UnknownModel
from flora import BASE
from plumbing.files import BadInput, check_json
from plumbing.flags import EMBEDDED, check_numbers, run_main
from plumbing.prompts import stop_check

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route
except ModuleNotFoundError as e:
    if __name__ != "__main__":
        raise
    print(f"python -m extras.serve: error: needs {e.name}; pip install -r extras/requirements.txt", file=sys.stderr)
    sys.exit(2)

PAGE = Path(__file__).with_name("serve.html")


def error_response(request, error):
    """Any exception as OpenAI's error object."""
    status, code, headers, message = 500, None, None, "the server failed; its log says why"
    if isinstance(error, Refused):
        status, code, headers, message = error.status, error.code, error.headers, str(error)
    elif isinstance(error, BadInput):
        status, message = 400, str(error)
    elif isinstance(error, HTTPException):   # no such path or method
        status, headers = error.status_code, error.headers
        message = f"{request.method} {request.url.path}: {error.detail}"
    elif isinstance(error, ClientDisconnect):   # before it had sent all: nobody reads this
        status, message = 499, "the client went away"
    if isinstance(error, UnknownModel):
        status, code = 404, "model_not_found"
    return JSONResponse(error_object(status, message, code), status, headers)


# ---------------------------------------------------------------------------------------- the server


class Server:
    """The HTTP side: what each path answers. All of it runs in the event loop, and waits for nothing there but
    queues; the model runs in an EngineThread."""

    def __init__(self, args, thread, tokenizer, base):
        self.args, self.thread, self.tokenizer, self.base = args, thread, tokenizer, base
        self.roots = [os.path.realpath(root) for root in args.adapter_root]
        self.chat_template = read_chat_template(args.weights)
        self.page, self.started = PAGE.read_text(), int(time.time())
        self.room = thread.engine.length   # tokens of a prompt
        self.outstanding = 0               # texts that are asked for and have not ended
        routes = [
            Route("/", self.index), Route("/health", self.health), Route("/metrics", self.metrics),
            Route("/v1/models", self.with_key(self.models)),
            Route("/v1/completions", self.with_key(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self.with_key(self.chat), methods=["POST"]),
            Route("/v1/load_lora_adapter", self.with_key(self.load_adapter), methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.with_key(self.unload_adapter), methods=["POST"])]
        kinds = (Refused, BadInput, HTTPException, ClientDisconnect, Exception)
        self.app = Starlette(routes=routes, lifespan=self.lifespan,
                             exception_handlers={kind: error_response for kind in kinds})

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        self.thread.loop = asyncio.get_running_loop()
        self.thread.start()
        yield

    def with_key(self, endpoint):
        """endpoint, for clients that send the --api-key alone."""
        async def checked(request):
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            if self.args.api_key and not (scheme.lower() == "bearer" and secrets.compare_digest(
                    key.strip().encode(), self.args.api_key.encode())):
                raise Refused(401, "the API key is missing or another one", "invalid_api_key")
            return await endpoint(request)
        return checked

    async def index(self, request):
        policy = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
                  "img-src data:")
        return HTMLResponse(self.page, headers={"Content-Security-Policy": policy})

    async def health(self, request):
        return Response(status_code=200 if self.thread.is_alive() else 503)

    async def metrics(self, request):
        waiting = max(0, self.outstanding - len(self.thread.batch))
        text = self.thread.metrics.text(self.args.slots, waiting, self.thread.batch)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, request):
        return JSONResponse(dict(object="list", data=[
            dict(id=name, object="model", created=self.started, owned_by="flora", root=self.base,
                 parent=None if i == BASE else self.base) for name, i in self.thread.names.items()]))

    async def load_adapter(self, request):
        body = await read_body(request)
        check_json(body, {"lora_name": str, "lora_path": str}, "the request")
        check_name(body["lora_name"])
        if not self.roots:
            raise Refused(403, "adapters cannot be loaded by HTTP here; start the server with --adapter-root FOLDER")
        file = inside(self.roots, body["lora_path"])
        await self.thread.do(self.thread._load, body["lora_name"], file)
        return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    async def unload_adapter(self, request):
        body = await read_body(request)
        check_json(body, {"lora_name": str}, "the request")
        if not self.roots:
            raise Refused(403, "adapters cannot be unloaded by HTTP here; start the server with --adapter-root FOLDER")
        await self.thread.do(self.thread._unload, body["lora_name"])
        return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' removed successfully.")

    async def completions(self, request):
        body = await read_body(request)
        check_fields(body, "prompt")
        prompts = prompts_of(body)
        if isinstance(prompts[0], str):
            prompts = await asyncio.to_thread(self.encode, prompts)
        return await self.answer(request, body, prompts, Shape("cmpl", "text_completion", body["model"]),
                                 body.get("max_tokens", body.get("max_completion_tokens", 16)))

    async def chat(self, request):
        body = await read_body(request)
        check_fields(body, "messages")
        ids = await asyncio.to_thread(self.encode_chat, body.get("messages"))
        limit = body.get("max_completion_tokens", body.get("max_tokens", 2**31))
        return await self.answer(request, body, [ids], ChatShape("chatcmpl", "chat.completion", body["model"]), limit)

    def encode(self, texts):
        return [self.tokenizer.encode(text, bos=True) for text in texts]

    def encode_chat(self, messages):
        if self.chat_template is None:
            raise BadInput("this model has no chat template; use /v1/completions")
        check_json(messages, [{"role": str, "content": str}], "the request", "messages")
        return self.tokenizer.encode(render_chat(self.chat_template, messages))

    async def answer(self, request, body, prompts, shape, max_tokens):
        """Generate n choices for each of the prompts, lists of token ids -> the response."""
        jobs = self.make_jobs(body, prompts, max_tokens)
        if self.outstanding + len(jobs) > self.args.slots + self.args.max_waiting:
            raise Refused(429, "too many requests are waiting; try again later", "queue_full", {"Retry-After": "1"})
        self.outstanding += len(jobs)
        try:
            await self.thread.do(self.thread._submit, jobs, body["model"])
            if body.get("stream"):
                return Stream(self.chunks(jobs, shape, body, prompts), partial(self.release, jobs))
            value = await until_gone(request, self.whole(jobs, shape, body, prompts))
        except BaseException:
            self.release(jobs)
            raise
        self.release(jobs)
        return JSONResponse(value)

    def make_jobs(self, body, prompts, max_tokens):
        n, seed = body.get("n", 1), body.get("seed")
        most = min(MOST_CHOICES, self.args.slots + self.args.max_waiting)
        if not 1 <= n * len(prompts) <= most:
            raise BadInput(f"n is {n}, for {len(prompts)} prompts; 1 to {most} texts can be asked for at once")
        longest = max(map(len, prompts))
        if longest > self.room:
            raise Refused(413, f"the prompt has {longest} tokens, more than the model's context of {self.room}",
                          "context_length_exceeded")
        seed = random.getrandbits(40) if seed is None else seed
        events, stops, top_k = asyncio.Queue(), stops_of(body), body.get("top_k", 0)
        settings = dict(
            max_new_tokens=max_tokens, temperature=body.get("temperature", 1.0), top_p=body.get("top_p", 1.0),
            top_k=0 if top_k == -1 else top_k, eos_id=None if body.get("ignore_eos") else self.tokenizer.eos_ids,
            stopped=stop_check(self.tokenizer, stops))
        now = time.perf_counter()
        return [Job(prompt, settings | dict(seed=seed + i), i + n * number, events, now)
                for number, prompt in enumerate(prompts) for i in range(n)]

    def release(self, jobs):
        """What has to happen once however a request ends: its place in the queue is free, its jobs stop."""
        self.outstanding -= len(jobs)
        self.thread.post(self.thread._cancel, jobs)

    async def whole(self, jobs, shape, body, prompts):
        """All the texts, when the last has ended."""
        texts = {job.index: Text(self.tokenizer, stops_of(body)) for job in jobs}
        async for job, ids, ended in arriving(jobs):
            texts[job.index].ids += ids
        choices = []
        for job in jobs:
            text = texts[job.index]
            _, reason = text.more([], True)
            choices.append(shape.choice(job.index, text.shown, reason))
        return shape.answer(choices, usage=usage(prompts, texts))

    async def chunks(self, jobs, shape, body, prompts):
        """The texts as they come, as server-sent events."""
        texts = {job.index: Text(self.tokenizer, stops_of(body)) for job in jobs}
        with_usage = body.get("stream_options", {}).get("include_usage")
        extra = dict(usage=None) if with_usage else {}
        try:
            for job in jobs:
                if begin := shape.begin(job.index):
                    yield event(shape.chunk([begin], **extra))
            async for job, ids, ended in arriving(jobs):
                delta, reason = texts[job.index].more(ids, ended)
                if delta or ended:
                    yield event(shape.chunk([shape.delta(job.index, delta, reason)], **extra))
        except Refused as e:   # a request that failed on the way
            yield event(error_object(e.status, str(e)))
            return
        if with_usage:
            yield event(shape.chunk([], usage=usage(prompts, texts)))
        yield "data: [DONE]\n\n"


async def arriving(jobs):
    """Yield (job, new ids, whether it has ended) until all jobs, which share a queue, have. Refused if one fails."""
    missing = len(jobs)
    while missing:
        job, ids, ended = await jobs[0].events.get()
        if ended and job.error:
            raise Refused(job.status, job.error)
        missing -= ended
        yield job, ids, ended


class Stream(StreamingResponse):
    """Server-sent events, with release() called at the end or when the client goes away."""

    def __init__(self, content, release):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.release = release

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:   # by uvicorn: a client that reads nothing outlived the grace
            pass
        finally:
            self.release()


async def until_gone(request, work):
    """What `work` returns; ClientDisconnect where the client goes away before."""
    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


# ------------------------------------------------------------------------- adapters, templates, flags


def inside(roots, path):
    """The file or folder that `path` names, absolute or in one of the roots, links followed. BadInput, and nothing
    said of what is there, if it, or what a folder holds, is not within one of them."""
    for root in roots:
        with contextlib.suppress(ValueError, OSError):   # a null byte, a name too long
            file = os.path.realpath(os.path.join(root, path))
            if within(root, file) and os.path.exists(file):
                held = os.listdir(file) if os.path.isdir(file) else []
                if all(within(root, os.path.realpath(os.path.join(file, name))) for name in held):
                    return file
    raise BadInput(f"lora_path {path!r}: there is no such adapter within --adapter-root")


def within(root, file):
    return os.path.commonpath([root, file]) == root


def check_name(name):
    if not NAME.fullmatch(name):
        raise BadInput(f"the adapter name {name[:40]!r} must be 1 to 100 letters, digits and characters of _ . - /")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--adapter", action="append", default=[], metavar="NAME=FILE", help="a file, or a folder of PEFT")
    add("--weights", metavar="FOLDER", default=EMBEDDED, help="base model (default: the embedded one)")
    add("--device", default="cuda" if cuda else "cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16", "auto"], default="bfloat16" if cuda else "float32")
    add("--quantize", choices=["int8", "int8-dynamic"])
    add("--attention", choices=["flash", "math"], default="flash")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0 takes a free one")
    add("--slots", type=int, default=64 if cuda else 8, help="requests that run at once")
    add("--max-batched-tokens", type=int, default=8192, help="of one step, padding included")
    add("--max-waiting", type=int, default=256, help="requests that wait for a slot; more are answered 429")
    add("--grace", type=int, default=30, help="seconds that running requests have after SIGTERM")
    add("--api-key", help="what clients of /v1 must send")
    add("--adapter-root", action="append", default=[], metavar="FOLDER",
        help="from where adapters may be loaded by HTTP")
    args = parser.parse_args(argv)
    check_numbers(args, at_least_1=["slots", "max_batched_tokens"], at_least_0=["max_waiting", "grace", "port"])
    if args.port > 65535:
        raise BadInput(f"--port is {args.port}; use a whole number of at most 65535")
    for root in args.adapter_root:
        if not os.path.isdir(root):
            raise BadInput(f"--adapter-root {root}: no such folder")
    return args


def listen(args):
    """A socket bound to --host and --port."""
    try:
        family, *_, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as e:
        raise BadInput(f"--host {args.host} --port {args.port}: cannot listen there ({e})") from None
    return sock


def make_server(args):
    """Load the model and --adapter -> a Server."""
    base = os.path.basename(os.path.realpath(args.weights))
    files = [pair.partition("=") for pair in args.adapter]
    for pair, (name, equals, file) in zip(args.adapter, files):
        if not (equals and file):
            raise BadInput(f"--adapter {pair}: write NAME=FILE")
        check_name(name)
    names = [base, *(name for name, _, _ in files)]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"--adapter {name}=...: there are two models of this name")
    model, tokenizer = generate.load_model(args)
    model.requires_grad_(False)
    ids = {base: BASE} | {name: flora.load_adapter(model, file) for name, _, file in files}
    flora.freeze_bank(model)
    new_engine = partial(generate.new_engine, model, args.slots, max_batched_tokens=args.max_batched_tokens)
    return Server(args, EngineThread(new_engine, ids), tokenizer, base)


class Uvicorn(uvicorn.Server):
    """uvicorn, which ends what the engine still runs when the grace is over."""

    def __init__(self, config, thread, grace):
        super().__init__(config)
        self.thread, self.grace = thread, grace

    async def startup(self, sockets=None):
        await super().startup(sockets=sockets)
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"serving {', '.join(self.thread.names)} on http://{host}:{port}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets=None):
        asyncio.get_running_loop().call_later(self.grace, self.thread.post, self.thread._abort)
        await super().shutdown(sockets)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))   # before uvicorn takes it, and once uvicorn has ended
    args = parse_args()
    sock = listen(args)
    server = make_server(args)
    logging.getLogger("asyncio").setLevel(logging.ERROR)   # it warns of each client that went away
    config = uvicorn.Config(server.app, log_level="warning", access_log=False, lifespan="on",
                            timeout_graceful_shutdown=args.grace + 5)
    try:
        Uvicorn(config, server.thread, args.grace).run(sockets=[sock])
    finally:
        server.thread.stop()


if __name__ == "__main__":
    run_main(main)
