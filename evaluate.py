"""Accuracy: does FLoRA learn as well as LoRA? (§4.2, Table 1)

  python evaluate.py losses           base, FLoRA, IA3 and LoRA on several languages, several seeds: held-out
                                      bits per byte, each method at its own best learning rate

Every training is a run of train.py in a folder of its own under --out, several at once. What has finished is
kept, so that the same command, given again after an interruption or with more languages, methods or seeds,
does only what is missing.
"""
import argparse
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flora import BadInput
from model import read_json, run_main, write_json
from train import LEARNING_RATE

HERE = Path(__file__).resolve().parent
METHODS = {  # name in the tables: flags of train.py
    "flora-r1": "--adapter flora --rank 1",
    "flora-r4": "--adapter flora --rank 4",
    "lora-r1": "--adapter lora --rank 1",
    "lora-r4": "--adapter lora --rank 4",
    "ia3": "--adapter ia3",
    "ia3-c_attn": "--adapter ia3 --targets c_attn",
}
SITE = sysconfig.get_paths()["purelib"]
LANGUAGES = {  # real code that the requirements bring: (folder, extensions)
    "cpp": (os.path.join(os.path.dirname(torch.__file__), "include"), ".h .hpp"),
    "cuda": (os.path.join(os.path.dirname(torch.__file__), "include"), ".cuh .cu"),
    "cmake": (SITE, ".cmake"),
    "pyi": (SITE, ".pyi"),
}
TUNE_SEED = 100  # learning rates are chosen with a seed that no table shows


def corpus(name):
    """"cpp", or "NAME=FOLDER:.EXT" for code of one's own -> (name, train.py's --data and --ext)."""
    if name in LANGUAGES:
        folder, extensions = LANGUAGES[name]
    else:
        name, _, place = name.partition("=")
        folder, _, extensions = place.rpartition(":")
        if not (folder and extensions):
            raise BadInput(f"--languages {name}: use one of {', '.join(LANGUAGES)}, or NAME=FOLDER:.EXT")
    return name, ["--data", folder, "--ext", *extensions.split()]


def train_all(runs, jobs):
    """Run train.py for every {folder: flags} that has no result yet, `jobs` at once with the cores shared out.

    -> {folder: its log.json}. A run that fails, or Ctrl-C, stops all; what has finished stays.
    """
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def run(folder):
        log = Path(folder, "log.json")
        if not log.exists():
            Path(folder).mkdir(parents=True, exist_ok=True)
            with open(Path(folder, "train.txt"), "w") as text:
                code = subprocess.run([sys.executable, str(HERE / "train.py"), *runs[folder], "--out", folder,
                                       "--resume"], stdout=text, stderr=text, env=env).returncode
            if code:
                raise BadInput(f"a training failed, see {folder}/train.txt; its command: python train.py "
                               f"{shlex.join(runs[folder])} --out {folder}")
        return folder, read_json(log)

    logs = {}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), unit="run") as bar:
        futures = [pool.submit(run, folder) for folder in runs]
        try:
            for future in as_completed(futures):
                folder, logs[folder] = future.result()
                bar.set_postfix(run=os.path.relpath(folder), bits=f"{logs[folder]['heldout_bpb_after']:.3f}")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return logs


def common_flags(args):
    return ["--weights", args.weights, "--dtype", args.dtype, "--device", args.device, "--steps", str(args.steps),
            "--batch-size", str(args.batch_size), "--block-size", str(args.block_size),
            "--eval-every", str(args.steps), "--eval-tokens", str(args.eval_tokens)]


# ------------------------------------------------------------------------------- held-out losses


def tune(args):
    """Choose each method's learning rate by held-out loss on the first language: from train.py's default up by
    factors of two to 8, and on in either direction while the last one tried is the best.

    -> {method: {rate: held-out bits/byte}}
    """
    name, data = corpus(args.languages[0])
    sweep = {method: {} for method in args.methods}
    default = {method: LEARNING_RATE[METHODS[method].split()[1]] for method in args.methods}
    wanted = {method: [lr, 2 * lr, 4 * lr, 8 * lr] for method, lr in default.items()}
    while any(wanted.values()):
        runs = {f"{args.out}/tune/{method}/{lr:g}":
                [*METHODS[method].split(), *data, *common_flags(args), "--lr", f"{lr:g}", "--seed", str(TUNE_SEED)]
                for method in wanted for lr in wanted[method]}
        logs = train_all(runs, args.jobs)
        for method, tried in sweep.items():
            tried |= {lr: logs[f"{args.out}/tune/{method}/{lr:g}"]["heldout_bpb_after"] for lr in wanted[method]}
            best = min(tried, key=tried.get)
            wanted[method] = [2 * best] if best == max(tried) else [best / 2] if best == min(tried) else []
    print(f"\nlearning rates, tried on {name} with seed {TUNE_SEED}: held-out bits/byte")
    for method, tried in sweep.items():
        print(f"{method:>12}  " + "  ".join(f"{lr:g}: {tried[lr]:.4f}" for lr in sorted(tried)))
    return sweep


def losses(args):
    """Train every language x method x seed, print Table 1's form in bits per byte, draw it."""
    sweep = tune(args)
    best = {method: min(tried, key=tried.get) for method, tried in sweep.items()}
    languages, runs = dict(map(corpus, args.languages)), {}
    for language, data in languages.items():
        for method in args.methods:
            for seed in args.seeds:
                runs[f"{args.out}/{language}/{method}/{seed}"] = [
                    *METHODS[method].split(), *data, *common_flags(args),
                    "--lr", f"{best[method]:g}", "--seed", str(seed)]
    logs = train_all(runs, args.jobs)

    table = {}
    for language in languages:
        for method in args.methods:
            runs_of_seeds = [logs[f"{args.out}/{language}/{method}/{seed}"] for seed in args.seeds]
            bits = [log["heldout_bpb_after"] for log in runs_of_seeds]
            table.setdefault(language, {"base": dict(mean=runs_of_seeds[0]["heldout_bpb_before"], spread=0.0)})
            table[language][method] = dict(mean=float(np.mean(bits)), spread=float(np.std(bits, ddof=len(bits) > 1)),
                                           seeds=bits, parameters=runs_of_seeds[0]["trainable_parameters"])
    print_table(table, "held-out bits per byte (relative improvement) ± standard deviation over "
                f"{len(args.seeds)} seeds", lambda base, x: (base - x) / base)
    seconds = sum(log["seconds"] for log in logs.values())
    print(f"\n{len(logs)} trainings of {args.steps} steps of {args.batch_size} x {args.block_size} tokens, {args.dtype}, "
          f"{args.jobs} at once; {seconds / len(logs):.0f} s each")
    write_json(f"{args.out}/table.json", dict(table=table, sweep=sweep, learning_rates=best, seeds=args.seeds,
               steps=args.steps, batch_size=args.batch_size, block_size=args.block_size, dtype=args.dtype,
               torch=torch.__version__))
    draw(args.png, table, "held-out bits per byte saved", lambda base, x: base - x)
    print(f"wrote {args.out}/table.json and {args.png}")


def print_table(table, title, relative):
    """{row: {column: {mean, spread}}} as a Markdown table, each cell with its change from the base column."""
    columns = list(next(iter(table.values())))
    print(f"\n{title}\n\n| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for row, cells in table.items():
        base = cells["base"]["mean"]
        print(f"| {row} | {base:.4f} | " + " | ".join(
            f"{c['mean']:.4f} ({100 * relative(base, c['mean']):+.1f} %) ± {c['spread']:.4f}"
            for name, c in cells.items() if name != "base") + " |")


def draw(file, table, title, height):
    """Bars of height(base, mean) for every row of `table` and method, with the spread over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    methods = [name for name in next(iter(table.values())) if name != "base"]
    figure, axis = plt.subplots(figsize=(1.5 + 1.6 * len(table), 3.6))
    for i, method in enumerate(methods):
        x = np.arange(len(table)) + (i - (len(methods) - 1) / 2) / (len(methods) + 1)
        axis.bar(x, [height(row["base"]["mean"], row[method]["mean"]) for row in table.values()], 0.9 / (len(methods) + 1),
                 yerr=[row[method]["spread"] for row in table.values()], label=method, capsize=2)
    axis.set_xticks(range(len(table)), list(table))
    axis.set(ylabel=title)
    axis.legend(fontsize=8)
    figure.tight_layout()
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    figure.savefig(f"{file}.tmp", format="png", dpi=130)
    os.replace(f"{file}.tmp", file)


def parse_args(argv=None):
    from model import add_common_flags
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("losses", help="held-out losses of every language x method x seed")
    p.add_argument("--languages", nargs="+", default=list(LANGUAGES), metavar="LANGUAGE",
                   help=f"{', '.join(LANGUAGES)}, or NAME=FOLDER:.EXT (default: all four); rates are tuned on the first")
    p.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--block-size", type=int, default=128)
    p.add_argument("--eval-tokens", type=int, default=16384)
    p.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 1), help="trainings at once")
    p.add_argument("--out", default="out/losses")
    p.add_argument("--png", default="figures/table1_losses.png")
    add_common_flags(p, dtypes=["float32", "bfloat16"])
    return parser.parse_args(argv)


def main():
    args = parse_args()
    losses(args)


if __name__ == "__main__":
    run_main(main)
