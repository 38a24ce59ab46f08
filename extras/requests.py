"""Many requests from a file, batched continuously: JSONL in, JSONL out, and a run that resumes.

  python generate.py --requests in.jsonl --results out.jsonl

A line of --requests is a JSON object: "prompt", and optionally "adapter" (a file, or none),
"max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop" (a list of texts); the flags of
the same names give the defaults. A line of --results is that with "line" (its number), "tokens"
(new ids), "text" and "error" (null, or why it could not run), written as requests end. Run again
after an interruption, the same command does only what is missing.
"""
import gzip
import json
import os
import sys
import time

from tqdm import tqdm

import generate
from flora import BadInput

KEYS = {   # {key of a request: its type}
    "prompt": str, "adapter": str, "max_new_tokens": int, "temperature": (int, float),
    "top_k": int, "top_p": (int, float), "seed": int, "stop": list}
TYPE_NAMES = {str: "text", int: "whole number", (int, float): "number", list: "list of texts"}


# ---------------------------------------------------------------------------------- files of lines


def read_jsonl(file):
    """Yield (line number, value) of a .jsonl or .jsonl.gz file; empty lines are left out.

    ValueError, naming the line, for one that is not JSON.
    """
    with (gzip.open if str(file).endswith(".gz") else open)(file, "rt", encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as e:
                raise ValueError(f"line {number}: {e}") from None


def read_results(file, *keys):
    """The results that an earlier run wrote to `file` -> {their values of `keys`: result}.

    A last line that the run left unfinished is dropped.
    """
    results = {}
    if not os.path.exists(file):
        return results
    try:
        for _, result in read_jsonl(file):
            results[tuple(result[key] for key in keys)] = result
    except ValueError:
        pass   # the line that was being written when the run was killed
    except (OSError, KeyError, TypeError) as e:
        raise BadInput(f"--results {file}: is no file of results ({e}); move it away") from None
    return results


def rewrite_results(file, results):
    """Write what read_results kept, under a temporary name first, for the run to append to."""
    try:
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        with open(f"{file}.tmp", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(result) + "\n" for result in results.values())
        os.replace(f"{file}.tmp", file)
    except OSError as e:
        raise BadInput(f"--results {file}: cannot be written ({e.strerror})") from None


# ----------------------------------------------------------------------------------------- requests


def check_request(given, where):
    """BadInput, beginning with `where`, for what is not a request."""
    if not isinstance(given, dict) or "prompt" not in given:
        raise BadInput(f'{where}: needs a JSON object with a "prompt"')
    for key, value in given.items():
        if key not in KEYS:
            raise BadInput(f"{where}: unknown key {key!r}; use {', '.join(KEYS)}")
        fits = isinstance(value, KEYS[key]) and not isinstance(value, bool)
        if fits and key == "stop":
            fits = all(isinstance(text, str) and text for text in value)
        if not fits:
            raise BadInput(f"{where}: {key} is {value!r}, which is no {TYPE_NAMES[KEYS[key]]}")


def read_requests(file, defaults):
    """A --requests file -> {line number: request, with `defaults` for the keys it lacks}."""
    requests = {}
    try:
        for line, given in read_jsonl(file):
            check_request(given, f"--requests {file} line {line}")
            requests[line] = defaults | given
    except BadInput:
        raise
    except (OSError, ValueError) as e:
        raise BadInput(f"--requests {file}: not readable as JSONL ({e})") from None
    if not requests:
        raise BadInput(f"--requests {file}: holds no request")
    return requests


def resume_results(file, requests):
    """Set of the lines that an earlier run has finished; BadInput where its requests differ."""
    results = read_results(file, "line")
    for (line,), result in results.items():
        request = requests.get(line, {"prompt": None})
        if any(result.get(key) != value for key, value in request.items()):
            raise BadInput(f"--results {file}: line {line} of the requests was another one then; "
                           "move the file away, or choose another --results")
    rewrite_results(file, results)
    return {line for line, in results}


# ------------------------------------------------------------------------------------------ serving


def submit(engine, r, adapter_id, tokenizer, cut):
    """Submit the request of one line to the engine; cut: drop the start of a too long prompt."""
    ids = tokenizer.encode(r["prompt"], bos=True)
    if cut:
        room = engine.model.config.n_positions - r["max_new_tokens"]
        ids = generate.truncate(ids, room, tokenizer.bos_id)
    settings = {key: r[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    return engine.submit(ids, adapter_id=adapter_id, eos_id=tokenizer.eos_ids,
                         stopped=generate.stop_check(tokenizer, r["stop"]), **settings)


def result_of(request, r, line, tokenizer):
    """The line of --results for a Request that has ended."""
    text = generate.cut_at_stop(generate.new_text(tokenizer, request.ids), r["stop"])
    return r | dict(line=line, tokens=request.ids, error=request.error, text=text)


def serve(args, model, tokenizer):
    """Run the requests of args.requests, and write args.results as they end."""
    defaults = {key: getattr(args, key) for key in KEYS if key not in ("prompt", "adapter")}
    defaults["adapter"] = args.adapter[0] if args.adapter else "none"
    requests = read_requests(args.requests, defaults)
    finished = resume_results(args.results, requests)
    loaded = generate.load_adapters(model, [r["adapter"] for r in requests.values()])
    slots = args.slots or (8 if model.wte.weight.device.type == "cpu" else 64)
    engine = generate.new_engine(
        model, min(slots, len(requests)), max_batched_tokens=args.max_batched_tokens,
        continuous=not args.static_batching, compile=args.compile)
    lines = {submit(engine, r, loaded[r["adapter"]], tokenizer, args.truncate): line
             for line, r in requests.items() if line not in finished}

    start, tokens, failed = time.time(), 0, 0
    with open(args.results, "a", encoding="utf-8") as f, \
            tqdm(total=len(requests), initial=len(finished), unit="request") as bar:
        while engine.busy:
            for request, _ in engine.step():
                if request.state not in ("done", "failed"):
                    continue
                line = lines[request]
                f.write(json.dumps(result_of(request, requests[line], line, tokenizer)) + "\n")
                f.flush()
                tokens += len(request.ids)
                failed += request.state == "failed"
                bar.update()
    seconds = time.time() - start
    print(f"{len(lines)} requests, {failed} failed, {tokens} tokens in {seconds:.2f} s: "
          f"{tokens / seconds:.1f} tokens/s, {engine.slots} slots, {args.dtype} on {args.device}",
          file=sys.stderr)
