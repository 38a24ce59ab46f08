"""Throughput and latency of FLoRA, IA3 and LoRA across ranks (§4.1, Fig. 2), and two predictions.

  python bench.py --ranks 1 2 4 8                       the embedded model, minutes on 2 cores
  python bench.py --model starcoder --random-weights --dtype float16 --attention math \\
      --ranks 1 2 4 8 16 --request-rate 8               Fig. 2, on one GPU

Every request runs its own adapter, all of one kind and rank. The rows of the table share one model
and are measured in turns, step by step: each has an engine with a cache and a clock of its own,
which only its own steps advance, and the row that is furthest behind takes the next step. So all
rows share the machine's weather, and waiting for an arrival costs no time.

  tokens/s              generated tokens / seconds, from the first arrival to the last token
  s per output token    of a request: (its last token read by the host - its arrival) / its new
                        tokens, queueing and prefill included, as in vLLM 0.1.3's benchmark; mean,
                        median and 99th percentile over the requests
  time to first token   of a request: its first token read by the host - its arrival
  ratio to base         how fast the row is beside the base, with its 95 % interval (`ratio`): by
                        its steps in mode throughput, by seconds per output token in mode latency

Mode throughput: all requests arrive at once. Mode latency: they arrive at random (Poisson), at
--request-rate a second. extras/bench_more.py adds the modes layer and token, and more rows; with
--turns rounds whole workloads are timed one after another (extras/bench_rounds.py).

Two predictions stand beside the measured ranks: Eq. 7's inflection rank, up to which FLoRA is
cheaper than bmm-LoRA, and the free rank, up to which it is as fast as the base (free_rank).
"""
import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from random import random
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
from plumbing.timing import measure_limits, seconds, share_of_limits, synchronize
from plumbing.workload import make_workload

FREE = 0.97       # FLoRA counts as free at this ratio to the base
LOAD = 0.8        # of what the base serves: arrivals in mode latency


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
    layer.add_lora = flora.add_lora


def token(layer):
    layer.add_lora = lora_per_token


def lora_per_token(y, x, rows):
    """flora.add_lora as an engine computes it that flattens tokens (the paper's baseline): every
    token carries a copy of its adapter."""
    own = (rows[part].unflatten(0, (len(x), -1)) for part in ("added_A", "added_B"))
    A, B = (z.expand(-1, x.shape[1], -1, -1).flatten(0, 1) for z in own)     # [b T, r, k or d]
    return flora.add_lora(y, x, dict(added_A=A, added_B=B))


lora_per_token.is_add_lora_at_one_token = True   # so extras/joint.py may take its decoding steps


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
        layer.path, layer.add_lora = "auto", flora.add_lora
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


# ---------------------------------------------------------------------------------------- the turns


class Lane:
    """One row of the table as it is measured: an engine of its own, and a clock in seconds that
    only its own steps advance. install() makes the shared model compute as this row does."""

    def __init__(self, engine, num_adapters=0, install=lambda: None):
        self.engine, self.num_adapters, self.install = engine, num_adapters, install
        self.steps, self.runs = [], []   # (seconds, whether it ran prompts); metrics of each run
        self.start()

    def start(self):
        """Set the clock to 0, for a run."""
        self.clock, self.taken = 0.0, 0
        self.times = {}                  # {request: [its arrival, first token, end] by the clock}


def timed_step(engine):
    """One step of an engine -> (what it reports, its seconds)."""
    start = time.perf_counter()
    events = engine.step()
    synchronize(engine.device)
    return events, time.perf_counter() - start


def take_turn(lane, workload, arrivals, timed):
    """Submit what has arrived by the lane's clock, and take a step. False when all has ended."""
    lane.install()
    while len(lane.times) < len(workload) and arrivals[len(lane.times)] <= lane.clock:
        i = len(lane.times)
        prompt, output = workload[i]
        adapter_id = 1 + i % lane.num_adapters if lane.num_adapters else flora.BASE
        request = lane.engine.submit(prompt, adapter_id=adapter_id, max_new_tokens=output)
        lane.times[request] = [arrivals[i], None, None]
    if not lane.engine.busy:
        if len(lane.times) == len(workload):
            return False
        lane.clock = arrivals[len(lane.times)]
        return True
    waiting = len(lane.engine.waiting)
    events, seconds = timed(lane.engine)
    lane.clock, lane.taken = lane.clock + seconds, lane.taken + 1
    lane.steps.append((seconds, len(lane.engine.waiting) < waiting))
    for request, ids in events:
        times = lane.times[request]
        times[1] = lane.clock if ids and times[1] is None else times[1]
        times[2] = lane.clock
    return True


def run_in_turns(lanes, workload, arrivals, timed=timed_step):
    """Serve the workload once by each of `lanes`, in turns; request i arrives at arrivals[i]. Where
    all arrive at once all rows take the same steps, one of those with the fewest the next: at
    random, since a row that always follows the same one may fall in step with other programs."""
    at_once = arrivals[-1] == 0
    for lane in lanes:
        lane.start()
    live = list(lanes)
    while live:
        lane = min(live, key=lambda lane: (lane.taken, random()) if at_once else lane.clock)
        if not take_turn(lane, workload, arrivals, timed):
            live.remove(lane)
    for lane in lanes:
        lane.runs.append(metrics(lane, arrivals[0]))


def seconds_per_token(lane):
    """Of each request, in their order of arrival."""
    return [(end - arrival) / len(r.ids) for r, (arrival, _, end) in lane.times.items()]


def metrics(lane, first_arrival):
    """What is measured of one run of a lane, as explained above."""
    for request in lane.times:
        if request.error:
            raise RuntimeError(request.error)
    tokens = sum(len(request.ids) for request in lane.times)
    found = dict(tokens_per_second=tokens / (lane.clock - first_arrival))
    first_tokens = [first - arrival for arrival, first, _ in lane.times.values()]
    for name, values in [("seconds_per_output_token", seconds_per_token(lane)),
                         ("time_to_first_token", first_tokens)]:
        p50, p99 = np.percentile(values, [50, 99])
        found |= {f"{name}_mean": np.mean(values), f"{name}_p50": p50, f"{name}_p99": p99}
    return found


def ratio(base, row, block=8, near=2, resamples=1000):
    """How many times as fast as `base` a row is, from the seconds of the same steps of both, lists
    of (seconds, whether it ran prompts) -> (ratio, low, high), of which the last two hold 95 %.

    The steps are cut into blocks of `block` neighbours, ten blocks at least. A row's seconds in one
    are the base's over the median of the paired ratios there, so that single slow steps count for
    little; steps that ran prompts have a median of their own. The interval is that of a local block
    bootstrap (Paparoditis & Politis, 2002), which draws in the place of each block one that is at
    most `near` away: it counts the machine's weather, and not the workload's course, in which
    fewer and fewer requests run.
    """
    (base, prompts), (row, _) = np.transpose(base), np.transpose(row)
    paired, rng = base / row, np.random.default_rng(0)

    def seconds_in(steps):
        kinds = [steps[prompts[steps] == kind] for kind in (0, 1)]
        mine = sum(base[kind].sum() / np.median(paired[kind]) for kind in kinds if len(kind))
        return base[steps].sum(), mine

    n = max(len(base) // block, min(len(base), 10))
    blocks = np.array([seconds_in(steps) for steps in np.array_split(np.arange(len(base)), n)])
    place = np.arange(n)
    drawn = rng.integers((place - near).clip(0), (place + near + 1).clip(max=n), (resamples, n))
    drawn = blocks[drawn].sum(1)                                             # [resamples, 2]
    return np.divide(*blocks.sum(0)), *np.percentile(np.divide(*drawn.T), [2.5, 97.5])


def pairs_of(lane, rate):
    """What `ratio` compares of a lane: its steps, or in mode latency its last run's requests."""
    return lane.steps if rate is None else [(t, False) for t in seconds_per_token(lane)]


def result_row(bench, variant, lanes, mode, rate, warm_up):
    """One row of the results, from its lane and the base's."""
    (name, rank), lane = variant, lanes[variant]
    block = 8 if rate is None else 4
    found, low, high = ratio(pairs_of(lanes["base", None], rate), pairs_of(lane, rate), block)
    speeds = [run["tokens_per_second"] for run in lane.runs]
    steps = {kind: [t for t, prompts in lane.steps if prompts == kind] for kind in (False, True)}
    medians = {metric: float(np.median([run[metric] for run in lane.runs]))
               for metric in lane.runs[0]}
    return medians | dict(
        method=bench.rows[name].kind or "base", baseline=name, what=bench.rows[name].what,
        rank=rank, mode=mode, request_rate=rate, rounds=len(lane.runs), warm_up_seconds=warm_up,
        tokens_per_second_min=min(speeds), tokens_per_second_max=max(speeds),
        ratio_to_base=found, ratio_to_base_low=low, ratio_to_base_high=high,
        decoding_step_seconds=float(np.median(steps[False])) if steps[False] else None,
        prefill_step_seconds=float(np.median(steps[True])) if steps[True] else None,
        steps=len(lane.steps))


def compare(lanes):
    """[FLoRA's steps beside those of each LoRA of its rank, with the interval of their ratio]"""
    found = []
    for (name, rank), lane in lanes.items():
        if name.startswith("lora") and ("flora", rank) in lanes:
            times = ratio(lane.steps, lanes["flora", rank].steps)
            found.append(dict(row="flora", rank=rank, against=name,
                              **dict(zip(("ratio", "low", "high"), times))))
    return found


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
        self.panels = {mode: PANELS[mode] for mode in ("throughput", "latency")
                       if mode in self.args.mode}

    def install(self, variant):
        """Make the model compute as a row at a rank does; -> the number of adapters."""
        name, rank = variant
        row = self.rows[name]
        install(self.model, self.sets.get((row.kind, rank)), row.set_up)
        return self.args.num_adapters if row.kind else 0


def make_lanes(bench, shared_cache=False):
    """{variant: its Lane}, {variant: seconds that it took to serve a few requests, untimed}.
    shared_cache: one KV cache for all, of rows that do not run in turns."""
    args, lanes, warm_up = bench.args, {}, {}
    if args.compile:
        torch._dynamo.config.recompile_limit = 8 * len(bench.variants)
    length = max(len(prompt) + output for prompt, output in bench.workload)
    few = [(prompt, min(output, 8)) for prompt, output in bench.workload[:args.slots]]
    for variant in tqdm(bench.variants, desc="warm-up", unit="row"):
        num_adapters, start = bench.install(variant), time.perf_counter()
        engine = new_engine(bench.model, args.slots, args.compile, length=length)
        lanes[variant] = Lane(engine, num_adapters, partial(bench.install, variant))
        if shared_cache:
            engine.kv_cache = lanes["base", None].engine.kv_cache
        while take_turn(lanes[variant], few, [0.0] * len(few), timed_step):
            pass
        warm_up[variant] = time.perf_counter() - start
    if args.compile:
        print("warm-up with compilation: " + ", ".join(
            f"{name} {rank or ''} {t:.1f} s" for (name, rank), t in warm_up.items()))
    return lanes, warm_up


def bench_serving(bench):
    """Modes throughput and latency -> rows of the results."""
    args, results = bench.args, []
    lanes, warm_up = make_lanes(bench)

    def rows_of(mode, rate, runs, budget, arrivals):
        for lane in lanes.values():
            lane.engine.max_batched_tokens = args.max_batched_tokens or budget
            if rate is not None:
                lane.engine.sync_every = 1   # so that a first token is seen when it is there
        # a shape's first product takes longer, and the base is the first to meet it
        run_in_turns([lanes["base", None]], bench.workload, arrivals)
        for lane in lanes.values():
            lane.steps, lane.runs = [], []
        label = mode if rate is None else f"{mode}, {rate:.3g} requests/s"
        for _ in tqdm(range(runs), desc=label, unit="run"):
            run_in_turns(lanes.values(), bench.workload, arrivals)
        return [result_row(bench, v, lanes, mode, rate, warm_up[v]) for v in bench.variants]

    at_once = np.zeros(len(bench.workload))
    if "throughput" in args.mode:
        results += rows_of("throughput", None, args.repeats, 8192, at_once)
        bench.result["ratios"] = compare(lanes)
    if "latency" not in args.mode:
        return results
    if not args.request_rate:
        base = lanes["base", None]
        if not base.runs:
            run_in_turns([base], bench.workload, at_once)
        new_tokens = np.mean([output for _, output in bench.workload])
        capacity = base.runs[-1]["tokens_per_second"] / new_tokens   # requests/s
        args.request_rate = [float(f"{LOAD * capacity:.2g}")]
    for rate in args.request_rate:
        rng = np.random.default_rng(args.seed)
        arrivals = rng.exponential(1 / rate, len(bench.workload)).cumsum()
        results += rows_of("latency", rate, 1, 2560, arrivals)
    return results


# ----------------------------------------------------------------------------- the two predictions


def benched_layer(model):
    """The first projection that every kind of the core adapts by default: c_attn of StarCoder."""
    adapted = [flora.make_adapters(model, kind, 1, None, 8.0) for kind in flora.KINDS]
    return next(layer for name, layer in flora.adapter_layers(model)
                if all(name in adapters for adapters in adapted))


@torch.inference_mode()
def predict_inflection(layer, b, l, device, dtype):
    """Eq. 7, with c1 and c2, the seconds per multiply-add of LoRA's addend and of the plain matmul,
    measured at rank 1 on `layer` with b examples of l tokens."""
    d, k = layer.in_features, layer.out_features
    x = torch.randn(b, l, d, device=device).to(dtype)
    A = torch.randn(b, 1, k, device=device).to(dtype)
    B = torch.randn(b, d, 1, device=device).to(dtype)
    y = torch.zeros(b, l, k, device=device, dtype=dtype)
    c1 = seconds(lambda: flora.lora_bmm(y, x, A, B), device) / (b * l * (d + k))
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


def told_apart(ratios, lora):
    """(the last rank at which FLoRA is ahead of `lora` by more than the interval, or 0; the first
    at which `lora` is ahead of FLoRA, or infinity)"""
    mine = [r for r in ratios if r["against"] == lora]
    return (max((r["rank"] for r in mine if r["low"] > 1), default=0),
            min((r["rank"] for r in mine if r["high"] < 1), default=float("inf")))


def throughput_of(rows, key="tokens_per_second"):
    """{(row, rank): tokens/s, or another key} of mode throughput."""
    return {(r["baseline"], r.get("rank")): r[key] for r in rows if r["mode"] == "throughput"}


def free_rank(requests, balance):
    """The rank up to which Eq. 6 costs nothing when `requests` rows are decoded at once (not in the
    paper): reading W0 hides the arithmetic of requests * r rows up to the device's balance, matmul
    rate (FLOP/s) / bandwidth (bytes/s) * bytes of a weight / 2."""
    return balance / requests


def measured_free_ranks(rows, name):
    """The ranks at which `name` keeps FREE of the base's speed; None if it has no rows."""
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
                 measured={name: measured_inflection(results, name) for name in loras},
                 told_apart={name: told_apart(bench.result.get("ratios", []), name)
                             for name in loras}),
        free_rank=dict(requests=slots, balance=balance, predicted=free_rank(slots, balance),
                       measured={name: measured_free_ranks(results, name) for name in floras}))


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

    figure = partial(draw, bench.result, bench.args.png, bench.panels)
    write_each(results, *([figure] if bench.panels else []))


def main():
    args = parse_args()
    if args.plot:
        png = args.png or os.path.join("out", "fig3.png")
        return extra("bench_more", "--plot").draw_together(args.plot, png)
    bench_flags.find_outputs(args)
    more = [extra("bench_more", f"--mode {mode}").MODES[mode]
            for mode in ("layer", "token") if mode in args.mode]
    bench = prepare(args)
    bandwidth, flops = measure_limits(bench.device, bench.dtype)
    weights = [layer.weight for _, layer in flora.adapter_layers(bench.model)]
    bench.result["limits"] = share_of_limits(bench.model, weights, args.slots, bandwidth, flops)
    print(f"limits: {json.dumps(bench.result['limits'])}", flush=True)
    rows = bench.result["rows"] = []
    for bench_mode in more:
        rows += bench_mode(bench)
    if bench.panels:
        serving = bench_serving
        if args.turns == "rounds":
            serving = extra("bench_rounds", "--turns rounds").bench_serving
        served = serving(bench)
        rows += served
        print_table(served)
    bench.result |= predict(bench, bandwidth, flops)
    print_summary(bench.result, FREE)
    write(bench)


if __name__ == "__main__":
    run_main(main)
