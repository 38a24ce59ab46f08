"""What bench.py measures beyond the paper's Figure 2; a flag of bench.py asks for each part.

  python bench.py --mode layer --model starcoderbase-1b --random-weights      one projection alone
  python bench.py --mode token --ranks 8             one request alone, methods at equal parameters
  python bench.py --rows flora lora-masked ffba      rows that the core lacks (ROWS)
  python bench.py --dataset sharegpt.json            lengths and prompts of a ShareGPT file
  python bench.py --model llama-2-7b --random-weights --dtype float16 --attention math \\
      --ranks 1 2 4 8 16 --mode throughput --json 7b.json                    Fig. 3 left, on one GPU
  python bench.py --plot 7b.json 13b.json --png fig3.png        several results in one figure

layer: the forward of one projection (c_attn; Llama: v_proj) for --slots examples of each of
--layer-tokens; tokens/s counts rows of the input. It also measures flora.MATERIALISE_COST.
token: one request of 16 + --token-length tokens at a time, with one adapter. Each of --ranks is
LoRA's on its default targets; every other row of TOKEN_ROWS (--rows is not asked) has the rank
whose parameters are nearest to LoRA's.
"""
import copy
import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

import flora
from bench import (Lane, Row, benched_layer, check_agreement, default, example, install,
                   make_adapter_sets, measured_inflection, result_row, throughput_of)
from extras.bench_rounds import in_turns, serve
from generate import new_engine
from plumbing.figures import PANELS, print_table, tell_rank, with_bars
from plumbing.files import BadInput, check_json, existing_file, read_json
from plumbing.names import full_name, model_name
from plumbing.outputs import PNG, check_writable, save_figure
from plumbing.timing import seconds, synchronize

from .ffba import own_columns

# ------------------------------------------------------------------------- rows that bench.py lacks


def lora_masked(y, x, rows):
    """LoRA without bmm: all n adapters as one dense [d, n r] matmul, the others masked out.

    y [b, T, k], x [b, T, d], rows a flora.Rows -> y and the addend of Eq. 1; for a layer's add_lora.
    """
    A, B = rows.bank.added_A.flatten(0, 1), rows.bank.added_B.flatten(0, 1)   # [n r, k], [n r, d]
    own = own_columns(rows, "added_B")                                        # [b, 1 or T, n r]
    hidden = (x.to(B.dtype) @ B.T) * own.to(B.dtype)                          # [b, T, n r]
    return torch.addmm(y.flatten(0, 1).to(A.dtype), hidden.flatten(0, 1), A).view(y.shape)


def masked(layer):
    layer.add_lora = lora_masked


def fused(layer):
    """FFBA as freeze_bank leaves it."""


def unfused(layer):
    if layer.frozen_bank:
        layer.frozen_bank = replace(layer.frozen_bank, fused=None)


def merged(layer):
    """LoRA in W0: the base model."""


ROWS = {
    "lora-masked": Row("lora", masked, "LoRA: one dense [d, n r] matmul and a mask, no bmm"),
    "ffba": Row("ffba", fused, "FFBA: fused, on all four projections: more parameters at a rank"),
    "ffba-unfused": Row("ffba", unfused, "FFBA: by small matmuls of its own"),
}


# ----------------------------------------------------------------------------- one projection alone


TURNS = 20   # of each row, times --repeats


def bench_layer(bench):
    """Mode layer -> rows of the results: the forward of one projection, all rows in turns of
    a few milliseconds."""
    args, results = bench.args, []
    for tokens in args.layer_tokens:
        lanes = {v: Lane(None, install=forward_of(bench, v, tokens)) for v in bench.variants}
        for _ in tqdm(range(TURNS * args.repeats), desc=f"layer, {tokens} tokens", unit="turn"):
            for lane in lanes.values():
                lane.steps.append((lane.install(), False))
        for variant, lane in lanes.items():
            rate = args.slots * tokens / np.median(lane.steps, axis=0)[0]
            lane.runs = [dict(tokens_per_second=float(rate))]
            results.append(result_row(bench, variant, lanes, "layer", None, 0.0)
                           | dict(batch=args.slots, tokens=tokens))
    install(bench.model)
    print_table(results, columns=[])
    rank = args.ranks[0]
    if ("flora", rank) in bench.sets:
        cost = materialise_cost(bench.model, bench.sets["flora", rank])
        bench.result["materialise_cost"] = cost
        print(f"making W0 ∘ ΔW costs {cost:.0f} rows of the plain matmul (flora.MATERIALISE_COST)")
    if not bench.panels:   # otherwise the figure is of these
        bench.panels = {"layer": PANELS["layer"]}
    return results


def forward_of(bench, variant, tokens):
    """A function that runs the forward of one projection, --slots examples of `tokens` tokens, for
    a few milliseconds, and returns the seconds of one. Called once, untimed, to warm up."""
    layer, slots = benched_layer(bench.model), bench.args.slots
    x = torch.randn(slots, tokens, layer.in_features, device=bench.device).to(bench.dtype)
    num_adapters, adapters = bench.install(variant), None
    if num_adapters:
        adapters = 1 + torch.arange(slots, device=bench.device) % num_adapters
    if num_adapters and tokens == 1:   # as in decoding, where rows are gathered once
        adapters = flora.gather(bench.model, adapters)

    @torch.inference_mode()
    def forward(times=None):
        bench.install(variant)
        times = times or often
        synchronize(bench.device)
        start = time.perf_counter()
        for _ in range(times):
            layer(x, flora.gather(layer, adapters))
        synchronize(bench.device)
        return (time.perf_counter() - start) / times

    forward(1)
    often = max(1, int(0.005 / forward(1)))
    return forward


@torch.inference_mode()
def materialise_cost(model, adapters):
    """The measured flora.MATERIALISE_COST: making W0 ∘ ΔW once, in rows of the plain matmul.

    adapters: one set of FLoRA adapters, of make_adapter_sets.
    """
    install(model, adapters)
    layer, weight = benched_layer(model), model.wte.weight
    x = torch.randn(1, 256, layer.in_features, device=weight.device).to(weight.dtype)
    adapters = flora.gather(model, torch.tensor([1], device=weight.device))
    plain = seconds(lambda: layer(x), weight.device)
    layer.path = "materialise"
    made = seconds(lambda: layer(x, adapters), weight.device)
    install(model)
    return (made - plain) / (plain / 256)


# -------------------------------------------------------------------------------- one request alone


TOKEN_ROWS = {  # for --mode token: (kind of adapter, targets, how to set a layer up, what it is)
    "base": (None, None, default, "base model, no adapters"),
    "lora": ("lora", None, example, "LoRA unmerged on the default targets, c_attn"),
    "lora-all": ("lora", ["all"], example, "LoRA unmerged on all projections"),
    "lora-merged": ("lora", None, merged, "LoRA merged into W0: the base model's shapes"),
    "ffba": ("ffba", None, fused, "FFBA fused, in both of a block's pairs"),
    "ffba-unfused": ("ffba", None, unfused, "FFBA by small matmuls of its own"),
    "flora": ("flora", None, default, "FLoRA on the default targets"),
}
TOKEN_COLUMNS = [("s/token", 11, ".6f", "seconds_per_output_token_mean"),
                 ("parameters", 12, ",", "parameters")]


def parameters_of(model, kind, rank, targets):
    """The number of parameters of an adapter."""
    adapters = flora.make_adapters(model, kind, rank, targets, 8.0)
    return sum(p.numel() for adapter in adapters.values() for p in adapter.parameters())


def nearest_ranks(model, lora_ranks, names):
    """{(name of TOKEN_ROWS, rank): its parameters, near to LoRA's at each of lora_ranks}"""
    parameters = {("base", None): 0}
    for lora_rank in lora_ranks:
        budget = parameters_of(model, "lora", lora_rank, None)
        for name in names:
            kind, targets, _, _ = TOKEN_ROWS[name]
            rank = max(1, round(budget / parameters_of(model, kind, 1, targets)))
            parameters[name, rank] = parameters_of(model, kind, rank, targets)
    return parameters


def token_sets(model, variants, dtype):
    """{variant: its adapter, of make_adapter_sets}, checked; none for base and lora-merged."""
    ways = {name: Row(kind, set_up, what) for name, (kind, _, set_up, what) in TOKEN_ROWS.items()
            if set_up != merged}
    sets = {}
    for name, rank in variants:
        if name in ways and ways[name].kind:
            kind, targets, _, _ = TOKEN_ROWS[name]
            with torch.no_grad():
                made = make_adapter_sets(model, [(kind, rank)], 1, targets)
            check_agreement(model, made, dtype, ways)
            sets[name, rank] = made[kind, rank]
    return sets


@torch.no_grad()
def merged_copy(model):
    """The model with a LoRA merged into it."""
    served = copy.deepcopy(model)
    flora.merge_adapter(served, flora.add_adapter(served, "lora", 1))
    return served


def bench_token(bench):
    """Mode token: seconds per output token of one request alone -> rows of the results."""
    args, model, prompt = bench.args, bench.model, list(range(16))
    install(model)
    names = [name for name in TOKEN_ROWS if name != "base"]
    if args.quantize:   # int8 has no weights to merge into
        names.remove("lora-merged")
    parameters = nearest_ranks(model, args.ranks, names)
    sets = token_sets(model, parameters, bench.dtype)
    merged_model = None if args.quantize else merged_copy(model)
    engines, warm_up = {}, {}

    def run(variant):
        set_up = TOKEN_ROWS[variant[0]][2]
        served = merged_model if set_up == merged else model
        install(served, sets.get(variant), set_up)
        if variant not in engines:
            length = len(prompt) + args.token_length
            engines[variant] = new_engine(served, 1, args.compile, length=length)
        return serve(engines[variant], [(prompt, args.token_length)], int(variant in sets))

    for variant in tqdm(parameters, desc="warm-up", unit="row"):
        start = time.perf_counter()
        run(variant)
        warm_up[variant] = time.perf_counter() - start
    rows = {name: Row(kind, set_up, what) for name, (kind, _, set_up, what) in TOKEN_ROWS.items()}
    found = in_turns(rows, list(parameters), "token", None, args.repeats, run, warm_up)
    install(model)
    results = [row | dict(parameters=parameters[row["baseline"], row["rank"]]) for row in found]
    print_table(results, TOKEN_COLUMNS)
    return results


MODES = {"layer": bench_layer, "token": bench_token}


# -------------------------------------------------------------------------------- ShareGPT's format


def read_conversations(file):
    """[texts of the first two turns] of each entry of a file in ShareGPT's JSON format."""
    try:
        existing_file(file)
    except BadInput as e:
        raise BadInput(f"--dataset {file}: cannot be read ({e})") from None
    try:
        entries = read_json(file, [{"conversations": [{"value": str}]}])
    except BadInput as e:
        raise BadInput(f"--dataset {file}: is not in ShareGPT's JSON format ({e}); it "
                       'needs a list of {"conversations": [{"value": TEXT}, ...]}') from None
    return [[turn["value"] for turn in entry["conversations"][:2]] for entry in entries]


def dataset_prompts(file, n, seed, tokenizer):
    """n (prompt ids or their number, output length) from a JSON file in ShareGPT's format: a list
    of {"conversations": [{"value": ...}, {"value": ...}, ...]}, whose first two turns count.

    Without a tokenizer (random weights) a token is taken for four characters.
    """
    pairs = [pair for pair in read_conversations(file) if len(pair) == 2]
    np.random.default_rng(seed).shuffle(pairs)
    found = []
    for texts in pairs:
        if tokenizer:
            prompt, output = (tokenizer.encode(text) for text in texts)
        else:
            prompt, output = ([0] * (len(text) // 4) for text in texts)
        if prompt and output and 50 <= len(prompt) + len(output) <= 2000:
            found.append((prompt if tokenizer else len(prompt), len(output)))
            if len(found) == n:
                return found
    raise BadInput(f"--dataset {file}: holds {len(found)} conversations of 50 to 2,000 tokens, but "
                   f"--num-requests is {n}; lower it")


# ------------------------------------------------------------------------ several results, Figure 3


RESULT = {   # what is read of a result of bench.py
    "rows": [{"mode": str, "baseline": str, "rank?": float, "tokens_per_second": float,
              "ratio_to_base": float, "ratio_to_base_low?": float, "ratio_to_base_high?": float}],
    "model": {"name": str}, "workload": {"ranks": [float]},
    "eq7": {"predicted": {"inflection_rank?": float}},
    "ratios?": [{"rank": float, "against": str, "ratio": float, "low": float, "high": float}]}


def read_result(file):
    """A result of bench.py -> (result, the ranks of both methods, its rows of each of them, FLoRA's
    speed beside LoRA's at each rank, with the interval where rows ran in turns)."""
    result = read_json(file)
    if result.get("rows"):
        check_json(result, RESULT, f"--plot {file}")
    speed = throughput_of(result.get("rows") or [])
    ranks = sorted(r for name, r in speed if name == "flora" and ("lora-token", r) in speed)
    if not ranks:
        raise BadInput(f"--plot {file}: holds no throughput of flora and lora-token; measure them "
                       "with --mode throughput --json FILE")
    if min(speed.values()) <= 0:
        raise BadInput(f"--plot {file}: holds tokens_per_second that are not above 0")
    rows = {(row["baseline"], row.get("rank")): row for row in result["rows"]
            if row["mode"] == "throughput"}
    of_each = {name: [rows[name, rank] for rank in ranks] for name in ("flora", "lora-token")}
    found = {r["rank"]: dict(ratio=r["ratio"], ratio_low=r["low"], ratio_high=r["high"])
             for r in result.get("ratios") or [] if r["against"] == "lora-token"}
    beside = [dict(ratio=speed["flora", rank] / speed["lora-token", rank]) for rank in ranks]
    return result, ranks, of_each, [found.get(*pair) for pair in zip(ranks, beside)]


def tell_inflection(result):
    """Eq. 7's inflection rank against lora-token, and the measured one."""
    predicted = result["eq7"]["predicted"].get("inflection_rank")
    predicted = np.inf if predicted is None else predicted   # JSON's null is infinity
    measured = measured_inflection(result["rows"], "lora-token")
    return tell_rank(predicted, result), tell_rank(measured, result)


def draw_together(files, png):
    """The paper's Figure 3 left, of several models, results that bench.py wrote: each method's
    share of its base model's speed across ranks; beside it FLoRA's speed over the paper's
    bmm-LoRA's, which is 1 at the inflection rank."""
    check_writable(png, "--png", PNG, make_folder=True)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8))
    told = []
    print(f"{'':>32}{'inflection rank, predicted':>28}{'measured':>22}")
    for i, file in enumerate(files):
        result, ranks, of_each, beside = read_result(file)
        predicted, measured = tell_inflection(result)
        print(f"{result['model']['name']:>32}{predicted:>28}{measured:>22}")
        name = model_name(result["model"]["name"])
        for (method, rows), line in zip(of_each.items(), ("-", "--")):
            with_bars(left, ranks, rows, "ratio_to_base", color=f"C{i}", linestyle=line,
                      label=f"{name}: {full_name(method)}")
        with_bars(right, ranks, beside, "ratio", color=f"C{i}", label=name)
        told.append(f"{name}: FLoRA at {beside[0]['ratio']:.2f} of the speed of LoRA, bmm per "
                    f"token, at rank {ranks[0]}, at {beside[-1]['ratio']:.2f} at rank {ranks[-1]}; "
                    f"inflection rank by Eq. 7 {predicted}, measured {measured}")
    right.axhline(1, color="grey", linewidth=1)
    for axis, what in (left, "speed, share of the base model's"), (right, "FLoRA's speed / LoRA's"):
        axis.set(xlabel="rank", ylabel=f"{what}\n(higher is better)")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, ranks)
        axis.minorticks_off()
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.suptitle("\n".join(told), fontsize=9)
    save_figure(figure, png)
    print(f"wrote {png}")
