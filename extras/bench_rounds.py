"""bench.py by rounds of whole workloads: for models that have no room for a KV cache of each row.

  python bench.py --turns rounds --model starcoder --random-weights --dtype float16 --ranks 1 8

All rows share one KV cache and run one after another, every other round in reverse order; ratios
are medians of those of each round, and their intervals, from so few rounds, are their extremes. On a
shared machine they are ten times as wide as those of bench.py's turns.
"""
import time

import numpy as np
from tqdm import tqdm

import flora
from bench import LOAD, make_lanes
from plumbing.timing import synchronize


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
        speeds = [m["tokens_per_second"] for m in found]
        ratios = pace(found, rate) / pace(base, rate)
        results.append(result | dict(tokens_per_second_min=min(speeds), tokens_per_second_max=max(speeds),
                                     ratio_to_base=float(np.median(ratios)),
                                     ratio_to_base_low=float(min(ratios)),
                                     ratio_to_base_high=float(max(ratios))))
    return results


def pace(found, rate):
    """What a ratio to the base is of: tokens/s or, where requests arrive at a rate, which bounds
    those, output tokens a second of a request."""
    if rate is None:
        return np.array([m["tokens_per_second"] for m in found])
    return 1 / np.array([m["seconds_per_output_token_mean"] for m in found])


def bench_serving(bench):
    """Modes throughput and latency -> rows of the results, as bench.bench_serving makes them."""
    args, results = bench.args, []
    lanes, warm_up = make_lanes(bench, shared_cache=True)

    def run(variant, budget=8192, arrivals=None):
        num_adapters, engine = bench.install(variant), lanes[variant].engine
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
        args.request_rate = [float(f"{LOAD * capacity:.2g}")]
    for rate in args.request_rate:
        rng = np.random.default_rng(args.seed)
        arrivals = rng.exponential(1 / rate, len(bench.workload)).cumsum()
        results += rows_of("latency", rate, 1, lambda variant: run(variant, 2560, arrivals))
    return results
