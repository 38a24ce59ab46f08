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
METHODS = {  # command: {name in its table, beginning with the adapter's kind: flags of train.py}
    "losses": {"flora-r1": "--adapter flora --rank 1", "flora-r4": "--adapter flora --rank 4",
               "lora-r1": "--adapter lora --rank 1", "lora-r4": "--adapter lora --rank 4",
               "ia3": "--adapter ia3", "ia3-c_attn": "--adapter ia3 --targets c_attn"},
    "toys": {"flora-r4": "--adapter flora --rank 4 --targets all", "lora-r4": "--adapter lora --rank 4 --targets all",
             "ia3": "--adapter ia3 --targets all"},
}
SITE = sysconfig.get_paths()["purelib"]
CORPORA = {  # real code that the requirements bring: (folder, extensions)
    "cpp": (os.path.join(os.path.dirname(torch.__file__), "include"), ".h .hpp"),
    "cuda": (os.path.join(os.path.dirname(torch.__file__), "include"), ".cuh .cu"),
    "cmake": (SITE, ".cmake"),
    "pyi": (SITE, ".pyi"),
}
TUNE_SEED = 100  # learning rates are chosen with a seed that no table shows


def corpus(name):
    """"cpp", or "NAME=FOLDER:.EXT" for code of one's own -> (name, train.py's --data and --ext)."""
    if name in CORPORA:
        folder, extensions = CORPORA[name]
    else:
        name, _, place = name.partition("=")
        folder, _, extensions = place.rpartition(":")
        if not (folder and extensions):
            raise BadInput(f"--languages {name}: use one of {', '.join(CORPORA)}, or NAME=FOLDER:.EXT")
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


# ------------------------------------------------------------------------------- held-out losses


def tune(args, data):
    """Choose each method's learning rate by held-out loss on `data`: from train.py's default up by factors of two
    to 8, and on in either direction while the last one tried is the best. Prints the sweep.

    -> {method: {rate: held-out bits/byte}}
    """
    methods = args.methods or list(METHODS[args.command])
    sweep = {method: {} for method in methods}
    default = {method: LEARNING_RATE[method.split("-")[0]] for method in methods}
    wanted = {method: [lr, 2 * lr, 4 * lr, 8 * lr] for method, lr in default.items()}
    while any(wanted.values()):
        runs = {f"{args.out}/tune/{method}/{lr:g}": train_flags(args, method, data, lr, TUNE_SEED)
                for method in wanted for lr in wanted[method]}
        logs = train_all(runs, args.jobs)
        for method, tried in sweep.items():
            tried |= {lr: logs[f"{args.out}/tune/{method}/{lr:g}"]["heldout_bpb_after"] for lr in wanted[method]}
            best = min(tried, key=tried.get)
            wanted[method] = [2 * best] if best == max(tried) else [best / 2] if best == min(tried) else []
    print(f"\nlearning rates, tried on {args.languages[0]} with seed {TUNE_SEED}: held-out bits/byte")
    for method, tried in sweep.items():
        print(f"{method:>12}  " + "  ".join(f"{lr:g}: {tried[lr]:.4f}" for lr in sorted(tried)))
    return sweep


def train_flags(args, method, data, lr, seed):
    """train.py's flags for one run."""
    return [*METHODS[args.command][method].split(), *data, "--lr", f"{lr:g}", "--seed", str(seed),
            "--weights", args.weights, "--dtype", args.dtype, "--device", args.device, "--steps", str(args.steps),
            "--batch-size", str(args.batch_size), "--block-size", str(args.block_size),
            "--eval-every", str(args.steps), "--eval-tokens", str(args.eval_tokens)]


def train_table(args, languages):
    """Tune on the first of {language: train.py's --data flags}, then train all languages x methods x seeds.

    -> {language: {method: [log.json of each seed]}}, the sweep of `tune`
    """
    sweep = tune(args, next(iter(languages.values())))
    best = {method: min(tried, key=tried.get) for method, tried in sweep.items()}
    logs = train_all({f"{args.out}/{language}/{method}/{seed}": train_flags(args, method, data, best[method], seed)
                      for language, data in languages.items() for method in best for seed in args.seeds}, args.jobs)
    print(f"\n{len(logs)} trainings of {args.steps} steps of {args.batch_size} x {args.block_size} tokens, {args.dtype}, "
          f"{args.jobs} at once, {np.mean([log['seconds'] for log in logs.values()]):.0f} s each")
    return {language: {method: [logs[f"{args.out}/{language}/{method}/{seed}"] for seed in args.seeds]
                       for method in best} for language in languages}, sweep


def over_seeds(values, **more):
    """Mean and standard deviation, a cell of a table."""
    return dict(mean=float(np.mean(values)), spread=float(np.std(values, ddof=len(values) > 1)), seeds=values, **more)


def finish(args, table, sweep, **more):
    """Write a table and its sweep as JSON."""
    settings = {key: getattr(args, key) for key in ("seeds", "steps", "batch_size", "block_size", "dtype", "weights")}
    write_json(f"{args.out}/table.json", dict(table=table, sweep=sweep, torch=torch.__version__, **settings, **more))
    print(f"\nwrote {args.out}/table.json and {args.png}")


def losses(args):
    """The command `losses`: Table 1's form, in held-out bits per byte."""
    logs, sweep = train_table(args, dict(map(corpus, args.languages)))
    table = {}
    for language, methods in logs.items():
        table[language] = {"base": over_seeds([next(iter(methods.values()))[0]["heldout_bpb_before"]])}
        for method, seeds in methods.items():
            table[language][method] = over_seeds([log["heldout_bpb_after"] for log in seeds],
                                                 parameters=seeds[0]["trainable_parameters"])
    print_accuracy(table, "held-out bits per byte (relative improvement) ± standard deviation over seeds",
                   lambda base, x: f"{100 * (base - x) / base:+.1f} %")
    draw(args.png, table, "held-out bits per byte saved", lambda base, x: base - x)
    finish(args, table, sweep)


def toys(args):
    """The command `toys`: pass@1 on held-out problems of a family made for small models, by execution.

    A base model that has learnt the family in Python alone is adapted to each of the other languages.
    """
    require_consent(args)
    problems, base = f"{args.out}/problems", f"{args.out}/base"
    if not os.path.exists(f"{problems}/py.jsonl"):
        subprocess.run([sys.executable, HERE / "fixtures" / "make_problems.py", problems], check=True)
    held_out = {language: read_problems(f"{problems}/{language}.jsonl") for language in ("py", *args.languages)}
    data = {language: ["--data", f"{problems}/{language}", "--keep-duplicates"] for language in held_out}
    train_all({base: ["--adapter", "none", "--weights", args.weights, *data.pop("py"), "--lr", "1e-3", "--steps",
                      str(args.base_steps), "--batch-size", str(args.batch_size), "--block-size", str(args.block_size),
                      "--dtype", args.dtype, "--device", args.device, "--eval-every", str(args.base_steps)]}, 1)
    args.weights = base
    logs, sweep = train_table(args, data)

    model, tokenizer = load_model(args)
    def score(problems, adapter, file):
        if not os.path.exists(file):
            adapter_id = load_adapters(model, [adapter])[adapter]
            counts = evaluate_problems(model, tokenizer, adapter_id, problems, args.samples, max_new_tokens=96,
                                       temperature=0.1, slots=16)
            if adapter_id:
                flora.remove_adapter(model, adapter_id)
            write_json(file, dict(counts=counts))
        return float(np.mean([pass_at_k(args.samples, c.get("passed", 0), 1) for c in read_json(file)["counts"]]))

    table, bar = {}, tqdm(total=len(data) * len(next(iter(logs.values()))) * len(args.seeds), unit="adapter")
    in_python = score(held_out["py"], "none", f"{base}/pass.json")
    for language, methods in logs.items():
        table[language] = {"base": over_seeds([score(held_out[language], "none", f"{args.out}/{language}/pass.json")])}
        for method, seeds in methods.items():
            passed = []
            for log in seeds:
                passed.append(score(held_out[language], log["adapter_file"], log["adapter_file"].replace(
                    "adapter.safetensors", "pass.json")))
                bar.update()
            table[language][method] = over_seeds(passed, parameters=seeds[0]["trainable_parameters"])
    bar.close()
    print(f"\nthe base model passes {in_python:.4f} of the held-out problems in Python, which it was trained on")
    print_accuracy(table, "pass@1 on held-out problems (change) ± standard deviation over seeds",
                   lambda base, x: f"{x - base:+.4f}")
    draw(args.png, table, "pass@1 on held-out problems", lambda base, x: x)
    finish(args, table, sweep, base_in_python=in_python)


def print_accuracy(table, title, change):
    """{row: {column: {mean, spread}}} as a Markdown table, each cell with its change from the base column."""
    columns = list(next(iter(table.values())))
    print(f"\n{title}\n\n| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for row, cells in table.items():
        base = cells["base"]["mean"]
        print(f"| {row} | {base:.4f} | " + " | ".join(
            f"{c['mean']:.4f} ({change(base, c['mean'])}) ± {c['spread']:.4f}"
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
    p.add_argument("--languages", nargs="+", default=list(CORPORA), metavar="LANGUAGE",
                   help=f"{', '.join(CORPORA)}, or NAME=FOLDER:.EXT (default: all four); rates are tuned on the first")
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
