"""Does FLoRA learn as well as LoRA? Table 1's form in held-out bits per byte of real code (§4.2).

  python -m extras.table1

Trains every language x method x seed of --seeds, each method at its own best learning rate, chosen
on the first language by a mean over other seeds, --tune-seeds. A training is a run of train.py in a
folder of its own under --out, several at once. Trainings that have finished are kept: the same
command, given again after an interruption or with more languages, methods or seeds, does only what
is missing.

extras/toys.py shares all but the measure.
"""
import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import flora
import train
from extras.fast import check_packs
from model import model_class, read_config
from plumbing.checkpoints import contents, flags_of
from plumbing.files import BadInput, read_json
from plumbing.flags import Help, add_common_flags, run_main
from plumbing.names import full_name
from plumbing.outputs import PNG, check_writable, save_figure, write_each, write_json
from plumbing.provenance import difference, provenance
from plumbing.runs import outputs as run_outputs
from plumbing.texts import load_texts

TRAIN = train.__file__
WITH_PARENT = str(Path(__file__).with_name("with_parent.py"))
METHODS = {  # name in the table: flags of train.py
    "flora-r1": "--adapter flora --rank 1",
    "lora-r1": "--adapter lora --rank 1",
    "flora-r4": "--adapter flora --rank 4",
    "lora-r4": "--adapter lora --rank 4",
    "ia3": "--adapter ia3",
    "ia3-c_attn": "--adapter ia3 --targets c_attn",
    "ffba-r2": "--adapter ffba --rank 2",
    "hira-r1": "--adapter hira --rank 1",   # as many parameters as flora-r1
    "hira-r4": "--adapter hira --rank 4",
}
HEADERS = os.path.join(os.path.dirname(torch.__file__), "include")
SITE = sysconfig.get_paths()["purelib"]
CORPORA = {  # real code that the requirements bring: (folder, extensions)
    "cpp": (HEADERS, ".h .hpp"),
    "cuda": (HEADERS, ".cuh .cu"),
    "cmake": (SITE, ".cmake"),
    "pyi": (SITE, ".pyi"),
}
# Of a log.json: what is read of it; and what is compared where it does not say what made it
LOG = {"heldout_bpb_before": float, "heldout_bpb_after": float, "trainable_parameters": int,
       "seconds": float}
MUST_AGREE = ("adapter", "lr", "seed", "steps", "batch_size", "block_size", "dtype", "quantize")


def saved(base, x):
    return base - x


SAVED = "held-out bits per byte saved", saved   # what the figure shows


def losses(args):
    """Train, and print held-out bits per byte."""
    with outputs(args):
        logs, sweep = train_table(args, dict(corpus(name) for name in args.languages))
        table = {language: losses_row(methods) for language, methods in logs.items()}
        print_accuracy(table, "held-out bits per byte (relative improvement) ± standard deviation "
                       "over seeds", lambda base, x: f"{100 * (base - x) / base:+.1f} %")
        finish(args, table, sweep, *SAVED)


@contextlib.contextmanager
def outputs(args):
    """Inside, no other table is made in --out; what cannot be written is found out before."""
    args.json = args.json or f"{args.out}/table.json"
    with run_outputs(args):
        check_writable(args.png, "--png", PNG, make_folder=True)
        if "--fast" in size_flags(args):
            check_packs(getattr(torch, args.dtype))
        yield


def losses_row(methods):
    """{method: [log.json of each seed]} -> {"base" or method: cell}."""
    first = next(iter(methods.values()))
    row = {"base": over_seeds([first[0]["heldout_bpb_before"]])}
    for method, logs in methods.items():
        row[method] = over_seeds([log["heldout_bpb_after"] for log in logs],
                                 parameters=logs[0]["trainable_parameters"])
    return row


def corpus(name):
    """"cpp", or "NAME=FOLDER:.EXT" for other code -> (name, train.py's --data and --ext)."""
    if name in CORPORA:
        folder, extensions = CORPORA[name]
    else:
        name, _, place = name.partition("=")
        folder, _, extensions = place.rpartition(":")
        if not (folder and extensions):
            raise BadInput(f"--languages {name}: use one of {', '.join(CORPORA)}, or "
                           "NAME=FOLDER:.EXT")
    return name, ["--data", folder, "--ext", *extensions.split()]


# --------------------------------------------------------------------------------------- trainings


def train_table(args, languages):
    """Tune on the first of {language: train.py's --data flags}, then train all languages x methods
    x seeds -> ({language: {method: [log.json of each seed]}}, the sweep of `tune`)."""
    sweep = tune(args, next(iter(languages.values())))
    runs, folders = {}, {}
    for language, data in languages.items():
        folders[language] = {}
        for method, tried in sweep.items():
            rate = min(tried, key=tried.get)
            mine = {f"{args.out}/{language}/{method}/{seed}": train_flags(
                args, method, data, rate, seed) for seed in args.seeds}
            folders[language][method] = list(mine)
            runs |= mine
    logs = train_all(runs, args.jobs)
    seconds = np.mean([log["seconds"] for log in logs.values()])
    print(f"\n{len(logs)} trainings of {args.steps} steps of {args.batch_size} x {args.block_size} "
          f"tokens, {args.dtype}, {args.jobs} at once, {seconds:.0f} s each")
    table = {}
    for language, methods in folders.items():
        table[language] = {method: [logs[f] for f in mine] for method, mine in methods.items()}
    return table, sweep


def tune(args, data):
    """Choose each method's learning rate by held-out loss on `data` (train.py's flags), a mean over
    --tune-seeds: one seed alone may prefer a rate twice too large. Prints the sweep.

    The rates go from the kind's own up by factors of two to 8, and on in either direction while
    the last one tried is the best. -> {method: {rate: held-out bits/byte}}
    """
    sweep, wanted = {method: {} for method in args.methods}, {}
    for method, flags in args.methods.items():
        own = flora.adapter_class(train.parse_args(flags.split()).adapter).learning_rate
        wanted[method] = [own, 2 * own, 4 * own, 8 * own]
    while any(wanted.values()):
        for method, rate, losses in tuning_losses(args, data, wanted):
            sweep[method][rate] = float(np.mean(losses))
        wanted = {method: next_rates(tried) for method, tried in sweep.items()}
    print(f"\nlearning rates, tried on {args.languages[0]}: held-out bits/byte, a mean over seeds "
          f"{' '.join(map(str, args.tune_seeds))}")
    for method, tried in sweep.items():
        cells = "  ".join(f"{rate:g}: {tried[rate]:.4f}" for rate in sorted(tried))
        print(f"{method:>12}  {cells}")
    return sweep


def tuning_losses(args, data, wanted):
    """Train {method: rates} with each of --tune-seeds -> (method, rate, [held-out bits/byte of
    each seed]), one by one."""
    tried = [(method, rate) for method, rates in wanted.items() for rate in rates]
    runs = {}
    for method, rate in tried:
        for seed in args.tune_seeds:
            runs[tuning_folder(args, method, rate, seed)] = train_flags(
                args, method, data, rate, seed)
    logs = train_all(runs, args.jobs)
    for method, rate in tried:
        mine = [logs[tuning_folder(args, method, rate, seed)] for seed in args.tune_seeds]
        yield method, rate, [log["heldout_bpb_after"] for log in mine]


def tuning_folder(args, method, rate, seed):
    return f"{args.out}/tune/{method}/{rate:g}/{seed}"


def next_rates(tried):
    """{rate: loss} -> the rates to try next: beyond the best, if it lies at an end."""
    best = min(tried, key=tried.get)
    if best == max(tried):
        return [2 * best]
    if best == min(tried):
        return [best / 2]
    return []


def train_flags(args, method, data, lr, seed):
    """train.py's flags for one run."""
    own = on_own_targets(args.methods[method].split(), args.weights)
    return [*own, *data, "--lr", f"{lr:g}", "--seed", str(seed),
            "--weights", args.weights, "--steps", str(args.steps), *size_flags(args),
            "--eval-every", str(args.steps), "--eval-tokens", str(args.eval_tokens),
            *(["--quantize", args.quantize] if args.quantize else [])]


def on_own_targets(flags, weights):
    """train.py's flags, with the kind's own targets where they name none: train.py has others for
    the embedded base."""
    if "--targets" in flags:
        return flags
    family = model_class(read_config(weights).model_type)
    kind = train.parse_args(flags).adapter
    return [*flags, "--targets", *flora.default_targets(family, kind)]


def size_flags(args):
    """train.py's flags that all of its runs share."""
    packs = args.device == "cpu" and torch.backends.mkldnn.is_available()
    return ["--batch-size", str(args.batch_size), "--block-size", str(args.block_size),
            "--dtype", args.dtype, "--device", args.device,
            *(["--fast"] if packs else [])]


def train_all(runs, jobs):
    """Run train.py for every {folder: flags} that has no result yet, `jobs` at once with the cores
    shared out -> {folder: its log.json}.

    A run that fails, or Ctrl-C, stops all; what has finished stays.
    """
    logs, running = finished(runs), set()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool, \
            tqdm(total=len(runs), initial=len(logs), unit="run") as bar:
        futures = {pool.submit(train_one, folder, flags, threads, running): folder
                   for folder, flags in runs.items() if folder not in logs}
        try:
            for future in as_completed(futures):
                folder, log = futures[future], future.result()
                logs[folder] = log
                bits = f"{log['heldout_bpb_after']:.3f}"
                bar.set_postfix(run=os.path.relpath(folder), bits=bits)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(running):
                process.terminate()
            raise
    return {folder: logs[folder] for folder in runs}


def train_one(folder, flags, threads, running):
    """Run train.py with its output in folder/train.txt -> log.json. It is in the set `running`
    while it does."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder, "train.txt"), "w") as text:
            process = subprocess.Popen(
                [sys.executable, WITH_PARENT, str(os.getpid()), TRAIN, *flags, "--out", folder,
                 "--resume"], stdout=text, stderr=text,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    except OSError as e:
        raise BadInput(f"{folder}: cannot be written ({e.strerror})") from None
    running.add(process)
    code = process.wait()
    running.discard(process)
    if code:
        raise BadInput(f"a training failed, see {folder}/train.txt; its command: python train.py "
                       f"{shlex.join(flags)} --out {folder}")
    return read_log(folder)


def read_log(folder):
    """folder/log.json, with the place where its adapter now is."""
    log = read_json(Path(folder, "log.json"), LOG)
    return log | dict(adapter_file=str(Path(folder, "adapter.safetensors")))


def finished(runs):
    """{folder: log.json} of the runs that have ended. BadInput where one was made with other
    settings, another base or other data than train.py's flags for it name now."""
    logs, known, unchecked = {}, {}, 0
    for folder, flags in runs.items():
        if not Path(folder, "log.json").exists():
            continue
        log, asked = read_log(folder), train.parse_args(flags)
        now = {name: getattr(asked, name) for name in MUST_AGREE}
        made = log.get("made_with")
        if isinstance(made, dict):
            train.fill_targets(asked)
            now = flags_of(asked) | contents_of(asked, known)
        else:
            made, unchecked = log, unchecked + 1
        other = difference(made, now)
        if other:
            raise BadInput(f"{folder}/log.json was made with {other}; choose another --out, or "
                           "delete it")
        logs[folder] = log
    if unchecked:
        print(f"{unchecked} trainings were written before there were fingerprints; whether their "
              "base model and data are the same is not checked", file=sys.stderr)
    return logs


def contents_of(asked, known):
    """checkpoints.contents for train.py's flags; `known` keeps what was read before."""
    what = asked.weights, asked.adapter == "none", tuple(asked.data or ()), tuple(asked.ext)
    if what not in known:
        known[what] = contents(asked, load_texts(asked))
    return known[what]


# --------------------------------------------------------------------------------------- the table


def over_seeds(values, **more):
    """A cell of a table: mean, standard deviation, the values."""
    spread = float(np.std(values, ddof=len(values) > 1))
    return dict(mean=float(np.mean(values)), spread=spread, seeds=values, **more)


def print_accuracy(table, title, change):
    """{row: {column: {mean, spread}}} as a Markdown table.

    Each cell has change(base, mean), its change from the row's base column.
    """
    columns = list(next(iter(table.values())))
    print(f"\n{title}\n\n| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in table.items():
        base = row["base"]["mean"]
        cells = [f"{base:.4f}"]
        for method in columns[1:]:
            mean, spread = row[method]["mean"], row[method]["spread"]
            cells.append(f"{mean:.4f} ({change(base, mean)}) ± {spread:.4f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


MOST = 6   # methods in a figure; the table has all


def draw(file, table, title, height):
    """height(base, mean) for every row and the first methods of `table`, with the seeds' spread."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    every = list(next(iter(table.values())))[1:]
    shown = {method: [(height(row["base"]["mean"], row[method]["mean"]), row[method]["spread"])
                      for row in table.values()] for method in every[:MOST]}
    figure, axis = plt.subplots(figsize=(4 + 1.6 * len(table), 4))
    for i, (method, cells) in enumerate(shown.items()):
        x = np.arange(len(table)) + (i - (len(shown) - 1) / 2) / (len(shown) + 2)
        axis.errorbar(x, *zip(*cells), fmt="os^vDP"[i], markersize=5, capsize=3,
                      label=full_name(method))
    axis.set_xticks(range(len(table)), map(full_name, table))
    axis.set(ylabel=f"{title} (higher is better)")
    left_out = f"; not shown: {', '.join(map(full_name, every[MOST:]))}" if every[MOST:] else ""
    what = f"mean ± standard deviation over seeds{left_out}"
    axis.set_title(f"{tell_finding(shown)}\n{what}", fontsize=9)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, file)


def tell_finding(shown):
    """What a figure of {method: [(height, spread) of each row]} says: which is the best in how many
    rows, and how LoRA and FLoRA of a rank compare."""
    heights = {method: [height for height, _ in cells] for method, cells in shown.items()}
    best = [max(shown, key=lambda method: heights[method][i])
            for i in range(len(next(iter(shown.values()))))]
    first = max(shown, key=best.count)
    found = [f"{full_name(first)} is the best of these in {best.count(first)} of {len(best)}"]
    for method in shown:
        lora = method.replace("flora", "lora", 1)
        if method != lora in shown:
            ahead = tell_ahead(shown[lora], shown[method])
            behind = tell_ahead(shown[method], shown[lora])
            found.append(f"{full_name(lora)} is ahead of {full_name(method)} {ahead or 'in none'}"
                         + (f", behind it {behind}" if behind else ""))
    return "\n".join(found)


def tell_ahead(mine, other):
    """In how many cells `mine` is higher, and in how many of those by more than the spread; "" for
    none."""
    gaps = [(a - b, max(s, t)) for (a, s), (b, t) in zip(mine, other) if a > b]
    beyond = sum(gap > spread for gap, spread in gaps)
    return f"in {len(gaps)} of {len(mine)} (beyond the spread in {beyond})" if gaps else ""


def finish(args, table, sweep, title, height, **more):
    """Write a table and its sweep as JSON, and its figure as `draw` explains."""
    names = ("seeds", "tune_seeds", "steps", "batch_size", "block_size", "dtype")
    settings = {name: getattr(args, name) for name in names}
    settings["weights"] = os.path.relpath(args.weights)
    result = provenance(args.device) | dict(table=table, sweep=sweep, **settings, **more)
    write_each(partial(write_json, args.json, result),
               partial(draw, args.png, table, title, height))
    print(f"\nwrote {args.json} and {args.png}")


# ------------------------------------------------------------------------------------- the command


def new_parser(description, name, languages, methods, steps, more_languages=""):
    """The flags that table1 and toys share."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=Help)
    add = parser.add_argument
    add("--languages", nargs="+", default=languages, metavar="LANGUAGE",
        help=f"default: {' '.join(languages)}; learning rates are chosen on the first"
        + more_languages)
    add("--methods", nargs="+", choices=list(methods), default=list(methods), help="rows of the table")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trainings; the mean is told")
    add("--tune-seeds", nargs="+", type=int, default=[100, 101, 102],
        help="of the choice of rates alone")
    add("--steps", type=int, default=steps, help="of each training")
    add("--batch-size", type=int, default=8, help="sequences per step")
    add("--block-size", type=int, default=128, help="tokens per sequence")
    add("--eval-tokens", type=int, default=16384, help="of held-out files, about")
    add("--jobs", type=int, default=os.cpu_count() or 1,
        help="trainings at once (default: one per core)")
    add("--out", default=f"out/{name}", metavar="FOLDER", help="of the trainings")
    add("--png", default=f"out/table1_{name}.png", metavar="FILE", help="the figure")
    add_common_flags(parser, dtypes=["float32", "bfloat16"])
    parser.set_defaults(attention="flash")
    return parser


def parse(parser, methods, argv):
    """Parse, with args.methods as {name: flags of train.py}; errors for counts below 1."""
    args = parser.parse_args(argv)
    for flag in ("samples", "steps", "batch_size", "block_size", "jobs"):
        if getattr(args, flag, 1) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; use a whole number "
                         "of at least 1")
    args.methods = {name: methods[name] for name in args.methods}
    return args


def parse_args(argv=None):
    parser = new_parser(__doc__, "losses", list(CORPORA), METHODS, steps=150,
                        more_languages="; NAME=FOLDER:.EXT adds code of your own")
    return parse(parser, METHODS, argv)


def main():
    losses(parse_args())


if __name__ == "__main__":
    run_main(main)
