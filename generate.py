"""Generate with many adapters in one batch: every prompt runs its own.

  python generate.py --prompt 'def fibonacci(n):'                             the embedded base model
  python generate.py --prompt 'class Tensor {' --adapter out/flora-r1/adapter.safetensors
  python generate.py --prompt 'class A' --prompt 'class B' --adapter FLORA_FILE --adapter none
  python generate.py --requests FILE.jsonl --results FILE.jsonl      many requests, batched continuously

Text goes to standard output as it comes (with several prompts line by line, each line numbered by
its prompt), speed to standard error.

A line of --requests is a JSON object: "prompt", and if it likes "adapter" (a file, or none),
"max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop" (a list of texts); the flags of the
same names give the defaults. A line of --results is that with "line" (its number), "tokens" (new
ids), "text" and "error" (null, or why it could not run), written as requests end. Run again after an
interruption, the same command does only what is missing.
"""
import argparse
import gzip
import json
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

import flora
from flora import BASE, BadInput
from model import GPT, Tokenizer, add_common_flags, get_device, run_main, write_json


def sample(logits, temperature, top_k, top_p, u):
    """Pick a token per row: logits [B, vocab] -> int64 [B].

    temperature [B] (0 is greedy), top_k [B] (0 keeps all), top_p [B], u [B] uniform in [0, 1): the
    randomness of each row comes from outside, so a row draws the same whatever is beside it.
    """
    greedy = logits.argmax(-1)
    scaled = logits.float() / temperature.clamp(min=1e-6)[:, None]
    probs, order = scaled.softmax(-1).sort(descending=True)                   # [B, vocab]
    before = probs.cumsum(-1) - probs                                         # mass of likelier tokens
    ranks = torch.arange(probs.shape[-1], device=logits.device)
    keep = (before < top_p[:, None]) & ((ranks < top_k[:, None]) | (top_k[:, None] == 0))
    keep[:, 0] = True
    mass = (probs * keep).cumsum(-1)
    choice = (mass <= u[:, None] * mass[:, -1:]).sum(-1, keepdim=True)        # inverse of the CDF
    return torch.where(temperature > 0, order.gather(-1, choice)[:, 0], greedy)


@dataclass(eq=False)
class Request:
    """One text to generate, and, below the blank line, what the engine fills in."""
    prompt: list                  # token ids; empty is the config's eos_token_id
    adapter_id: int = BASE
    max_new_tokens: int = 64
    temperature: float = 0.0      # 0 is greedy
    top_k: int = 0                # 0 keeps all
    top_p: float = 1.0
    seed: int = 0                 # the same request draws the same tokens, whatever runs beside it
    eos_id: int | None = None     # ends the request, which then includes it
    stopped: object = None        # stopped(new ids) -> True ends it; asked whenever tokens are read

    ids: list = field(default_factory=list)   # the new ids so far
    state: str = "waiting"        # -> "running" -> "done"; or "failed" (see error), or "cancelled"
    error: str | None = None
    limit: int = 0                # new tokens at most: max_new_tokens, or what the context leaves
    arrived: float = 0.0          # time.perf_counter() at submit, at the first token, at the end
    first_token: float = 0.0
    ended: float = 0.0


class Engine:
    """Continuous batching (Orca; §4.1): requests enter and leave a running batch between its steps.

        flora.freeze_bank(model)
        engine = Engine(model, slots=8)
        requests = [engine.submit(prompt, adapter_id=i) for i, prompt in enumerate(prompts)]
        engine.run()                                         # or step() by step(), with more submits

    A step takes waiting requests into free slots, first come first served, and runs their prompts
    (prefill); picks a token for every running request; lets those that ended go; and runs the model
    once, one token each, for the others (decode). Running requests fill slots 0 .. n - 1 of one
    static KV cache, and only these are computed: the last moves into the slot of one that ends.

    slots: how many run at once. length: tokens a slot holds, prompt and new (default: the context).
    max_batched_tokens: of one step, padding included; a longer prompt waits until it runs alone.
    continuous=False: static batching, which admits only when all slots are empty.
    sync_every: steps between reads of the tokens by the host, which a GPU has to wait for; an end of
    text is noticed, and what follows it dropped, only then. Default 1, on CUDA 8.
    compile=True: decode with torch.compile. Compiled code and, on CUDA, CUDA graphs need shapes that
    repeat, so then all slots are computed. NOT TESTED ON A GPU: none was at hand.
    """

    def __init__(self, model, slots=8, length=None, max_batched_tokens=8192, continuous=True,
                 sync_every=None, compile=False):
        self.model, self.slots, self.continuous = model, slots, continuous
        self.length = min(length or model.config.n_positions, model.config.n_positions)
        self.max_batched_tokens = max_batched_tokens
        self.device = device = model.wte.weight.device
        self.sync_every = sync_every or (8 if device.type == "cuda" else 1)
        self.forward = torch.compile(model, dynamic=False) if compile else model
        self.fixed_shapes = compile or device.type == "cuda"
        self.has_adapters = any(layer.adapters for _, layer in flora.adapter_layers(model))
        self.graphs = {}                      # {cache length: (CUDA graph, its logits)}
        self.waiting, self.running = deque(), []
        self.events = []                      # (request, new ids) that step() has yet to report
        self.unread = []                      # tokens [n] of each step since the last sync
        self.steps = 0
        self.logits = None                    # [n, vocab] of the token that comes next
        self.kv_cache = model.new_kv_cache(slots, self.length)                # [n_layer, 2, slots, K, S, D]
        self.rows = dict(                     # per slot; the first n are running requests
            token=torch.zeros(slots, dtype=torch.int64, device=device),       # the last one picked
            position=torch.zeros(slots, dtype=torch.int64, device=device),    # of the next one
            adapter_id=torch.zeros(slots, dtype=torch.int64, device=device),
            temperature=torch.zeros(slots, device=device),
            top_k=torch.zeros(slots, dtype=torch.int64, device=device),
            top_p=torch.ones(slots, device=device),
            u=torch.zeros(slots, self.length, device=device),                 # randomness by position
        )
        model.pack()

    @property
    def busy(self):
        return bool(self.waiting or self.running or self.events)

    def submit(self, prompt, **settings):
        """Queue a request (fields of Request); returns it. One that cannot run fails alone: it comes
        back with `error` set, and step() reports it like any other that has ended."""
        request = Request(list(prompt) or [self.model.config.eos_token_id], **settings)
        request.arrived = time.perf_counter()
        request.limit = min(request.max_new_tokens, self.length - len(request.prompt))
        request.error = self.refusal(request)
        if request.error or request.limit <= 0:
            self.end(request, "failed" if request.error else "done")
        else:
            self.waiting.append(request)
        return request

    def refusal(self, request):
        """Why a request cannot run, in one sentence, or None."""
        if len(request.prompt) > self.length:
            what = (f"the model's context of {self.length} (n_positions)"
                    if self.length == self.model.config.n_positions else f"the {self.length} of a slot (length)")
            return f"a prompt has {len(request.prompt)} tokens, more than {what}; shorten it, or use --truncate"
        vocab_size = self.model.config.vocab_size
        if min(request.prompt) < 0 or max(request.prompt) >= vocab_size:
            return f"a prompt has token ids outside 0 to {vocab_size - 1}; encode it with this model's tokenizer"
        if request.adapter_id != BASE and not any(
                str(request.adapter_id) in layer.adapters for _, layer in flora.adapter_layers(self.model)):
            return f"the model has no adapter {request.adapter_id}; load it first"
        if not (request.temperature >= 0 and request.top_k >= 0 and 0 < request.top_p <= 1):
            return (f"temperature {request.temperature}, top_k {request.top_k}, top_p {request.top_p}: "
                    "the first two must be at least 0, top_p in (0, 1]")

    def cancel(self, request):
        """End a waiting or running request; it keeps the ids it has."""
        if request.state in ("waiting", "running"):
            self.end(request, "cancelled")

    def end(self, request, state, ids=()):
        request.state, request.ended = state, time.perf_counter()
        self.events.append((request, list(ids)))

    def load_adapter(self, file):
        """flora.load_adapter between steps -> its id. Where it fits the bank it is written in place."""
        banks = flora.frozen_banks(self.model)
        adapter_id = flora.load_adapter(self.model, file)
        self.update_bank(banks, adapter_id)
        return adapter_id

    def remove_adapter(self, adapter_id):
        """Evict an adapter between steps. BadInput while a waiting or running request uses it."""
        if any(r.adapter_id == adapter_id and r.state in ("waiting", "running")
               for r in (*self.waiting, *self.running)):
            raise BadInput(f"adapter {adapter_id} is in use by a request; cancel it or let it end first")
        banks = flora.frozen_banks(self.model)
        flora.remove_adapter(self.model, adapter_id)
        self.update_bank(banks, adapter_id)

    def update_bank(self, banks, adapter_id):
        if not flora.update_bank(self.model, banks, adapter_id):
            self.graphs.clear()  # they read the old tensors
        self.has_adapters = True
        self.recompose()

    def run(self):
        """step() until no request is left."""
        while self.busy:
            self.step()

    @torch.inference_mode()
    def step(self):
        """One step, as above -> [(request, its new ids)]: a request is in it whenever tokens of it
        were read, and once more or for the last time when its state is no longer "running"."""
        self.admit()
        if self.running:
            tokens = self.pick()                                              # [n]
            self.rows["token"][:len(tokens)] = tokens
            self.unread.append(tokens)
            self.steps += 1
            if self.steps == self.next_end or len(self.unread) == self.sync_every:
                self.sync()
            if self.running:
                self.decode()
        events, self.events = self.events, []
        return events

    def admit(self):
        """Take waiting requests into free slots, within the budget, and prefill them."""
        n = len(self.running)
        if not self.waiting or n == self.slots or n and not self.continuous:
            return
        newcomers, longest = [], 0
        while self.waiting and n + len(newcomers) < self.slots:
            request = self.waiting[0]
            if request.state == "waiting":  # else it was cancelled
                longest = max(longest, len(request.prompt))
                if n + longest * (len(newcomers) + 1) > self.max_batched_tokens and (n or newcomers):
                    break
                newcomers.append(request)
            self.waiting.popleft()
        if not newcomers:
            return
        if self.unread:
            self.sync()
            n = len(self.running)
        m, longest = len(newcomers), max(len(r.prompt) for r in newcomers)
        ids = torch.zeros(m, longest, dtype=torch.int64)
        u = torch.zeros(m, self.length)
        for i, r in enumerate(newcomers):
            T = len(r.prompt)
            ids[i, :T] = torch.tensor(r.prompt)
            if r.temperature:
                generator = torch.Generator().manual_seed(r.seed)
                u[i, T:T + r.limit] = torch.rand(r.limit, generator=generator)
            r.state, r.last_step = "running", self.steps + r.limit
            r.offset = T - self.steps         # its length is offset + self.steps
        columns = dict(token=[0] * m, position=[len(r.prompt) for r in newcomers], u=u,
                       **{name: [getattr(r, name) for r in newcomers]
                          for name in ("adapter_id", "temperature", "top_k", "top_p")})
        for name, rows in self.rows.items():
            rows[n:n + m] = torch.as_tensor(columns[name], dtype=rows.dtype)
        self.running += newcomers
        # Prompts are padded on the right; the logits are those of each one's own last token
        adapter_ids = self.rows["adapter_id"][n:n + m] if any(r.adapter_id for r in newcomers) else None
        hidden = self.model.hidden(ids.to(self.device), adapter_ids, self.kv_cache[:, :, n:n + m, :, :longest])
        last = self.rows["position"][n:n + m] - 1
        logits = self.model.logits(hidden[torch.arange(m, device=self.device), last])
        self.logits = torch.cat([self.logits[:n], logits]) if n else logits
        self.recompose()

    def pick(self):
        """The next token of every running request, int64 [n]."""
        if not self.sampling:
            return self.logits.argmax(-1)
        temperature, top_k, top_p, u, position = (
            self.rows[name][:len(self.running)] for name in ("temperature", "top_k", "top_p", "u", "position"))
        return sample(self.logits, temperature, top_k, top_p, u.gather(1, position[:, None])[:, 0])

    def recompose(self):
        """What a change of the batch changes for all the steps until the next."""
        running = self.running
        self.next_end = min((r.last_step for r in running), default=0)
        self.offset = max((r.offset for r in running), default=0)
        self.sampling = any(r.temperature for r in running)
        self.adapters = None
        if any(r.adapter_id for r in running) and not self.fixed_shapes:
            self.adapters = flora.gather(self.model, self.rows["adapter_id"][:len(running)])

    def sync(self):
        """Read the tokens of the steps since the last sync, and let the requests that have ended go."""
        tokens, self.unread = torch.stack(self.unread, 1).tolist(), []         # n lists
        now = time.perf_counter()
        for request, ids in zip(self.running, tokens):
            if request.state != "running":
                continue
            if request.eos_id in ids:
                ids = ids[:ids.index(request.eos_id) + 1]
            request.first_token = request.first_token or now
            request.ids += ids
            ended = len(request.ids) == request.limit or ids[-1] == request.eos_id
            if request.stopped is not None and not ended:
                try:
                    ended = request.stopped(request.ids)
                except Exception as e:  # the caller's code; its failure is this request's alone
                    request.error = f"stopped() raised {e!r}"
            if request.error or ended:
                self.end(request, "failed" if request.error else "done", ids)
            else:
                self.events.append((request, ids))
        ended = [i for i, request in enumerate(self.running) if request.state != "running"]
        for i in reversed(ended):
            self.leave(i)
        if ended:
            self.recompose()

    def leave(self, i):
        """Free slot i, moving the last running request into it."""
        last = self.running.pop()
        if i < len(self.running):
            j, length = len(self.running), last.offset + self.steps
            self.kv_cache[:, :, i, :, :length] = self.kv_cache[:, :, j, :, :length]
            for rows in (self.logits, *self.rows.values()):
                rows[i] = rows[j]
            self.running[i] = last

    def decode(self):
        """Run the model on the last token of every running request -> self.logits [n, vocab]."""
        n, length = len(self.running), self.offset + self.steps
        if self.fixed_shapes:
            self.logits = self.decode_all(min(self.length, -(-length // 256) * 256))[:n]
        else:
            self.logits = self.forward(self.rows["token"][:n, None], self.adapters,
                                       self.kv_cache[:, :, :n, :, :length], self.rows["position"][:n, None])[:, 0]
        self.rows["position"][:n] += 1

    def decode_all(self, length):
        """The same for all slots and a rounded cache length -> [slots, vocab]; on CUDA, as a graph.

        Slots without a request compute nonsense in their own rows, which prefill overwrites. Adapters
        are gathered inside, so that ids and bank may change in place. NOT TESTED ON A GPU.
        """
        def run():
            adapter_ids = self.rows["adapter_id"] if self.has_adapters else None
            position = self.rows["position"].clamp(max=length - 1)
            return self.forward(self.rows["token"][:, None], adapter_ids,
                                self.kv_cache[:, :, :, :, :length], position[:, None])[:, 0]
        if self.device.type != "cuda":
            return run()
        if length not in self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # compiles, and lets libraries set up what a capture may not
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = run()
            self.graphs[length] = graph, logits
        graph, logits = self.graphs[length]
        graph.replay()
        return logits


def generate_steps(model, prompts, adapter_ids=None, max_new_tokens=64, temperature=0.0, top_k=0,
                   top_p=1.0, seed=0, eos_id=None, stopped=None):
    """Generate from prompts, lists of ids of any lengths, as one batch; yield each step's new tokens.

    adapter_ids: one per prompt, 0 (flora.BASE) for the base model; None is the base for all.
    A row ends at max_new_tokens, at the end of the context, after eos_id (which it includes), or
    when stopped(row, its new ids) says so. Yields {row: id}, without the rows that have ended.
    Raises BadInput for a prompt longer than the context.
    """
    engine = Engine(model, len(prompts), max(map(len, prompts)) + max_new_tokens, sync_every=1)
    rows = {}
    for row, prompt in enumerate(prompts):
        request = engine.submit(
            prompt, adapter_id=adapter_ids[row] if adapter_ids is not None else BASE, seed=seed + row,
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, eos_id=eos_id,
            stopped=stopped and (lambda ids, row=row: stopped(row, ids)))
        if request.error:
            raise BadInput(request.error)
        rows[request] = row
    while engine.busy:
        fresh = {rows[request]: ids[0] for request, ids in engine.step() if ids}
        if fresh:
            yield fresh


def generate(model, prompts, adapter_ids=None, **settings):
    """generate_steps to the end -> a list of new ids per prompt."""
    new = [[] for _ in prompts]
    for fresh in generate_steps(model, prompts, adapter_ids, **settings):
        for row, token in fresh.items():
            new[row].append(token)
    return new


class Printer:
    """Streams texts to standard output: one as it comes, several line by line with their numbers."""

    def __init__(self, prompts):
        self.many = len(prompts) > 1
        self.pending = [prompt if self.many else "" for prompt in prompts]
        self.shown = [0] * len(prompts)
        if not self.many:
            print(prompts[0], end="", flush=True)

    def show(self, row, text, end=False):
        """text: all that the row has generated so far, certain not to change."""
        self.pending[row] += text[self.shown[row]:]
        self.shown[row] = len(text)
        if not self.many:
            print(self.pending[row], end="\n" if end else "", flush=True)
            self.pending[row] = ""
        else:
            *lines, self.pending[row] = self.pending[row].split("\n")
            if end:
                lines.append(self.pending[row])
            for line in lines:
                print(f"[{row + 1}] {line}", flush=True)


def new_text(tokenizer, ids):
    """The text of a request's new ids, without the end of text."""
    return tokenizer.decode([i for i in ids if i != tokenizer.eos_id], continues=True)


def cut_at_stop(text, stops):
    """text up to the first of the strings `stops`."""
    return text[:min((text.find(s) for s in stops if s in text), default=len(text))]


def truncate(ids, room, bos_id):
    """The last `room` of ids (at least one), a bos at their start kept."""
    room = max(1, room)
    kept = 1 if room > 1 and ids[:1] == [bos_id] else 0
    return ids if len(ids) <= room else ids[:kept] + ids[kept - room:]


REQUEST_KEYS = {"prompt": str, "adapter": str, "max_new_tokens": int, "temperature": (int, float),
                "top_k": int, "top_p": (int, float), "seed": int, "stop": list}


def read_jsonl(file):
    """Yield (line number, value) of a .jsonl or .jsonl.gz file; a line that is no JSON is a ValueError that
    names it."""
    with (gzip.open if str(file).endswith(".gz") else open)(file, "rt", encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as e:
                    raise ValueError(f"line {number}: {e}") from None


def read_requests(file, defaults):
    """A --requests file -> {line number: request, with `defaults` for the keys it lacks}."""
    requests = {}
    try:
        for line, given in read_jsonl(file):
            where = f"--requests {file} line {line}"
            if not isinstance(given, dict) or "prompt" not in given:
                raise BadInput(f'{where}: needs a JSON object with a "prompt"')
            for key, value in given.items():
                if key not in REQUEST_KEYS:
                    raise BadInput(f"{where}: unknown key {key!r}; use {', '.join(REQUEST_KEYS)}")
                if not isinstance(value, REQUEST_KEYS[key]) or isinstance(value, bool) or (
                        key == "stop" and not all(isinstance(text, str) and text for text in value)):
                    raise BadInput(f"{where}: {key} is {value!r}, which is no "
                                   + {str: "text", int: "whole number", list: "list of texts"}.get(
                                       REQUEST_KEYS[key], "number"))
            requests[line] = defaults | given
    except (OSError, ValueError) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"--requests {file}: not readable as JSONL ({e})") from None
    if not requests:
        raise BadInput(f"--requests {file}: holds no request")
    return requests


def read_results(file, *keys):
    """Results that an earlier run wrote to `file` -> {their values of `keys`: result}. What it left half
    written is dropped."""
    results = {}
    if os.path.exists(file):
        try:
            for _, result in read_jsonl(file):
                results[tuple(result[key] for key in keys)] = result
        except ValueError:
            pass  # the line that was being written when the run was killed
        except (OSError, KeyError, TypeError) as e:
            raise BadInput(f"--results {file}: is no file of results ({e}); move it away") from None
    return results


def rewrite_results(file, results):
    """Write the results that read_results kept, whole, for the run to append to."""
    try:
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        with open(f"{file}.tmp", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(result) + "\n" for result in results.values())
        os.replace(f"{file}.tmp", file)
    except OSError as e:
        raise BadInput(f"--results {file}: cannot be written ({e.strerror})") from None


def resume_results(file, requests):
    """Set of the lines that an earlier run has finished."""
    results = read_results(file, "line")
    for (line,), result in results.items():
        if any(result.get(key) != value for key, value in requests.get(line, {"prompt": None}).items()):
            raise BadInput(f"--results {file}: line {line} of the requests was another one then; move the "
                           "file away, or choose another --results")
    rewrite_results(file, results)
    return {line for line, in results}


def serve(args, model, tokenizer):
    """--requests to --results, by an Engine."""
    requests = read_requests(args.requests, dict(
        adapter=args.adapter[0] if args.adapter else "none", max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, stop=args.stop))
    finished = resume_results(args.results, requests)
    loaded = load_adapters(model, [r["adapter"] for r in requests.values()])
    slots = args.slots or (8 if model.wte.weight.device.type == "cpu" else 64)
    engine = Engine(model, min(slots, len(requests)), max_batched_tokens=args.max_batched_tokens,
                    continuous=not args.static_batching, compile=args.compile)
    lines = {}
    for line, r in requests.items():
        if line not in finished:
            ids = tokenizer.encode(r["prompt"], bos=True)
            if args.truncate:
                ids = truncate(ids, model.config.n_positions - r["max_new_tokens"], tokenizer.bos_id)
            stopped = r["stop"] and (lambda ids, stop=r["stop"]: any(s in tokenizer.decode(ids, True) for s in stop))
            settings = {key: r[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
            lines[engine.submit(ids, adapter_id=loaded[r["adapter"]], eos_id=tokenizer.eos_id,
                                stopped=stopped or None, **settings)] = line
    start, tokens, failed = time.time(), 0, 0
    with open(args.results, "a", encoding="utf-8") as f, \
            tqdm(total=len(requests), initial=len(finished), unit="request") as bar:
        while engine.busy:
            for request, _ in engine.step():
                if request.state in ("done", "failed"):
                    r = requests[lines[request]]
                    text = new_text(tokenizer, request.ids)
                    f.write(json.dumps(r | dict(line=lines[request], tokens=request.ids, error=request.error,
                                                text=cut_at_stop(text, r["stop"]))) + "\n")
                    f.flush()
                    tokens, failed = tokens + len(request.ids), failed + (request.state == "failed")
                    bar.update()
    seconds = time.time() - start
    print(f"{len(lines)} requests, {failed} failed, {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} "
          f"tokens/s, {engine.slots} slots, {args.dtype} on {args.device}", file=sys.stderr)


def load_model(args):
    """The model and the tokenizer that the flags name."""
    tokenizer = Tokenizer(args.weights)
    model = GPT.from_pretrained(args.weights, get_device(args.device), getattr(torch, args.dtype))
    model.set_attention(args.attention == "flash")
    if args.quantize:
        flora.quantize_int8(model)
    return model, tokenizer


def load_adapters(model, names):
    """{name: adapter id} of adapter files and "none"; stacked into the bank."""
    loaded = {"none": BASE}
    for name in names:
        if name not in loaded:
            loaded[name] = flora.load_adapter(model, name)
    flora.freeze_bank(model)
    return loaded


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="give it again for more rows")
    add("--prompt-file", action="append", default=[], metavar="FILE", help="a prompt from a file, - for standard input")
    add("--suffix", action="append", help="fill in the middle between prompt and this; one for all or one each")
    add("--adapter", action="append", default=[], metavar="FILE",
        help="a file, or a folder of PEFT; one for all prompts or one each; none is the base model")
    add("--max-new-tokens", type=int, default=64)
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 keeps all")
    add("--top-p", type=float, default=1.0)
    add("--stop", action="append", default=[], metavar="TEXT", help="end a row before this text; may be repeated")
    add("--truncate", action="store_true", help="drop the start of prompts that do not fit the context")
    add("--requests", metavar="FILE", help="JSONL of requests, as above; with --results")
    add("--results", metavar="FILE", help="JSONL to write, or to complete")
    add("--slots", type=int, help="requests that run at once (default: 8 on a CPU, else 64)")
    add("--max-batched-tokens", type=int, default=8192, help="of one step, padding included")
    add("--static-batching", action="store_true", help="admit requests only when all slots are empty")
    add("--compile", action="store_true", help="decode --requests with torch.compile")
    add("--attention", choices=["flash", "math"], default="flash")
    add_common_flags(parser, dtypes=["float32", "bfloat16", "float16"])
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {args.max_new_tokens}; use a whole number of at least 1")
    if bool(args.requests) != bool(args.results):
        parser.error("--requests and --results go together")
    if args.requests and (args.prompt or args.prompt_file or args.suffix or len(args.adapter) > 1):
        parser.error("--requests brings prompts and adapters itself; give no --prompt, --prompt-file or --suffix, "
                     "and at most one --adapter, the default")
    if args.slots is not None and args.slots < 1 or args.max_batched_tokens < 1:
        parser.error("--slots and --max-batched-tokens must be whole numbers of at least 1")
    if args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature and --top-k must be at least 0, --top-p in (0, 1]")
    return args


def one_each(values, n, what):
    """values for n prompts: as they are, or the one repeated."""
    if len(values) not in (1, n):
        raise BadInput(f"{len(values)} {what} for {n} prompts; give one for all, or one each")
    return values if len(values) == n else values * n


def main():
    args = parse_args()
    if args.requests:
        return serve(args, *load_model(args))
    prompts = list(args.prompt)
    for file in args.prompt_file:
        try:
            prompts.append(sys.stdin.read() if file == "-" else open(file, encoding="utf-8").read())
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(f"--prompt-file {file}: not readable as UTF-8 text ({e})") from None
    if not prompts:
        raise BadInput("no prompt; give --prompt TEXT or --prompt-file FILE")
    names = args.adapter or ["none"]
    if len(prompts) == 1:
        prompts = prompts * len(names)
    names = one_each(names, len(prompts), "--adapter")

    model, tokenizer = load_model(args)
    loaded = load_adapters(model, names)
    adapter_ids = [loaded[name] for name in names] if len(loaded) > 1 else None

    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    if args.suffix:
        if tokenizer.fim_ids is None:
            raise BadInput(f"--suffix: the tokenizer of {args.weights} has no fill-in-the-middle tokens; "
                           "StarCoder's has")
        prefix, suffix, middle = ([i] for i in tokenizer.fim_ids)
        suffixes = one_each(args.suffix, len(prompts), "--suffix")
        ids = [prefix + p + suffix + tokenizer.encode(s) + middle for p, s in zip(ids, suffixes)]
    if args.truncate:
        ids = [truncate(row, model.config.n_positions - args.max_new_tokens, tokenizer.bos_id) for row in ids]

    new = [[] for _ in prompts]
    texts = [""] * len(prompts)
    held_back = max(map(len, args.stop), default=1) - 1  # characters that may turn out to be a stop

    def stopped(row, row_ids):
        return any(s in tokenizer.decode(row_ids, continues=True) for s in args.stop)

    printer, start = Printer(prompts), time.time()
    for fresh in generate_steps(model, ids, adapter_ids, args.max_new_tokens, args.temperature, args.top_k,
                                args.top_p, args.seed, tokenizer.eos_id, stopped if args.stop else None):
        for row, token in fresh.items():
            new[row].append(token)
            texts[row] = new_text(tokenizer, new[row])
            certain = texts[row].rstrip("\ufffd")  # a character whose bytes have not all come yet
            printer.show(row, cut_at_stop(certain[:len(certain) - held_back], args.stop))
    seconds, count = time.time() - start, sum(map(len, new))
    for row in range(len(prompts)):
        texts[row] = cut_at_stop(texts[row], args.stop)
        printer.show(row, texts[row], end=True)
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s, batch {len(prompts)}, "
          f"{args.dtype} on {args.device}", file=sys.stderr)
    if args.json:
        write_json(args.json, [dict(prompt=p, adapter=a, tokens=n, text=t)
                               for p, a, n, t in zip(prompts, names, new, texts)])


if __name__ == "__main__":
    run_main(main)
