"""Speech to text: the paper's second task (§4.3, Table 2), with Whisper.

  python -m extras.whisper transcribe --weights out/whisper-base --language cs clip.wav
  python -m extras.whisper train --weights out/whisper-base --data out/czech --language cs --adapter flora --rank 1
  python -m extras.whisper transcribe --weights out/whisper-base --language cs lt \\
      --adapter out/whisper/cs-flora-r1/adapter.safetensors none one.wav two.wav
  python -m extras.whisper score --weights out/whisper-base --data out/czech --language cs
  python -m extras.whisper table --weights out/whisper-base --data cs=out/czech

--weights is a Hugging Face folder of a multilingual Whisper, tiny to large-v3. --data is a folder in
Common Voice's layout; extras/whisper_data.py makes one of each. Adapters go to every fully connected
layer of both halves (App. A). Training is by train.py's loop (train.fit) and writes what train.py does.
An interrupted table goes on by the same command.
"""
import argparse
import csv
import math
import os
import sys
import time
import unicodedata
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import flora
import train
from bench import describe_machine, describe_run
from extras.fast import BothWays, keep_memory
from extras.table1 import next_rates, over_seeds
from extras.whisper_model import (RATE, REQUIREMENTS, Attention, Whisper, attend_plainly, load_whisper,
                                  log_mel, read_audio, window_of, write_greedily)
from flora import BASE, BadInput, open_file, read_json, write_json
from generate import load_adapters, one_each
from model import (JSON, base_digest, check_numbers, check_writable, difference, digest, get_device,
                   read_config, run_main)

MODEL = Whisper   # model.py finds it by config.json's model_type

METHODS = {  # name in the table: adapter, rank
    "flora-r1": ("flora", 1), "flora-r4": ("flora", 4), "ia3": ("ia3", 1),
    "lora-r1": ("lora", 1), "lora-r4": ("lora", 4), "hira-r1": ("hira", 1)}
# Defaults, found on Czech with the base model; the paper's for Whisper large: 6e-3, 2e-4, 4e-3
LEARNING_RATES = {"flora": 2e-2, "lora": 3e-3, "ia3": 2e-2, "hira": 2e-2}

# ------------------------------------------------------------------------------------------- data


class Clips:
    """A split of a folder, FOLDER/SPLIT.tsv: its sentences, and the features of its clips, which are
    computed once and held as float16. Clips longer than `longest` seconds (default: the window) are
    left out."""

    def __init__(self, folder, split, window, n_mels, longest=None):
        longest = longest or window
        self.sentences, self.mels, parts = [], [], []
        rows, self.dropped = read_split(folder, split), 0
        for file, sentence in tqdm(rows, desc=f"{split}: features", unit="clip", leave=False):
            samples = read_audio(file)
            if len(samples) > longest * RATE:
                self.dropped += 1
                continue
            mel = log_mel(samples, n_mels, window, file)
            self.sentences.append(sentence)
            self.mels.append(mel.half())
            parts += [sentence, self.mels[-1].numpy().tobytes()]
        self.digest = digest(*parts)
        if not self.mels:
            raise BadInput(f"{folder}/{split}.tsv: names no clip of at most {longest} s; give others, or "
                           "a larger --window")
        train.say(f"{split}: {len(self.mels)} clips, {self.dropped} longer than {longest} s left out")

    def mel(self, rows):
        """-> float32 [n, n_mels, F]."""
        return torch.stack([self.mels[i] for i in rows]).float()


clips_of = lru_cache(maxsize=3)(Clips)   # the trainings of a table share them


def split_of(args, split):
    """The Clips of one split of --data."""
    return clips_of(args.data, split, args.window, read_config(args.weights).n_mels)


def read_split(folder, split):
    """[(file, sentence)] of FOLDER/SPLIT.tsv. A path is looked for in FOLDER/clips, then in FOLDER."""
    tsv = flora.existing_file(os.path.join(folder, f"{split}.tsv"), "table of clips")
    try:
        with open_file(tsv, "rb") as f:
            lines = f.read().decode("utf-8").splitlines()
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, csv.Error) as e:
        raise BadInput(f"{tsv}: not readable as a table of UTF-8 text ({e})") from None
    found = []
    for n, row in enumerate(rows, start=2):
        if not row.get("path") or not (row.get("sentence") or "").strip():
            raise BadInput(f"{tsv}: line {n} has no path or no sentence; the table needs both columns, "
                           "with tabs between them")
        places = [os.path.join(folder, "clips", row["path"]), os.path.join(folder, row["path"])]
        found.append((next(filter(os.path.exists, places), places[0]), row["sentence"].strip()))
    return found


def make_batch(clips, rows, writing, prompt, limit):
    """Clips and their sentences -> mel [n, n_mels, F], x int64 [n, T], their next tokens y [n, T], of
    which those of the prompt and the padding are -100."""
    texts = [prompt + writing.encode(clips.sentences[i]) for i in rows]
    longest = max(map(len, texts)) - 1
    if longest > limit:
        raise BadInput(f"a sentence has {longest} tokens, more than the {limit} of this model; "
                       "shorten it or leave it out")
    x = torch.full((len(rows), longest), writing.end)
    y = torch.full((len(rows), longest), -100)
    for i, text in enumerate(texts):
        n = len(text) - 1
        x[i, :n], y[i, :n] = torch.tensor(text[:-1]), torch.tensor(text[1:])
    y[:, :len(prompt) - 1] = -100
    return clips.mel(rows), x, y


# ------------------------------------------------------------------------------- the word error rate


def normalised(text):
    """Lower case, without punctuation and symbols; marks, as in Devanagari, stay."""
    kept = (" " if unicodedata.category(c)[0] in "PS" else c for c in unicodedata.normalize("NFKC", text))
    return " ".join("".join(kept).lower().split())


def error_rates(sentences, written):
    """Percent of words that are wrong, as they are and normalised, and of characters as they are."""
    jiwer = load_jiwer()
    bare = [[normalised(text) for text in texts] for texts in (sentences, written)]
    pairs = [(said, heard) for said, heard in zip(*bare) if said]   # jiwer takes no empty reference
    return dict(wer=100 * jiwer.wer(sentences, written),
                wer_normalised=100 * jiwer.wer(*map(list, zip(*pairs))) if pairs else None,
                cer=100 * jiwer.cer(sentences, written))


def load_jiwer():
    try:
        import jiwer
    except ImportError:
        raise BadInput(f"the word error rate needs jiwer, which is not here: {REQUIREMENTS}") from None
    return jiwer


def score(model, writing, clips, adapter_id, args):
    """Write down all clips with one adapter -> their error rates, seconds and texts."""
    order = sorted(range(len(clips.sentences)), key=lambda i: len(clips.sentences[i]))
    written, begin = [""] * len(order), time.time()
    flora.freeze_bank(model)
    for at in tqdm(range(0, len(order), 16), desc="word error rate", unit="batch", leave=False):
        rows = order[at:at + 16]
        mel = clips.mel(rows).to(args.device)
        prompts = torch.tensor([writing.prompt(args.language)] * len(rows), device=args.device)
        ids = torch.full((len(rows),), adapter_id, device=args.device)
        for row, text in zip(rows, write_greedily(model, writing, mel, prompts, ids, args.max_new_tokens)):
            written[row] = writing.decode(text)
    return dict(**error_rates(clips.sentences, written), clips=len(order),
                words=sum(len(text.split()) for text in clips.sentences), seconds=time.time() - begin,
                texts=written)


# ---------------------------------------------------------------------------------------- training


def loss_of(model, adapter_id, mel, x, y):
    """Mean loss in nats of the tokens of the sentences."""
    ids = torch.full((len(x),), adapter_id, device=x.device)
    return F.cross_entropy(model(x, ids, mel).flatten(0, 1).float(), y.flatten())


@torch.no_grad()
def heldout_loss(model, clips, writing, adapter_id, args):
    """Mean loss of the clips' tokens, in nats."""
    order = sorted(range(len(clips.sentences)), key=lambda i: len(clips.sentences[i]))
    prompt, total, tokens = writing.prompt(args.language), 0.0, 0
    for at in range(0, len(order), 8):
        mel, x, y = (tensor.to(args.device) for tensor in make_batch(
            clips, order[at:at + 8], writing, prompt, model.config.n_positions))
        n = int((y != -100).sum())
        with train.autocast(torch.device(args.device), args.dtype):
            total, tokens = total + n * loss_of(model, adapter_id, mel, x, y).item(), tokens + n
    return total / tokens


def next_batch(clips, writing, args, limit, step, micro):
    """This process's share of a micro-batch, drawn from the seed and the step alone."""
    rng = np.random.default_rng([args.seed, step, micro])
    n, few = args.batch_size // train.WORLD, len(clips.mels) < args.batch_size
    rows = rng.choice(len(clips.mels), args.batch_size, replace=few)[train.RANK * n:][:n]
    return make_batch(clips, rows, writing, writing.prompt(args.language), limit)


def fit_adapter(args):
    """Train one adapter as the flags say -> (model, writing, adapter id, the report)."""
    device = train.start_processes(args)
    model, writing = load(args, device)
    clips = {split: split_of(args, split) for split in ("train", "dev")}
    args.made_with = made_with(args)
    checkpoint = train.open_checkpoint(args)
    if checkpoint and train.RANK == 0:
        train.check_same(checkpoint, args)
    torch.manual_seed(args.seed)
    model.requires_grad_(False)
    adapter_id = flora.add_adapter(model, args.adapter, args.rank, args.targets, args.alpha)
    parameters = flora.adapter_parameters(model, adapter_id)
    train.say_sizes(args, model, parameters)
    speed_up(model, args)
    log, rate = train.fit(
        model, parameters, partial(next_batch, clips["train"], writing, args, model.config.n_positions),
        lambda model, mel, x, y: loss_of(model, adapter_id, mel, x, y),
        partial(heldout_loss, model, clips["dev"], writing, adapter_id, args), args, checkpoint)
    report = dict(adapter=args.adapter, rank=args.rank, targets=args.targets, lr=args.lr, seed=args.seed,
                  steps=args.steps, batch_size=args.batch_size, language=args.language, window=args.window,
                  heldout_loss_before=log[0]["heldout_loss"], heldout_loss_after=log[-1]["heldout_loss"],
                  trainable_parameters=train.count(parameters), seconds=log[-1]["seconds"],
                  seconds_per_step=args.tokens_per_step / rate if rate else None,
                  total_parameters=train.count(model.base_parameters()),
                  peak_memory_bytes=train.peak_memory(device), device=args.device, dtype=args.dtype,
                  torch=torch.__version__, made_with=args.made_with, log=log)
    return model, writing, adapter_id, report


def load(args, device):
    """The model and its Writing, by the flags."""
    model, writing = load_whisper(args.weights, device, getattr(torch, args.dtype))
    if args.window > window_of(model.config):
        raise BadInput(f"--window {args.window}: this model hears at most {window_of(model.config)} s")
    return model, writing


def speed_up(model, args):
    """On a CPU, hold the frozen projections packed for both directions (extras/fast.py), and, in
    bfloat16, attend by plain matmuls."""
    if torch.device(args.device).type != "cpu" or train.WORLD > 1:
        return
    keep_memory()
    form = BothWays(getattr(torch, args.dtype))
    for _, layer in flora.adapter_layers(model):
        layer.form = form
    for module in model.modules():
        if isinstance(module, Attention) and args.dtype == "bfloat16":
            module.attend = attend_plainly


def made_with(args):
    """The digests and flags that decide what a training learns."""
    data = digest(*(split_of(args, split).digest for split in ("train", "dev", "test")))
    return dict(base=base_digest(args.weights), data=data, language=args.language,
                window=args.window) | train.flags_of(args)


def train_adapter(args):
    """`train`: one training, its word error rates before and after, and its files."""
    load_jiwer()
    with train.outputs(args):
        model, writing, adapter_id, report = fit_adapter(args)
        if train.RANK > 0:
            return
        test = split_of(args, "test")
        before = score(model, writing, test, BASE, args)
        report |= dict(before=before) | finish(args, model, writing, test, adapter_id, report)
        print(f"{len(test.mels)} test clips: " + ", ".join(
            f"{what} {before[key]:.1f} -> {report['after'][key]:.1f} %"
            for key, what in RATES.items() if before[key] is not None))
        if args.json:
            write_json(args.json, report)


def finish(args, model, writing, test, adapter_id, report):
    """Write OUT/adapter.safetensors, score it, write OUT/log.json -> the report."""
    file = str(Path(args.out, "adapter.safetensors"))
    summary = {key: value for key, value in report.items() if key != "log"}
    flora.save_adapter(model, adapter_id, file, summary)
    report = report | dict(adapter_file=file, after=score(model, writing, test, adapter_id, args))
    write_json(str(Path(args.out, "log.json")), report)
    print(f"held-out loss {report['heldout_loss_before']:.4f} -> {report['heldout_loss_after']:.4f} "
          f"nats/token, {report['seconds']:.0f} s; saved {file}")
    return report


def score_adapters(args):
    """`score`: the error rates of test.tsv with the base model or with adapters, one after another."""
    load_jiwer()
    check_writable(args.json, "--json", JSON)
    model, writing = load(args, get_device(args.device))
    n_mels, scores = model.config.n_mels, {}
    test = Clips(args.data, "test", args.window, n_mels, args.longest)
    model.pack()
    for name, adapter_id in load_adapters(model, args.adapter).items():
        if name in args.adapter:
            scores[name] = score(model, writing, test, adapter_id, args)
            said = ", ".join(f"{what} {scores[name][key]:.1f} %" for key, what in RATES.items())
            print(f"{name}: {said}; {scores[name]['words']} words, {scores[name]['seconds']:.0f} s")
    if args.json:
        write_json(args.json, scores)


# -------------------------------------------------------------------------------------- transcribe


def transcribe(args):
    """`transcribe`: clips, each in its language and with its adapter, in batches -> [{clip, text, ...}]."""
    check_writable(args.json, "--json", JSON)
    n = len(args.clips)
    languages = one_each(args.language, n, "--language")
    names = one_each(args.adapter, n, "--adapter")
    device = get_device(args.device)
    model, writing = load(args, device)
    prompts = [writing.prompt(language) for language in languages]
    mels = [log_mel(read_audio(clip), model.config.n_mels, args.window, clip) for clip in args.clips]
    model.pack()
    loaded, results = load_adapters(model, args.adapter), []
    for at in range(0, n, args.batch_size):
        part = slice(at, at + args.batch_size)
        mel = torch.stack(mels[part]).to(device)
        ids = torch.tensor([loaded[name] for name in names[part]], device=device)
        texts = write_greedily(model, writing, mel, torch.tensor(prompts[part], device=device), ids,
                               args.max_new_tokens)
        for clip, language, name, text in zip(args.clips[part], languages[part], names[part], texts):
            results.append(dict(clip=clip, language=language, adapter=name, text=writing.decode(text)))
            print(f"{clip}\t{results[-1]['text']}", flush=True)
    if args.json:
        write_json(args.json, results)
    return results


# ------------------------------------------------------------------------------------------- table

RATES = {"wer": "raw WER", "wer_normalised": "normalised WER", "cer": "CER"}
SCORE = {"wer": float, "wer_normalised?": float, "cer": float, "seconds": float}
LOG = {"heldout_loss_after": float, "trainable_parameters": int, "seconds": float, "made_with": {}}


def table(args):
    """`table`: every method x seed on every folder, each method at its best rate, chosen on the first."""
    load_jiwer()
    args.json = args.json or f"{args.out}/table.json"
    with train.outputs(args):
        folders = dict(named_folder(spec) for spec in args.data)
        rates, sweep = tune(args, *next(iter(folders.items())))
        bases = {language: base_of(args, language, folder) for language, folder in folders.items()}
        logs = {language: {method: [] for method in args.methods} for language in folders}
        for seed in args.seeds:   # outermost: what is there after one seed is a table already
            for language, folder in folders.items():
                for method in args.methods:
                    run = run_args(args, language, folder, method, rates[method], seed)
                    logs[language][method].append(result_of(run, scored=True))
            show(args, bases, logs, rates, sweep)


def named_folder(spec):
    """"cs=out/czech" -> ("cs", "out/czech")."""
    language, _, folder = spec.partition("=")
    if not (language and folder):
        raise BadInput(f"--data {spec}: use LANGUAGE=FOLDER, as cs=out/czech")
    return language, folder


def run_args(args, language, folder, method, lr, seed, **more):
    """The flags of one training of the table. more: those that differ in the choice of rates."""
    adapter, rank = METHODS[method]
    run = argparse.Namespace(**vars(args))
    run.__dict__.update(language=language, data=folder, adapter=adapter, rank=rank, lr=lr, seed=seed,
                        targets=None, json=None, resume=True, warmup=None,
                        eval_every=math.ceil(args.steps / 2),
                        out=f"{args.out}/{language}/{method}/{seed}")
    run.__dict__.update(more)
    fill_in(run)
    return run


def result_of(run, scored=True):
    """A run's log.json. Where there is none yet it is trained, and, if `scored`, its error rates are
    measured. BadInput if what is there was made with other settings."""
    file = Path(run.out, "log.json")
    if file.exists():
        log = read_json(file, LOG | ({"after": SCORE} if scored else {}))
        check_made_with(file, log, made_with(run))
        return log
    os.makedirs(run.out, exist_ok=True)
    model, writing, adapter_id, report = fit_adapter(run)
    if scored:
        return finish(run, model, writing, split_of(run, "test"), adapter_id, report)
    write_json(str(file), report)
    return report


def base_of(args, language, folder):
    """The base model's score on a test split, kept in OUT/LANGUAGE/base.json."""
    run = run_args(args, language, folder, "flora-r1", lr=None, seed=0)
    file, test = Path(args.out, language, "base.json"), split_of(run, "test")
    settings = dict(base=base_digest(run.weights), data=test.digest, language=language,
                    window=run.window, dtype=run.dtype, max_new_tokens=run.max_new_tokens)
    if file.exists():
        kept = read_json(file, SCORE | {"made_with": {}})
        check_made_with(file, kept, settings)
        return kept
    model, writing = load(run, get_device(run.device))
    speed_up(model, run)
    kept = score(model, writing, test, BASE, run) | dict(made_with=settings)
    os.makedirs(file.parent, exist_ok=True)
    write_json(str(file), kept)
    return kept


def check_made_with(file, kept, now):
    other = difference(kept["made_with"], now)
    if other:
        raise BadInput(f"{file} was made with {other}; choose another --out, or delete it")


def tune(args, language, folder):
    """Choose each method's learning rate by the loss on dev.tsv, with the seed --seed and
    --tune-steps -> ({method: rate}, {method: {rate: loss}}).

    The rates go up from the kind's default by factors of two, and on in either direction while the
    last one tried is the best."""
    sweep = {}
    for method in args.methods:
        default = learning_rate(METHODS[method][0])
        wanted, tried = [default, 2 * default], {}
        while wanted:
            for rate in wanted:
                run = run_args(args, language, folder, method, rate, args.seed, steps=args.tune_steps,
                               eval_every=args.tune_steps,
                               out=f"{args.out}/{language}/tune/{method}/{rate:g}")
                try:
                    tried[rate] = result_of(run, scored=False)["heldout_loss_after"]
                except FloatingPointError as e:
                    print(f"{run.out}: {e}", file=sys.stderr)
                    tried[rate] = math.inf
            wanted = next_rates(tried)
        sweep[method] = tried
        print(f"{method}: " + "  ".join(f"{rate:g}: {tried[rate]:.4f}" for rate in sorted(tried)))
    return {method: min(tried, key=tried.get) for method, tried in sweep.items()}, sweep


def show(args, bases, logs, rates, sweep):
    """Print the table as far as it goes, in Markdown, and write it to --json."""
    cells = {language: {} for language in logs}
    for language, methods in logs.items():
        print(f"\n{language}: {bases[language]['clips']} test clips, {bases[language]['words']} words; "
              f"{args.steps} steps of {args.batch_size} clips, {args.dtype}, "
              f"{len(methods[args.methods[0]])} seeds; mean ± standard deviation over seeds, %\n\n| | rate | parameters | "
              + " | ".join(RATES.values()) + " | training, s |\n" + "|---" * 7 + "|")
        base = bases[language]
        print("| base | | | " + " | ".join(f"{base[key]:.1f}" for key in RATES) + " | |")
        for method, runs in methods.items():
            row = {key: over_seeds([run["after"][key] for run in runs]) for key in RATES}
            row["seconds"] = over_seeds([run["seconds"] for run in runs])
            cells[language][method] = row
            print(f"| {method} | {rates[method]:g} | {runs[0]['trainable_parameters']:,} | "
                  + " | ".join(f"{row[key]['mean']:.1f} ± {row[key]['spread']:.1f}" for key in RATES)
                  + f" | {row['seconds']['mean']:.0f} |")
    sweep = {method: {f"{rate:g}": loss for rate, loss in tried.items() if loss < math.inf}
             for method, tried in sweep.items()}
    without_texts = {language: {k: v for k, v in base.items() if k != "texts"} for language, base in bases.items()}
    write_json(args.json, dict(run=describe_run(), machine=describe_machine(torch.device(args.device)),
                               base=without_texts, table=cells, rates=rates, sweep=sweep, seeds=args.seeds,
                               steps=args.steps, batch_size=args.batch_size, dtype=args.dtype))


# ------------------------------------------------------------------------------------- the command


def learning_rate(kind):
    return LEARNING_RATES.get(kind, flora.adapter_class(kind).learning_rate)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, add_flags in [
            ("transcribe", transcribe, add_transcribe_flags), ("train", train_adapter, add_train_flags),
            ("score", score_adapters, add_score_flags), ("table", table, add_table_flags)]:
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run, quantize=None, grad_accum=1, compile=False)
        add_flags(command.add_argument)
        command.add_argument("--weights", required=True, metavar="FOLDER", help="a Whisper, a Hugging Face folder")
        command.add_argument("--window", type=int, default=30 if name == "transcribe" else 6,
                             help="seconds of sound that the model hears; clips must fit (default: %(default)s)")
        command.add_argument("--max-new-tokens", type=int, default=224 if name == "transcribe" else 100)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--dtype", choices=["float32", "bfloat16"],
                             default="bfloat16" if name in ("train", "table") else "float32")
        command.add_argument("--json", metavar="FILE", help="write the results there as JSON")
    args = parser.parse_args(argv)
    check_args(args)
    if args.command == "train":
        fill_in(args)
    return args


def add_transcribe_flags(add):
    add("clips", nargs="+", metavar="CLIP", help="WAV of 16 bits; with soundfile also flac, ogg, mp3")
    add("--language", nargs="+", required=True, metavar="CODE", help="as cs; one for all clips, or one each")
    add("--adapter", nargs="+", default=["none"], metavar="FILE",
        help="one for all clips, or one each; none is the base model")
    add("--batch-size", type=int, default=8)


def add_train_flags(add):
    add("--data", required=True, metavar="FOLDER", help="with train.tsv, dev.tsv, test.tsv and clips/")
    add("--language", required=True, metavar="CODE", help="as cs")
    add("--adapter", default="flora", metavar="KIND", help="flora, lora, ia3, or a kind of extras/")
    add("--rank", type=int, default=1)
    add("--targets", nargs="+", help=f"of {' '.join(Whisper.TARGETS)} (default: all)")
    add("--alpha", type=float, default=8.0, help="LoRA's scale is alpha / rank")
    add("--lr", type=float, help=f"peak learning rate (default: of {LEARNING_RATES}, or the kind's)")
    add("--warmup", type=int, help="steps (default: a twentieth)")
    add("--eval-every", type=int, help="steps between held-out losses and checkpoints (default: a third)")
    add("--seed", type=int, default=0)
    add("--out", metavar="FOLDER", help="default: out/whisper/LANGUAGE-ADAPTER-rRANK")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    add_loop_flags(add)


def add_score_flags(add):
    add("--data", required=True, metavar="FOLDER", help="with test.tsv and clips/")
    add("--language", required=True, metavar="CODE", help="as cs")
    add("--adapter", nargs="+", default=["none"], metavar="FILE", help="none is the base model")
    add("--longest", type=float, help="seconds; longer clips are left out (default: the window)")


def add_table_flags(add):
    add("--data", required=True, nargs="+", metavar="LANGUAGE=FOLDER", help="rates are chosen on the first")
    add("--methods", nargs="+", choices=list(METHODS), default=[name for name in METHODS if name != "hira-r1"])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--seed", type=int, default=100, help="of the choice of rates alone")
    add("--tune-steps", type=int, default=60, help="of the choice of rates alone")
    add("--alpha", type=float, default=8.0, help="LoRA's scale is alpha / rank")
    add("--out", default="out/whisper-table", metavar="FOLDER")
    add("--resume", action="store_true", help="understood: a table always goes on")
    add_loop_flags(add)


def add_loop_flags(add):
    add("--steps", type=int, default=180)
    add("--batch-size", type=int, default=6, help="clips per step (the paper's 6)")
    add("--clip", type=float, default=1.0, help="gradient norm")


def check_args(args):
    present = vars(args)
    counts = [flag for flag in ("rank", "steps", "batch_size", "window", "max_new_tokens", "eval_every", "tune_steps")
              if flag in present]
    check_numbers(args, at_least_1=counts, at_least_0=[f for f in ("warmup", "seed", "seeds") if f in present],
                  above_0=[flag for flag in ("lr", "clip", "alpha", "longest") if flag in present])


def fill_in(args):
    """The defaults that follow from other flags."""
    args.targets = args.targets or flora.default_targets(Whisper, args.adapter)
    args.lr = learning_rate(args.adapter) if args.lr is None else args.lr
    args.warmup = args.steps // 20 if args.warmup is None else args.warmup
    args.eval_every = args.eval_every or max(1, args.steps // 3)
    args.tokens_per_step = args.batch_size * args.window * 50   # positions of the encoder
    rank = "" if args.adapter in train.UNRANKED else f"-r{args.rank}"
    args.out = args.out or f"out/whisper/{args.language}-{args.adapter}{rank}"


def main():
    args, argv = parse_args(), sys.argv
    sys.argv = ["-m", "extras.whisper", *argv[1:]]   # train.fit tells it, to be given again
    try:
        args.run(args)
    except FloatingPointError as e:
        print(f"{os.path.basename(argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(1)
    finally:
        sys.argv = argv


if __name__ == "__main__":
    run_main(main)
