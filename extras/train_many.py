"""Many adapters trained in one batch.

  python -m extras.train_many --data cpp=include:.h cuda=include:.cuh --adapter flora --rank 1
  python -m extras.train_many --data cpp cuda cmake --adapter flora lora ia3 --lr 8e-3 4e-3 5e-3
  python -m extras.train_many --speed 2 4 8 --rows 1 2 8 --weights base

Every adapter is trained as train.py would train it alone, by its loop (train.fit), with its own
optimizer, learning rates, windows, held-out loss, and adapter.safetensors, log.json and
checkpoint.pt in OUT/NAME. What they share is the base model and the pass through it: the rows of
all are one batch, in which each row has its own adapter (Eq. 6).

A training is a thread, and one thread runs at a time: it waits in Together.loss until all others
have come there too, and then one forward and one backward serve all of them. One whose loss is not
finite ends alone.
"""
import argparse
import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import flora
import train
from extras.results import many as table_of
from extras.table1 import CORPORA, on_own_targets
from plumbing import runs as training_runs
from plumbing.files import BadInput, read_json
from plumbing.flags import EMBEDDED, Help, check_numbers, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.processes import WORLD, interrupts, start_processes
from plumbing.provenance import provenance
from plumbing.report import make_report

ONE_OR_EACH = ("adapter", "rank", "lr", "steps", "seed")   # flags of one value, or one per adapter

# -------------------------------------------------------------------------------- the shared pass


class Together:
    """The forward and backward of n trainings, each in a thread that holds `turn` while it runs."""

    def __init__(self, n, grad_accum):
        self.turn = threading.Condition()
        self.under_way, self.grad_accum = n, grad_accum
        self.batches = {}   # name of a training: (model, x, y, ids), waiting for the others
        self.losses = {}    # name: its mean loss, or the exception that the pass raised
        self.passes = []    # (when it ended, its tokens)

    def loss(self, name, model, x, y, ids):
        """What train.fit calls for the batch x, y [b, T] of the one adapter in `ids` [b] -> its
        mean loss. That is a leaf: the adapter has its gradients already, and backward adds none."""
        self.batches[name] = model, x, y, ids
        self.run_if_all_are_here()
        self.turn.wait_for(lambda: name in self.losses)
        loss = self.losses.pop(name)
        if isinstance(loss, Exception):
            raise loss
        return loss.requires_grad_()

    def leave(self):
        """A training has ended: nobody waits for it any more."""
        self.under_way -= 1
        self.run_if_all_are_here()

    def run_if_all_are_here(self):
        if not self.batches or len(self.batches) < self.under_way:
            return
        batches, self.batches = dict(sorted(self.batches.items())), {}
        try:
            self.losses |= zip(batches, one_pass(list(batches.values()), self.grad_accum))
        except Exception as e:   # of memory, for one
            self.losses |= dict.fromkeys(batches, e)
        self.passes.append((time.perf_counter(), sum(x.numel() for _, x, _, _ in batches.values())))
        self.turn.notify_all()

    def rate(self):
        """Tokens per second from pass to pass, the median; None before the second one."""
        rates = [tokens / (end - begin)
                 for (begin, _), (end, tokens) in zip(self.passes, self.passes[1:])]
        return statistics.median(rates) if rates else None


def one_pass(batches, grad_accum):
    """Add the gradients of each (model, x, y, ids) to its adapter -> their mean losses.

    Blocks run once on the rows of all; logits are made for one adapter after another, since they
    are large and no adapter touches them."""
    model = batches[0][0]
    x, ids = (torch.cat([b[i] for b in batches]) for i in (1, 3))
    hidden = model.hidden(x, ids)                                             # [n b, T, C]
    shared, losses = hidden.detach().requires_grad_(), []
    for part, (_, _, y, _) in zip(shared.split([len(b[1]) for b in batches]), batches):
        losses.append(F.cross_entropy(model.logits(part).flatten(0, 1).float(), y.flatten()))
        backward(losses[-1] / grad_accum)
    backward(hidden, shared.grad)
    return [loss.detach() for loss in losses]


def backward(tensor, gradient=None):
    """tensor.backward, as in train.py outside of autocast."""
    with torch.autocast(tensor.device.type, enabled=False):
        tensor.backward(gradient)


# ------------------------------------------------------------------------------------ the trainings


def train_many(runs):
    """{name: train.py's args} -> ({name: report}, {name: why it ended without one}, tokens per
    second of all together)."""
    args = next(iter(runs.values()))
    device = start_processes(args)
    model, tokenizer = train.load_base(args, device, getattr(torch, args.dtype))
    model.requires_grad_(False)
    with contextlib.ExitStack() as outputs:
        prepared = {}
        for name, mine in runs.items():
            print(f"{name}:")
            mine.targets = mine.targets or flora.default_targets(model, mine.adapter)
            outputs.enter_context(training_runs.outputs(mine))
            prepared[name] = training_runs.prepare(mine)
        return fit_together(runs, model, tokenizer, prepared)


def fit_together(runs, model, tokenizer, prepared):
    """The trainings, each in a thread, from {name: (its checkpoint or None, its texts)}."""
    args = next(iter(runs.values()))
    together, reports, failed, errors = Together(len(runs), args.grad_accum), {}, {}, []

    def train_one(name, checkpoint, texts, stop):
        with together.turn:
            try:
                reports[name] = train_with(runs[name], model, tokenizer, texts, checkpoint,
                                           partial(together.loss, name), stop)
            except FloatingPointError as e:
                failed[name] = str(e)
                print(f"{name}: {e}", file=sys.stderr)
            except BaseException as e:   # whatever it is, the others keep what they have
                errors.append(e)
                stop.fill_(1)
            finally:
                together.leave()

    with interrupts() as stop:
        threads = [threading.Thread(target=train_one, args=(name, *prepared[name], stop))
                   for name in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, KeyboardInterrupt)), errors[0])
    return reports, failed, together.rate()


def train_with(args, model, tokenizer, texts, checkpoint, loss, stop):
    """One of the trainings, as train.train runs it, with a loss of its own -> its report."""
    torch.manual_seed(args.seed)
    adapter_id, parameters = train.new_adapter(args, model)
    data = train.encode_data(args, texts, tokenizer)
    task = train.text_task(args, model, data, adapter_id, loss)
    log, rate = train.fit(model, parameters, *task, train.loop_of(args), stop, checkpoint)
    report = make_report(args, model, parameters, data, log, rate)
    return train.finish_adapter(args, model, adapter_id, report)


def summarize(reports, failed, rate, file):
    """Print the held-out losses and the rate of all; write them as JSON to `file`, if there is one."""
    for name, report in reports.items():
        print(f"{name:12s} {report['adapter']:6s} held-out loss "
              f"{report['heldout_loss_before']:.4f} -> {report['heldout_loss_after']:.4f}   "
              f"{report['adapter_file']}")
    print(f"{len(reports)} adapters, {rate or 0:.0f} tokens/s together")
    if file:
        write_json(file, dict(adapters=reports, failed=failed, tokens_per_second=rate))


# ----------------------------------------------------------------------------------------- speed


def speed(args, shared):
    """Measure tokens/s and peak memory of n adapters in one batch and of one alone, which are also
    those of n one after another. Each run is a process, on random words; they are repeated in
    turns, after one that is not counted."""
    check_numbers(args, ["speed", "rows", "repeats"])
    check_writable(args.json, "--json", JSON)
    about = provenance() | dict(repeats=args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        words = random_words(folder)
        shared = on_own_targets(shared, train.parse_args(shared).weights or EMBEDDED)
        flags = ["--steps", "6", "--eval-every", "1000", "--eval-tokens", "500",
                 "--keep-duplicates", *shared]   # nothing is held out between the steps timed
        cases, seen = list(itertools.product(args.rows, dict.fromkeys([1, *args.speed]))), {}
        measure(*cases[0], words, flags, folder)
        for case in tqdm(cases * args.repeats, unit="run"):
            seen.setdefault(case, []).append(measure(*case, words, flags, folder))
    data = about | dict(rows=[row_of(case, seen) for case in cases])
    print(table_of(data))
    if args.json:
        write_json(args.json, data)


def row_of(case, seen):
    """A line of the table, from {(rows, n): [(tokens per second, bytes)]}; the ratio is the median of
    the rounds'."""
    rates, sizes = zip(*seen[case])
    alone = [rate for rate, _ in seen[case[0], 1]]
    return dict(rows_per_adapter=case[0], adapters=case[1], tokens_per_second=statistics.median(rates),
                tokens_per_second_min=min(rates), tokens_per_second_max=max(rates),
                ratio_to_alone=statistics.median(a / b for a, b in zip(rates, alone)),
                peak_memory_bytes=max(sizes))


def random_words(folder):
    """A folder of short texts."""
    generator = torch.Generator().manual_seed(0)
    path = Path(folder, "words")
    path.mkdir()
    for i in range(64):
        letters = "".join(map(chr, torch.randint(97, 123, (600,), generator=generator).tolist()))
        words = [letters[j:j + 6] for j in range(0, len(letters), 6)]
        Path(path, f"{i}.txt").write_text(" ".join(words))
    return path


def measure(rows, n, words, flags, folder):
    """One run of n adapters -> (tokens per second, bytes)."""
    file, root = Path(folder, "report.json"), Path(train.__file__).resolve().parent
    data = [f"a{i}={words}" for i in range(n)]
    done = subprocess.run([sys.executable, "-m", "extras.train_many", "--data", *data, *flags,
                           "--batch-size", str(rows), "--out", f"{folder}/out", "--json", file],
                          capture_output=True, text=True, cwd=root)
    if done.returncode:
        *_, last = ["", *done.stderr.strip().splitlines()]
        raise BadInput(f"--speed: {n} adapters of {rows} rows ended with status {done.returncode} "
                       f"(-9: out of memory). {last}")
    report = read_json(file)
    return report["tokens_per_second"], report["adapters"]["a0"]["peak_memory_bytes"]


# ------------------------------------------------------------------------------------ the command


def parse_args(argv=None):
    """-> (this script's args, its own flags taken out of argv: train.py's)."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=Help,
                                     epilog="Other flags are train.py's, and hold for all.")
    add = parser.add_argument
    add("--data", nargs="+", metavar="NAME", default=[],
        help=f"one for each adapter: NAME=PATH, NAME='PATH:.EXT .EXT', or {', '.join(CORPORA)}")
    for flag in ONE_OR_EACH:
        add(f"--{flag}", nargs="+", default=[], help="one for all, or one for each of --data")
    add("--out", default="out/many", help="folder; adapter NAME's is OUT/NAME")
    add("--json", metavar="FILE", help="write all reports, or --speed's table, there")
    add("--speed", nargs="+", type=int, metavar="N", help="no training: measure N adapters")
    add("--rows", nargs="+", type=int, default=[1, 2, 8], help="of --speed: rows per adapter")
    add("--repeats", type=int, default=3, help="of --speed")
    args, shared = parser.parse_known_args(argv)
    if not (args.data or args.speed):
        parser.error("--data names no adapter; give NAME=PATH for each")
    if args.data and args.speed:
        parser.error("--speed measures on random words; leave out --data")
    for flag in ONE_OR_EACH:
        values = getattr(args, flag)
        if len(values) not in (0, 1, len(args.data) or len(values)):
            parser.error(f"--{flag} has {len(values)} values; give one, or one for each of the "
                         f"{len(args.data)} in --data")
    return args, shared


def runs_of(args, shared):
    """-> {name: train.py's args}, one for each of --data."""
    runs = {}
    for i, spec in enumerate(args.data):
        name, data = name_and_data(spec)
        if name in runs:
            raise BadInput(f"--data names {name} twice; each adapter needs a name of its own")
        flags = [*shared, *data, "--out", f"{args.out}/{name}", *flags_of(args, i)]
        runs[name] = train.parse_args(flags)
        if runs[name].adapter == "none" or runs[name].from_lora or runs[name].compile:
            raise BadInput("extras.train_many trains adapters; --adapter none, --from-lora and "
                           "--compile are train.py's alone")
        if runs[name].fast:
            raise BadInput("extras.train_many has its own loss; --fast is train.py's alone")
    if WORLD > 1:
        raise BadInput("extras.train_many runs in one process; use train.py under torchrun")
    return runs


def flags_of(args, i):
    """train.py's flags for adapter i, of those in ONE_OR_EACH."""
    given = {flag: getattr(args, flag) for flag in ONE_OR_EACH if getattr(args, flag)}
    return [word for flag, values in given.items()
            for word in (f"--{flag}", values[i % len(values)])]


def name_and_data(spec):
    """"cpp", "NAME=PATH" or "NAME=PATH:.EXT .EXT" -> (name, train.py's --data and --ext)."""
    name, equals, path = spec.partition("=")
    extensions = ""
    if not equals and name in CORPORA:
        path, extensions = CORPORA[name]
    elif ":." in path:
        path, _, extensions = path.rpartition(":")
    if not path or not name or name != Path(name).name:
        raise BadInput(f"--data {spec}: use NAME=PATH, NAME='PATH:.EXT .EXT', or one of "
                       f"{', '.join(CORPORA)}")
    return name, ["--data", path, *(["--ext", *extensions.split()] if extensions else [])]


def main():
    args, shared = parse_args()
    if args.speed:
        return speed(args, [*shared, *flags_of(args, 0)])
    runs, argv = runs_of(args, shared), sys.argv
    sys.argv = ["-m", "extras.train_many", *argv[1:]]   # train.fit tells it, to be given again
    try:
        reports, failed, rate = train_many(runs)
    finally:
        sys.argv = argv
    summarize(reports, failed, rate, args.json)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
