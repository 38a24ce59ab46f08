"""Speech to text: the paper's second task (§4.3, Table 2), with Whisper.

  python -m extras.whisper transcribe --weights out/whisper-base --language cs clip.wav
  python -m extras.whisper train --weights out/whisper-base --data out/czech --language cs \\
      --adapter flora --rank 1
  python -m extras.whisper transcribe --weights out/whisper-base --language cs lt \\
      --adapter out/whisper/cs-flora-r1/adapter.safetensors none -- one.wav two.wav
  python -m extras.whisper score --weights out/whisper-base --data out/czech --language cs
  python -m extras.whisper table --weights out/whisper-base --data cs=out/czech

--weights is a Hugging Face folder of a multilingual Whisper, tiny to large-v3. --data is a folder
in Common Voice's layout. extras/whisper_data.py makes one of each. Adapters go to every fully
connected layer of both halves (App. A). Training is by train.py's loop (train.fit) and writes what
train.py does; an interrupted table goes on by the same command.
"""
import argparse
import csv
import io
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
from extras.fast import check_packs, keep_memory, pack_both_ways
from extras.packed import choose_dtype
from extras.results import speech
from extras.table1 import next_rates, over_seeds
from extras.whisper_model import (RATE, REQUIREMENTS, Attention, Whisper, Writing, attend_plainly, load_whisper,
                                  log_mel, read_audio, window_of, write_greedily)
from flora import BASE
from generate import load_adapters
from model import read_config
from plumbing.checkpoints import check_same, flags_of, open_checkpoint
from plumbing.files import BadInput, existing_file, open_file, read_json
from plumbing.flags import Help, check_numbers, get_device, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.processes import WORLD, interrupts, say
from plumbing.prompts import one_each
from plumbing.provenance import base_digest, difference, digest, peak_memory, provenance
from plumbing.report import count, say_sizes
from plumbing.runs import outputs

MODEL = Whisper   # model.py finds it by config.json's model_type

METHODS = {  # name in the table: adapter, rank
    "flora-r1": ("flora", 1), "flora-r4": ("flora", 4), "ia3": ("ia3", 1),
    "lora-r1": ("lora", 1), "lora-r4": ("lora", 4), "hira-r1": ("hira", 1)}
PAPERS = ["flora-r1", "flora-r4", "ia3", "lora-r1", "lora-r4"]   # those of Table 2
# Where the search begins, and the default; the paper's for Whisper large: 6e-3, 2e-4, 4e-3
LEARNING_RATES = {"flora": 1e-2, "lora": 3e-3, "ia3": 1e-2, "hira": 1e-2}
RATES = {"wer": "raw WER", "wer_normalised": "normalised WER", "cer": "CER"}

# ------------------------------------------------------------------------------------------- data


class Clips:
    """A split of a folder, FOLDER/SPLIT.tsv: its sentences, and the features of its clips, which
    are computed once and held as float16. Clips longer than `longest` seconds (default: the
    window) are left out."""

    def __init__(self, folder, split, window, n_mels, longest=None):
        self.table = os.path.join(folder, f"{split}.tsv")
        self.files, self.sentences, self.mels = [], [], []
        rows, longest = read_split(folder, split), longest or window
        for file, sentence in tqdm(rows, desc=f"{split}: features", unit="clip", leave=False):
            samples = read_audio(file)
            if len(samples) <= longest * RATE:
                self.files.append(file)
                self.sentences.append(sentence)
                self.mels.append(log_mel(samples, n_mels, window, file).half())
        if not self.mels:
            raise BadInput(f"{self.table}: names no clip of at most {longest} s; give others, or "
                           "a larger --window")
        pairs = zip(self.sentences, (mel.numpy().tobytes() for mel in self.mels))
        self.digest = digest(*(part for pair in pairs for part in pair))
        say(f"{split}: {len(self.mels)} clips, {len(rows) - len(self.mels)} longer than "
                  f"{longest} s left out")

    def mel(self, rows):
        """-> float32 [n, n_mels, F]."""
        return torch.stack([self.mels[i] for i in rows]).float()

    def shortest_first(self, n):
        """All clips' numbers, in lists of n with sentences of about one length."""
        order = sorted(range(len(self.mels)), key=lambda i: len(self.sentences[i]))
        return [order[at:at + n] for at in range(0, len(order), n)]


clips_of = lru_cache(maxsize=3)(Clips)   # the trainings of a table share them


def split_of(args, split):
    """The Clips of one split of --data."""
    return clips_of(args.data, split, args.window, read_config(args.weights).n_mels)


def read_split(folder, split):
    """[(file, sentence)] of FOLDER/SPLIT.tsv. A path lies in FOLDER/clips, or else in FOLDER."""
    tsv = existing_file(os.path.join(folder, f"{split}.tsv"), "table of clips")
    try:
        with open_file(tsv, "rb") as f:
            text = f.read().decode("utf-8-sig")
        lines = io.StringIO(text, newline="")   # not splitlines: a sentence may hold a U+2028
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, csv.Error) as e:
        raise BadInput(f"{tsv}: not readable as a table of UTF-8 text ({e})") from None
    found = []
    for n, row in enumerate(rows, start=2):
        path, sentence = row.get("path"), (row.get("sentence") or "").strip()
        if not path or not sentence:
            raise BadInput(f"{tsv}: line {n} has no path or no sentence; the table needs both "
                           "columns, with tabs between them")
        places = [os.path.join(folder, "clips", path), os.path.join(folder, path)]
        found.append((next(filter(os.path.exists, places), places[0]), sentence))
    return found


def check_data(args, writing):
    """BadInput, before the first step, for what a training could not use of --data."""
    for split in ("train", "dev"):
        check_sentences(split_of(args, split), writing, args.language, read_config(args.weights).n_positions)
    split_of(args, "test")


def check_sentences(clips, writing, language, limit):
    """BadInput, naming their clips, for sentences that the model cannot be given. limit: of its
    decoder, in tokens."""
    prompt, refused = writing.prompt(language), []
    for file, sentence in zip(clips.files, clips.sentences):
        try:
            size = len(prompt) + len(writing.encode(sentence)) - 1
        except BadInput as e:
            refused.append(f"the sentence of {file}: {e}")
        else:
            if size > limit:
                refused.append(f"the sentence of {file} has {size} tokens, more than the {limit} of this model")
    if refused:
        more = f"; and {len(refused) - 3} more" if refused[3:] else ""
        raise BadInput(f"{clips.table}: {'; '.join(refused[:3])}{more}; shorten them or leave them out")


def make_batch(clips, rows, writing, language):
    """Clips and their sentences -> mel [n, n_mels, F], x int64 [n, T], their next tokens y [n, T],
    of which those of the prompt and the padding are -100."""
    prompt = writing.prompt(language)
    texts = [prompt + writing.encode(clips.sentences[i]) for i in rows]
    longest = max(map(len, texts)) - 1
    x = torch.full((len(rows), longest), writing.end)
    y = torch.full((len(rows), longest), -100)
    for i, text in enumerate(texts):
        n = len(text) - 1
        x[i, :n], y[i, :n] = torch.tensor(text[:-1]), torch.tensor(text[1:])
    y[:, :len(prompt) - 1] = -100
    return clips.mel(rows), x, y


# ----------------------------------------------------------------------------- the word error rate


def normalised(text):
    """Lower case, without punctuation and symbols; marks, as in Devanagari, stay."""
    text = unicodedata.normalize("NFKC", text)
    kept = (" " if unicodedata.category(c)[0] in "PS" else c for c in text)
    return " ".join("".join(kept).lower().split())


def error_rates(sentences, written):
    """Percent of the words that are wrong, as they are and normalised, and of the characters."""
    jiwer = load_jiwer()
    bare = [(normalised(said), normalised(heard)) for said, heard in zip(sentences, written)]
    said, heard = zip(*[pair for pair in bare if pair[0]] or [("-", "-")])   # jiwer's none is empty
    return dict(wer=100 * jiwer.wer(sentences, written),
                wer_normalised=100 * jiwer.wer(list(said), list(heard)),
                cer=100 * jiwer.cer(sentences, written))


def load_jiwer():
    try:
        import jiwer
    except ImportError:
        raise BadInput("the word error rate needs jiwer, which is not here: "
                       f"{REQUIREMENTS}") from None
    return jiwer


def score(model, writing, clips, adapter_id, args):
    """Write down all clips with one adapter -> their error rates, seconds and texts, and how many
    are endless: as long as they may be, since the model repeats itself."""
    written, begin, device = [""] * len(clips.mels), time.time(), torch.device(args.device)
    prompt, endless = writing.prompt(args.language), 0
    limit = min(args.max_new_tokens, model.config.n_positions - len(prompt))
    flora.freeze_bank(model)
    for rows in tqdm(clips.shortest_first(16), desc="writing", unit="batch", leave=False):
        texts = write_greedily(
            model, writing, clips.mel(rows).to(device),
            torch.tensor([prompt] * len(rows), device=device),
            train.row_ids(adapter_id, len(rows), device), limit)
        endless += sum(len(text) == limit for text in texts)
        for row, text in zip(rows, texts):
            written[row] = writing.decode(text)
    return dict(**error_rates(clips.sentences, written), clips=len(written), endless=endless,
                words=sum(len(sentence.split()) for sentence in clips.sentences),
                seconds=time.time() - begin, texts=written)


def said(scores):
    return ", ".join(f"{what} {scores[key]:.1f} %" for key, what in RATES.items())


# ---------------------------------------------------------------------------------------- training


def loss_of(adapter_id, model, mel, x, y):
    """Mean loss of the sentences' tokens, in nats."""
    logits = model(x, train.row_ids(adapter_id, len(x), x.device), mel)
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


@torch.no_grad()
def heldout_loss(model, clips, writing, adapter_id, args):
    """The same over all clips."""
    total, tokens, device = 0.0, 0, torch.device(args.device)
    for rows in clips.shortest_first(8):
        batch = make_batch(clips, rows, writing, args.language)
        n = int((batch[2] != -100).sum())
        with train.autocast(device, args.dtype):
            loss = loss_of(adapter_id, model, *(tensor.to(device) for tensor in batch))
        total, tokens = total + n * loss.item(), tokens + n
    return total / tokens


def next_batch(clips, writing, args, step, micro):
    """A batch, drawn from the seed and the step alone."""
    rng, again = np.random.default_rng([args.seed, step, micro]), len(clips.mels) < args.batch_size
    rows = rng.choice(len(clips.mels), args.batch_size, replace=again)
    return make_batch(clips, rows, writing, args.language)


def fit_adapter(args):
    """Train one adapter as the flags say -> (model, its Writing, adapter id, the report)."""
    if WORLD > 1:
        raise BadInput("extras.whisper trains in one process; leave torchrun out")
    model, writing = load(args, get_device(args.device))
    check_data(args, writing)
    clips, heldout = split_of(args, "train"), split_of(args, "dev")
    args.made_with = made_with(args)
    checkpoint = open_checkpoint(args)
    if checkpoint:
        check_same(checkpoint, args)
    torch.manual_seed(args.seed)
    adapter_id = flora.add_adapter(model, args.adapter, args.rank, args.targets, args.alpha)
    parameters = flora.adapter_parameters(model, adapter_id)
    say_sizes(args, model, parameters)
    speed_up(model, args)
    batches = partial(next_batch, clips, writing, args)
    measure = partial(heldout_loss, model, heldout, writing, adapter_id, args)
    with interrupts() as stop:
        log, rate = train.fit(model, parameters, batches, partial(loss_of, adapter_id), measure,
                              train.loop_of(args), stop, checkpoint)
    return model, writing, adapter_id, make_report(args, model, parameters, log, rate)


def make_report(args, model, parameters, log, rate):
    """What OUT/log.json holds, but for the error rates."""
    names = ("adapter", "rank", "targets", "lr", "seed", "steps", "batch_size", "language",
             "window", "device", "dtype", "made_with")
    settings = {name: getattr(args, name) for name in names}
    return provenance(args.device) | settings | dict(
        heldout_loss_before=log[0]["heldout_loss"], heldout_loss_after=log[-1]["heldout_loss"],
        trainable_parameters=count(parameters),
        total_parameters=count(model.base_parameters()), seconds=log[-1]["seconds"],
        seconds_per_step=args.tokens_per_step / rate if rate else None,
        peak_memory_bytes=peak_memory(model.wte.weight.device), torch=torch.__version__,
        log=log)


def load(args, device):
    """The model and its Writing, by the flags."""
    model, writing = load_whisper(args.weights, device, getattr(torch, args.dtype))
    longest = window_of(model.config)
    if args.window > longest:
        raise BadInput(f"--window {args.window}: this model hears at most {longest} s")
    return model.requires_grad_(False), writing


def speed_up(model, args):
    """On a CPU, hold the frozen projections packed for both directions (extras/fast.py), and, in
    bfloat16, attend by plain matmuls."""
    if torch.device(args.device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    check_packs(getattr(torch, args.dtype))
    keep_memory()
    pack_both_ways(model, getattr(torch, args.dtype))
    for module in model.modules():
        if isinstance(module, Attention) and args.dtype == "bfloat16":
            module.attend = attend_plainly


def made_with(args):
    """The digests and flags that decide what a training learns."""
    data = digest(*(split_of(args, split).digest for split in ("train", "dev", "test")))
    return dict(base=base_digest(args.weights), data=data, language=args.language,
                window=args.window) | flags_of(args)


def train_adapter(args):
    """`train`: one training, its word error rates before and after, and its files."""
    load_jiwer()
    with outputs(args):
        model, writing, adapter_id, report = fit_adapter(args)
        before = score(model, writing, split_of(args, "test"), BASE, args)
        report = finish(args, model, writing, adapter_id, report | dict(before=before))
        print(f"{before['clips']} test clips: {said(before)}\n  -> {said(report['after'])}")
        if args.json:
            write_json(args.json, report)


def finish(args, model, writing, adapter_id, report):
    """Write OUT/adapter.safetensors, score it, and write OUT/log.json -> the report."""
    file = str(Path(args.out, "adapter.safetensors"))
    summary = {key: value for key, value in report.items() if key not in ("log", "before")}
    flora.save_adapter(model, adapter_id, file, summary)
    after = score(model, writing, split_of(args, "test"), adapter_id, args)
    report = report | dict(adapter_file=file, after=after)
    write_json(str(Path(args.out, "log.json")), report)
    print(f"held-out loss {report['heldout_loss_before']:.4f} -> "
          f"{report['heldout_loss_after']:.4f} nats/token, {report['seconds']:.0f} s; saved {file}")
    return report


# --------------------------------------------------------------------------- scoring, transcribing


def score_adapters(args):
    """`score`: the error rates on test.tsv of the base model or of adapters, one after another."""
    load_jiwer()
    check_writable(args.json, "--json", JSON)
    model, writing = load(args, get_device(args.device))
    test = Clips(args.data, "test", args.window, model.config.n_mels, args.longest)
    model.pack()
    loaded, rows = load_adapters(model, args.adapter), []
    for name in args.adapter:
        scores = score(model, writing, test, loaded[name], args)
        rows.append(dict(adapter=name) | scores)
        print(f"{name}: {said(scores)}; {scores['words']} words, {scores['seconds']:.0f} s")
    if args.json:
        write_json(args.json, provenance(args.device) | dict(
            language=args.language, window=args.window, dtype=args.dtype, rows=rows))


def transcribe(args):
    """`transcribe`: clips, each in its language and with its adapter, in batches."""
    check_writable(args.json, "--json", JSON)
    n, device = len(args.clips), get_device(args.device)
    languages = one_each(args.language, n, "--language")
    names = one_each(args.adapter, n, "--adapter")
    model, writing = load(args, device)
    prompts = torch.tensor([writing.prompt(language) for language in languages], device=device)
    n_mels = model.config.n_mels
    mels = [log_mel(read_audio(clip), n_mels, args.window, clip) for clip in args.clips]
    loaded, results = load_adapters(model, args.adapter), []
    ids = torch.tensor([loaded[name] for name in names], device=device)
    model.pack()
    for at in range(0, n, args.batch_size):
        part = slice(at, at + args.batch_size)
        mel = torch.stack(mels[part]).to(device)
        texts = write_greedily(model, writing, mel, prompts[part], ids[part], args.max_new_tokens)
        for i, text in enumerate(map(writing.decode, texts), start=at):
            print(f"{args.clips[i]}\t{text}", flush=True)
            results.append(dict(clip=args.clips[i], language=languages[i], adapter=names[i],
                                text=text))
    if args.json:
        write_json(args.json, results)


# ------------------------------------------------------------------------------------------- table

SCORE = {"wer": float, "wer_normalised": float, "cer": float, "seconds": float, "words": int,
         "clips": int, "endless": int}
LOG = {"heldout_loss_after": float, "trainable_parameters": int, "seconds": float, "made_with": {}}


def table(args):
    """`table`: every method x seed on every folder, each method at its best rate, which is chosen
    on the first folder."""
    load_jiwer()
    args.json = args.json or f"{args.out}/table.json"
    with outputs(args):
        folders, writing = dict(named_folder(spec) for spec in args.data), Writing(args.weights)
        for language, folder in folders.items():
            check_data(run_args(args, language, folder, args.methods[0], lr=None, seed=0), writing)
        sweep = tune(args, *next(iter(folders.items())))
        rates = {method: min(tried, key=tried.get) for method, tried in sweep.items()}
        bases = {language: base_of(args, language, folder) for language, folder in folders.items()}
        logs = {language: {method: [] for method in args.methods} for language in folders}
        for seed in args.seeds:   # outermost: after one seed there is a table already
            for language, folder in folders.items():
                for method in args.methods:
                    run = run_args(args, language, folder, method, rates[method], seed)
                    logs[language][method].append(result_of(run))
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
    run = argparse.Namespace(**vars(args) | dict(
        language=language, data=folder, adapter=adapter, rank=rank, lr=lr, seed=seed, targets=None,
        json=None, resume=True, warmup=None, eval_every=math.ceil(args.steps / 2),
        out=f"{args.out}/{language}/{method}/{seed}") | more)
    fill_in(run)
    return run


def result_of(run, scored=True):
    """A run's log.json. Where there is none yet it is trained, and, if `scored`, its error rates
    are measured. BadInput if what is there was made with other settings."""
    file = Path(run.out, "log.json")
    if file.exists():
        log = read_json(file, LOG | ({"after": SCORE} if scored else {}))
        check_made_with(file, log, made_with(run))
        return log
    os.makedirs(run.out, exist_ok=True)
    model, writing, adapter_id, report = fit_adapter(run)
    if scored:
        return finish(run, model, writing, adapter_id, report)
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
    """The loss on dev.tsv of each method and rate, after --tune-steps, a mean over --tune-seeds
    -> {method: {rate: loss}}.

    The rates go up from the kind's default by factors of two, and on in either direction while the
    last one tried is the best."""
    sweep = {}
    for method in args.methods:
        default, tried = learning_rate(METHODS[method][0]), {}
        wanted = [default, 2 * default]
        while wanted:
            for rate in wanted:
                losses = [tuning_loss(args, language, folder, method, rate, seed)
                          for seed in args.tune_seeds]
                tried[rate] = sum(losses) / len(losses)
            wanted = next_rates(tried)
        sweep[method] = tried
        cells = "  ".join(f"{rate:g}: {tried[rate]:.4f}" for rate in sorted(tried))
        print(f"{method}: loss on dev.tsv by rate: {cells}")
    return sweep


def tuning_loss(args, language, folder, method, rate, seed):
    """One training of `tune` -> its loss on dev.tsv, infinite if it diverged."""
    run = run_args(args, language, folder, method, rate, seed,
                   steps=args.tune_steps, eval_every=args.tune_steps,
                   out=f"{args.out}/{language}/tune/{method}/{rate:g}/{seed}")
    try:
        return result_of(run, scored=False)["heldout_loss_after"]
    except FloatingPointError as e:
        print(f"{run.out}: {e}", file=sys.stderr)
        return math.inf


def show(args, bases, logs, rates, sweep):
    """Print the table as far as it goes, and write it to --json."""
    rows = {language: {method: row_of(runs) for method, runs in methods.items()}
            for language, methods in logs.items()}
    bases = {language: {key: base[key] for key in SCORE} for language, base in bases.items()}
    sweep = {method: {f"{rate:g}": loss for rate, loss in tried.items() if loss < math.inf}
             for method, tried in sweep.items()}
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "window", "dtype")}
    data = provenance(args.device) | dict(
        base=bases, table=rows, rates=rates, sweep=sweep, **settings)
    print(f"\n{speech(data)}")
    write_json(args.json, data)


def row_of(runs):
    """The log.json of each seed -> {measure: mean, spread, seeds}."""
    row = {key: over_seeds([run["after"][key] for run in runs]) for key in (*RATES, "endless")}
    return row | dict(heldout_loss=over_seeds([run["heldout_loss_after"] for run in runs]),
                      seconds=over_seeds([run["seconds"] for run in runs]),
                      parameters=runs[0]["trainable_parameters"])


# ------------------------------------------------------------------------------------- the command


def learning_rate(kind):
    return LEARNING_RATES.get(kind, flora.adapter_class(kind).learning_rate)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, add_flags in [("transcribe", transcribe, add_transcribe_flags),
                                 ("train", train_adapter, add_train_flags),
                                 ("score", score_adapters, add_score_flags),
                                 ("table", table, add_table_flags)]:
        command = commands.add_parser(name, help=run.__doc__, formatter_class=Help)
        command.set_defaults(run=run, quantize=None, grad_accum=1, compile=False)
        add_flags(command.add_argument)
        add_common_flags(command.add_argument, name)
    args = parser.parse_args(argv)
    check_args(args)
    if args.dtype is None:
        args.dtype, _ = choose_dtype(get_device(args.device))
    if args.command == "train":
        fill_in(args)
    return args


def add_common_flags(add, command):
    trains = command in ("train", "table")
    add("--weights", required=True, metavar="FOLDER", help="a Whisper, as a Hugging Face folder")
    add("--window", type=int, default=30 if command == "transcribe" else 6,
        help="seconds of sound that the model hears; clips must fit (default: %(default)s)")
    add("--max-new-tokens", type=int, default=224 if command == "transcribe" else 100, help="of a clip's text")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=["float32", "bfloat16"], default=None if trains else "float32",
        help="default: " + ("bfloat16 if the device computes in it" if trains else "float32"))
    add("--json", metavar="FILE", help="write the results there as JSON")


def add_transcribe_flags(add):
    add("clips", nargs="+", metavar="CLIP",
        help="WAV of 16 bits; with soundfile also flac, ogg, mp3")
    add("--language", nargs="+", required=True, metavar="CODE",
        help="as cs; one for all clips, or one each")
    add("--adapter", nargs="+", default=["none"], metavar="FILE",
        help="one for all clips, or one each; none is the base model")
    add("--batch-size", type=int, default=8, help="clips at once")


def add_train_flags(add):
    add("--data", required=True, metavar="FOLDER", help="train.tsv, dev.tsv, test.tsv and clips/")
    add("--language", required=True, metavar="CODE", help="as cs")
    add("--adapter", default="flora", metavar="KIND", help="flora, lora, ia3, or of extras/")
    add("--rank", type=int, default=1, help="of the adapter; ia3 has none")
    add("--targets", nargs="+", help=f"of {' '.join(Whisper.TARGETS)} (default: all)")
    add("--alpha", type=float, default=8.0, help="LoRA's scale is alpha / rank")
    add("--lr", type=float, help="peak learning rate (default: " +
        ", ".join(f"{kind} {rate:g}" for kind, rate in LEARNING_RATES.items()) + ")")
    add("--warmup", type=int, help="steps (default: a twentieth)")
    add("--eval-every", type=int,
        help="steps between held-out losses and checkpoints (default: a third)")
    add("--seed", type=int, default=0, help="of all that is drawn at random")
    add("--out", metavar="FOLDER", help="default: out/whisper/LANGUAGE-ADAPTER-rRANK")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    add_loop_flags(add)


def add_score_flags(add):
    add("--data", required=True, metavar="FOLDER", help="test.tsv and clips/")
    add("--language", required=True, metavar="CODE", help="as cs")
    add("--adapter", nargs="+", default=["none"], metavar="FILE", help="none is the base model")
    add("--longest", type=float,
        help="seconds; longer clips are left out (default: the window)")


def add_table_flags(add):
    add("--data", required=True, nargs="+", metavar="LANGUAGE=FOLDER",
        help="rates are chosen on the first")
    add("--methods", nargs="+", choices=list(METHODS), default=PAPERS, help="rows of the table")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trainings; the mean is told")
    add("--tune-seeds", nargs="+", type=int, default=[100, 101, 102],
        help="of the choice of rates alone")
    add("--tune-steps", type=int, default=60, help="of the choice of rates alone")
    add("--alpha", type=float, default=8.0, help="LoRA's scale is alpha / rank")
    add("--out", default="out/whisper-table", metavar="FOLDER", help="of the trainings")
    add("--resume", action="store_true", help="understood: a table always goes on")
    add_loop_flags(add)


def add_loop_flags(add):
    add("--steps", type=int, default=180, help="of each training")
    add("--batch-size", type=int, default=6, help="clips per step (App. A: 6)")
    add("--clip", type=float, default=1.0, help="gradient norm")


def check_args(args):
    """BadInput for numbers that are out of range, of the flags that the command has."""
    def given(*flags):
        return [flag for flag in flags if flag in args]
    check_numbers(args, given("rank", "steps", "batch_size", "window", "max_new_tokens",
                              "eval_every", "tune_steps"),
                  given("warmup", "seed", "seeds", "tune_seeds"),
                  given("lr", "clip", "alpha", "longest"))


def fill_in(args):
    """The defaults that follow from other flags."""
    args.targets = args.targets or flora.default_targets(Whisper, args.adapter)
    args.lr = learning_rate(args.adapter) if args.lr is None else args.lr
    args.warmup = args.steps // 20 if args.warmup is None else args.warmup
    args.eval_every = args.eval_every or max(1, args.steps // 3)
    args.tokens_per_step = args.batch_size * args.window * 50   # positions of the encoder
    rank = "" if flora.adapter_class(args.adapter).fixed_rank else f"-r{args.rank}"
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
