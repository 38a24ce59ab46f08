"""What bench.py prints and draws of its results."""
import os

import numpy as np

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
        print(f"{'':>14}{'rank':>5}{'tokens/s':>10}{'min-max':>16}{'of base':>9}"
              + "".join(f"{title:>{width}}" for title, width, _, _ in columns))
        for row in group:
            spread = f"{row['tokens_per_second_min']:.0f}-{row['tokens_per_second_max']:.0f}"
            print(f"{row['baseline']:>14}{row['rank'] or '':>5}{row['tokens_per_second']:>10.1f}"
                  f"{spread:>16}{row['ratio_to_base']:>9.3f}"
                  + "".join(f"{row[key]:>{width}{form}}" for _, width, form, key in columns))


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
          + ", ".join(f"{name} {tell_rank(r, result)}" for name, r in eq7["measured"].items()))
    print(f"free rank: {free['balance']:.1f} rows take as long as reading W0, so predicted for "
          f"{free['requests']} requests {free['predicted']:.1f}; at {share} of the base or more: "
          + ", ".join(f"{name} {tell_ranks(ranks)}" for name, ranks in free["measured"].items()))


def tell_rank(rank, result):
    if rank is None:
        return "no rows of it"
    if rank == 0:
        return "below the first rank"
    last = max(result["workload"]["ranks"])
    return f"{rank:.1f}" if np.isfinite(rank) else f"none up to rank {last}"


def tell_ranks(ranks):
    if ranks is None:
        return "no rows of it"
    return " ".join(map(str, ranks)) or "none"


PANELS = {   # of the figure: {mode: (key of a row, title)}
    "throughput": ("tokens_per_second", "Throughput (tokens/s)"),
    "latency": ("seconds_per_output_token_mean", "Seconds per output token"),
}


def draw(bench):
    """The paper's Figure 2: throughput and latency across ranks, with Eq. 7's inflection rank."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    result, panels = bench.result, bench.panels
    rows = {mode: [row for row in result["rows"] if row["mode"] == mode] for mode in panels}
    panels = {mode: panel for mode, panel in panels.items() if rows[mode]}
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.4), squeeze=False)
    for axis, (mode, (metric, title)) in zip(axes[0], panels.items()):
        draw_lines(axis, rows[mode], metric)
        if mode == "throughput":
            draw_inflection(axis, result)
        axis.set(xlabel="Rank", title=title)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    where = result["machine"]["gpu"] or result["machine"]["cpu"]
    figure.suptitle(f"{result['model']['name']}, {result['dtype']}, {where}, "
                    f"{result['workload']['slots']} slots", fontsize=9)
    save_figure(figure, bench.args.png)
    print(f"wrote {bench.args.png}")


def draw_lines(axis, rows, metric):
    """One mode's rows: a color for each method, a style for each request rate or token count."""
    names = list(dict.fromkeys(row["baseline"] for row in rows))
    for ((_, rate, tokens), group), style in zip(by_group(rows).items(), ["-", "--", ":", "-."]):
        note = (f", {rate:.3g} req/s" if rate else "") + (f", {tokens} tokens" if tokens else "")
        for i, name in enumerate(names):
            found = [row for row in group if row["baseline"] == name]
            look = dict(color=f"C{i}", linestyle=style, label=name + note)
            if found[0]["method"] in ("base", "ia3"):   # without a rank
                axis.axhline(found[0][metric], linewidth=1, **look)
            else:
                points = [(row["rank"], row[metric]) for row in found]
                axis.plot(*zip(*points), marker="o", markersize=3, **look)


def draw_inflection(axis, result):
    eq7 = result["eq7"]
    told = [(eq7["predicted"]["inflection_rank"], ":", "predicted by Eq. 7")]
    if "lora-token" in eq7["measured"]:   # that row ran
        told.append((eq7["measured"]["lora-token"], "-", "measured"))
    for rank, style, what in told:
        label = f"inflection against lora-token, {what}: {tell_rank(rank, result)}"
        at = rank if rank and np.isfinite(rank) else np.nan   # nan has a legend alone
        axis.axvline(at, color="grey", linestyle=style, linewidth=1, label=label)


def finite(value):
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
