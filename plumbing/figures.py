"""What bench.py prints and draws of its results."""
import os

import numpy as np

from plumbing.names import full_name, model_name
from plumbing.outputs import save_figure
from plumbing.provenance import provenance

def describe(args, model, workload):
    """What is measured, on what: the head of the results."""
    prompts, outputs = np.array([(len(prompt), output) for prompt, output in workload]).T
    totals, folder = prompts + outputs, os.path.basename(os.path.abspath(args.weights))
    return provenance(model.wte.weight.device) | dict(
        dtype=args.dtype,
        model=dict(name=f"{args.model}, random weights" if args.model else folder,
                   parameters=sum(p.numel() for p in model.base_parameters().values()),
                   quantize=args.quantize, attention=args.attention, compile=args.compile),
        workload=dict(source=args.dataset or "synthetic", requests=len(workload), scale=args.scale,
                      seed=args.seed, prompt_tokens_mean=float(prompts.mean()),
                      new_tokens_mean=float(outputs.mean()), total_tokens_min=int(totals.min()),
                      total_tokens_max=int(totals.max()), slots=args.slots,
                      num_adapters=args.num_adapters, ranks=args.ranks, repeats=args.repeats))


BUSY = 0.04   # a wider interval of a ratio tells rows apart no more
COLUMNS = [   # of the table, beside those that every mode has: (title, width, format, key of a row)
    ("s/token mean", 14, ".4f", "seconds_per_output_token_mean"),
    ("p50", 9, ".4f", "seconds_per_output_token_p50"),
    ("p99", 9, ".4f", "seconds_per_output_token_p99"),
    ("first token", 13, ".3f", "time_to_first_token_mean"),
    ("p99", 9, ".3f", "time_to_first_token_p99"),
]


def by_group(rows):
    """{(mode, request rate, tokens of an example): their rows}"""
    groups = {}
    for row in rows:
        groups.setdefault((row["mode"], row["request_rate"], row.get("tokens")), []).append(row)
    return groups


def print_table(rows, columns=COLUMNS):
    for (mode, rate, tokens), group in by_group(rows).items():
        print(f"\n{mode}" + (f" at {rate:.3g} requests/s" if rate else "")
              + (f", {tokens} tokens an example" if tokens else ""))
        print(f"{'':>14}{'rank':>5}{'tokens/s':>10}{'of base':>9}{'95 %':>16}"
              + "".join(f"{title:>{width}}" for title, width, _, _ in columns))
        for row in group:
            interval = f"{row['ratio_to_base_low']:.3f}-{row['ratio_to_base_high']:.3f}"
            print(f"{row['baseline']:>14}{row['rank'] or '':>5}{row['tokens_per_second']:>10.1f}"
                  f"{row['ratio_to_base']:>9.3f}{interval:>16}"
                  + "".join(f"{row[key]:>{width}{form}}" for _, width, form, key in columns))


def widest_interval(rows):
    """Of the ratios to the base in mode throughput."""
    return max((row["ratio_to_base_high"] - row["ratio_to_base_low"] for row in rows
                if row["mode"] == "throughput"), default=0.0)


def print_summary(result, share):
    """The limits, and the two predictions beside what was measured."""
    limits, eq7, free = result["limits"], result["eq7"], result["free_rank"]
    decode, prefill = limits["decode_share_of_bandwidth"], limits["prefill_share_of_matmul"]
    print(f"\nlimits: {limits['bandwidth_gb_s']:.1f} GB/s, of which decoding "
          f"{limits['decode_batch']} base requests reaches {100 * decode:.0f} %; "
          f"{limits['matmul_gflop_s']:.0f} GFLOP/s, of which a prefill of "
          f"{limits['prefill_tokens']} tokens reaches {100 * prefill:.0f} %")
    p = eq7["predicted"]
    print(f"Eq. 7 at {p['batch']} x {p['tokens']} tokens, d = {p['d']}, k = {p['k']}: "
          f"c1 = {p['c1']:.2e}, c2 = {p['c2']:.2e} s, predicted inflection rank "
          f"{tell_rank(p['inflection_rank'], result)}; measured: "
          + "; ".join(f"{name} {tell_rank(r, result)}{tell_apart(eq7, name)}"
                      for name, r in eq7["measured"].items()))
    print(f"free rank: {free['balance']:.1f} rows take as long as reading W0, so predicted for "
          f"{free['requests']} requests {free['predicted']:.1f}; at {share} of the base or more: "
          + ", ".join(f"{name} {tell_ranks(ranks)}" for name, ranks in free["measured"].items()))
    widest = widest_interval(result["rows"])
    if widest:
        print(f"the widest interval of a throughput's ratio is {widest:.3f}")
    if widest > BUSY:
        print("That is too wide to tell rows apart: this machine was too busy, or the workload is "
              "short. Close other programs, or keep to one core, whose steps no other program "
              "holds up: OMP_NUM_THREADS=1 python bench.py ...; or raise --repeats.")


def tell_rank(rank, result):
    if rank is None:
        return "no rows of it"
    if rank == 0:
        return "below the first rank"
    last = max(result["workload"]["ranks"])
    return f"{rank:.1f}" if np.isfinite(rank) else f"none up to rank {last}"


def tell_apart(eq7, name):
    """Between which ranks FLoRA and a LoRA cannot be told apart, in words."""
    ahead, behind = eq7.get("told_apart", {}).get(name, (0, np.inf))
    if behind in (None, np.inf):   # JSON's null is infinity
        return f" (FLoRA is ahead up to rank {ahead})" if ahead else " (told apart at no rank)"
    if ahead:
        return f" (not told apart between ranks {ahead} and {behind})"
    return f" (LoRA is ahead from rank {behind}; below it they cannot be told apart)"


def tell_ranks(ranks):
    if ranks is None:
        return "no rows of it"
    return " ".join(map(str, ranks)) or "none"


PANELS = {   # of the figure: {mode: its title}
    "throughput": "All requests at once", "latency": "Time per token of a request",
    "layer": "One projection"}


def draw(result, png, panels=PANELS):
    """The paper's Figure 2 as ratios to the base: a panel for each mode and request rate, with
    intervals where the results hold some; above them what was found."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    # older results have no ratio of latencies
    rows = [row for row in result["rows"] if row["mode"] in panels and
            (row["mode"] != "latency" or "ratio_to_base_low" in row)]
    groups = by_group(rows)
    figure, axes = plt.subplots(1, len(groups), figsize=(max(7, 4.6 * len(groups)), 4.6),
                                squeeze=False)
    for axis, ((mode, rate, tokens), group) in zip(axes[0], groups.items()):
        draw_ratios(axis, [row for row in group if row["method"] != "base"])
        note = f", {rate:.3g} requests/s" if rate else ""
        note += f", tokens an example: {tokens}" if tokens else ""
        axis.set_title(PANELS[mode] + note, fontsize=9)
        axis.set(xlabel="rank", ylabel="speed, share of the base model's (higher is better)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=2,
                  loc="upper center", bbox_to_anchor=(0.5, 0))
    figure.suptitle(tell_finding(result, rows), fontsize=10)
    save_figure(figure, png)
    print(f"wrote {png}")


def draw_ratios(axis, rows):
    """A line for each method over the ranks, bars for the intervals. IA3 has no rank."""
    names = list(dict.fromkeys(row["baseline"] for row in rows))
    for i, name in enumerate(names):
        mine = [row for row in rows if row["baseline"] == name]
        x = [row["rank"] * 1.03**(i - len(names) / 2) for row in mine]   # beside each other
        with_bars(axis, x, mine, "ratio_to_base", color=f"C{i}", label=full_name(name))
    axis.axhline(1, color="grey", linewidth=1)
    ranks = sorted({row["rank"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, ["none" if rank < 1 else rank for rank in ranks])
    axis.minorticks_off()


def with_bars(axis, x, rows, key, **look):
    """A line of row[key] over x, with bars from {key}_low to {key}_high if the rows have them."""
    y, bars = np.array([row[key] for row in rows]), None
    if all(f"{key}_low" in row for row in rows):
        bars = np.clip([y - [row[f"{key}_low"] for row in rows],
                        [row[f"{key}_high"] for row in rows] - y], 0, None)
    axis.errorbar(x, y, bars, marker="o", markersize=3, capsize=2, **look)


def tell_finding(result, rows):
    """What the figure says: FLoRA beside the paper's bmm-LoRA at the first and the last rank, of
    the first panel; and where it is one, the inflection rank."""
    where = result["machine"]["gpu"] or f"{result['machine']['threads']} threads of a CPU"
    head = (f"{model_name(result['model']['name'])}, {result['dtype']}, {where}, "
            f"{result['workload']['slots']} requests at once{tell_bars(rows)}")
    (mode, _, _), rows = next(iter(by_group(rows).items()))
    share = {(row["baseline"], row["rank"]): row["ratio_to_base"] for row in rows}
    ranks = sorted(rank for name, rank in share
                   if name == "flora" and ("lora-token", rank) in share)
    if not ranks:
        return head
    flora, lora = ([f"{share[name, rank]:.2f}" for rank in (ranks[0], ranks[-1])]
                   for name in ("flora", "lora-token"))
    found = (f"FLoRA keeps {flora[0]} of the base model's speed at rank {ranks[0]} and {flora[1]} "
             f"at rank {ranks[-1]}; LoRA, bmm per token, {lora[0]} and {lora[1]}")
    return "\n".join([found, *([tell_inflection(result)] if mode == "throughput" else []), head])


def tell_inflection(result):
    """Eq. 7's rank, the measured one, and between which the two cannot be told apart."""
    eq7 = result["eq7"]
    predicted, measured = (np.inf if rank is None else rank for rank in   # JSON's null
                           (eq7["predicted"]["inflection_rank"], eq7["measured"]["lora-token"]))
    apart = tell_apart(eq7, "lora-token") if "told_apart" in eq7 else ""
    return (f"inflection rank by Eq. 7 {tell_rank(predicted, result)}, measured "
            f"{tell_rank(measured, result)}{apart}")


def tell_bars(rows):
    """What the bars are: bench.py's 95 % intervals, or those of few rounds, their extremes."""
    if not all("ratio_to_base_low" in row for row in rows):
        return ""
    turns = all("decoding_step_seconds" in row for row in rows)
    return "; bars: " + ("95 % intervals" if turns else "lowest and highest of the rounds")


def finite(value):
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
