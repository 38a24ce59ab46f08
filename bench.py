"""Throughput and latency of FLoRA, IA3 and LoRA across ranks (§4.1, Fig. 2), and two predictions.

  python bench.py --ranks 1 2 4 8                       the embedded model, minutes on 2 cores
  python bench.py --model starcoder --random-weights --dtype float16 --attention math \\
      --ranks 1 2 4 8 16 --request-rate 8               Fig. 2, on one GPU

Every request runs its own adapter, all of one kind and rank. The rows of the table share one model
and run in turns (round 1 of every row, round 2 of every row, ...) after an untimed warm-up; the
table has the medians over the rounds.

  tokens/s              generated tokens / wall time, from the first arrival to the last token
  s per output token    of a request: (its last token read by the host - its arrival) / its new
                        tokens, queueing and prefill included, as in vLLM 0.1.3's benchmark; mean,
                        median and 99th percentile over the requests
  time to first token   of a request: its first token read by the host - its arrival
  ratio to base         tokens/s of the row / tokens/s of the base row, in the same round

Mode throughput: all requests arrive at once. Mode latency: they arrive at random (Poisson), at
--request-rate a second. extras/bench_more.py adds the modes layer and token, and more rows.

Two predictions stand beside the measured ranks: Eq. 7's inflection rank, up to which FLoRA is
cheaper than bmm-LoRA, and the free rank, up to which it is as fast as the base (free_rank).
"""
import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import flora
from generate import new_engine
from model import GPT, PRESETS, model_from_config, preset
from plumbing import bench_flags
from plumbing.figures import PANELS, describe, draw, finite, print_summary, print_table
from plumbing.files import BadInput
from plumbing.flags import get_device, get_dtype, run_main, set_up
from plumbing.outputs import write_each, write_json
from plumbing.registry import extra
from plumbing.tokenizer import Tokenizer

BYTES = 1 << 28   # of the tensors that memory bandwidth is measured with
FREE = 0.97       # FLoRA counts as free at this share of the base model's tokens/s


# ---------------------------------------------------------------------------- the rows of the table


class Row(NamedTuple):
    kind: str | None    # of adapter; None is the base model
    set_up: Callable    # makes a layer compute the adapters in this row's way
    what: str


def default(layer):
    """As `install` leaves a layer: FLoRA by flora.choose_path, LoRA by bmm per example."""


def expand(layer):
    layer.path = "expand"


def materialise(layer):
    layer.path = "materialise"


def example(layer):
    layer.lora = flora.lora_addend


def token(layer):
    layer.lora = lora_per_token


def lora_per_token(x, rows):
    """LoRA's addend as an engine computes it that flattens tokens (the paper's baseline): every
    token carries a copy of its adapter."""
    A, B = (rows[part].expand(*x.shape[:2], -1, -1) for part in ("added_A", "added_B"))
    return flora.lora_addend(x, dict(added_A=A, added_B=B))


ROWS = {   # by the names that --rows takes
    "base": Row(None, default, "base model, no adapters"),
    "ia3": Row("ia3", default, "IA3"),
    "flora": Row("flora", default, "FLoRA: Eq. 6; prompts by Eq. 4 where that is cheaper"),
    "flora-eq6": Row("flora", expand, "FLoRA: Eq. 6 for prompts too, as in the paper"),
    "lora-example": Row("lora", example, "LoRA: bmm per example"),
    "lora-token": Row("lora", token, "LoRA: bmm, adapters gathered per token, as in the paper"),
}


def find_rows(names):
    """{name: Row}: the core's, and those of the extra if `names` has one that the core lacks."""
    unknown = [name for name in names if name not in ROWS]
    if not unknown:
        return ROWS
    known = ROWS | extra("bench_more", f"--rows {unknown[0]}").ROWS
    for name in unknown:
        if name not in known:
            raise BadInput(f"--rows {name}: unknown row; use some of {', '.join(known)}")
    return known


def make_adapter_sets(model, kinds_and_ranks, n, targets=None):
    """{(kind, rank): {layer name: (its class, adapters, frozen bank)}}, n adapters each, moved off
    the identity. A kind of extras/ may have changed the class."""
    sets = {}
    for kind, rank in kinds_and_ranks:
        install(model)
        for _ in range(n):
            adapter_id = flora.add_adapter(model, kind, rank, targets)
            for p in flora.adapter_parameters(model, adapter_id).values():
                p.data += 0.02 * torch.randn_like(p)
        flora.freeze_bank(model)
        sets[kind, rank] = {name: (type(layer), layer.adapters, layer.frozen_bank)
                            for name, layer in flora.adapter_layers(model)}
    install(model)
    return sets


def install(model, adapters=None, set_up=default):
    """Give the model one set of make_adapter_sets, or none, and a way to compute it."""
    for name, layer in flora.adapter_layers(model):
        plain = flora.AdapterLinear, nn.ModuleDict(), None
        layer.__class__, layer.adapters, layer.frozen_bank = adapters[name] if adapters else plain
        layer.num_adapters = len(layer.adapters)
        layer.path, layer.lora = "auto", flora.lora_addend
        set_up(layer)


@torch.no_grad()
def check_agreement(model, sets, dtype, rows=ROWS):
    """Raise RuntimeError unless all ways to compute one set of adapters give the same logits, for
    prompts and for single tokens. Nothing is timed before that."""
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    prompts = torch.randint(0, model.config.vocab_size, (2, 12), device=model.wte.weight.device)
    for (kind, rank), adapters in sets.items():
        ways = [row.set_up for row in rows.values() if row.kind == kind]
        if kind == "flora":
            ways.append(materialise)   # which `default` takes for long prompts alone
        for ids in (prompts, prompts[:, :1]):
            expected = logits_of(model, adapters, ways[0], ids)
            for way in ways[1:]:
                difference = (logits_of(model, adapters, way, ids) - expected).abs().max()
                error = (difference / expected.abs().max()).item()
                if not error <= tolerance:
                    raise RuntimeError(
                        f"{kind} rank {rank}: {way.__name__} differs from {ways[0].__name__} by "
                        f"{error:.1e} of the largest logit, more than {tolerance:.0e}; not timed")
    install(model)


def logits_of(model, adapters, way, ids):
    """ids [2, T] with the first and the last adapter of a set -> float32 [2, T, vocab]."""
    install(model, adapters, way)
    last = max(layer.num_adapters for _, layer in flora.adapter_layers(model))
    return model(ids, torch.tensor([1, last], device=ids.device)).float()


# ------------------------------------------------------------------------------------- the workload


def synthetic_lengths(n, seed):
    """n (prompt, output) lengths of 50 to 2,000 tokens together; log-normal, with the means that
    the paper's ShareGPT sample is known for, about 161 and 338."""
    rng, lengths = np.random.default_rng(seed), []
    while len(lengths) < n:
        prompt, output = np.maximum(1, rng.lognormal([4.588, 5.502], [1.05, 0.9]).astype(int))
        if 50 <= prompt + output <= 2000:
            lengths.append((int(prompt), int(output)))
    return lengths


def make_workload(args, config):
    """[(prompt ids, number of new tokens)], lengths scaled by --scale."""
    if args.dataset:
        tokenizer = None if args.random_weights else Tokenizer(args.weights)
        more = extra("bench_more", "--dataset")
        pairs = more.dataset_prompts(args.dataset, args.num_requests, args.seed, tokenizer)
    else:
        pairs = synthetic_lengths(args.num_requests, args.seed)
    rng, workload = np.random.default_rng(args.seed), []
    for prompt, output in pairs:
        if isinstance(prompt, int):   # a length alone
            prompt = rng.integers(0, config.vocab_size, prompt).tolist()
        length = max(1, round(len(prompt) * args.scale))
        workload.append((prompt[:length], max(1, round(output * args.scale))))
    longest = max(len(prompt) + output for prompt, output in workload)
    if longest > config.n_positions:
        fits = 0.99 * args.scale * config.n_positions / longest
        raise BadInput(f"--scale {args.scale}: the longest request has {longest} tokens, more than "
                       f"the model's context of {config.n_positions}; use --scale {fits:.2g}")
    return workload


# ---------------------------------------------------------------------------------------- measuring


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(f, device, repeats=7):
    """Median seconds of f(), called often enough for a clock; untimed first calls warm up."""
    def timed(calls):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            f()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    timed(2)
    calls = max(1, min(100, int(0.01 / max(timed(1), 1e-6))))
    return float(np.median([timed(calls) for _ in range(repeats)]))


@torch.inference_mode()
def measure_limits(device, dtype):
    """The device's bytes/s (the better of a copy and a sum) and FLOP/s (of a large matmul)."""
    a = torch.ones(BYTES // dtype.itemsize, dtype=dtype, device=device)
    b = torch.empty_like(a)
    copied = 2 * BYTES / seconds(lambda: b.copy_(a), device)
    summed = BYTES / seconds(lambda: a.sum(), device)
    n = 8192 if device.type == "cuda" else 1024
    square = torch.randn(n, n, device=device).to(dtype)
    return max(copied, summed), 2 * n**3 / seconds(lambda: square @ square, device)


@torch.inference_mode()
def share_of_limits(model, slots, bandwidth, flops):
    """Both limits, and the base's share of them in decoding and in prefilling `slots` requests."""
    device, T = model.wte.weight.device, min(256, model.config.n_positions // 2)
    ids = torch.zeros(slots, T, dtype=torch.int64, device=device)
    cache, position = model.new_kv_cache(slots, T + 1), torch.full((slots, 1), T, device=device)
    decode = seconds(lambda: model(ids[:, :1], None, cache, position), device)
    prefill = seconds(lambda: model.hidden(ids, None, cache[:, :, :, :, :T]), device)
    weights = [layer.weight for _, layer in flora.adapter_layers(model)]
    read = [*weights, model.wte.weight, cache]   # wte is the output's matrix, or as large
    decode_bytes = sum(tensor.numel() * tensor.element_size() for tensor in read)
    prefill_flops = 2 * slots * T * sum(weight.numel() for weight in weights)
    return dict(bandwidth_gb_s=bandwidth / 1e9, matmul_gflop_s=flops / 1e9,
                decode_batch=slots, decode_ms=1e3 * decode,
                decode_share_of_bandwidth=decode_bytes / decode / bandwidth,
                prefill_tokens=slots * T, prefill_ms=1e3 * prefill,
                prefill_share_of_matmul=prefill_flops / prefill / flops)


def benched_layer(model):
    """The first projection that every kind of the core adapts by default: c_attn of StarCoder."""
    adapted = [flora.make_adapters(model, kind, 1, None, 8.0) for kind in flora.KINDS]
    return next(layer for name, layer in flora.adapter_layers(model)
                if all(name in adapters for adapters in adapted))


@torch.inference_mode()
def predict_inflection(layer, b, l, device, dtype):
    """Eq. 7, with c1 and c2, the seconds per multiply-add of torch.bmm and of the plain matmul,
    measured at rank 1 on `layer` with b examples of l tokens."""
    d, k = layer.in_features, layer.out_features
    x = torch.randn(b, l, d, device=device).to(dtype)
    A = torch.randn(b, 1, k, device=device).to(dtype)
    B = torch.randn(b, d, 1, device=device).to(dtype)
    c1 = seconds(lambda: flora.lora_bmm(x, A, B), device) / (b * l * (d + k))
    c2 = seconds(lambda: layer.product(x), device) / (b * l * d * k)
    return dict(batch=b, tokens=l, d=d, k=k, c1=c1, c2=c2,
                inflection_rank=flora.inflection_rank(c1, c2, d, k))


def measured_inflection(rows, lora):
    """Where the tokens/s of `lora` pass FLoRA's, interpolated between ranks: a rank, infinity
    (never up to the last rank), 0 (at the first rank already) or None (no such rows)."""
    speed = throughput_of(rows)
    ranks = sorted(rank for name, rank in speed if name == "flora" and (lora, rank) in speed)
    ratios = [speed["flora", rank] / speed[lora, rank] for rank in ranks]
    if not ranks:
        return None
    if ratios[0] < 1:
        return 0.0
    for i in range(1, len(ranks)):
        if ratios[i] < 1:
            share = (ratios[i - 1] - 1) / (ratios[i - 1] - ratios[i])
            return ranks[i - 1] + share * (ranks[i] - ranks[i - 1])
    return float("inf")


def throughput_of(rows, key="tokens_per_second"):
    """{(row, rank): tokens/s, or another key} of mode throughput."""
    return {(r["baseline"], r.get("rank")): r[key] for r in rows if r["mode"] == "throughput"}


def free_rank(requests, balance):
    """The rank up to which Eq. 6 costs nothing when `requests` rows are decoded at once (not in the
    paper): reading W0 hides the arithmetic of requests * r rows up to the device's balance, matmul
    rate (FLOP/s) / bandwidth (bytes/s) * bytes of a weight / 2."""
    return balance / requests


def measured_free_ranks(rows, name):
    """The ranks at which `name` keeps FREE of the base's tokens/s; None if it has no rows."""
    shares = throughput_of(rows, "ratio_to_base")
    shares = {rank: share for (row, rank), share in shares.items() if row == name}
    return [rank for rank, share in shares.items() if share >= FREE] if shares else None


def predict(bench, bandwidth, flops):
    """Eq. 7's inflection rank and the free rank, each beside what the rows measured."""
    slots, results = bench.args.slots, bench.result["rows"]
    layer = benched_layer(bench.model)
    balance = flops / bandwidth * bench.dtype.itemsize / 2
    ran = dict.fromkeys(name for name, _ in bench.variants)
    loras = [name for name in ran if bench.rows[name].kind == "lora"]
    floras = [name for name in ran if bench.rows[name].kind == "flora"]
    return dict(
        eq7=dict(predicted=predict_inflection(layer, slots, 1, bench.device, bench.dtype),
                 measured={name: measured_inflection(results, name) for name in loras}),
        free_rank=dict(requests=slots, balance=balance, predicted=free_rank(slots, balance),
                       measured={name: measured_free_ranks(results, name) for name in floras}))


def serve(engine, workload, num_adapters, arrivals=None):
    """Run the workload: request i arrives at arrivals[i] seconds (None: all at once) with adapter
    1 + i % num_adapters (0: the base model). -> the metrics of one run, as explained above."""
    arrivals = np.zeros(len(workload)) if arrivals is None else arrivals
    requests, start = [], time.perf_counter()
    while engine.busy or len(requests) < len(workload):
        now = time.perf_counter() - start
        while len(requests) < len(workload) and arrivals[len(requests)] <= now:
            i = len(requests)
            prompt, output = workload[i]
            adapter_id = 1 + i % num_adapters if num_adapters else flora.BASE
            request = engine.submit(prompt, adapter_id=adapter_id, max_new_tokens=output)
            request.arrived = start + arrivals[i]
            requests.append(request)
        if engine.busy:
            engine.step()
        else:
            time.sleep(max(0.0, arrivals[len(requests)] - now))
    synchronize(engine.device)
    return metrics(requests, time.perf_counter() - start - arrivals[0])


def metrics(requests, wall):
    """What is measured of requests that ran in `wall` seconds."""
    for request in requests:
        if request.error:
            raise RuntimeError(request.error)
    found = dict(tokens_per_second=sum(len(r.ids) for r in requests) / wall)
    for name, values in [
            ("seconds_per_output_token", [(r.ended - r.arrived) / len(r.ids) for r in requests]),
            ("time_to_first_token", [r.first_token - r.arrived for r in requests])]:
        p50, p99 = np.percentile(values, [50, 99])
        found |= {f"{name}_mean": np.mean(values), f"{name}_p50": p50, f"{name}_p99": p99}
    return found


def in_turns(rows, variants, mode, rate, repeats, run, warm_up):
    """run(variant) -> metrics, in `repeats` rounds of all variants, every other one in reverse
    order -> rows of the results. variants: (name, rank) pairs, the base among them."""
    rounds = {variant: [] for variant in variants}
    label = mode if rate is None else f"{mode}, {rate:.3g} requests/s"
    for r in tqdm(range(repeats), desc=label, unit="round"):
        for variant in variants if r % 2 == 0 else reversed(variants):
            rounds[variant].append(run(variant))
    results, base = [], rounds["base", None]
    for (name, rank), found in rounds.items():
        row = rows[name]
        result = dict(method=row.kind or "base", baseline=name, what=row.what, rank=rank, mode=mode,
                      request_rate=rate, rounds=repeats, warm_up_seconds=warm_up[name, rank])
        for metric in found[0]:
            result[metric] = float(np.median([m[metric] for m in found]))
        speeds = np.array([m["tokens_per_second"] for m in found])
        ratios = speeds / [m["tokens_per_second"] for m in base]
        results.append(result | dict(tokens_per_second_min=float(speeds.min()),
                                     tokens_per_second_max=float(speeds.max()),
                                     ratio_to_base=float(np.median(ratios))))
    return results


@dataclass
class Bench:
    """One run of this program: what it measures, with what, and what it found."""
    args: argparse.Namespace
    model: GPT
    workload: list    # of make_workload
    rows: dict        # of find_rows
    variants: list    # (name of a row, rank), which are timed in turns
    sets: dict        # of make_adapter_sets
    result: dict      # what is written as JSON

    def __post_init__(self):
        weight = self.model.wte.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.panels = {mode: PANELS[mode] for mode in PANELS if mode in self.args.mode}

    def install(self, variant):
        """Make the model compute as a row at a rank does; -> the number of adapters."""
        name, rank = variant
        row = self.rows[name]
        install(self.model, self.sets.get((row.kind, rank)), row.set_up)
        return self.args.num_adapters if row.kind else 0


def start_engines(bench):
    """{variant: its engine}, {variant: seconds that it took to serve a few requests, untimed}."""
    args, engines, warm_up = bench.args, {}, {}
    if args.compile:
        torch._dynamo.config.recompile_limit = 8 * len(bench.variants)
    length = max(len(prompt) + output for prompt, output in bench.workload)
    for variant in tqdm(bench.variants, desc="warm-up", unit="row"):
        num_adapters = bench.install(variant)
        engine = engines[variant] = new_engine(bench.model, args.slots, args.compile, length=length)
        engine.kv_cache = engines["base", None].kv_cache   # one for all: they run in turns
        start = time.perf_counter()
        serve(engine, bench.workload[:args.slots], num_adapters)
        warm_up[variant] = time.perf_counter() - start
    if args.compile:
        print("warm-up with compilation: " + ", ".join(
            f"{name} {rank or ''} {t:.1f} s" for (name, rank), t in warm_up.items()))
    return engines, warm_up


def bench_serving(bench):
    """Modes throughput and latency -> rows of the results."""
    args, results = bench.args, []
    engines, warm_up = start_engines(bench)

    def run(variant, budget=8192, arrivals=None):
        num_adapters, engine = bench.install(variant), engines[variant]
        engine.max_batched_tokens = args.max_batched_tokens or budget
        if arrivals is not None:
            engine.sync_every = 1   # so that a first token is seen when it is there
        return serve(engine, bench.workload, num_adapters, arrivals)

    def rows_of(mode, rate, repeats, run):
        return in_turns(bench.rows, bench.variants, mode, rate, repeats, run, warm_up)

    if "throughput" in args.mode:
        results += rows_of("throughput", None, args.repeats, run)
    if "latency" not in args.mode:
        return results
    if not args.request_rate:
        new_tokens = np.mean([output for _, output in bench.workload])
        capacity = run(("base", None))["tokens_per_second"] / new_tokens   # requests a second
        args.request_rate = [float(f"{share * capacity:.2g}") for share in (0.5, 1.5)]
    for rate in args.request_rate:
        rng = np.random.default_rng(args.seed)
        arrivals = rng.exponential(1 / rate, len(bench.workload)).cumsum()
        results += rows_of("latency", rate, 1, lambda variant: run(variant, 2560, arrivals))
    return results


# --------------------------------------------------------------------------------- table and figure


# -------------------------------------------------------------------------------------- the command


def parse_args(argv=None):
    return bench_flags.parse_args(argv, __doc__, ROWS, PRESETS)


def load_model(args):
    device, dtype = get_device(args.device), get_dtype(args)
    if args.model:
        model = random_model(args, device, dtype)
    else:
        model = GPT.from_pretrained(args.weights, device, dtype)
    return set_up(model.requires_grad_(False), args)


def random_model(args, device, dtype):
    config, default_dtype = preset(args.model), torch.get_default_dtype()
    if args.mode == ["layer"]:   # one projection needs no more
        config = replace(config, n_layer=1)
    torch.manual_seed(args.seed)
    torch.set_default_dtype(dtype)   # so that 15 B parameters are never held in float32
    try:
        with torch.device(device):
            return model_from_config(config)
    finally:
        torch.set_default_dtype(default_dtype)


def fill_defaults(args, model):
    """The sizes that depend on the device and on the model's context."""
    on_gpu = model.wte.weight.device.type == "cuda"
    args.num_requests = args.num_requests or (1000 if on_gpu else 32)
    args.slots = args.slots or (64 if on_gpu else 8)
    args.scale = args.scale or min(1.0 if on_gpu else 0.25, model.config.n_positions / 2000)


def choose_variants(args, rows):
    """[(name of a row, rank)] that --rows and --ranks ask for, the base first."""
    variants = [("base", None)]
    if args.mode == ["token"]:   # it has rows of its own
        return variants
    for name in args.rows:
        kind = rows[name].kind
        if kind:
            fixed = flora.adapter_class(kind).fixed_rank   # IA3's
            variants += [(name, rank) for rank in ([fixed] if fixed else args.ranks)]
    return variants


def prepare(args):
    """The model with the adapters of every row, checked, and the workload -> Bench."""
    rows, model = find_rows(args.rows), load_model(args)
    fill_defaults(args, model)
    workload = make_workload(args, model.config)
    result = describe(args, model, workload)
    print("\n".join(f"{key}: {json.dumps(value)}" for key, value in result.items()), flush=True)
    variants = choose_variants(args, rows)
    wanted = dict.fromkeys((rows[name].kind, rank) for name, rank in variants[1:])
    with torch.no_grad():
        sets = make_adapter_sets(model, wanted, args.num_adapters)
    model.pack()
    check_agreement(model, sets, model.wte.weight.dtype, rows)
    return Bench(args, model, workload, rows, variants, sets, result)


def write(bench):
    """Write the results and the figure."""
    def results():
        write_json(bench.args.json, finite(bench.result))
        print(f"\nwrote {bench.args.json}")

    write_each(results, *([partial(draw, bench)] if bench.panels else []))


def main():
    args = parse_args()
    if args.plot:
        png = args.png or os.path.join("figures", "fig3.png")
        return extra("bench_more", "--plot").draw_together(args.plot, png)
    bench_flags.find_outputs(args)
    more = [extra("bench_more", f"--mode {mode}").MODES[mode]
            for mode in ("layer", "token") if mode in args.mode]
    bench = prepare(args)
    bandwidth, flops = measure_limits(bench.device, bench.dtype)
    bench.result["limits"] = share_of_limits(bench.model, args.slots, bandwidth, flops)
    print(f"limits: {json.dumps(bench.result['limits'])}", flush=True)
    rows = bench.result["rows"] = []
    for bench_mode in more:
        rows += bench_mode(bench)
    if PANELS.keys() & args.mode:
        served = bench_serving(bench)
        rows += served
        print_table(served)
    bench.result |= predict(bench, bandwidth, flops)
    print_summary(bench.result, FREE)
    write(bench)


if __name__ == "__main__":
    run_main(main)
