"""Generate with many adapters in one batch: every prompt runs its own.

  python generate.py --prompt 'def fibonacci(n):'                             the embedded base model
  python generate.py --prompt 'class Tensor {' --adapter out/flora-r1/adapter.safetensors
  python generate.py --prompt 'class A' --prompt 'class B' --adapter FLORA_FILE --adapter none

Text goes to standard output as it comes (with several prompts line by line, each line numbered by
its prompt), speed to standard error.
"""
import argparse
import sys
import time

import torch

import flora
from flora import BASE, BadInput
from model import GPT, Tokenizer, add_common_flags, get_device, run_main, write_json


def sample(logits, temperature, top_k, top_p, u):
    """Pick a token per row: logits [B, vocab] -> int64 [B].

    temperature [B] (0 is greedy), top_k [B] (0 keeps all), top_p [B], u [B] uniform in [0, 1): the
    randomness of each row comes from outside, so a row draws the same whatever is beside it.
    """
    greedy = logits.argmax(-1)
    if not temperature.any():
        return greedy
    scaled = logits.float() / temperature.clamp(min=1e-6)[:, None]
    probs, order = scaled.softmax(-1).sort(descending=True)                   # [B, vocab]
    before = probs.cumsum(-1) - probs                                         # mass of likelier tokens
    ranks = torch.arange(probs.shape[-1], device=logits.device)
    keep = (before < top_p[:, None]) & ((ranks < top_k[:, None]) | (top_k[:, None] == 0))
    keep[:, 0] = True
    mass = (probs * keep).cumsum(-1)
    choice = (mass <= u[:, None] * mass[:, -1:]).sum(-1, keepdim=True)        # inverse of the CDF
    return torch.where(temperature > 0, order.gather(-1, choice)[:, 0], greedy)


@torch.inference_mode()
def generate_steps(model, prompts, adapter_ids=None, max_new_tokens=64, temperature=0.0, top_k=0,
                   top_p=1.0, seed=0, eos_id=None, stopped=None):
    """Generate from prompts, lists of ids of any lengths, as one batch; yield each step's new tokens.

    adapter_ids: one per prompt, 0 (flora.BASE) for the base model; None is the base for all.
    A row ends at max_new_tokens, at the end of the context, after eos_id (which it includes), or
    when stopped(row, its new ids) says so. Yields {row: id}, without the rows that have ended.
    Raises BadInput for a prompt longer than the context.
    """
    config, device, B = model.config, model.transformer.wte.weight.device, len(prompts)
    prompts = [list(p) or [config.eos_token_id] for p in prompts]
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = max(map(len, prompts))
    if longest > config.n_positions:
        raise BadInput(f"a prompt has {longest} tokens, more than the model's context of "
                       f"{config.n_positions} (n_positions); shorten it, or use --truncate")
    limits = [min(max_new_tokens, config.n_positions - len(p)) for p in prompts]
    if adapter_ids is not None:
        adapter_ids = torch.tensor(adapter_ids, device=device)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(B)]
    u = torch.stack([torch.rand(max_new_tokens, generator=g) for g in generators]).to(device)
    settings = [torch.full((B,), value, device=device) for value in (float(temperature), top_k, float(top_p))]

    # Prefill: prompts padded on the right; logits of each row's own last token
    ids = torch.zeros(B, longest, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, :len(prompt)] = torch.tensor(prompt)
    kv_cache = model.new_kv_cache(B, min(longest + max_new_tokens, config.n_positions))
    hidden = model.hidden(ids, adapter_ids, kv_cache)                         # [B, T, C]
    logits = model.lm_head(hidden[torch.arange(B, device=device), lengths - 1])

    # Decode: one token a row, at its own position; the padding there is overwritten or unseen
    new = [[] for _ in prompts]
    running = {row for row in range(B) if limits[row] > 0}
    for step in range(max_new_tokens):
        if not running:
            return
        tokens = sample(logits, *settings, u[:, step])                        # [B]
        fresh = {row: token for row, token in enumerate(tokens.tolist()) if row in running}
        for row, token in fresh.items():
            new[row].append(token)
            if (len(new[row]) == limits[row] or token == eos_id
                    or (stopped is not None and stopped(row, new[row]))):
                running.discard(row)
        yield fresh
        if running:
            positions = (lengths + step).clamp(max=kv_cache.shape[3] - 1)     # ended rows may idle
            cached = kv_cache[:, :, :, :longest + step + 1]
            logits = model(tokens[:, None], adapter_ids, cached, positions[:, None])[:, 0]


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


def cut_at_stop(text, stops):
    """text up to the first of the strings `stops`."""
    return text[:min((text.find(s) for s in stops if s in text), default=len(text))]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="give it again for more rows")
    add("--prompt-file", action="append", default=[], metavar="FILE", help="a prompt from a file, - for standard input")
    add("--suffix", action="append", help="fill in the middle between prompt and this; one for all or one each")
    add("--adapter", action="append", default=[], metavar="FILE",
        help="one for all prompts or one each; none is the base model")
    add("--max-new-tokens", type=int, default=64)
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 keeps all")
    add("--top-p", type=float, default=1.0)
    add("--stop", action="append", default=[], metavar="TEXT", help="end a row before this text; may be repeated")
    add("--truncate", action="store_true", help="drop the start of prompts that do not fit the context")
    add("--attention", choices=["flash", "math"], default="flash")
    add_common_flags(parser, dtypes=["float32", "bfloat16", "float16"])
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {args.max_new_tokens}; use a whole number of at least 1")
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

    tokenizer = Tokenizer(args.weights)
    model = GPT.from_pretrained(args.weights, get_device(args.device), getattr(torch, args.dtype))
    model.set_attention(args.attention == "flash")
    loaded = {"none": BASE}
    for name in names:
        if name not in loaded:
            loaded[name] = flora.load_adapter(model, name)
    flora.freeze_bank(model)
    adapter_ids = [loaded[name] for name in names] if len(loaded) > 1 else None

    ids = [tokenizer.encode(prompt) for prompt in prompts]
    if args.suffix:
        if tokenizer.fim_ids is None:
            raise BadInput(f"--suffix: the tokenizer of {args.weights} has no fill-in-the-middle tokens; "
                           "StarCoder's has")
        prefix, suffix, middle = ([i] for i in tokenizer.fim_ids)
        suffixes = one_each(args.suffix, len(prompts), "--suffix")
        ids = [prefix + p + suffix + tokenizer.encode(s) + middle for p, s in zip(ids, suffixes)]
    if args.truncate:
        room = max(1, model.config.n_positions - args.max_new_tokens)
        ids = [row[-room:] for row in ids]

    new = [[] for _ in prompts]
    texts = [""] * len(prompts)
    held_back = max(map(len, args.stop), default=1) - 1  # characters that may turn out to be a stop

    def stopped(row, row_ids):
        return any(s in tokenizer.decode(row_ids) for s in args.stop)

    printer, start = Printer(prompts), time.time()
    for fresh in generate_steps(model, ids, adapter_ids, args.max_new_tokens, args.temperature, args.top_k,
                                args.top_p, args.seed, tokenizer.eos_id, stopped if args.stop else None):
        for row, token in fresh.items():
            new[row].append(token)
            texts[row] = tokenizer.decode([i for i in new[row] if i != tokenizer.eos_id])
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
