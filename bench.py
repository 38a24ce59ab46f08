"""Throughput and latency of FLoRA, IA3, LoRA and FFBA across ranks (§4.1, Fig. 2, App. B.2, Eq. 7).

  python bench.py --ranks 1 2 4 8                             the embedded model, minutes on 2 cores
  python bench.py --mode token --ranks 8                      one request alone, at equal parameters
  python bench.py --mode layer --model starcoderbase-1b --random-weights        one projection alone
  python bench.py --model starcoder --random-weights --dtype float16 --attention math \\
      --ranks 1 2 4 8 16 --mode throughput latency --request-rate 8             Fig. 2, on one GPU
  python bench.py --model llama-2-7b --random-weights --dtype float16 --attention math \\
      --ranks 1 2 4 8 16 --mode throughput --json 7b.json                        Fig. 3 left, on one GPU
  python bench.py --plot 7b.json 13b.json --png fig3.png          several results' throughput in one figure

Every request runs its own adapter, all of one kind and rank. All rows share one model and one engine
(generate.Engine), run in turns (round 1 of every row, round 2 of every row, ...) after an untimed
warm-up, and stand in the table as medians over the rounds.

  tokens/s                  generated tokens / wall time, from the first arrival to the last token
  s per output token        of a request: (its last token read by the host - its arrival) / its generated
                            tokens, queueing and prefill included, as in vLLM 0.1.3's benchmark; mean,
                            median and 99th percentile over the requests
  time to first token       of a request: its first token read by the host - its arrival
  ratio to base             tokens/s of the row / tokens/s of the base row, in the same round

throughput: all requests arrive at once. latency: they arrive at random (Poisson) at --request-rate a
second. layer: forward of one c_attn (Llama: v_proj) alone; its tokens/s counts rows of the input. token: one request of
16 + --token-length tokens at a time, with one adapter; each of --ranks is LoRA's on c_attn (Llama: q_proj v_proj), and every other row
(TOKEN_ROWS; --rows is not asked) has the rank whose parameters are nearest to LoRA's.
"""
import argparse
import copy
import json
import os
import platform
import time

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import flora
from flora import BadInput
from generate import Engine
from model import GPT, PRESETS, Tokenizer, add_common_flags, get_device, read_json, run_main, save_figure, write_json

ROWS = {  # name for --rows: (kind of adapter, path of AdapterLinear, what it is)
    "base": (None, None, "base model, no adapters"),
    "ia3": ("ia3", None, "IA3"),
    "flora": ("flora", "auto", "FLoRA: Eq. 6; prompts by Eq. 4 where that is cheaper"),
    "flora-eq6": ("flora", "expand", "FLoRA: Eq. 6 for prompts too, as in the paper"),
    "lora-token": ("lora", "token", "LoRA: bmm, adapters gathered per token, as in the paper"),
    "lora-example": ("lora", "example", "LoRA: bmm per example"),
    "lora-masked": ("lora", "masked", "LoRA: one dense [d, n r] matmul and a mask, no bmm"),
    "ffba": ("ffba", None, "FFBA: fused, on all four projections: more parameters at a rank"),
    "ffba-unfused": ("ffba", "unfused", "FFBA: by small matmuls of its own"),
}
DEFAULT_ROWS = [name for name in ROWS if name not in ("flora-eq6", "ffba", "ffba-unfused")]
TOKEN_ROWS = {  # for --mode token: (kind of adapter, targets, path, what it is)
    "base": (None, None, None, "base model, no adapters"),
    "lora": ("lora", None, "example", "LoRA unmerged on the default targets, c_attn"),
    "lora-all": ("lora", ["all"], "example", "LoRA unmerged on all projections"),
    "lora-merged": ("lora", None, "merged", "LoRA merged into W0: the base model's shapes"),
    "ffba": ("ffba", None, None, "FFBA fused, in both of a block's pairs"),
    "ffba-unfused": ("ffba", None, "unfused", "FFBA by small matmuls of its own"),
    "flora": ("flora", None, "auto", "FLoRA on the default targets"),
}
LORA_ROWS = [name for name, (kind, _, _) in ROWS.items() if kind == "lora"]
BYTES = 1 << 28  # of the tensors that memory bandwidth is measured with


# --------------------------------------------------------------------------------------- the workload


def synthetic_lengths(n, seed):
    """n (prompt, output) lengths of 50 to 2,000 tokens together; log-normal, with the means that the
    paper's ShareGPT sample is known for, about 161 and 338."""
    rng, lengths = np.random.default_rng(seed), []
    while len(lengths) < n:
        prompt, output = np.maximum(1, rng.lognormal([4.588, 5.502], [1.05, 0.9]).astype(int))
        if 50 <= prompt + output <= 2000:
            lengths.append((int(prompt), int(output)))
    return lengths


def dataset_prompts(file, n, seed, tokenizer):
    """n (prompt ids or their number, output length) from a JSON file in ShareGPT's format: a list of
    {"conversations": [{"value": ...}, {"value": ...}, ...]}, of which the first two turns count.

    Without a tokenizer (random weights) a token is taken for four characters.
    """
    try:
        with open(file, encoding="utf-8") as f:
            turns = [[turn["value"] for turn in entry["conversations"][:2]] for entry in json.load(f)]
    except OSError as e:
        raise BadInput(f"--dataset {file}: cannot be read ({e.strerror})") from None
    except (ValueError, TypeError, KeyError) as e:
        raise BadInput(f"--dataset {file}: is not in ShareGPT's JSON format ({type(e).__name__}: {e}); it "
                       'needs a list of {"conversations": [{"value": TEXT}, ...]}') from None
    pairs = [pair for pair in turns if len(pair) == 2]
    np.random.default_rng(seed).shuffle(pairs)
    found = []
    for prompt, output in pairs:
        prompt, output = ((tokenizer.encode(text) if tokenizer else [0] * (len(text) // 4))
                          for text in (prompt, output))
        if prompt and output and 50 <= len(prompt) + len(output) <= 2000:
            found.append((prompt if tokenizer else len(prompt), len(output)))
            if len(found) == n:
                return found
    raise BadInput(f"--dataset {file}: holds {len(found)} conversations of 50 to 2,000 tokens, but "
                   f"--num-requests is {n}; lower it")


def make_workload(args, config, tokenizer):
    """[(prompt ids, number of new tokens)], lengths scaled by --scale."""
    if args.dataset:
        pairs = dataset_prompts(args.dataset, args.num_requests, args.seed, tokenizer)
    else:
        pairs = synthetic_lengths(args.num_requests, args.seed)
    rng, workload = np.random.default_rng(args.seed), []
    for prompt, output in pairs:
        if isinstance(prompt, int):
            prompt = rng.integers(0, config.vocab_size, prompt).tolist()
        workload.append((prompt[:max(1, round(len(prompt) * args.scale))], max(1, round(output * args.scale))))
    longest = max(len(prompt) + output for prompt, output in workload)
    if longest > config.n_positions:
        raise BadInput(f"--scale {args.scale}: the longest request has {longest} tokens, more than the model's "
                       f"context of {config.n_positions}; use --scale {0.99 * args.scale * config.n_positions / longest:.2g}")
    return workload


# ------------------------------------------------------------------------------- adapters and variants


def make_adapter_sets(model, kinds_and_ranks, n, targets=None):
    """{(kind, rank): {layer: (adapters, frozen bank)}}, n adapters each, moved off the identity."""
    sets = {}
    for kind, rank in kinds_and_ranks:
        install(model, None)
        for _ in range(n):
            adapter_id = flora.add_adapter(model, kind, rank, targets)
            for p in flora.adapter_parameters(model, adapter_id).values():
                p.data += 0.02 * torch.randn_like(p)
        flora.freeze_bank(model)
        sets[kind, rank] = {layer: (layer.adapters, layer.frozen_bank) for _, layer in flora.adapter_layers(model)}
    install(model, None)
    return sets


def install(model, adapters, path=None):
    """Give the model one set of make_adapter_sets, or (None) no adapter, and a way to compute it."""
    for _, layer in flora.adapter_layers(model):
        layer.adapters, layer.frozen_bank = adapters[layer] if adapters else (nn.ModuleDict(), None)
        if path == "unfused" and layer.frozen_bank:
            layer.frozen_bank = layer.frozen_bank._replace(fused=None)
        layer.num_adapters = len(layer.adapters)
        layer.path = path if path in ("expand", "materialise") else "auto"
        layer.lora_path = path if path in ("token", "masked") else "example"


@torch.no_grad()
def check_agreement(model, sets, dtype):
    """Raise RuntimeError unless all ways to compute one set of adapters give the same logits, for
    prompts and for one token. Nothing is timed before that."""
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    device = model.wte.weight.device
    ids = torch.randint(0, model.config.vocab_size, (2, 12), device=device)
    for (kind, rank), adapters in sets.items():
        paths = {"flora": ("expand", "materialise"), "lora": ("example", "token", "masked"),
                 "ffba": (None, "unfused")}.get(kind, (None,))
        for x in (ids, ids[:, :1]):
            outputs = {}
            for path in paths:
                install(model, adapters, path)
                n = len(next(iter(flora.frozen_banks(model))).adapters)
                outputs[path] = model(x, torch.tensor([1, n], device=device)).float()
            reference = outputs[paths[0]]
            for path, output in outputs.items():
                error = ((output - reference).abs().max() / reference.abs().max()).item()
                if not error <= tolerance:
                    raise RuntimeError(f"{kind} rank {rank}: {path} differs from {paths[0]} by {error:.1e} of "
                                       f"the largest logit, more than {tolerance:.0e}; not timed")
    install(model, None)


# ------------------------------------------------------------------------------------------- measuring


def benched_layer(model):
    """The first projection that every kind adapts by default: c_attn, or Llama's v_proj."""
    return next(layer for name, layer in flora.adapter_layers(model) if name.endswith(("c_attn", "v_proj")))


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(f, device, repeats=7):
    """Median seconds of f(), called often enough for a clock; untimed first calls warm up."""
    for _ in range(2):
        f()
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    calls = max(1, min(100, int(0.01 / max(time.perf_counter() - start, 1e-6))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            f()
        synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times))


@torch.inference_mode()
def measure_limits(model, args, device, dtype):
    """What the device can do, and which part of it the base model reaches: bytes/s (the better of a
    copy and a sum), multiply-adds/s x 2 of a large matmul, decode and prefill of --slots requests."""
    a = torch.ones(BYTES // dtype.itemsize, dtype=dtype, device=device)
    b = torch.empty_like(a)
    bandwidth = max(2 * BYTES / seconds(lambda: b.copy_(a), device), BYTES / seconds(lambda: a.sum(), device))
    del a, b
    n = 8192 if device.type == "cuda" else 1024
    square = torch.randn(n, n, device=device).to(dtype)
    flops = 2 * n**3 / seconds(lambda: square @ square, device)
    B, T = args.slots, min(256, model.config.n_positions // 2)
    ids = torch.zeros(B, T, dtype=torch.int64, device=device)
    cache, position = model.new_kv_cache(B, T + 1), torch.full((B, 1), T, device=device)
    decode = seconds(lambda: model(ids[:, :1], None, cache, position), device)
    prefill = seconds(lambda: model.hidden(ids, None, cache[:, :, :, :, :T]), device)
    looked_up = ["wpe.weight"] + ["embed_tokens.weight"] * (not model.config.tie_word_embeddings)   # not multiplied by
    weights = [p for name, p in model.base_parameters().items() if not name.endswith(tuple(looked_up))]
    layers = sum(layer.weight.numel() for _, layer in flora.adapter_layers(model))
    decode_bytes = sum(p.numel() * p.element_size() for p in weights) + cache.numel() * cache.element_size()
    return dict(bandwidth_gb_s=bandwidth / 1e9, matmul_gflop_s=flops / 1e9,
                decode_batch=B, decode_ms=1e3 * decode, decode_share_of_bandwidth=decode_bytes / decode / bandwidth,
                prefill_tokens=B * T, prefill_ms=1e3 * prefill,
                prefill_share_of_matmul=2 * layers * B * T / prefill / flops)


@torch.inference_mode()
def predict_inflection(layer, b, l, device, dtype):
    """Eq. 7: FLoRA is cheaper than bmm-LoRA while 2 c1 / (d c2) + 1 / r >= 1.

    c1, c2: seconds per multiply-add of torch.bmm and of the plain matmul, measured at rank 1 on the
    benched layer of the model with b examples of l tokens. The rank where equality holds, or infinity.
    """
    k, d = layer.weight.shape
    x = torch.randn(b, l, d, device=device).to(dtype)
    A, B = torch.randn(b, 1, k, device=device).to(dtype), torch.randn(b, d, 1, device=device).to(dtype)
    c1 = seconds(lambda: flora.lora_bmm(x, A, B), device) / (b * l * (d + k))
    c2 = seconds(lambda: flora.matmul(x, layer.W0()), device) / (b * l * d * k)
    ratio = 2 * c1 / (d * c2)
    return dict(batch=b, tokens=l, d=d, k=k, c1=c1, c2=c2, inflection_rank=1 / (1 - ratio) if ratio < 1 else float("inf"))


def measured_inflection(rows, lora):
    """Where the tokens/s of `lora` pass FLoRA's, interpolated between ranks: a rank, infinity (never
    up to the last rank) or 0 (at the first rank already)."""
    speed = {(row["baseline"], row["rank"]): row["tokens_per_second"] for row in rows if row["mode"] == "throughput"}
    ranks = sorted(rank for baseline, rank in speed if baseline == "flora" and (lora, rank) in speed)
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


def serve(engine, workload, num_adapters, arrivals=None):
    """Run the workload: request i arrives at arrivals[i] seconds (None: all at once) with adapter
    1 + i % num_adapters (0: the base model). -> the metrics of one run, as in the docstring above."""
    arrivals = np.zeros(len(workload)) if arrivals is None else arrivals
    requests, start = [], time.perf_counter()
    while engine.busy or len(requests) < len(workload):
        now = time.perf_counter() - start
        while len(requests) < len(workload) and arrivals[len(requests)] <= now:
            i = len(requests)
            prompt, output = workload[i]
            request = engine.submit(prompt, adapter_id=1 + i % num_adapters if num_adapters else 0, max_new_tokens=output)
            request.arrived = start + arrivals[i]
            requests.append(request)
        if engine.busy:
            engine.step()
        else:
            time.sleep(max(0.0, arrivals[len(requests)] - now))
    synchronize(engine.device)
    wall = time.perf_counter() - start - arrivals[0]
    for request in requests:
        if request.error:
            raise RuntimeError(request.error)
    per_token = np.array([(r.ended - r.arrived) / len(r.ids) for r in requests])
    first = np.array([r.first_token - r.arrived for r in requests])
    return dict(tokens_per_second=sum(len(r.ids) for r in requests) / wall,
                seconds_per_output_token_mean=per_token.mean(),
                seconds_per_output_token_p50=np.percentile(per_token, 50),
                seconds_per_output_token_p99=np.percentile(per_token, 99),
                time_to_first_token_mean=first.mean(), time_to_first_token_p50=np.percentile(first, 50),
                time_to_first_token_p99=np.percentile(first, 99))


def summarise(name, rank, mode, rate, rounds, base_rounds, warm_up):
    """One row of the results out of a row's rounds, dicts of metrics."""
    kind, *_, what = (TOKEN_ROWS if mode == "token" else ROWS)[name]
    row = dict(method=kind or "base", baseline=name, what=what, rank=rank, mode=mode,
               request_rate=rate, rounds=len(rounds), warm_up_seconds=warm_up)
    for metric in rounds[0]:
        row[metric] = float(np.median([r[metric] for r in rounds]))
    speeds = [r["tokens_per_second"] for r in rounds]
    row["tokens_per_second_min"], row["tokens_per_second_max"] = float(min(speeds)), float(max(speeds))
    row["ratio_to_base"] = float(np.median(
        [r["tokens_per_second"] / b["tokens_per_second"] for r, b in zip(rounds, base_rounds)]))
    return row


def in_turns(variants, mode, rate, repeats, run, warm_up):
    """run(variant) -> metrics, `repeats` rounds of all variants, every other round in reverse order
    -> rows. variants: (name, rank) pairs, the base among them."""
    rounds = {variant: [] for variant in variants}
    label = mode if rate is None else f"{mode}, {rate:.3g} requests/s"
    for r in tqdm(range(repeats), desc=label, unit="round"):
        for variant in variants if r % 2 == 0 else reversed(variants):
            rounds[variant].append(run(variant))
    base = rounds["base", None]
    return [summarise(*variant, mode, rate, rounds[variant], base, warm_up[variant]) for variant in variants]


def bench_layer(model, sets, variants, args, device, dtype):
    """Mode layer: forward of benched_layer alone, --slots examples of each of --layer-tokens."""
    layer, rows = benched_layer(model), []
    ids = 1 + torch.arange(args.slots, device=device) % args.num_adapters
    for T in args.layer_tokens:
        x = torch.randn(args.slots, T, layer.in_features, device=device).to(dtype)

        @torch.inference_mode()
        def run(variant):
            name, rank = variant
            kind, path, _ = ROWS[name]
            install(model, kind and sets[kind, rank], path)
            adapter_ids = None if kind is None else {layer: layer.gather(ids)} if T == 1 else ids
            return dict(tokens_per_second=args.slots * T / seconds(lambda: layer(x, adapter_ids), device, repeats=3))
        found = in_turns(variants, "layer", None, args.repeats, run, dict.fromkeys(variants, 0.0))
        rows += [row | dict(batch=args.slots, tokens=T) for row in found]
    install(model, None)
    return rows


def parameters_of(model, kind, rank, targets):
    return sum(p.numel() for a in flora.make_adapters(model, kind, rank, targets, 8.0).values() for p in a.parameters())


def bench_token(model, args, device, dtype):
    """Mode token: seconds per output token of one request alone, methods at equal parameters."""
    prompt, new = list(range(16)), args.token_length
    variants, sets, parameters = [("base", None)], {}, {("base", None): 0}
    install(model, None)
    with torch.no_grad():
        for lora_rank in args.ranks:
            budget = parameters_of(model, "lora", lora_rank, None)
            for name, (kind, targets, path, _) in TOKEN_ROWS.items():
                if kind is None or path == "merged" and args.quantize:  # int8 has no weights to merge into
                    continue
                rank = max(1, round(budget / parameters_of(model, kind, 1, targets)))
                if (name, rank) in parameters:  # two budgets, one nearest rank
                    continue
                variants.append((name, rank))
                parameters[name, rank] = parameters_of(model, kind, rank, targets)
                if path != "merged":
                    made = make_adapter_sets(model, [(kind, rank)], 1, targets)
                    check_agreement(model, made, dtype)
                    sets[name, rank] = made[kind, rank]
        merged = copy.deepcopy(model)
        if not args.quantize:
            flora.merge_adapter(merged, flora.add_adapter(merged, "lora", 1))
    engines = {}

    def run(variant):
        _, _, path, _ = TOKEN_ROWS[variant[0]]
        served = merged if path == "merged" else model
        install(served, sets.get(variant), path)
        if variant not in engines:
            engines[variant] = Engine(served, 1, len(prompt) + new, compile=args.compile)
        return serve(engines[variant], [(prompt, new)], int(variant in sets))

    warm_up = {}
    for variant in tqdm(variants, desc="warm-up", unit="row"):
        start = time.perf_counter()
        run(variant)
        warm_up[variant] = time.perf_counter() - start
    rows = in_turns(variants, "token", None, args.repeats, run, warm_up)
    install(model, None)
    return [row | dict(parameters=parameters[row["baseline"], row["rank"]]) for row in rows]


@torch.inference_mode()
def materialise_cost(model, sets, rank, device, dtype):
    """The measured flora.MATERIALISE_COST: what making W0 ∘ ΔW costs, in rows of the plain matmul."""
    layer = benched_layer(model)
    install(model, sets["flora", rank])
    x, ids = torch.randn(1, 256, layer.in_features, device=device).to(dtype), torch.tensor([1], device=device)
    plain = seconds(lambda: layer(x), device)
    made = seconds(lambda: layer(x, ids, "materialise"), device)
    install(model, None)
    return (made - plain) / (plain / 256)


# --------------------------------------------------------------------------------- table and figure


def machine(device):
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
    return dict(cpu=cpu, threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version(),
                gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
                cuda=torch.version.cuda if device.type == "cuda" else None)


def print_table(rows):
    for mode, rate, T in dict.fromkeys((r["mode"], r["request_rate"], r.get("tokens")) for r in rows):
        title = mode + (f" at {rate:.3g} requests/s" if rate else "") + (f", {T} tokens an example" if T else "")
        print(f"\n{title}\n{'':>14}{'rank':>5}{'tokens/s':>10}{'min-max':>16}{'of base':>9}", end="")
        print(f"{'s/token':>11}{'parameters':>12}" if mode == "token" else
              "" if T else f"{'s/token mean':>14}{'p50':>9}{'p99':>9}{'first token':>13}{'p99':>9}")
        for r in rows:
            if (r["mode"], r["request_rate"], r.get("tokens")) == (mode, rate, T):
                spread = f"{r['tokens_per_second_min']:.0f}-{r['tokens_per_second_max']:.0f}"
                print(f"{r['baseline']:>14}{r['rank'] or '':>5}{r['tokens_per_second']:>10.1f}{spread:>16}"
                      f"{r['ratio_to_base']:>9.3f}", end="")
                print(f"{r['seconds_per_output_token_mean']:>11.6f}{r['parameters']:>12,}" if mode == "token" else
                      "" if T else f"{r['seconds_per_output_token_mean']:>14.4f}{r['seconds_per_output_token_p50']:>9.4f}"
                      f"{r['seconds_per_output_token_p99']:>9.4f}{r['time_to_first_token_mean']:>13.3f}"
                      f"{r['time_to_first_token_p99']:>9.3f}")


def draw(file, result):
    """The paper's Figure 2: throughput and latency across ranks, with Eq. 7's inflection rank."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = result["rows"]
    panels = [("throughput", "tokens_per_second", "Throughput (tokens/s)"),
              ("latency", "seconds_per_output_token_mean", "Seconds per output token")]
    panels = [p for p in panels if any(r["mode"] == p[0] for r in rows)]
    if any(r["mode"] == "layer" for r in rows) and not panels:
        panels = [("layer", "tokens_per_second", "Rows/s of one projection")]
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.4), squeeze=False)
    for axis, (mode, metric, title) in zip(axes[0], panels):
        groups = dict.fromkeys((r["request_rate"], r.get("tokens")) for r in rows if r["mode"] == mode)
        for group, style in zip(groups, ["-", "--", ":", "-."]):
            for color, name in enumerate(ROWS):
                points = [(r["rank"], r[metric]) for r in rows if r["mode"] == mode and r["baseline"] == name
                          and (r["request_rate"], r.get("tokens")) == group]
                note = "".join(f", {v:.3g} {unit}" for v, unit in zip(group, ("req/s", "tokens")) if v)
                if points and ROWS[name][0] in (None, "ia3"):
                    axis.axhline(points[0][1], color=f"C{color}", linestyle=style, linewidth=1, label=name + note)
                elif points:
                    axis.plot(*zip(*points), color=f"C{color}", linestyle=style, marker="o", markersize=3, label=name + note)
        if mode == "throughput":
            eq7 = result["eq7"]
            for rank, style, what in ((eq7["predicted"]["inflection_rank"], ":", "predicted by Eq. 7"),
                                      (eq7["measured"].get("lora-token"), "-", "measured")):
                label = f"inflection against lora-token, {what}: " + tell_rank(rank, result)
                if rank and np.isfinite(rank):
                    axis.axvline(rank, color="grey", linestyle=style, linewidth=1, label=label)
                else:
                    axis.plot([], [], color="grey", linestyle=style, label=label)
        axis.set(xlabel="Rank", title=title)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.suptitle(f"{result['model']['name']}, {result['dtype']}, {result['machine']['gpu'] or result['machine']['cpu']}, "
                    f"{result['workload']['slots']} slots", fontsize=9)
    save_figure(figure, file)


def draw_together(files, png):
    """The paper's Figure 3 left: throughput across ranks of several models, results that this program
    wrote; beside it FLoRA's share over the bmm-LoRA of the paper, which is 1 at the inflection rank."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    print(f"{'':>32}{'inflection rank, predicted':>28}{'measured':>22}")
    for color, file in enumerate(files):
        result = read_json(file)
        speed = {(row["baseline"], row["rank"]): row["tokens_per_second"]
                 for row in result.get("rows", []) if row["mode"] == "throughput"}
        ranks = sorted(rank for name, rank in speed if name == "flora" and ("lora-token", rank) in speed)
        if not ranks:
            raise BadInput(f"--plot {file}: holds no throughput of flora and lora-token; measure them with --mode "
                           "throughput --json FILE")
        predicted = result["eq7"]["predicted"]["inflection_rank"]   # JSON's null is infinity
        predicted, measured = (tell_rank(rank, result) for rank in (
            np.inf if predicted is None else predicted, measured_inflection(result["rows"], "lora-token")))
        name = result["model"]["name"]
        print(f"{name:>32}{predicted:>28}{measured:>22}")
        for row, style in (("flora", "-"), ("lora-token", "--")):
            left.plot(ranks, [speed[row, rank] for rank in ranks], style, color=f"C{color}", marker="o", markersize=3,
                      label=f"{name}: {'FLoRA' if row == 'flora' else 'LoRA (bmm per token)'}")
        right.plot(ranks, [speed["flora", rank] / speed["lora-token", rank] for rank in ranks], color=f"C{color}",
                   marker="o", markersize=3, label=f"{name}; inflection rank: Eq. 7 {predicted}, measured {measured}")
    right.axhline(1, color="grey", linewidth=1)
    left.set(xlabel="Rank", title="Throughput (tokens/s)")
    right.set(xlabel="Rank", title="FLoRA / LoRA (bmm per token)")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    save_figure(figure, png)
    print(f"wrote {png}")


def tell_rank(rank, result):
    last = max(result["workload"]["ranks"])
    if rank is None:
        return "not measured"
    if rank == 0:
        return "below the first rank"
    return f"{rank:.1f}" if np.isfinite(rank) else f"none up to rank {last}"


# ------------------------------------------------------------------------------------------------ main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--mode", nargs="+", choices=["throughput", "latency", "layer", "token"], default=["throughput", "latency"])
    add("--rows", nargs="+", choices=list(ROWS), default=DEFAULT_ROWS, help="the base always runs too")
    add("--model", choices=list(PRESETS), help="a published size instead of --weights; needs --random-weights")
    add("--random-weights", action="store_true")
    add("--attention", choices=["flash", "math"], default="flash", help="math: as the paper measured")
    add("--compile", action="store_true", help="decode with torch.compile; its time is reported apart")
    add("--num-requests", type=int, help="default: 1,000, on a CPU 32")
    add("--scale", type=float, help="multiply all lengths by this (default: 1, on a CPU 0.25)")
    add("--dataset", metavar="FILE", help="ShareGPT's JSON format (default: a synthetic mixture)")
    add("--num-adapters", type=int, default=32, help="distinct adapters; request i runs number i modulo this")
    add("--slots", type=int, help="requests that run at once (default: 64, on a CPU 8)")
    add("--max-batched-tokens", type=int, help="default: 8,192, for latency 2,560, as in the paper")
    add("--request-rate", type=float, nargs="+", help="arrivals a second for latency (default: 0.5 and 1.5 "
        "times what the base model serves)")
    add("--layer-tokens", type=int, nargs="+", default=[1, 64, 256], help="tokens an example, for layer")
    add("--token-length", type=int, default=128, help="new tokens of a request, for token")
    add("--repeats", type=int, default=3, help="rounds; latency takes one, its spread is over the requests")
    add("--png", metavar="FILE", help="default: figures/fig2_DEVICE.png")
    add("--plot", nargs="+", metavar="JSON", help="no measuring: draw the throughput of these results into --png")
    add_common_flags(parser, dtypes=["float32", "bfloat16", "float16"])
    args = parser.parse_args(argv)
    for flag in ("ranks", "num_requests", "num_adapters", "slots", "max_batched_tokens", "layer_tokens", "token_length",
                 "repeats"):
        value = getattr(args, flag)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise BadInput(f"--{flag.replace('_', '-')} is {value}; use whole numbers of at least 1")
    if args.request_rate and min(args.request_rate) <= 0 or args.scale is not None and args.scale <= 0:
        raise BadInput("--request-rate and --scale must be above 0")
    if bool(args.model) != args.random_weights:
        raise BadInput("--model needs --random-weights and the other way round; for a checkpoint use --weights FOLDER")
    return args


def load_model(args, device, dtype):
    if not args.model:
        return GPT.from_pretrained(args.weights, device, dtype)
    torch.manual_seed(args.seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that 15 B parameters are never held in float32
    try:
        with torch.device(device):
            return GPT(PRESETS[args.model])
    finally:
        torch.set_default_dtype(default)


def main():
    args = parse_args()
    if args.plot:
        return draw_together(args.plot, args.png or os.path.join("figures", "fig3.png"))
    device, dtype = get_device(args.device), getattr(torch, args.dtype)
    on_gpu = device.type == "cuda"
    model = load_model(args, device, dtype)
    model.requires_grad_(False)
    model.set_attention(args.attention == "flash")
    if args.quantize:
        flora.quantize_int8(model)
    args.num_requests = args.num_requests or (1000 if on_gpu else 32)
    args.slots = args.slots or (64 if on_gpu else 8)
    args.scale = args.scale or min(1.0 if on_gpu else 0.25, model.config.n_positions / 2000)
    workload = make_workload(args, model.config, None if args.random_weights or not args.dataset
                             else Tokenizer(args.weights))
    prompts, outputs = np.array([(len(p), n) for p, n in workload]).T
    name = f"{args.model}, random weights" if args.model else os.path.basename(os.path.abspath(args.weights))
    result = dict(
        machine=machine(device), dtype=args.dtype,
        model=dict(name=name, parameters=sum(p.numel() for p in model.base_parameters().values()),
                   quantize=args.quantize, attention=args.attention, compile=args.compile),
        workload=dict(source=args.dataset or "synthetic", requests=len(workload), scale=args.scale, seed=args.seed,
                      prompt_tokens_mean=float(prompts.mean()), new_tokens_mean=float(outputs.mean()),
                      total_tokens_min=int((prompts + outputs).min()), total_tokens_max=int((prompts + outputs).max()),
                      slots=args.slots, num_adapters=args.num_adapters, ranks=args.ranks, repeats=args.repeats))
    print("\n".join(f"{key}: {json.dumps(value)}" for key, value in result.items()), flush=True)

    variants = [("base", None)]
    for row in args.rows if args.mode != ["token"] else []:  # which has rows of its own
        if row != "base":
            variants += [(row, rank) for rank in (args.ranks if ROWS[row][0] != "ia3" else [0.5])]
    with torch.no_grad():
        sets = make_adapter_sets(model, dict.fromkeys((ROWS[row][0], rank) for row, rank in variants[1:]),
                                 args.num_adapters)
        model.pack()
        check_agreement(model, sets, dtype)
    result["limits"] = measure_limits(model, args, device, dtype)
    print(f"limits: {json.dumps(result['limits'])}", flush=True)

    rows, warm_up = [], {}
    if "layer" in args.mode:
        rows += bench_layer(model, sets, variants, args, device, dtype)
        if ("flora", args.ranks[0]) in sets:
            result["materialise_cost"] = materialise_cost(model, sets, args.ranks[0], device, dtype)
    if "token" in args.mode:
        rows += bench_token(model, args, device, dtype)
    if "throughput" in args.mode or "latency" in args.mode:
        if args.compile:
            torch._dynamo.config.recompile_limit = 8 * len(variants)
        engines = {}
        for variant in tqdm(variants, desc="warm-up", unit="row"):
            kind, path, _ = ROWS[variant[0]]
            install(model, kind and sets[kind, variant[1]], path)
            engine = engines[variant] = Engine(model, args.slots, int((prompts + outputs).max()), compile=args.compile)
            engine.kv_cache = engines["base", None].kv_cache  # one for all: they run in turns
            start = time.perf_counter()
            serve(engine, workload[:args.slots], kind and args.num_adapters)
            warm_up[variant] = time.perf_counter() - start

        def run(variant, budget, arrivals=None):
            kind, path, _ = ROWS[variant[0]]
            install(model, kind and sets[kind, variant[1]], path)
            engine = engines[variant]
            engine.max_batched_tokens = args.max_batched_tokens or budget
            if arrivals is not None:
                engine.sync_every = 1  # so that a first token is seen when it is there
            return serve(engine, workload, kind and args.num_adapters, arrivals)

        if "throughput" in args.mode:
            rows += in_turns(variants, "throughput", None, args.repeats, lambda v: run(v, 8192), warm_up)
        if "latency" in args.mode:
            if not args.request_rate:
                capacity = run(("base", None), 8192)["tokens_per_second"] / outputs.mean()
                args.request_rate = [float(f"{share * capacity:.2g}") for share in (0.5, 1.5)]
            for rate in args.request_rate:
                arrivals = np.random.default_rng(args.seed).exponential(1 / rate, len(workload)).cumsum()
                rows += in_turns(variants, "latency", rate, 1, lambda v: run(v, 2560, arrivals), warm_up)
    result["rows"] = rows
    layer = benched_layer(model)
    result["eq7"] = dict(predicted=predict_inflection(layer, args.slots, 1, device, dtype),
                         measured={name: measured_inflection(rows, name) for name in LORA_ROWS})

    print_table(rows)
    limits, eq7 = result["limits"], result["eq7"]
    print(f"\nlimits: {limits['bandwidth_gb_s']:.1f} GB/s, of which decoding {limits['decode_batch']} base requests reaches "
          f"{100 * limits['decode_share_of_bandwidth']:.0f} %; {limits['matmul_gflop_s']:.0f} GFLOP/s, of which a prefill "
          f"of {limits['prefill_tokens']} tokens reaches {100 * limits['prefill_share_of_matmul']:.0f} %")
    p = eq7["predicted"]
    print(f"Eq. 7 at {p['batch']} x {p['tokens']} tokens, d = {p['d']}: c1 = {p['c1']:.2e}, c2 = {p['c2']:.2e} s, predicted "
          f"inflection rank {tell_rank(p['inflection_rank'], result)}; measured: "
          + ", ".join(f"{name} {tell_rank(rank, result)}" for name, rank in eq7["measured"].items()))
    if "materialise_cost" in result:
        print(f"making W0 ∘ ΔW costs {result['materialise_cost']:.0f} rows of the plain matmul (flora.MATERIALISE_COST)")
    if args.compile:
        print("warm-up with compilation: " + ", ".join(f"{name} {rank or ''} {s:.1f} s" for (name, rank), s in warm_up.items()))
    file = args.json or os.path.join("out", f"bench_{device.type}.json")
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    write_json(file, finite(result))
    if args.mode == ["token"]:  # no figure
        return print(f"\nwrote {file}")
    png = args.png or os.path.join("figures", f"fig2_{device.type}.png")
    draw(png, result)
    print(f"\nwrote {file} and {png}")


def finite(value):
    """JSON knows no infinity: null stands for it."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


if __name__ == "__main__":
    run_main(main)
