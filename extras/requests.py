"""Many requests from a file, batched continuously: JSONL in, JSONL out, and a run that resumes.

  python generate.py --requests in.jsonl --results out.jsonl

A line of --requests is a JSON object: "prompt", and optionally "adapter" (a file, none, or a blend,
{"a.safetensors": 0.7, "b.safetensors": 0.3}), "max_new_tokens", "temperature", "top_k", "top_p", "seed",
"stop" (a list of texts); the flags of the same names give the defaults. A line of --results is that with
"line" (its number), "tokens" (new ids), "text", "error" (null, or why it could not run) and "made_with" (the
fingerprints of the base model and the adapter, and the flags that count), written as requests end. Run again
after an interruption, the same command does only what is missing.
"""
import contextlib
import gzip
import json
import os
import reprlib
import shlex
import sys
import time
import zlib

from tqdm import tqdm

import flora
import generate
from extras import blend
from flora import BASE
from plumbing.files import BadInput, open_file
from plumbing.flags import get_dtype
from plumbing.outputs import check_writable, locked, open_output, written_through
from plumbing.prompts import cut_at_stop, encode_prompt, new_text, stop_check
from plumbing.provenance import adapter_digest, base_digest, difference, digest
from plumbing.registry import is_blend

KEYS = {   # {key of a request: its type}
    "prompt": str, "adapter": (str, dict), "max_new_tokens": int, "temperature": (int, float),
    "top_k": int, "top_p": (int, float), "seed": int, "stop": list}
TYPE_NAMES = {
    str: "text", (str, dict): "text and no object of files and weights", int: "whole number",
    (int, float): "number", list: "list of texts"}
OTHER_FILE = "move the file away, or choose another --results"


# ---------------------------------------------------------------------------------- files of lines


def read_jsonl(file):
    """Yield (line number, value) of a .jsonl or .jsonl.gz file; empty lines are left out.

    ValueError, naming the line, for one that is not JSON, or if `file` is not a file.
    """
    with (gzip.open if str(file).endswith(".gz") else open)(regular(file), "rt", encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line, parse_int=parse_int)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"line {number}: {e}") from None


def regular(file):
    """`file`; ValueError if it is there and not a file: a pipe would be waited for."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise ValueError("it is a folder, device or pipe")
    return file


def parse_int(digits):
    """A whole number of a JSON file; of more digits than Python converts, infinity."""
    return int(digits) if len(digits) < 4000 else float(digits)


def read_results(file, *keys):
    """The results that earlier runs wrote to `file` -> {their values of `keys`: result}.

    A damaged line is left out, so that it is done again. BadInput if the file holds anything else.
    keys[0] is what every line begins with.
    """
    results, damaged = {}, []
    if written_through(file) or not os.path.exists(file):
        return results
    with open_file(file, "rb") as f:
        lines = f.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line.decode("utf-8")) if line.strip() else None
        except (ValueError, RecursionError):
            damaged.append(number)
            continue
        if line.strip():
            results[key_of(result, keys, f"--results {file}: line {number}")] = result
    unfinished = [n for n in damaged if n == len(lines)]   # when the run was killed
    begin = f'{{"{keys[0]}": '.encode()
    if damaged and not results and not (damaged == unfinished and begins(lines[-1], begin)):
        raise BadInput(f"--results {file}: is not a file of results; {OTHER_FILE}")
    for number in damaged[:len(damaged) - len(unfinished)]:
        print(f"--results {file}: line {number} is damaged; it is done again", file=sys.stderr)
    return results


def key_of(result, keys, where):
    """The values of `keys` in a line of results, or BadInput."""
    found = [result.get(key) for key in keys] if isinstance(result, dict) else [None]
    if not all(type(value) in (str, int) for value in found):
        raise BadInput(f"{where} is not a result; {OTHER_FILE}")
    return tuple(found)


def begins(line, begin):
    """Whether `line`, which may be cut off, begins with `begin`."""
    return begin.startswith(line[:len(begin)])


def rewrite_results(file, results):
    """Leave in the file what read_results kept, for the run to append to; nothing is written where
    that is all it holds."""
    if written_through(file):
        return
    text = "".join(json.dumps(result) + "\n" for result in results.values()).encode()
    with contextlib.suppress(FileNotFoundError), open(file, "rb") as f:
        if f.read() == text:
            return
    with open_output(file) as f:
        f.write(text)


@contextlib.contextmanager
def appending(file):
    """Inside, add(result) writes a line at the end of `file` at once: all of it, or BadInput."""
    stream = written_through(file)
    with open(os.dup(stream) if isinstance(stream, int) else file, "ab", buffering=0) as f:
        def add(result):
            line, size = json.dumps(result).encode() + b"\n", os.fstat(f.fileno()).st_size
            try:
                while line:
                    line = line[f.write(line):]
            except OSError as e:
                if stream is None:
                    os.ftruncate(f.fileno(), size)
                raise BadInput(f"--results {file}: cannot be written ({e.strerror}); the results "
                               "in it are kept, and the same command goes on from there") from None
        yield add


@contextlib.contextmanager
def resumable(file):
    """Inside, this process alone writes a file of results; an interruption says how to go on."""
    try:
        with locked(file, "--results"):
            yield
    except KeyboardInterrupt:
        if not written_through(file):
            print(f"interrupted; what has ended is kept in {file}; go on with: "
                  f"{shlex.join([sys.executable, *sys.orig_argv[1:]])}", file=sys.stderr)
        raise


# ----------------------------------------------------------------------------------------- requests


def check_request(given, where):
    """BadInput, beginning with `where`, for what is not a request."""
    if not isinstance(given, dict) or "prompt" not in given:
        raise BadInput(f'{where}: needs a JSON object with a "prompt"')
    for key in given:
        if key not in KEYS:
            raise BadInput(f"{where}: unknown key {key!r}; use {', '.join(KEYS)}")


def refusal(given):
    """Why a request cannot be run for the type of a value, in one sentence, or None."""
    for key, value in given.items():
        fits = isinstance(value, KEYS[key]) and not isinstance(value, bool)
        if fits and key == "stop":
            fits = all(isinstance(text, str) and text for text in value)
        if fits and key == "adapter" and isinstance(value, dict):
            fits = bool(value) and all(type(weight) in (int, float) for weight in value.values())
        if not fits:
            return f"{key} is {reprlib.repr(value)}, which is no {TYPE_NAMES[KEYS[key]]}"


def read_requests(file, defaults):
    """A --requests file -> {line number: request, with `defaults` for the keys it lacks}.

    A request with a value of the wrong type has its refusal as "error". BadInput if all have.
    """
    requests, errors = {}, []
    try:
        for line, given in read_jsonl(file):
            where = f"--requests {file} line {line}"
            check_request(given, where)
            own_seed = generate.row_seed(defaults.get("seed", 0), line)   # where the line gives none
            requests[line] = defaults | dict(seed=own_seed) | given
            if error := refusal(given):
                errors.append(f"{where}: {error}")
                requests[line]["error"] = error
    except BadInput:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as e:
        raise BadInput(f"--requests {file}: not readable as JSONL ({e})") from None
    if not requests:
        raise BadInput(f"--requests {file}: holds no request")
    if len(errors) == len(requests):
        raise BadInput(errors[0])
    return requests


def made_with(args, requests):
    """{line: on what its answer depends beside the request itself}: contents, not names."""
    names = {name_of(r["adapter"]) for r in requests.values() if "error" not in r}
    adapters = {name: adapter_content(name) for name in names}
    settings = dict(dtype=args.dtype, quantize=args.quantize, truncate=args.truncate)
    base = base_digest(args.weights)
    return {line: dict(base=base, adapter_file=None if "error" in r else adapters[name_of(r["adapter"])],
                       **settings) for line, r in requests.items()}


def name_of(adapter):
    """A request's "adapter" as a key of a dict: a text, or of a blend its (file, weight) pairs."""
    return adapter if isinstance(adapter, str) else tuple(sorted(adapter.items()))


def adapter_content(name):
    try:
        if weights := weights_of(name):
            return digest(*sorted(f"{adapter_digest(file)} {weight:g}" for file, weight in weights.items()))
        return adapter_digest(name)
    except BadInput:   # which its requests are told later
        return "unreadable"


def resume_results(file, requests, made=None):
    """Set of the lines that an earlier run has finished. BadInput where its requests differed, or
    where they were `made` ({line: made_with's}) with something else; if one then failed, it is done
    again."""
    results, finished, unchecked = read_results(file, "line"), {}, 0
    for (line,), result in results.items():
        now = made[line] if made and line in made else {}
        then = result.get("made_with")
        if not isinstance(then, dict):
            then, unchecked = {}, unchecked + 1
        by_content = {"error", "adapter"} if "adapter_file" in then else {"error"}
        request = requests.get(line, {"prompt": None})
        if any(json.dumps(result.get(key)) != json.dumps(value)
               for key, value in request.items() if key not in by_content):
            raise BadInput(f"--results {file}: line {line} of the requests was another one then; "
                           f"{OTHER_FILE}")
        other = difference(then, now)
        if other and not result.get("error"):
            raise BadInput(f"--results {file}: line {line} was made with {other}; {OTHER_FILE}")
        if not other:
            finished[line] = result
    if unchecked:
        print(f"--results {file}: {unchecked} results, written before results had fingerprints, do "
              "not say which base model and adapter made them; they are kept", file=sys.stderr)
    rewrite_results(file, finished)
    return set(finished)


def weights_of(name):
    """{file: weight} of what name_of or a text names as a blend; None of a file or "none"."""
    if isinstance(name, tuple):
        return dict(name)
    return blend.parse(name) if is_blend(name) else None


# ------------------------------------------------------------------------------------------ serving


def load_adapters(model, requests):
    """{name: adapter id} for the adapters of requests; those whose adapter cannot be loaded are
    given the reason as their "error". BadInput if no request is left."""
    loaded, refused = {"none": BASE}, {}
    for r in requests.values():
        if "error" in r:
            continue
        name = name_of(r["adapter"])
        if name not in loaded and name not in refused:
            try:
                weights = weights_of(name)
                loaded[name] = blend.load(model, weights, loaded) if weights else flora.load_adapter(model, name)
            except BadInput as e:
                refused[name] = str(e)
        if name in refused:
            r["error"] = refused[name]
    flora.freeze_bank(model)
    if all("error" in r for r in requests.values()):
        raise BadInput(next(iter(requests.values()))["error"])
    return loaded


def submit(engine, r, loaded, tokenizer, cut):
    """Submit the request of one line to the engine; cut: drop the start of a too long prompt."""
    try:
        if "error" in r:
            raise BadInput(r["error"])
        context = engine.model.config.n_positions if cut else None
        ids = encode_prompt(tokenizer, r["prompt"], None, context, r["max_new_tokens"])
    except BadInput as e:
        return engine.submit([], error=str(e))
    settings = {key: r[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    return engine.submit(ids, adapter_id=loaded[name_of(r["adapter"])], eos_id=tokenizer.eos_ids,
                         stopped=stop_check(tokenizer, r["stop"]), **settings)


def result_of(request, r, line, tokenizer, made):
    """The line of --results for a Request that has ended."""
    text = ""
    if request.ids:
        text = cut_at_stop(new_text(tokenizer, request.ids), r["stop"])
    return dict(line=line) | r | dict(tokens=request.ids, error=request.error, text=text,
                                      made_with=made)


def serve(args):
    """Run the requests of args.requests, and write args.results as they end."""
    defaults = {key: getattr(args, key) for key in KEYS if key not in ("prompt", "adapter")}
    defaults["adapter"] = args.adapter[0] if args.adapter else "none"
    requests = read_requests(args.requests, defaults)
    check_writable(args.results, "--results", make_folder=True)
    get_dtype(args)   # auto becomes a dtype, which the results name
    with resumable(args.results):
        made = made_with(args, requests)
        finished = resume_results(args.results, requests, made)
        model, tokenizer = generate.load_model(args)
        loaded = load_adapters(model, requests)
        slots = args.slots or (8 if model.wte.weight.device.type == "cpu" else 64)
        engine = generate.new_engine(
            model, min(slots, len(requests)), max_batched_tokens=args.max_batched_tokens,
            continuous=not args.static_batching, compile=args.compile)
        lines = {submit(engine, r, loaded, tokenizer, args.truncate): line
                 for line, r in requests.items() if line not in finished}
        start = time.time()
        with appending(args.results) as add, \
                tqdm(total=len(requests), initial=len(finished), unit="request") as bar:
            while engine.busy:
                for request, _ in engine.step():
                    if request.state in ("done", "failed"):
                        line = lines[request]
                        add(result_of(request, requests[line], line, tokenizer, made[line]))
                        bar.update()
    seconds, tokens = time.time() - start, sum(len(request.ids) for request in lines)
    failed = sum(request.state == "failed" for request in lines)
    print(f"{len(lines)} requests, {failed} failed, {tokens} tokens in {seconds:.2f} s: "
          f"{tokens / seconds:.1f} tokens/s, {engine.slots} slots, {args.dtype} on {args.device}",
          file=sys.stderr)
