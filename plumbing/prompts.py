"""Prompts in, text out: what the command of generate.py reads, cuts, checks and prints.

Text is shown as it comes: what is printed only ever grows, and at the end is the text reported.
"""
import sys

from plumbing.files import BadInput
from plumbing.outputs import write_json


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


def one_each(values, n, what):
    """values for n prompts: as they are, or the one repeated."""
    if len(values) not in (1, n):
        raise BadInput(f"{len(values)} {what} for {n} prompts; give one for all, or one each")
    return values if len(values) == n else values * n


def encode_prompts(args, tokenizer, prompts, n_positions):
    """The flags' prompts, around a gap where there is a --suffix, cut where --truncate says -> for
    each dict(prompt=ids), with its reason as error if it cannot be encoded."""
    if args.suffix and tokenizer.fim_ids is None:
        raise BadInput(f"--suffix: the tokenizer of {args.weights} has no fill-in-the-middle "
                       "tokens; StarCoder's has")
    suffixes = [None] * len(prompts)
    if args.suffix:
        suffixes = one_each(args.suffix, len(prompts), "--suffix")
    context, rows = n_positions if args.truncate else None, []
    for prompt, suffix in zip(prompts, suffixes):
        try:
            ids = encode_prompt(tokenizer, prompt, suffix, context, args.max_new_tokens)
            rows.append(dict(prompt=ids))
        except BadInput as e:
            rows.append(dict(prompt=[], error=str(e)))
    return rows


def encode_prompt(tokenizer, prompt, suffix=None, context=None, new=0):
    """A prompt -> its ids: or, around a gap, of prompt and suffix between the tokens of FIM.

    context: of what does not fit in so many tokens, the prompt loses its start and the suffix its
    end, so that there is room for `new` tokens (if these fit at all, otherwise for half).
    """
    start, end = tokenizer.encode(prompt, bos=True), tokenizer.encode(suffix or "")
    marks = 0 if suffix is None else len(tokenizer.fim_ids)
    if context is not None and len(start) + len(end) + marks > context:
        room = (context - new if new < context else context // 2) - marks
        start = truncate(start, max(room - len(end), room - room // 2), tokenizer.bos_id)
        end = end[:max(0, room - len(start))]
    if suffix is None:
        return start
    before, between, after = tokenizer.fim_ids
    return [before, *start, between, *end, after]


def truncate(ids, room, bos_id):
    """The last `room` of ids (at least one), a bos at their start kept."""
    room = max(1, room)
    kept = 1 if room > 1 and ids[:1] == [bos_id] else 0
    return ids if len(ids) <= room else ids[:kept] + ids[kept - room:]


def new_text(tokenizer, ids):
    """The text of a request's new ids, without the end of text."""
    return tokenizer.decode([i for i in ids if i not in tokenizer.eos_ids], continues=True)


def cut_at_stop(text, stops):
    """text up to the first of the strings `stops`."""
    return text[:min((text.find(s) for s in stops if s in text), default=len(text))]


def certain_text(tokenizer, ids, stops=()):
    """What of a request's text cannot change any more, whatever ids come after these: without
    bytes that may be part of a character, and without what may be the beginning of a stop."""
    n = len(ids)
    while n and ids[n - 1] in tokenizer.byte_ids:
        n -= 1
    text = new_text(tokenizer, ids[:n]).rstrip("\ufffd")
    end, longest = len(cut_at_stop(text, stops)), max(map(len, stops), default=0)
    for start in range(max(0, len(text) - longest), end):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start]
    return text[:end]


def stop_check(tokenizer, stops):
    """A Request's `stopped` that finds one of the strings `stops` in its text; None without any."""
    def stopped(ids):
        text = tokenizer.decode(ids, continues=True)
        return any(s in text for s in stops)
    return stopped if stops else None


class TextPrinter:
    """Prints texts as they come: one as it is, several line by line, with their numbers."""

    def __init__(self, tokenizer, prompts, stops):
        self.tokenizer, self.stops, self.many = tokenizer, stops, len(prompts) > 1
        self.pending = [prompt if self.many else "" for prompt in prompts]   # of a line
        self.shown = [0] * len(prompts)                                      # characters
        if not self.many:
            print(prompts[0], end="", flush=True)

    def show(self, row, ids):
        """Print what is certain of a row's new ids so far, and was not printed yet."""
        self.print(row, certain_text(self.tokenizer, ids, self.stops))

    def end(self, row, request):
        """Print the rest of a row's text -> all of it. Nothing, of one that failed at once."""
        text = cut_at_stop(new_text(self.tokenizer, request.ids), self.stops)
        if request.ids or not request.error:
            self.print(row, text, end=True)
        return text

    def print(self, row, text, end=False):
        fresh, self.shown[row] = text[self.shown[row]:], len(text)
        if not self.many:
            print(fresh, end="\n" if end else "", flush=True)
            return
        *lines, self.pending[row] = (self.pending[row] + fresh).split("\n")
        if end:
            lines.append(self.pending[row])
        for line in lines:
            print(f"[{row + 1}] {line}", flush=True)


def report_texts(args, prompts, names, requests, texts, seconds):
    """Tell the speed on standard error, and write --json."""
    count = sum(len(request.ids) for request in requests)
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s, "
          f"batch {len(prompts)}, {args.dtype} on {args.device}", file=sys.stderr)
    if args.json:
        rows = zip(prompts, names, requests, texts)
        write_json(args.json, [dict(prompt=p, adapter=a, tokens=r.ids, text=t, error=r.error)
                               for p, a, r, t in rows])
