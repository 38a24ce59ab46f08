"""Generate with many adapters in one batch: every prompt runs its own.

  python generate.py --prompt 'def fibonacci(n):'                       the embedded base model
  python generate.py --prompt 'class Tensor {' --adapter out/flora-r1/adapter.safetensors
  python generate.py --prompt 'class A' --prompt 'class B' --adapter FLORA_FILE --adapter none
  python generate.py --requests FILE.jsonl --results FILE.jsonl         many requests, continuously

Text goes to standard output as it comes (with several prompts line by line, each line numbered by
its prompt), speed to standard error. The lines of --requests are explained in extras/requests.py.
"""
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

import flora
from flora import BASE
from model import GPT
from plumbing.files import BadInput
from plumbing.flags import get_device, get_dtype, run_main, set_up
from plumbing.generate_flags import parse_args
from plumbing.outputs import JSON, check_writable
from plumbing.prompts import TextPrinter, encode_prompts, read_prompts, report_texts, stop_check
from plumbing.registry import extra, is_blend
from plumbing.requests import DIVERGED, complete_request, fits_in_memory, refuse_failed
from plumbing.tokenizer import Tokenizer


# ----------------------------------------------------------------------------------------- sampling


def sample(logits, temperature, top_k, top_p, u):
    """Pick a token per row: logits [B, vocab] -> int64 [B].

    temperature [B] (0 is greedy), top_k [B] (0 keeps all), top_p [B], u [B] uniform in [0, 1): the
    randomness of each row comes from outside, so a row draws the same whatever is beside it.
    """
    greedy = logits.argmax(-1)
    scaled = logits.float() / temperature.clamp(min=1e-6)[:, None]
    probs, order = scaled.softmax(-1).sort(descending=True)              # [B, vocab]
    ranks, top_k = torch.arange(probs.shape[-1], device=logits.device), top_k[:, None]
    probs = probs * ((ranks < top_k) | (top_k == 0))
    mass = probs.cumsum(-1)                                              # of it top-p takes a share
    keep = mass - probs < top_p[:, None] * mass[:, -1:]                  # by what is likelier
    keep[:, 0] = True
    mass = (probs * keep).cumsum(-1)
    choice = (mass <= u[:, None] * mass[:, -1:]).sum(-1, keepdim=True)   # inverse of the CDF
    return torch.where(temperature > 0, order.gather(-1, choice)[:, 0], greedy)


# --------------------------------------------------------------------------------------- the engine


NOT_FINITE = -1   # in the place of a token, where a row's logits are NaN or infinite


@dataclass(eq=False)
class Request:
    """One text to generate, and, below the blank line, what the engine fills in."""
    prompt: list                  # token ids; empty is the config's eos_token_id, or 0
    adapter_id: int = BASE
    max_new_tokens: int = 64      # once submitted, at most what its slot leaves
    temperature: float = 0.0      # 0 is greedy
    top_k: int = 0                # 0 keeps all
    top_p: float = 1.0
    seed: int = 0                 # the same request draws the same tokens, whatever runs beside it
    eos_id: int | list | None = None   # one or several: ends the request, which then includes it
    stopped: object = None        # stopped(new ids) -> True ends it; asked for each token

    ids: list = field(default_factory=list)   # the new ids so far
    state: str = "waiting"        # -> "running" -> "done"; or "failed" (see error), or "cancelled"
    error: str | None = None      # or given, where there is no prompt: it fails with that reason
    arrived: float = 0.0          # time.perf_counter() at submit, at the first token, at the end
    first_token: float = 0.0
    ended: float = 0.0


class Engine:
    """Continuous batching (Orca; §4.1): requests enter and leave a batch between its steps.

        flora.freeze_bank(model)
        engine = Engine(model, slots=8)
        requests = [engine.submit(prompt, adapter_id=i) for i, prompt in enumerate(prompts)]
        engine.run()                                    # or step() by step(), with more submits

    A step takes waiting requests into free slots, first come first served, and runs their prompts
    (prefill); picks a token for every running request; frees the slots of those that ended; and
    runs the model once, one token each, for the others (decode). Running requests fill slots
    0 .. n - 1 of one static KV cache, and only these are computed: the last moves into the slot of
    one that ends. In float32 a request's tokens are those that it gets alone; in half precision a
    near-tie may fall the other way.

    slots: how many run at once. length: tokens a slot holds, prompt and new (default: the context).
    max_batched_tokens: of one step's prompts (padded) and running rows; a longer prompt runs alone.
    continuous=False: static batching, which admits only when all slots are empty.
    sync_every: steps between reads of the tokens by the host, which a GPU has to wait for; only
    then is an end of text noticed, and what follows it dropped. Default 1, on CUDA 8.
    """

    def __init__(self, model, slots=8, length=None, max_batched_tokens=8192, continuous=True,
                 sync_every=None):
        context = model.config.n_positions
        self.model, self.slots, self.continuous = model, slots, continuous
        self.length = min(length or context, context)
        self.max_batched_tokens = max_batched_tokens
        self.device = device = model.wte.weight.device
        self.sync_every = sync_every or (8 if device.type == "cuda" else 1)
        self.waiting, self.running = deque(), []
        self.events = {}                      # {request: its new ids} that step() has yet to report
        self.unread = []                      # tokens [n] of each step since the last sync
        self.logits = None                    # [n, vocab] of the token that comes next
        with fits_in_memory(f"a KV cache of {slots} slots of {self.length} tokens"):
            self.kv_cache = model.new_kv_cache(slots, self.length)   # [n_layer, 2, slots, K, S, D]
        self.written = 0                      # of S, at most, by any request so far
        zeros = partial(torch.zeros, slots, device=device)
        self.table = dict(                    # a row per slot; the first n are running requests
            token=zeros(dtype=torch.int64),        # the last one picked
            position=zeros(dtype=torch.int64),     # of that one, where decode writes it
            adapter_id=zeros(dtype=torch.int64),
            temperature=zeros(), top_k=zeros(dtype=torch.int64), top_p=zeros() + 1,
            u=torch.zeros(slots, self.length + 1, device=device),   # uniform in [0, 1), by position
        )
        model.pack()

    # what a caller does

    @property
    def busy(self):
        return bool(self.waiting or self.running or self.events)

    def submit(self, prompt, **settings):
        """Queue a request (fields of Request) and return it.

        One that cannot run fails alone: it comes back with `error` set, and step() reports it like
        any other that has ended.
        """
        request = Request(list(prompt), **settings)
        request.arrived = time.perf_counter()
        try:
            complete_request(request, self.length, self.model.config)
            if request.adapter_id != BASE:
                flora.adapters_of(self.model, request.adapter_id)
            self.waiting.append(request)
        except BadInput as e:
            self.fail(request, str(e))
        return request

    def cancel(self, request):
        """End a waiting or running request; it keeps the ids it has."""
        if request.state == "waiting":
            self.waiting.remove(request)
        if request.state in ("waiting", "running"):
            self.end(request, "cancelled")

    def run(self):
        """step() until all requests have ended."""
        while self.busy:
            self.step()

    @torch.inference_mode()
    def step(self):
        """One step, as above -> [(request, its new ids)]: a request is in it when tokens of it were
        read, and for the last time when it has ended (its state is no longer "running")."""
        self.admit()
        if self.running:
            tokens = self.pick()                                              # [n]
            self.table["token"][:len(tokens)] = tokens.clamp(min=0)
            self.unread.append(tokens)
            full = any(self.picked(r) == r.max_new_tokens for r in self.running)
            if full or len(self.unread) == self.sync_every:
                self.sync()
            if self.running:
                self.decode()
        events, self.events = self.events, {}
        return list(events.items())

    # the parts of a step

    def picked(self, request):
        """How many tokens were picked for a running request, read or not."""
        return len(request.ids) + len(self.unread)

    def cached(self):
        """How many tokens of the longest running request the next decoding step looks at."""
        return max(len(r.prompt) + self.picked(r) for r in self.running)

    def admit(self):
        """Take waiting requests into free slots, within the budget, and prefill them."""
        if not self.waiting or self.running and not self.continuous:
            return
        newcomers = self.take_waiting()
        if newcomers:
            if self.unread:
                self.sync()
            self.prefill(newcomers)

    def take_waiting(self):
        """The waiting requests that free slots and max_batched_tokens have room for."""
        n, taken, longest = len(self.running), [], 0
        while self.waiting and n + len(taken) < self.slots:
            longest = max(longest, len(self.waiting[0].prompt))
            tokens = n + longest * (len(taken) + 1)
            if tokens > self.max_batched_tokens and (n or taken):
                break
            taken.append(self.waiting.popleft())
        return taken

    def prefill(self, requests):
        """Run the prompts of m requests in slots n .. n + m - 1; append their logits."""
        n, m = len(self.running), len(requests)
        longest = max(len(r.prompt) for r in requests)
        ids = torch.zeros(m, longest, dtype=torch.int64)   # padded on the right
        u = torch.zeros(m, self.length + 1)
        for i, r in enumerate(requests):
            T, generator = len(r.prompt), torch.Generator().manual_seed(r.seed)
            ids[i, :T] = torch.tensor(r.prompt)
            if r.temperature:   # all the randomness that it will use
                u[i, T:T + r.max_new_tokens] = torch.rand(r.max_new_tokens, generator=generator)
            r.state = "running"
        columns = {name: [getattr(r, name) for r in requests]
                   for name in ("adapter_id", "temperature", "top_k", "top_p")}
        columns |= dict(position=[len(r.prompt) for r in requests], u=u)
        for name, values in columns.items():
            column = self.table[name]
            column[n:n + m] = torch.as_tensor(values, dtype=column.dtype)

        adapter_ids = None
        if any(r.adapter_id for r in requests):
            adapter_ids = self.table["adapter_id"][n:n + m]
        # A masked position still counts as 0 times what is there, so no NaN may be left behind
        self.kv_cache[:, :, n:n + m, :, :self.written] = 0
        self.written = max(self.written, longest)
        kv_cache = self.kv_cache[:, :, n:n + m, :, :longest]
        hidden = self.model.hidden(ids.to(self.device), adapter_ids, kv_cache)   # [m, longest, C]
        last = self.table["position"][n:n + m] - 1         # each prompt's own last token
        logits = self.model.logits(hidden[torch.arange(m, device=self.device), last])
        self.logits = torch.cat([self.logits[:n], logits]) if n else logits
        self.running += requests
        self.recompose()

    def recompose(self):
        """What a change of the batch changes for all the steps until the next."""
        self.sampling = any(r.temperature for r in self.running)
        self.adapters = self.batch_adapters()

    def batch_adapters(self):
        """What decode passes as adapter_ids: the adapters of the batch, gathered once for all its
        steps; None if all run the base model."""
        if any(r.adapter_id for r in self.running):
            return flora.gather(self.model, self.table["adapter_id"][:len(self.running)])

    def pick(self):
        """The next token of every running request, int64 [n]; NOT_FINITE where its logits are
        not finite."""
        best, token = self.logits.max(-1)      # max is NaN in a row that has one
        if self.sampling:
            u, position, temperature, top_k, top_p = (
                self.table[name][:len(self.running)]
                for name in ("u", "position", "temperature", "top_k", "top_p"))
            u = u.gather(1, position[:, None])[:, 0]                          # [n]
            token = sample(self.logits, temperature, top_k, top_p, u)
        return torch.where(best.isfinite(), token, NOT_FINITE)

    def decode(self):
        """Run the model on the last token of every running request -> self.logits [n, vocab]."""
        n, length = len(self.running), self.cached()
        self.written = max(self.written, length)
        token, position = self.table["token"][:n, None], self.table["position"][:n, None]
        kv_cache = self.kv_cache[:, :, :n, :, :length]
        self.logits = self.model(token, self.adapters, kv_cache, position)[:, 0]
        self.table["position"][:n] += 1

    def sync(self):
        """Read the tokens since the last sync; free the slots of requests that ended."""
        tokens, self.unread = torch.stack(self.unread, 1).tolist(), []        # n lists
        now = time.perf_counter()
        for request, ids in zip(self.running, tokens):
            if request.state == "running":   # not cancelled
                self.receive(request, ids, now)
        ended = [i for i, request in enumerate(self.running) if request.state != "running"]
        for i in reversed(ended):
            self.leave(i)
        if ended:
            self.recompose()

    def receive(self, request, tokens, now):
        """Give a request its new tokens, up to the one that ends it."""
        request.first_token = request.first_token or now
        fresh = self.events.setdefault(request, [])
        for token in tokens:
            if token == NOT_FINITE:
                return self.fail(request, DIVERGED)
            request.ids.append(token)
            fresh.append(token)
            full = len(request.ids) == request.max_new_tokens
            if full or token in request.eos_id or self.is_stopped(request):
                return self.end(request, "failed" if request.error else "done")

    def is_stopped(self, request):
        """Whether the caller ends a request. The caller's code may fail: for this request alone."""
        try:
            return request.stopped is not None and request.stopped(request.ids)
        except Exception as e:
            request.error = f"stopped() raised {e!r}"
            return True

    def fail(self, request, error):
        """End a request with the reason why."""
        request.error = error
        self.end(request, "failed")

    def end(self, request, state):
        request.state, request.ended = state, time.perf_counter()
        self.events.setdefault(request, [])

    def leave(self, i):
        """Free slot i, moving the last running request into it."""
        last = self.running.pop()
        if i < len(self.running):
            j, length = len(self.running), self.written
            self.kv_cache[:, :, i, :, :length] = self.kv_cache[:, :, j, :, :length]
            for column in (self.logits, *self.table.values()):
                column[i] = column[j]
            self.running[i] = last


def new_engine(model, slots=8, compile=False, **settings):
    """An Engine(model, slots, **settings); on CUDA, or to compile, that of extras/graphs.py."""
    if compile:
        return extra("graphs", "--compile").GraphEngine(model, slots, compile=True, **settings)
    if model.wte.weight.device.type == "cuda":
        with contextlib.suppress(BadInput):   # without extras/ the plain one runs
            return extra("graphs", "a CUDA graph").GraphEngine(model, slots, **settings)
    return Engine(model, slots, **settings)


def row_seed(seed, row):
    """The seed of one row of a run: rows, and runs of other seeds, share no random numbers."""
    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] >> 2)


def submit_batch(model, rows, max_new_tokens=64, seed=0, **settings):
    """An Engine with a slot for each of `rows`, dicts of Request's fields, and their Requests."""
    length = max(1, *(len(row["prompt"]) for row in rows)) + max_new_tokens
    engine = new_engine(model, len(rows), length=length, sync_every=1)
    return engine, [engine.submit(**row, max_new_tokens=max_new_tokens, seed=row_seed(seed, i),
                                  **settings) for i, row in enumerate(rows)]


def generate(model, prompts, adapter_ids=None, **settings):
    """Generate from prompts, lists of ids of any lengths, as one batch -> a list of new ids each.

    adapter_ids: one per prompt, 0 (flora.BASE) for the base model; None is the base for all.
    settings: other fields of Request, the same for all, but that each row draws a seed of its own.
    Raises BadInput for a row that cannot be run.
    """
    adapter_ids = [BASE] * len(prompts) if adapter_ids is None else adapter_ids
    rows = [dict(prompt=prompt, adapter_id=i) for prompt, i in zip(prompts, adapter_ids)]
    engine, requests = submit_batch(model, rows, **settings)
    refuse_failed(requests)
    engine.run()
    refuse_failed(requests)
    return [request.ids for request in requests]


# -------------------------------------------------------------------------------------- the command


def load_model(args):
    """The model and the tokenizer that the flags name."""
    tokenizer = Tokenizer(args.weights)
    model = GPT.from_pretrained(args.weights, get_device(args.device), get_dtype(args))
    return set_up(model, args), tokenizer


def load_adapters(model, names):
    """{name: adapter id} of adapter files, blends (extras/blend.py) and "none"; stacked for use."""
    loaded = {"none": BASE}
    for name in names:
        if name not in loaded and is_blend(name):
            loaded[name] = extra("blend", f"--adapter '{name}'").load(model, name, loaded)
        elif name not in loaded:
            loaded[name] = flora.load_adapter(model, name)
    flora.freeze_bank(model)
    return loaded


def submit_prompts(args, model, tokenizer, prompts, names):
    """The Engine and the Requests of the flags' prompts; one that cannot be run has its error."""
    loaded = load_adapters(model, names)
    rows = encode_prompts(args, tokenizer, prompts, model.config.n_positions)
    rows = [row | dict(adapter_id=loaded[name]) for row, name in zip(rows, names)]
    return submit_batch(model, rows, args.max_new_tokens, args.seed, temperature=args.temperature,
                        top_k=args.top_k, top_p=args.top_p, eos_id=tokenizer.eos_ids,
                        stopped=stop_check(tokenizer, args.stop))


def run_and_print(engine, requests, tokenizer, prompts, stops):
    """Run the requests, and print their texts as they come -> the text of each."""
    printer = TextPrinter(tokenizer, prompts, stops)
    rows = {request: row for row, request in enumerate(requests)}
    while engine.busy:
        for request, _ in engine.step():
            printer.show(rows[request], request.ids)
    return [printer.end(row, request) for row, request in enumerate(requests)]


def main():
    args = parse_args(description=__doc__)
    if args.requests:
        return extra("requests", "--requests").serve(args)
    check_writable(args.json, "--json", JSON)
    prompts, names = read_prompts(args)
    model, tokenizer = load_model(args)
    engine, requests = submit_prompts(args, model, tokenizer, prompts, names)
    if all(request.error for request in requests):
        refuse_failed(requests)

    start = time.time()
    texts = run_and_print(engine, requests, tokenizer, prompts, args.stop)
    report_texts(args, prompts, names, requests, texts, time.time() - start)
    refuse_failed(requests)


if __name__ == "__main__":
    run_main(main)
