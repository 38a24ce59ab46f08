"""The flags of bench.py, and which of them go together."""
import argparse
import os

from plumbing.files import BadInput
from plumbing.flags import Help, add_common_flags, check_numbers, get_device
from plumbing.outputs import JSON, PNG, check_writable


def parse_args(argv, description, known_rows, presets):
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=Help)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="of FLoRA and LoRA")
    add("--mode", nargs="+", choices=["throughput", "latency", "layer", "token"],
        default=["throughput", "latency"], help="what is measured; layer and token are extras'")
    rows = [name for name in known_rows if name != "flora-eq6"]
    add("--rows", nargs="+", default=rows, metavar="ROW", help="the base always runs too; "
        f"{', '.join(known_rows)}, and those of extras/bench_more.py (default: {' '.join(rows)})")
    add("--model", metavar="NAME", help="a size instead of --weights, with --random-weights: "
        f"{', '.join(presets)}, or one of extras/llama.py's")
    add("--random-weights", action="store_true", help="goes with --model")
    add("--attention", choices=["flash", "math"], default="flash", help="math: as in the paper")
    add("--compile", action="store_true",
        help="decode with torch.compile; its time is reported apart")
    add("--num-requests", type=int, help="default: 1,000, on a CPU 32")
    add("--scale", type=float, help="multiply all lengths by this (default: 1, on a CPU 0.25)")
    add("--dataset", metavar="FILE", help="ShareGPT's JSON format (default: a synthetic mixture)")
    add("--num-adapters", type=int, default=32,
        help="distinct adapters; request i runs number i modulo this")
    add("--slots", type=int, help="requests that run at once (default: 64, on a CPU 8)")
    add("--max-batched-tokens", type=int, help="default: 8,192, for latency 2,560, as in the paper")
    add("--request-rate", type=float, nargs="+", help="arrivals a second for latency (default: 0.8 "
        "times what the base model serves)")
    add("--layer-tokens", type=int, nargs="+", default=[1, 64, 256],
        help="tokens an example, for layer")
    add("--token-length", type=int, default=128, help="new tokens of a request, for token")
    add("--repeats", type=int, default=3,
        help="runs of the workload; latency takes one, its interval is over the requests")
    add("--turns", choices=["steps", "rounds"], default="steps", help="rows take turns by single "
        "steps, each with a cache of its own, or by whole workloads (extras/bench_rounds.py)")
    add("--png", metavar="FILE", help="default: out/fig2_DEVICE.png")
    add("--plot", nargs="+", metavar="JSON",
        help="no measuring: draw the throughput of these results into --png (Fig. 3)")
    add_common_flags(parser, dtypes=["float32", "bfloat16", "float16", "auto"])
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args):
    counts = ["ranks", "num_requests", "num_adapters", "slots", "max_batched_tokens",
              "layer_tokens", "token_length", "repeats"]
    check_numbers(args, counts, at_least_0=["seed"], above_0=["request_rate", "scale"])
    if bool(args.model) != args.random_weights:
        raise BadInput("--model needs --random-weights and the other way round; for a checkpoint "
                       "use --weights FOLDER")


def find_outputs(args):
    """Fill in --json and --png, and see that both can be written."""
    device = get_device(args.device).type
    args.json = args.json or os.path.join("out", f"bench_{device}.json")
    args.png = args.png or os.path.join("out", f"fig2_{device}.png")
    check_writable(args.json, "--json", JSON, make_folder=True)
    if args.mode != ["token"]:
        check_writable(args.png, "--png", PNG, make_folder=True)
