"""Prompts in, text out: what the command of generate.py reads, cuts, checks and prints."""
import reprlib
import sys

from plumbing.files import BadInput


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


def truncate(ids, room, bos_id):
    """The last `room` of ids (at least one), a bos at their start kept."""
    room = max(1, room)
    kept = 1 if room > 1 and ids[:1] == [bos_id] else 0
    return ids if len(ids) <= room else ids[:kept] + ids[kept - room:]


def new_text(tokenizer, ids):
    """The text of a request's new ids, without the end of text."""
    return tokenizer.decode([i for i in ids if i not in tokenizer.eos_ids], continues=True)


def stop_check(tokenizer, stops):
    """A Request's `stopped` that finds one of the strings `stops` in its text; None without any."""
    def stopped(ids):
        text = tokenizer.decode(ids, continues=True)
        return any(s in text for s in stops)
    return stopped if stops else None


def cut_at_stop(text, stops):
    """text up to the first of the strings `stops`."""
    return text[:min((text.find(s) for s in stops if s in text), default=len(text))]


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
