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
import math
import os
import shlex
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
from generate import generate
from model import GPT, model_class, read_config
from plumbing.checkpoints import (check_same, contents, flags_of, kept, open_checkpoint, restore,
                                  save_checkpoint)
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED, add_common_flags, check_numbers, run_main
from plumbing.outputs import JSON, check_writable, locked
from plumbing.processes import (RANK, WORLD, interrupts, over_processes, parallel, say,
                                start_processes)
from plumbing.prompts import new_text
from plumbing.registry import extra
from plumbing.report import finish, make_report, say_sizes
from plumbing.texts import load_texts
from plumbing.tokenizer import Tokenizer
from plumbing.training_flags import add_adapter_flags, add_data_flags, add_loop_flags

UNRANKED = ("ia3", "none")   # what --adapter may be where --rank says nothing


# ------------------------------------------------------------------------------------------- data


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


# ------------------------------------------------------------------------------- several processes


# ------------------------------------------------------------------------------------- checkpoints


# ------------------------------------------------------------------------------------ one training


def train(args):
    """Run one training as `parse_args` describes it; returns the report that --json writes."""
    run = train_adapter
    if args.adapter == "none":
        run = extra("pretrain", "--adapter none").pretrain
    elif args.from_lora:
        run = extra("lora_to_flora", "--from-lora").copy_lora
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
        extra("int8", "--quantize int8").quantize_int8(model)
    model.gradient_checkpointing = args.gradient_checkpointing
    return model, Tokenizer(folder)


def fit_text(args, model, parameters, data, adapter_id, checkpoint, loss=loss_of, **more):
    """`fit` on Data, with loss(model, x, y, adapter_ids) and `more` of its arguments -> the
    report."""
    if args.fast:
        loss = extra("fast", "--fast").speed_up(model, args)
    ids = row_ids(adapter_id, args.batch_size // WORLD, model.wte.weight.device)
    next_batch = partial(batch, data.tokens, args)
    heldout = partial(heldout_loss, model, data, adapter_id, args.dtype)

    def loss_of_rows(model, x, y):
        return loss(model, x, y, ids)

    log, rate = fit(model, parameters, next_batch, loss_of_rows, heldout, args, checkpoint, **more)
    return make_report(args, model, parameters, data, log, rate)


# --------------------------------------------------------------------------------------- the report


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
    add_adapter_flags(parser.add_argument_group("what is trained").add_argument,
                      flora.KINDS)
    add_data_flags(parser.add_argument_group("on what").add_argument)
    add_loop_flags(parser.add_argument_group("how").add_argument)
    add_common_flags(parser, dtypes=["float32", "bfloat16"])
    parser.set_defaults(weights=None)  # none without --weights starts from scratch
    args = parser.parse_args(argv)
    check_args(args, parser.error)
    fill_in(args)
    return args


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
        args.lr = extra("pretrain", "--adapter none").LEARNING_RATE
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
        return extra("curves", "--plot").plot(args.plot, args.out)
    try:
        train(args)
    except FloatingPointError as e:
        print(f"train.py: error: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
