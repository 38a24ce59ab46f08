"""Train an adapter on a folder of source files.

  python train.py --adapter flora --rank 1                      the embedded base learns C++
  python train.py --adapter lora --rank 8 --weights starcoderbase-1b --data src/ --ext .lua
  torchrun --nproc-per-node=4 train.py --adapter flora          data-parallel, same global batch
  python train.py --adapter none                    a base model, from scratch (extras/pretrain.py)
  python train.py --adapter flora --rank 4 --from-lora out/lora-r4/adapter.safetensors
                                                    a LoRA's copy (extras/lora_to_flora.py)

Writes OUT/adapter.safetensors (none: a Hugging Face folder), OUT/log.json and OUT/checkpoint.pt.
Read main -> train -> train_adapter -> fit_text -> fit, which is the loop, then what they call.
"""
import argparse
import contextlib
import glob
import hashlib
import math
import os
import re
import resource
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import flora
from flora import BadInput, write_json
from generate import generate, new_text
from model import (EMBEDDED, GPT, JSON, Tokenizer, adapter_digest, add_common_flags, base_digest,
                   check_numbers, check_writable, difference, digest, get_device, locked,
                   model_class, provenance, read_config, run_main, write_each)

UNRANKED = ("ia3", "none")   # what --adapter may be where --rank says nothing
# torchrun's: this process's number and how many there are; without torchrun there is one.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    """Print, once for all processes."""
    if RANK == 0:
        print(text)


# ------------------------------------------------------------------------------------------- data


def find_files(data, extensions=()):
    """Folders (searched through, hidden parts skipped), globs and files -> sorted list of Paths."""
    found = set()
    for pattern in data:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            raise BadInput(f"--data {pattern}: no such file, folder or glob match")
        for match in map(Path, matches):
            inside = [match] if match.is_file() else match.rglob("*")
            found.update(p for p in inside if p.is_file() and not hidden(p.relative_to(match)))
    return sorted(p for p in found if not extensions or p.suffix in extensions)


def hidden(path):
    return any(part.startswith(".") for part in path.parts)


def default_files(adapter):
    """Real code that is on the machine already: torch's C++ headers, a language that the embedded
    base has not seen; for the base itself, Python's standard library."""
    if adapter == "none":
        return flora.extra("pretrain", "--adapter none").default_files()
    return find_files([os.path.join(os.path.dirname(torch.__file__), "include")], [".h", ".hpp"])


def read_texts(files):
    """-> (texts, number of files skipped because they are empty, binary or not UTF-8)."""
    texts = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip() and "\0" not in text:
            texts.append(text)
    return texts, len(files) - len(texts)


def drop_near_duplicates(texts, window=5):
    """Keep a text unless over half of its 5-line windows were in texts kept before it, names and
    numbers aside: generated headers that differ by a name only count as one."""
    seen, kept = set(), []
    for text in texts:
        lines = [re.sub(r"\w+", "a", line).strip() for line in text.splitlines()]
        lines = [line for line in lines if line]
        starts = range(max(1, len(lines) - window + 1))
        windows = {hash(tuple(lines[i:i + window])) for i in starts}
        if 2 * len(windows & seen) <= len(windows):
            kept.append(text)
            seen |= windows
    return kept


def split(texts, share=0.05):
    """-> (training texts, held-out texts), entire files. The order and the split follow from the
    texts' SHA-1 alone, so they are the same on every machine and for every seed."""
    if len(texts) < 2:
        raise BadInput(f"--data holds {len(texts)} distinct readable text files after "
                       "deduplication; at least 2 are needed, one of them held out "
                       "(check the path and --ext)")
    texts = sorted(texts, key=lambda text: hashlib.sha1(text.encode()).digest())
    n = max(1, min(4, len(texts) // 5), round(share * len(texts)))   # of a few files, several
    return texts[n:], texts[:n]


def load_texts(args):
    """--data, read and deduplicated -> (training texts, held-out texts)."""
    files = find_files(args.data, args.ext) if args.data else default_files(args.adapter)
    texts, skipped = read_texts(files)
    distinct = texts if args.keep_duplicates else drop_near_duplicates(texts)
    training, heldout = split(distinct)
    say(f"data: {len(files):,} files, {skipped:,} skipped (empty, binary or not UTF-8), "
        f"{len(texts) - len(distinct):,} near-duplicates dropped; "
        f"{len(training):,} to train on, {len(heldout):,} held out")
    return training, heldout


def heldout_blocks(texts, tokenizer, block_size, budget):
    """Entire held-out files of about `budget` tokens -> (x, y [N, block], bytes of text).

    Every token of each file is predicted once; y is -100 on padding."""
    rows, size = [], 0
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    for text in texts:
        ids = [first] + tokenizer.encode(text)
        if rows and len(ids) > budget:
            continue
        budget -= len(ids)
        size += len(text.encode())
        rows += [ids[i:i + block_size + 1] for i in range(0, len(ids) - 1, block_size)]
    x = torch.zeros(len(rows), block_size, dtype=torch.int64)
    y = torch.full((len(rows), block_size), -100)
    for i, row in enumerate(rows):
        x[i, :len(row) - 1], y[i, :len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
    return x, y, size


class Data(NamedTuple):
    """What encode_data makes of the texts."""
    tokens: np.ndarray       # int32 [n], the training files one after the other
    x: torch.Tensor          # int64 [N, block], the held-out files
    y: torch.Tensor          # int64 [N, block], their next tokens or -100
    heldout_bytes: int

    @property
    def heldout_tokens(self):
        return int((self.y != -100).sum())

    def bits_per_byte(self, loss):
        """A held-out loss, nats per token, in a unit that does not depend on the tokenizer."""
        return loss * self.heldout_tokens / self.heldout_bytes / math.log(2)


def encode_data(args, texts, tokenizer):
    """(training texts, held-out texts) -> Data.

    As many entire training files as the steps can see, the eos before each (and the bos, if the
    tokenizer has one)."""
    training, heldout = texts
    budget, files = max(args.steps * args.tokens_per_step, args.block_size + 1), []
    for text in training:
        files.append([tokenizer.eos_id] + tokenizer.encode(text, bos=True))
        budget -= len(files[-1])
        if budget <= 0:
            break
    tokens = np.concatenate([np.array(ids, dtype=np.int32) for ids in files])
    if len(tokens) <= args.block_size:
        raise BadInput(f"--data holds {len(tokens)} training tokens, fewer than --block-size "
                       f"{args.block_size}; give more files or a smaller block")
    data = Data(tokens, *heldout_blocks(heldout, tokenizer, args.block_size, args.eval_tokens))
    say(f"{len(tokens):,} distinct training tokens; held-out: {data.heldout_tokens:,} tokens, "
        f"{data.heldout_bytes:,} bytes")
    return data


def batch(tokens, args, step, micro):
    """Training windows x, y [batch / processes, block] of one micro-step, drawn from the seed and
    the step alone: a resumed run and any number of processes see the same global batch."""
    rng = np.random.default_rng([args.seed, step, micro])
    starts = rng.integers(0, len(tokens) - args.block_size, args.batch_size)
    n = args.batch_size // WORLD
    windows = [tokens[s:s + args.block_size + 1] for s in starts[RANK * n:(RANK + 1) * n]]
    windows = torch.from_numpy(np.stack(windows)).long()
    return windows[:, :-1], windows[:, 1:]


# ----------------------------------------------------------------------------------------- losses


def autocast(device, dtype):
    """Matmuls in `dtype`, "float32" or "bfloat16"; parameters and their gradients stay float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def row_ids(adapter_id, rows, device):
    """int64 [rows]: every row runs the same adapter. None, the base alone, for None."""
    return None if adapter_id is None else torch.full((rows,), adapter_id, device=device)


def loss_of(model, x, y, adapter_ids):
    """Mean next-token loss in nats, over the targets y that are not -100."""
    logits = model(x, adapter_ids)                                            # [B, T, vocab]
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


@torch.no_grad()
def heldout_loss(model, data, adapter_id, dtype):
    """Mean held-out loss in nats per token."""
    total, device = 0.0, model.wte.weight.device
    for x, y in zip(data.x.split(8), data.y.split(8)):
        x, y, n = x.to(device), y.to(device), int((y != -100).sum())
        with autocast(device, dtype):
            total += n * loss_of(model, x, y, row_ids(adapter_id, len(x), device)).item()
    return total / data.heldout_tokens


# --------------------------------------------------------------------------------------- the loop


def fit(model, parameters, next_batch, loss, heldout, args, checkpoint=None, groups=None,
        stop=None):
    """The one loop: of adapters, base models and copies of LoRAs. It knows nothing of text.

    parameters: {name: Parameter}, all of `model` that takes gradients, as a checkpoint names them.
    next_batch(step, micro) -> tensors, this process's share of a micro-batch.
    loss(model, *tensors) -> their mean loss; its model is ours, parallel and compiled where asked.
    heldout() -> float, measured by process 0 at the start and every args.eval_every steps.
    args: those of add_loop_flags, and tokens_per_step.
    checkpoint: from open_checkpoint. groups: AdamW's, to give some parameters weight decay.
    stop: a tensor [1] that ends the loop like Ctrl-C, which it replaces, when it is set to 1.
    -> (log: [{step, loss, heldout_loss, seconds}], tokens per second or None after 0 steps).
    Raises FloatingPointError for a loss that is not finite, KeyboardInterrupt after Ctrl-C.
    """
    groups = groups or [dict(params=list(parameters.values()))]
    # Decay would pull a multiplicative adapter to 0, and the identity is 1
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    measure = heldout if RANK == 0 else lambda: 0.0
    if checkpoint:
        step, log = restore(checkpoint, parameters, optimizer)
    else:
        step, log = 0, [dict(step=0, loss=None, heldout_loss=measure(), seconds=0.0)]
    model = parallel(model, args.compile)
    losses, rate, interrupted = [], None, False
    first, busy, begin = step, 0.0, time.time() - log[-1]["seconds"]
    bar = tqdm(total=args.steps, initial=step, disable=RANK > 0, desc=args.out, unit="step")
    with bar, interrupts() if stop is None else contextlib.nullcontext(stop) as asked_to_stop:
        while step < args.steps and not interrupted:
            tick = time.time()
            share = backward(model, next_batch, loss, step, args)
            mean, interrupted = over_processes(share, asked_to_stop)
            check_finite("loss", mean, step + 1, args)
            update(optimizer, parameters, learning_rate(step, args), args.clip)
            losses.append(mean)
            step, busy = step + 1, busy + time.time() - tick
            rate = (step - first) * args.tokens_per_step / busy
            bar.update()
            bar.set_postfix(loss=f"{mean:.3f}", heldout=f"{log[-1]['heldout_loss']:.3f}",
                            tok_s=f"{rate:.0f}")
            if step % args.eval_every == 0 or step == args.steps or interrupted:
                log.append(dict(step=step, loss=sum(losses) / len(losses), heldout_loss=measure(),
                                seconds=time.time() - begin))
                check_finite("held-out loss", log[-1]["heldout_loss"], step, args)
                save_checkpoint(step, parameters, optimizer, log, args)
                losses = []
    if step < args.steps:
        resume = [] if args.resume else ["--resume"]
        command = shlex.join([sys.executable, *sys.argv, *resume])
        say(f"interrupted at step {step}; go on with: {command}")
        raise KeyboardInterrupt
    return log, rate


def backward(model, next_batch, loss, step, args):
    """Accumulate the gradients of one step's micro-batches; returns this process's loss, [1]."""
    device = next(model.parameters()).device
    total = torch.zeros(1, device=device)
    for micro in range(args.grad_accum):
        tensors = [tensor.to(device) for tensor in next_batch(step, micro)]
        last = micro == args.grad_accum - 1   # only then do the processes exchange gradients
        with contextlib.nullcontext() if WORLD == 1 or last else model.no_sync():
            with autocast(device, args.dtype):
                share = loss(model, *tensors) / args.grad_accum
            share.backward()
        total += share.detach()
    return total


def update(optimizer, parameters, lr, clip):
    """One step of the optimizer along the gradients, which are clipped and then forgotten."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def learning_rate(step, args):
    """Linear warm-up, then a cosine down to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def check_finite(name, value, step, args):
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value} at step {step}; {kept(args)}; lower --lr")


@contextlib.contextmanager
def interrupts():
    """Inside, Ctrl-C only sets the tensor that this yields, [1], from 0 to 1."""
    asked = torch.zeros(1)
    previous = signal.signal(signal.SIGINT, lambda *_: asked.fill_(1))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


# ------------------------------------------------------------------------------- several processes


def start_processes(args):
    """Join torchrun's processes, if there are any -> this one's torch.device."""
    device = get_device(args.device)
    if WORLD > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.batch_size % WORLD:
        raise BadInput(f"--batch-size {args.batch_size} is not a multiple of {WORLD} processes")
    return device


def parallel(model, compiled):
    """The model as the loop runs it: gradients averaged over the processes, and --compile."""
    if WORLD > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    return torch.compile(model) if compiled else model


def over_processes(loss, asked_to_stop):
    """-> (the loss of the global batch, whether any process was interrupted: then all stop)."""
    state = torch.cat([loss / WORLD, asked_to_stop.to(loss.device)])
    if WORLD > 1:
        dist.all_reduce(state)
    return state[0].item(), bool(state[1] > 0)


# ------------------------------------------------------------------------------------- checkpoints

# The flags that decide what a run learns, beside the contents of its base and its data
RESUME_KEYS = ("adapter", "rank", "targets", "alpha", "ffba_activation", "steps", "batch_size",
               "grad_accum", "block_size", "eval_tokens", "lr", "warmup", "clip", "seed",
               "vocab_size", "n_layer", "n_head", "n_embd", "dtype", "quantize")


def flags_of(args):
    return {key: getattr(args, key) for key in RESUME_KEYS if key in args}


def contents(args, texts):
    """The digests of what a run learns from -> {"base", "data", "lora"}."""
    scratch = args.adapter == "none" and args.weights is None
    return dict(base=None if scratch else base_digest(args.weights or EMBEDDED),
                data=digest(*texts[0], "held out:", *texts[1]),
                lora=adapter_digest(args.from_lora) if args.from_lora else None)


def save_checkpoint(step, parameters, optimizer, log, args):
    if RANK > 0:
        return
    state = dict(step=step, trained=parameters, optimizer=optimizer.state_dict(), log=log,
                 args=getattr(args, "made_with", {}))
    try:
        with flora.open_output(Path(args.out, "checkpoint.pt")) as f:
            torch.save(state, f)
    except BadInput as e:
        raise BadInput(f"{e} at step {step}; {kept(args)}") from None


def kept(args):
    """What is kept of a run that stops before its end."""
    file = Path(args.out, "checkpoint.pt")
    if file.exists():
        return f"the last good checkpoint is kept in {file}"
    return "no checkpoint was written yet"


CHECKPOINT = {"step": int, "trained": {}, "optimizer": {}, "args": {},
              "log": [{"step": int, "heldout_loss": float, "seconds": float}]}


def load_checkpoint(file):
    flora.existing_file(file, "checkpoint")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged zip or pickle raises
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise BadInput(f"{file}: not a readable checkpoint ({reason}); delete it to start "
                       "again") from e
    flora.check(checkpoint, CHECKPOINT, file)
    if any(isinstance(value, torch.Tensor) for value in checkpoint["args"].values()):
        raise BadInput(f"{file}: not a readable checkpoint (a tensor stands among its flags); "
                       "delete it to start again")
    return checkpoint


def open_checkpoint(args):
    """The checkpoint in OUT to go on from, or None to start at step 0.

    BadInput for an unfinished run without --resume."""
    file = Path(args.out, "checkpoint.pt")
    for unfinished in file.parent.glob(f"{file.name}.*.tmp"):   # by a run that was killed
        unfinished.unlink()
    checkpoint = load_checkpoint(file) if file.exists() else None
    if args.resume and checkpoint:
        return checkpoint
    if args.resume:
        say(f"{file}: no checkpoint yet, so starting at step 0")
    elif checkpoint and checkpoint["step"] < checkpoint["args"]["steps"]:
        raise BadInput(f"{file} is an unfinished run at step {checkpoint['step']}; add --resume "
                       "to go on with it, or choose another --out")
    return None


def check_same(checkpoint, args):
    """BadInput, naming the first difference, where a checkpoint was made with other settings,
    another base or other data than those of this run."""
    file, then, now = Path(args.out, "checkpoint.pt"), checkpoint["args"], args.made_with
    if "base" not in then:   # of an earlier version: the names of its data stand there instead
        now = now | {key: getattr(args, key, None) for key in then}
        say(f"{file}: was written before checkpoints had fingerprints; whether base, data, --clip, "
            "--dtype and --eval-tokens are the same is not checked")
    other = difference(then, now)
    if other:
        raise BadInput(f"{file} was made with {other}; give the same flags to --resume")


def restore(checkpoint, parameters, optimizer):
    """Put a checkpoint into the parameters and the optimizer -> (its step, its log)."""
    trained = checkpoint["trained"]
    shapes = {name: getattr(tensor, "shape", None) for name, tensor in trained.items()}
    if shapes != {name: p.shape for name, p in parameters.items()}:
        raise BadInput("the checkpoint was made with another base model or other targets, so that "
                       "its parameters do not fit; give the flags it was made with, or another "
                       "--out")
    for name, parameter in parameters.items():
        parameter.data.copy_(trained[name])
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(f"the checkpoint's optimizer is damaged ({e}); delete it to start "
                       "again") from None
    say(f"resumed at step {checkpoint['step']}")
    return checkpoint["step"], checkpoint["log"]


# ------------------------------------------------------------------------------------ one training


def train(args):
    """Run one training as `parse_args` describes it; returns the report that --json writes."""
    run = train_adapter
    if args.adapter == "none":
        run = flora.extra("pretrain", "--adapter none").pretrain
    elif args.from_lora:
        run = flora.extra("lora_to_flora", "--from-lora").copy_lora
    fill_targets(args)
    device = start_processes(args)
    with outputs(args):
        checkpoint, texts = prepare(args)
        torch.manual_seed(args.seed)
        report = run(args, device, texts, checkpoint)
    if WORLD > 1:
        dist.destroy_process_group()
    return report


def prepare(args):
    """-> (the checkpoint to go on from or None, the texts), which are seen to fit each other."""
    checkpoint, texts = open_checkpoint(args), load_texts(args)
    args.made_with = contents(args, texts) | flags_of(args) if RANK == 0 else {}
    if checkpoint and RANK == 0:
        check_same(checkpoint, args)
    return checkpoint, texts


def fill_targets(args):
    """The default --targets, which depend on the base's family."""
    if args.targets is None and not args.from_lora:
        family = model_class(read_config(args.weights or EMBEDDED).model_type)
        args.targets = flora.default_targets(family, args.adapter)


@contextlib.contextmanager
def outputs(args):
    """Make OUT a folder in which, inside, no other run writes; see that all can be written."""
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out {args.out}: cannot be made a folder ({e.strerror})") from None
    with locked(args.out, "--out") if RANK == 0 else contextlib.nullcontext():
        if RANK == 0:
            check_writable(str(Path(args.out, "log.json")), "--out", JSON)
            check_writable(args.json, "--json", JSON)
        yield


def train_adapter(args, device, texts, checkpoint):
    """Freeze the base and train one new adapter of it."""
    model, tokenizer = load_base(args, device, getattr(torch, args.dtype))
    model.requires_grad_(False)
    report = add_and_fit(args, model, tokenizer, texts, checkpoint)
    if RANK == 0:
        show_samples(args, model, tokenizer, texts[1], report["adapter_file"])
    return report


def add_and_fit(args, model, tokenizer, texts, checkpoint, **how):
    """Train one new adapter of a frozen model; how: as fit_text takes it."""
    options = dict(activation=args.ffba_activation) if args.adapter == "ffba" else {}
    adapter_id = flora.add_adapter(model, args.adapter, args.rank, args.targets, args.alpha,
                                   **options)
    parameters = flora.adapter_parameters(model, adapter_id)
    say_sizes(args, model, parameters)
    data = encode_data(args, texts, tokenizer)
    report = fit_text(args, model, parameters, data, adapter_id, checkpoint, **how)
    return finish_adapter(args, model, adapter_id, report)


def load_base(args, device, dtype):
    """The model of --weights in `dtype`, and its tokenizer."""
    folder = args.weights or EMBEDDED
    model = GPT.from_pretrained(folder, device, dtype)
    if args.block_size > model.config.n_positions:
        raise BadInput(f"--block-size {args.block_size} is more than the model's context of "
                       f"{model.config.n_positions} (n_positions in {folder}/config.json)")
    if args.quantize:
        flora.extra("int8", "--quantize int8").quantize_int8(model)
    model.gradient_checkpointing = args.gradient_checkpointing
    return model, Tokenizer(folder)


def fit_text(args, model, parameters, data, adapter_id, checkpoint, loss=loss_of, **more):
    """`fit` on Data, with loss(model, x, y, adapter_ids) and `more` of its arguments -> the
    report."""
    if args.fast:
        loss = flora.extra("fast", "--fast").speed_up(model, args)
    ids = row_ids(adapter_id, args.batch_size // WORLD, model.wte.weight.device)
    next_batch = partial(batch, data.tokens, args)
    heldout = partial(heldout_loss, model, data, adapter_id, args.dtype)

    def loss_of_rows(model, x, y):
        return loss(model, x, y, ids)

    log, rate = fit(model, parameters, next_batch, loss_of_rows, heldout, args, checkpoint, **more)
    return make_report(args, model, parameters, data, log, rate)


# --------------------------------------------------------------------------------------- the report


def count(parameters):
    return sum(p.numel() for p in parameters.values())


def say_sizes(args, model, parameters):
    trained, total = count(parameters), count(model.base_parameters())
    say(f"{args.adapter}: {trained:,} trainable parameters, {100 * trained / total:.4f} % of the "
        f"base model's {total:,}")


def make_report(args, model, parameters, data, log, rate):
    """What --json and OUT/log.json hold; bpb: bits per byte of held-out text."""
    before, after = log[0]["heldout_loss"], log[-1]["heldout_loss"]
    return provenance(model.wte.weight.device) | dict(
        adapter=args.adapter, rank=0.5 if args.adapter == "ia3" else args.rank,
        targets=args.targets, lr=args.lr, seed=args.seed, steps=args.steps,
        batch_size=args.batch_size, block_size=args.block_size,
        tokens_seen=args.steps * args.tokens_per_step,
        heldout_loss_before=before, heldout_loss_after=after,
        heldout_bpb_before=data.bits_per_byte(before), heldout_bpb_after=data.bits_per_byte(after),
        heldout_tokens=data.heldout_tokens, heldout_bytes=data.heldout_bytes,
        trainable_parameters=count(parameters), total_parameters=count(model.base_parameters()),
        tokens_per_second=rate, seconds=log[-1]["seconds"],
        peak_memory_bytes=peak_memory(model.wte.weight.device),
        device=args.device, dtype=args.dtype, quantize=args.quantize,
        torch=torch.__version__, made_with=args.made_with, log=log)


def peak_memory(device):
    """Bytes: the GPU's peak allocation, or this process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def finish_adapter(args, model, adapter_id, report):
    """Write OUT/adapter.safetensors, with a summary inside, and the report; returns the report."""
    if RANK > 0:
        return report
    file = str(Path(args.out, "adapter.safetensors"))
    summary = {key: value for key, value in report.items() if key != "log"}
    flags = {"--weights": args.weights, "--quantize": args.quantize, "--adapter": file}
    used = [f"{flag} {shlex.quote(value)}" for flag, value in flags.items() if value]
    save = partial(flora.save_adapter, model, adapter_id, file, summary)
    return finish(args, report | dict(adapter_file=file), " ".join(used), save)


def finish(args, report, hint, save):
    """Print the report, save() what was trained, write the report; what cannot be written stops
    none of the others. hint: generate.py's flags for what was trained."""
    say(f"held-out loss {report['heldout_loss_before']:.4f} -> {report['heldout_loss_after']:.4f} "
        f"nats/token, {report['heldout_bpb_before']:.4f} -> {report['heldout_bpb_after']:.4f} "
        "bits/byte\n"
        f"{report['seconds']:.0f} s, {report['tokens_per_second'] or 0:.0f} tokens/s, "
        f"peak memory {report['peak_memory_bytes'] / 2**20:.0f} MiB")
    files = {str(Path(args.out, "log.json")), args.json} - {None}
    write_each(save, *(partial(write_json, file, report) for file in sorted(files)))
    say(f"saved {report['adapter_file'] or args.out}; try it:\n"
        f"  python generate.py {hint} --prompt 'namespace at {{' --temperature 0.8")
    return report


def show_samples(args, model, tokenizer, heldout, adapter_file):
    """Print how the base and the saved adapter go on in the middle of three held-out texts (many
    begin alike), by sampling. All are rows of one batch."""
    given, new = min(32, args.block_size // 2), 40   # tokens
    middles = [text[text.find("\n", len(text) // 2) + 1:] for text in heldout[:3]]
    prompts = [tokenizer.encode(text, bos=True)[:given] for text in middles]
    rows = [prompt for prompt in prompts for _ in ("base", "adapter")]
    ids = [flora.BASE, flora.load_adapter(model, adapter_file)] * len(prompts)
    texts = generate(model, rows, ids, max_new_tokens=new, temperature=0.8, seed=args.seed,
                     eos_id=tokenizer.eos_ids)
    texts = [new_text(tokenizer, text) for text in texts]
    say(f"\nbase and adapter go on, sampled at temperature 0.8 with seed {args.seed}; look at "
        "which language each\nwrites (a model as small as the embedded one makes no sense in any):")
    for prompt, base, adapter in zip(prompts, texts[::2], texts[1::2]):
        say(f"\n=== held out\n{tokenizer.decode(prompt)}\n"
            f"--- base\n{base}\n--- adapter\n{adapter}")


# -------------------------------------------------------------------------------------- the command


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, fromfile_prefix_chars="@",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_adapter_flags(parser.add_argument_group("what is trained").add_argument)
    add_data_flags(parser.add_argument_group("on what").add_argument)
    add_loop_flags(parser.add_argument_group("how").add_argument)
    add_common_flags(parser, dtypes=["float32", "bfloat16"])
    parser.set_defaults(weights=None)  # none without --weights starts from scratch
    args = parser.parse_args(argv)
    check_args(args, parser.error)
    fill_in(args)
    return args


def add_adapter_flags(add):
    add("--adapter", default="flora", metavar="KIND",
        help=f"{', '.join(flora.KINDS)}, a kind of extras/ (as ffba), or none: the base itself")
    add("--rank", type=int, default=1)
    add("--targets", nargs="+", help="StarCoder: c_attn c_attn.qk c_attn.k c_proj c_fc mlp.c_proj, "
        "or all (default: c_attn; ia3: c_attn mlp.c_proj). Llama: q_proj k_proj v_proj o_proj "
        "gate_proj up_proj down_proj, or all (default: q_proj v_proj; ia3: k_proj v_proj "
        "down_proj). ffba: attn mlp, or all (default)")
    add("--alpha", type=float, default=8.0, help="LoRA's and FFBA's scale is alpha / rank")
    add("--ffba-activation", choices=["identity", "block"], default="identity",
        help="between FFBA's halves: nothing, or the block's activation")
    add("--from-lora", metavar="FILE", help="with --adapter flora: start from the best fit to this "
        "LoRA, and train towards its predictions on --data (no labels)")
    add("--n-layer", type=int, default=6,
        help="size of a base model from scratch, with --n-head --n-embd --vocab-size")
    add("--n-head", type=int, default=4)
    add("--n-embd", type=int, default=256)
    add("--vocab-size", type=int, default=4096)


def add_data_flags(add):
    add("--data", nargs="+", metavar="PATH", help="folders, globs or files, @FILE for a list "
        "(default: torch's C++ headers; none: Python's standard library)")
    add("--ext", nargs="+", default=[], metavar=".EXT",
        help="take only files with these extensions")
    add("--keep-duplicates", action="store_true",
        help="train on near-duplicates too: for texts made by a program")
    add("--block-size", type=int, default=256, help="tokens per sequence")
    add("--eval-tokens", type=int, default=32768,
        help="about how many held-out tokens, in entire files")


def add_loop_flags(add):
    add("--steps", type=int, default=300, help="0 measures alone (with --from-lora: the fit)")
    add("--batch-size", type=int, default=8, help="sequences per step and process group")
    add("--grad-accum", type=int, default=1, help="micro-batches of --batch-size per step")
    add("--lr", type=float, help="peak learning rate (default: the kind's learning_rate)")
    add("--warmup", type=int, help="steps (default: a twentieth)")
    add("--clip", type=float, default=1.0, help="gradient norm")
    add("--eval-every", type=int,
        help="steps between held-out losses and checkpoints (default: a tenth)")
    add("--compile", action="store_true", help="torch.compile")
    add("--fast", action="store_true", help="on a CPU: faster and, up to rounding, the same "
        "(extras/fast.py)")
    add("--gradient-checkpointing", action="store_true")
    add("--out", help="folder (default: out/ADAPTER-rRANK, with --from-lora "
        "out/flora-rRANK-from-lora)")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    add("--plot", nargs="+", metavar="JSON",
        help="no training: draw these runs' held-out losses into --out PNG")


def check_args(args, error):
    """Refuse flags that do not go together, by error(sentence)."""
    counts = ["rank", "batch_size", "grad_accum", "block_size", "eval_tokens", "eval_every",
              "n_layer", "n_head", "n_embd", "vocab_size"]
    check_numbers(args, at_least_1=counts, at_least_0=["steps", "warmup", "seed"],
                  above_0=["lr", "clip", "alpha"])
    if args.adapter != "none":
        flora.adapter_class(args.adapter)
    if args.quantize and args.adapter == "none":
        error("--quantize int8 freezes the base; it cannot be trained with --adapter none")
    if args.from_lora and args.adapter != "flora":
        error(f"--from-lora makes a FLoRA; it does not go with --adapter {args.adapter}")
    if args.plot and not args.out:
        error("--plot draws a PNG; name it with --out")
    if args.from_lora and args.fast:
        error("--fast is for a loss on text, not for --from-lora's; leave it out")
    if args.from_lora and args.targets:
        error("--from-lora takes the LoRA's targets; leave out --targets")


def fill_in(args):
    """The defaults that follow from other flags."""
    if args.lr is None and args.adapter == "none":
        args.lr = flora.extra("pretrain", "--adapter none").LEARNING_RATE
    elif args.lr is None:
        args.lr = flora.adapter_class(args.adapter).learning_rate
    if args.targets is None and args.adapter == "none":
        args.targets = []
    if args.warmup is None:
        args.warmup = args.steps // 20
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    args.tokens_per_step = args.batch_size * args.grad_accum * args.block_size
    rank = "" if args.adapter in UNRANKED else f"-r{args.rank}"
    args.out = args.out or f"out/{args.adapter}{rank}{'-from-lora' if args.from_lora else ''}"


def main():
    args = parse_args()
    if args.plot:
        return flora.extra("curves", "--plot").plot(args.plot, args.out)
    try:
        train(args)
    except FloatingPointError as e:
        print(f"train.py: error: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
