"""Generate with many adapters in one batch: every prompt runs its own.

  python generate.py --prompt 'def fibonacci(n):'                       the embedded base model
  python generate.py --prompt 'class Tensor {' --adapter out/flora-r1/adapter.safetensors
  python generate.py --prompt 'class A' --prompt 'class B' --adapter FLORA_FILE --adapter none
  python generate.py --requests FILE.jsonl --results FILE.jsonl         many requests, continuously

Text goes to standard output as it comes (with several prompts line by line, each line numbered by
its prompt), speed to standard error. The lines of --requests are explained in extras/requests.py.
"""
import argparse
import os
import reprlib
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import torch

import flora
from flora import BASE, BadInput
from model import (GPT, JSON, Tokenizer, add_common_flags, check_numbers, check_writable,
                   get_device, get_dtype, run_main, write_json)


# ----------------------------------------------------------------------------------------- sampling


def sample(logits, temperature, top_k, top_p, u):
    """Pick a token per row: logits [B, vocab] -> int64 [B].

    temperature [B] (0 is greedy), top_k [B] (0 keeps all), top_p [B], u [B] uniform in [0, 1): the
    randomness of each row comes from outside, so a row draws the same whatever is beside it.
    """
    greedy = logits.argmax(-1)
    scaled = logits.float() / temperature.clamp(min=1e-6)[:, None]
    probs, order = scaled.softmax(-1).sort(descending=True)              # [B, vocab]
    before = probs.cumsum(-1) - probs                                    # mass of likelier tokens
    ranks = torch.arange(probs.shape[-1], device=logits.device)
    keep = (before < top_p[:, None]) & ((ranks < top_k[:, None]) | (top_k[:, None] == 0))
    keep[:, 0] = True
    mass = (probs * keep).cumsum(-1)
    choice = (mass <= u[:, None] * mass[:, -1:]).sum(-1, keepdim=True)   # inverse of the CDF
    return torch.where(temperature > 0, order.gather(-1, choice)[:, 0], greedy)


# --------------------------------------------------------------------------------------- the engine


NOT_FINITE = -1   # in the place of a token, where a row's logits are NaN or infinite


def as_list(ids):
    """None, an id or several -> a list."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def bad_setting(max_new_tokens, temperature, top_k, top_p, seed):
    """Why no text can be generated with these settings, in one sentence, or None."""
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        return (f"temperature {reprlib.repr(temperature)}, top_k {reprlib.repr(top_k)}, top_p "
                f"{top_p}: the first two must be at least 0, top_p in (0, 1]")
    for name, value, least, most in [
            ("temperature", temperature, 0, 1e9), ("top_k", top_k, 0, 2**31),
            ("max_new_tokens", max_new_tokens, 1, 2**31), ("seed", seed, 0, 2**62)]:
        if not least <= value <= most:
            return f"{name} is {reprlib.repr(value)}; it must be from {least} to {most:.4g}"


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
    eos_id: int | list | None = None   # one or several: ends the request, which then includes it
    stopped: object = None        # stopped(new ids) -> True ends it; asked whenever tokens are read

    ids: list = field(default_factory=list)   # the new ids so far
    state: str = "waiting"        # -> "running" -> "done"; or "failed" (see error), or "cancelled"
    error: str | None = None
    ends: list = ()               # eos_id as a list
    limit: int = 0                # new tokens at most: max_new_tokens, or what the context leaves
    last_step: int = 0            # the engine's step that picks the last of them
    offset: int = 0               # tokens in the cache = offset + the engine's steps
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
    (prefill); picks a token for every running request; lets those that ended go; and runs the model
    once, one token each, for the others (decode). Running requests fill slots 0 .. n - 1 of one
    static KV cache, and only these are computed: the last moves into the slot of one that ends.
    In float32 a request's tokens are those that it gets alone; in half precision a near-tie may
    fall the other way. One whose logits are not finite fails, and leaves nothing in its slot.

    slots: how many run at once. length: tokens a slot holds, prompt and new (default: the context).
    max_batched_tokens: of one step, padding included; a longer prompt waits until it runs alone.
    continuous=False: static batching, which admits only when all slots are empty.
    sync_every: steps between reads of the tokens by the host, which a GPU has to wait for; an end
    of text is noticed, and what follows it dropped, only then. Default 1, on CUDA 8.
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
        self.events = []                      # (request, new ids) that step() has yet to report
        self.unread = []                      # tokens [n] of each step since the last sync
        self.steps = 0
        self.logits = None                    # [n, vocab] of the token that comes next
        self.kv_cache = self.new_kv_cache()   # [n_layer, 2, slots, K, S, D]
        self.written = 0                      # of S, at most, by any request so far
        zeros = partial(torch.zeros, slots, device=device)
        self.table = dict(                    # a row per slot; the first n are running requests
            token=zeros(dtype=torch.int64),        # the last one picked
            position=zeros(dtype=torch.int64),     # of the next one
            adapter_id=zeros(dtype=torch.int64),
            temperature=zeros(), top_k=zeros(dtype=torch.int64), top_p=zeros() + 1,
            u=torch.zeros(slots, self.length + 1, device=device),   # uniform in [0, 1), by position
        )
        model.pack()

    def new_kv_cache(self):
        try:
            return self.model.new_kv_cache(self.slots, self.length)
        except RuntimeError as e:   # of the allocator
            raise BadInput(f"a KV cache of {self.slots} slots of {self.length} tokens does not fit "
                           f"in memory ({str(e).splitlines()[0]}); use fewer --slots") from None

    # what a caller does

    @property
    def busy(self):
        return bool(self.waiting or self.running or self.events)

    def submit(self, prompt, **settings):
        """Queue a request (fields of Request) and return it.

        One that cannot run fails alone: it comes back with `error` set, and step() reports it like
        any other that has ended.
        """
        request = Request(list(prompt) or as_list(self.model.config.eos_token_id)[:1], **settings)
        request.arrived, request.ends = time.perf_counter(), as_list(request.eos_id)
        room = max(1, self.length - len(request.prompt))   # one token follows a full context too
        request.limit = min(request.max_new_tokens, room)
        request.error = self.refusal(request)
        if request.error:
            self.end(request, "failed")
        else:
            self.waiting.append(request)
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
        """One step, as above -> [(request, its new ids)]: a request is in it whenever tokens of it
        were read, and once more or for the last time when its state is no longer "running"."""
        self.admit()
        if self.running:
            tokens = self.pick()                                              # [n]
            self.table["token"][:len(tokens)] = tokens.clamp(min=0)
            self.unread.append(tokens)
            self.steps += 1
            if self.steps == self.next_end or len(self.unread) == self.sync_every:
                self.sync()
            if self.running:
                self.decode()
        events, self.events = self.events, []
        return events

    # the parts of a step

    def refusal(self, request):
        """Why a request cannot run, in one sentence, or None."""
        r, config = request, self.model.config
        if len(r.prompt) > self.length:
            room = f"the {self.length} of a slot (length)"
            if self.length == config.n_positions:
                room = f"the model's context of {self.length} (n_positions)"
            return (f"a prompt has {len(r.prompt)} tokens, more than {room}; shorten it, "
                    "or use --truncate")
        if min(r.prompt) < 0 or max(r.prompt) >= config.vocab_size:
            return (f"a prompt has token ids outside 0 to {config.vocab_size - 1}; "
                    "encode it with this model's tokenizer")
        layers = [layer for _, layer in flora.adapter_layers(self.model)]
        if r.adapter_id != BASE and not any(str(r.adapter_id) in x.adapters for x in layers):
            return f"the model has no adapter {r.adapter_id}; load it first"
        return bad_setting(r.max_new_tokens, r.temperature, r.top_k, r.top_p, r.seed)

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
                u[i, T:T + r.limit] = torch.rand(r.limit, generator=generator)
            r.state, r.last_step, r.offset = "running", self.steps + r.limit, T - self.steps
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
        self.next_end = min((r.last_step for r in self.running), default=0)
        self.offset = max((r.offset for r in self.running), default=0)
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
            token = self.sample()
        return torch.where(best.isfinite(), token, NOT_FINITE)

    def sample(self):
        u, position, temperature, top_k, top_p = (
            self.table[name][:len(self.running)]
            for name in ("u", "position", "temperature", "top_k", "top_p"))
        u = u.gather(1, position[:, None])[:, 0]                              # [n]
        return sample(self.logits, temperature, top_k, top_p, u)

    def decode(self):
        """Run the model on the last token of every running request -> self.logits [n, vocab]."""
        n, length = len(self.running), self.offset + self.steps
        self.written = max(self.written, length)
        token, position = self.table["token"][:n, None], self.table["position"][:n, None]
        kv_cache = self.kv_cache[:, :, :n, :, :length]
        self.logits = self.model(token, self.adapters, kv_cache, position)[:, 0]
        self.table["position"][:n] += 1

    def sync(self):
        """Read the tokens of the steps since the last sync; let the requests that ended go."""
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

    def receive(self, request, ids, now):
        """Give a request its new ids; end it after an eos_id, at its limit or where it says so."""
        last = [i for i, token in enumerate(ids) if token in request.ends][:1]
        ids = ids[:last[0] + 1] if last else ids
        if NOT_FINITE in ids:
            ids = ids[:ids.index(NOT_FINITE)]
            request.error = ("its logits are not finite: its adapter or its prompt's values "
                             "diverged, or overflow this dtype; use --dtype float32 or another "
                             "adapter")
        request.first_token = request.first_token or now
        request.ids += ids
        ended = len(request.ids) == request.limit or bool(last)
        if request.stopped is not None and not ended and not request.error:
            try:
                ended = request.stopped(request.ids)
            except Exception as e:  # the caller's code; its failure is this request's alone
                request.error = f"stopped() raised {e!r}"
        if request.error:
            self.end(request, "failed", ids)
        elif ended:
            self.end(request, "done", ids)
        else:
            self.events.append((request, ids))

    def end(self, request, state, ids=()):
        request.state, request.ended = state, time.perf_counter()
        self.events.append((request, list(ids)))

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
    """An Engine(model, slots, **settings); on CUDA and with compile=True that of extras/graphs.py.

    compile: decode with torch.compile. CUDA without extras/ has the plain one.
    """
    if compile:
        graphs = flora.extra("graphs", "--compile")
        return graphs.GraphEngine(model, slots, compile=True, **settings)
    if model.wte.weight.device.type == "cuda":
        try:
            return flora.extra("graphs", "a CUDA graph").GraphEngine(model, slots, **settings)
        except BadInput:
            pass
    return Engine(model, slots, **settings)


def generate_steps(model, prompts, adapter_ids=None, max_new_tokens=64, temperature=0.0, top_k=0,
                   top_p=1.0, seed=0, eos_id=None, stopped=None, failed=None):
    """Generate from prompts, lists of ids of any lengths, as one batch; yield each step's tokens.

    adapter_ids: one per prompt, 0 (flora.BASE) for the base model; None is the base for all.
    A row ends at max_new_tokens, at the end of the context, after eos_id (which it includes), or
    when stopped(row, its new ids) says so. Yields {row: id}, without the rows that have ended.
    Raises BadInput for a prompt longer than the context, and at the end for a row that failed; or,
    with a dict `failed`, notes {row: why} there, and leaves out the rows that stand in it already.
    """
    refused = {} if failed is None else failed
    length = max(map(len, prompts)) + max_new_tokens
    engine = new_engine(model, len(prompts), length=length, sync_every=1)
    if adapter_ids is None:
        adapter_ids = [BASE] * len(prompts)
    rows = {}
    for row, (prompt, adapter_id) in enumerate(zip(prompts, adapter_ids)):
        if row in refused:
            continue
        request = engine.submit(
            prompt, adapter_id=adapter_id, max_new_tokens=max_new_tokens, temperature=temperature,
            top_k=top_k, top_p=top_p, seed=seed + row, eos_id=eos_id,
            stopped=stopped and partial(stopped, row))
        if request.error and failed is None:
            raise BadInput(request.error)
        rows[request] = row
    while engine.busy:
        fresh = {rows[request]: ids[0] for request, ids in engine.step() if ids}
        if fresh:
            yield fresh
    refused |= {row: request.error for request, row in rows.items() if request.error}
    if refused and failed is None:
        raise BadInput(tell(refused))


def tell(failed):
    """{row: why} -> one sentence."""
    return "; ".join(f"prompt {row + 1}: {failed[row]}" for row in sorted(failed))


def generate(model, prompts, adapter_ids=None, **settings):
    """generate_steps to the end -> a list of new ids per prompt."""
    new = [[] for _ in prompts]
    for fresh in generate_steps(model, prompts, adapter_ids, **settings):
        for row, token in fresh.items():
            new[row].append(token)
    return new


# -------------------------------------------------------------------------------------- the command


class Printer:
    """Streams texts to standard output: one as it comes, several by line, with their numbers."""

    def __init__(self, prompts):
        self.many = len(prompts) > 1
        self.pending = [prompt if self.many else "" for prompt in prompts]
        self.shown = [0] * len(prompts)
        if not self.many:
            print(prompts[0], end="", flush=True)

    def show(self, row, text, end=False):
        """text: all that the row has generated so far, certain not to change."""
        fresh, self.shown[row] = text[self.shown[row]:], len(text)
        if not self.many:
            print(fresh, end="\n" if end else "", flush=True)
            return
        *lines, self.pending[row] = (self.pending[row] + fresh).split("\n")
        if end:
            lines.append(self.pending[row])
        for line in lines:
            print(f"[{row + 1}] {line}", flush=True)


def new_text(tokenizer, ids):
    """The text of a request's new ids, without the end of text."""
    return tokenizer.decode([i for i in ids if i not in tokenizer.eos_ids], continues=True)


def cut_at_stop(text, stops):
    """text up to the first of the strings `stops`."""
    return text[:min((text.find(s) for s in stops if s in text), default=len(text))]


def stop_check(tokenizer, stops):
    """A Request's `stopped` that finds one of the strings `stops` in its text; None without any."""
    def stopped(ids):
        text = tokenizer.decode(ids, continues=True)
        return any(s in text for s in stops)
    return stopped if stops else None


def truncate(ids, room, bos_id):
    """The last `room` of ids (at least one), a bos at their start kept."""
    room = max(1, room)
    kept = 1 if room > 1 and ids[:1] == [bos_id] else 0
    return ids if len(ids) <= room else ids[:kept] + ids[kept - room:]


def load_model(args):
    """The model and the tokenizer that the flags name."""
    tokenizer = Tokenizer(args.weights)
    device, dtype = get_device(args.device), get_dtype(args)
    model = GPT.from_pretrained(args.weights, device, dtype)
    model.set_attention(args.attention == "flash")
    if args.quantize:
        int8 = flora.extra("int8", f"--quantize {args.quantize}")
        int8.quantize_int8(model, dynamic=args.quantize == "int8-dynamic")
    return model, tokenizer


def load_adapters(model, names):
    """{name: adapter id} of adapter files, blends and "none"; stacked into the bank."""
    loaded = {"none": BASE}
    for name in names:
        if name not in loaded:
            blend = flora.extra("blend", f"--adapter '{name}'") if is_blend(name) else None
            loaded[name] = (blend.load(model, name, loaded) if blend else
                            flora.load_adapter(model, name))
    flora.freeze_bank(model)
    return loaded


def is_blend(name):
    """Whether a name is no file but 'FILE*WEIGHT + FILE*WEIGHT', of extras/blend.py."""
    return not os.path.exists(name) and ("*" in name or "+" in name)


def one_each(values, n, what):
    """values for n prompts: as they are, or the one repeated."""
    if len(values) not in (1, n):
        raise BadInput(f"{len(values)} {what} for {n} prompts; give one for all, or one each")
    return values if len(values) == n else values * n


def read_prompts(args):
    """The flags' prompts, and for each the name of its adapter: two lists of equal length."""
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
    return prompts, one_each(names, len(prompts), "--adapter")


def encode_prompts(args, tokenizer, prompts, n_positions, failed):
    """The ids of each prompt, around a gap where there is a --suffix, cut where --truncate says.
    A prompt that cannot be encoded has none, and its reason stands in {row: why} `failed`."""
    if args.suffix and tokenizer.fim_ids is None:
        raise BadInput(f"--suffix: the tokenizer of {args.weights} has no fill-in-the-middle "
                       "tokens; StarCoder's has")
    suffixes = one_each(args.suffix, len(prompts), "--suffix") if args.suffix else prompts
    encoded = []
    for row, (prompt, suffix) in enumerate(zip(prompts, suffixes)):
        try:
            ids = tokenizer.encode(prompt, bos=True)
            if args.suffix:
                before, between, after = ([i] for i in tokenizer.fim_ids)
                ids = before + ids + between + tokenizer.encode(suffix) + after
        except BadInput as e:
            failed[row], ids = str(e), []
        if args.truncate:
            ids = truncate(ids, n_positions - args.max_new_tokens, tokenizer.bos_id)
        encoded.append(ids)
    return encoded


def generate_and_print(args, model, tokenizer, prompts, ids, adapter_ids, failed):
    """Print the texts as they come -> the new ids and the new text of each prompt. What fails is
    noted in {row: why} `failed`, and a prompt that stands there is left out."""
    new, texts, printer = [[] for _ in prompts], [""] * len(prompts), Printer(prompts)
    held_back = max(map(len, args.stop), default=1) - 1   # characters that may begin a stop
    found = stop_check(tokenizer, args.stop)
    for fresh in generate_steps(
            model, ids, adapter_ids, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
            args.seed, tokenizer.eos_ids, found and (lambda row, row_ids: found(row_ids)), failed):
        for row, token in fresh.items():
            new[row].append(token)
            texts[row] = new_text(tokenizer, new[row])
            certain = texts[row].rstrip("\ufffd")   # without a character that has not come in full
            certain = certain[:max(0, len(certain) - held_back)]
            printer.show(row, cut_at_stop(certain, args.stop))
    for row, text in enumerate(texts):
        texts[row] = cut_at_stop(text, args.stop)
        if row not in failed or new[row]:
            printer.show(row, texts[row], end=True)
    return new, texts


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="give it again for more rows")
    add("--prompt-file", action="append", default=[], metavar="FILE",
        help="a prompt from a file, - for standard input")
    add("--suffix", action="append",
        help="fill in the middle between prompt and this; one for all or one each")
    add("--adapter", action="append", default=[], metavar="FILE",
        help="a file, a folder of PEFT, or a blend, 'FILE*0.7 + FILE*0.3'; one for all prompts or "
             "one each; none is the base model")
    add("--max-new-tokens", type=int, default=64)
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 keeps all")
    add("--top-p", type=float, default=1.0)
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end a row before this text; may be repeated")
    add("--truncate", action="store_true",
        help="drop the start of prompts that do not fit the context")
    add("--requests", metavar="FILE", help="JSONL of requests; with --results")
    add("--results", metavar="FILE", help="JSONL to write, or to complete")
    add("--slots", type=int, help="requests that run at once (default: 8 on a CPU, otherwise 64)")
    add("--max-batched-tokens", type=int, default=8192, help="of one step, padding included")
    add("--static-batching", action="store_true",
        help="admit requests only when all slots are empty")
    add("--compile", action="store_true", help="decode --requests with torch.compile")
    add("--attention", choices=["flash", "math"], default="flash")
    add_common_flags(parser, dtypes=["float32", "bfloat16", "float16", "auto"])
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    check_numbers(args, at_least_1=["max_new_tokens", "slots", "max_batched_tokens"],
                  at_least_0=["seed"])
    if bool(args.requests) != bool(args.results):
        parser.error("--requests and --results go together")
    given = args.prompt or args.prompt_file or args.suffix or len(args.adapter) > 1
    if args.requests and given:
        parser.error("--requests brings prompts and adapters itself; give no --prompt, "
                     "--prompt-file or --suffix, and at most one --adapter, the default")
    if not (args.temperature >= 0 and args.top_k >= 0 and 0 < args.top_p <= 1):
        parser.error("--temperature and --top-k must be at least 0, --top-p in (0, 1]")
    bad = bad_setting(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    if bad:
        parser.error(f"--{bad}")
    if "" in args.stop:
        parser.error("--stop is empty, so that nothing would be left; give a text or leave it out")


def main():
    args = parse_args()
    if args.requests:
        return flora.extra("requests", "--requests").serve(args)
    check_writable(args.json, "--json", JSON)
    prompts, names = read_prompts(args)
    model, tokenizer = load_model(args)
    loaded = load_adapters(model, names)
    adapter_ids = [loaded[name] for name in names]
    failed = {}
    ids = encode_prompts(args, tokenizer, prompts, model.config.n_positions, failed)
    if len(failed) == len(prompts):
        raise BadInput(tell(failed))

    start = time.time()
    new, texts = generate_and_print(args, model, tokenizer, prompts, ids, adapter_ids, failed)
    seconds, count = time.time() - start, sum(map(len, new))
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s, "
          f"batch {len(prompts)}, {args.dtype} on {args.device}", file=sys.stderr)
    if args.json:
        rows = enumerate(zip(prompts, names, new, texts))
        write_json(args.json, [dict(prompt=p, adapter=a, tokens=n, text=t, error=failed.get(row))
                               for row, (p, a, n, t) in rows])
    if failed:
        raise BadInput(tell(failed))


if __name__ == "__main__":
    run_main(main)
