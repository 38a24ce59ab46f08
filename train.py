"""Train an adapter on a folder of source files.

  python train.py --adapter flora --rank 1                      the embedded base learns C++
  python train.py --adapter lora --rank 8 --weights starcoderbase-1b/ --data src/ --ext .lua
  torchrun --nproc-per-node=4 train.py --adapter flora          data-parallel, same global batch
  python train.py --adapter none                    a base model itself (extras/pretrain.py)
  python train.py --adapter flora --rank 4 --from-lora out/lora-r4/adapter.safetensors
                                                    a LoRA's copy (extras/lora_to_flora.py)

Writes OUT/adapter.safetensors (none: a Hugging Face folder), OUT/log.json and OUT/checkpoint.pt.
Reading order: text to batches; the loss; the loop, `fit`; one training, `train`; the command.
"""
import contextlib
import math
import os
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import flora
from generate import generate
from model import GPT, model_class, read_config
from plumbing import training_flags
from plumbing.checkpoints import interrupted_at, kept, restore, save_checkpoint
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED, run_main
from plumbing.processes import RANK, WORLD, interrupts, over_processes, parallel, say
from plumbing.prompts import new_text
from plumbing.registry import extra
from plumbing.report import finish, make_report, say_sizes, side_by_side
from plumbing.runs import begin
from plumbing.texts import middle_line, within_budget
from plumbing.tokenizer import Tokenizer


# ------------------------------------------------------------------------------------------- data


def heldout_blocks(texts, tokenizer, block_size, budget):
    """Held-out texts of about `budget` tokens -> (x, y [N, block], bytes of text).

    Every token of each is predicted once; y is -100 on padding."""
    rows, size = [], 0
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    for text, ids in within_budget(texts, tokenizer, budget):
        ids = [first, *ids]
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


class Loop(NamedTuple):
    """The settings of `fit`."""
    steps: int
    grad_accum: int        # micro-batches of a step
    tokens_per_step: int   # of all processes
    lr: float              # its peak
    warmup: int            # steps
    clip: float            # the gradients' largest norm
    eval_every: int        # steps between held-out losses, and checkpoints
    dtype: str             # of matmuls
    compile: bool
    out: str               # folder of the checkpoint
    made_with: dict        # what decides what is learnt, for the checkpoint
    resume: bool           # whether this run goes on from one


def loop_of(args):
    """The Loop that flags describe."""
    return Loop(**{name: getattr(args, name) for name in Loop._fields})


def fit(model, parameters, next_batch, loss, heldout, loop, stop, checkpoint=None, optimizer=None):
    """The one loop: of adapters, base models and copies of LoRAs. It knows nothing of text.

    parameters: {name: Parameter}, all of `model` that takes gradients, as a checkpoint names them.
    next_batch(step, micro) -> tensors, this process's share of a micro-batch.
    loss(model, *tensors) -> their mean loss; its model is ours, parallel and compiled where asked.
    heldout() -> float, of process 0: at the start, every loop.eval_every steps, at the end.
    stop: a tensor [1]; the loop ends after the step in which it is set to 1 (see interrupts).
    checkpoint: from open_checkpoint. optimizer: default adamw(parameters.values()).
    -> (log: [{step, loss, heldout_loss, seconds}], tokens per second or None after 0 steps).
    Raises FloatingPointError for a loss that is not finite, KeyboardInterrupt if it was stopped.
    """
    optimizer = optimizer or adamw(parameters.values())
    measure = heldout if RANK == 0 else lambda: 0.0
    if checkpoint:
        step, log = restore(checkpoint, parameters, optimizer)
    else:
        step, log = 0, [dict(step=0, loss=None, heldout_loss=measure(), seconds=0.0)]
    model = parallel(model, loop.compile)
    losses, rate, stopped = [], None, False
    first, busy, started = step, 0.0, time.time() - log[-1]["seconds"]
    with tqdm(total=loop.steps, initial=step, disable=RANK > 0, desc=loop.out, unit="step") as bar:
        while step < loop.steps and not stopped:
            tick = time.time()
            share = backward(model, next_batch, loss, step, loop)
            mean, stopped = over_processes(share, stop)
            check_finite("loss", mean, step + 1, loop)
            update(optimizer, parameters, learning_rate(step, loop), loop.clip)
            losses.append(mean)
            step, busy = step + 1, busy + time.time() - tick
            rate = (step - first) * loop.tokens_per_step / busy
            bar.update()
            bar.set_postfix(loss=f"{mean:.3f}", heldout=f"{log[-1]['heldout_loss']:.3f}",
                            tok_s=f"{rate:.0f}")
            if step % loop.eval_every == 0 or step == loop.steps or stopped:
                log.append(dict(step=step, loss=sum(losses) / len(losses), heldout_loss=measure(),
                                seconds=time.time() - started))
                check_finite("held-out loss", log[-1]["heldout_loss"], step, loop)
                save_checkpoint(step, parameters, optimizer, log, loop)
                losses = []
    if step < loop.steps:
        interrupted_at(step, loop)
    return log, rate


def adamw(parameters):
    """The optimizer. Weight decay would pull a multiplicative adapter to 0, and the identity is 1.
    parameters: as torch's optimizers take them; update sets the rate."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)


def backward(model, next_batch, loss, step, loop):
    """Accumulate the gradients of one step's micro-batches; returns this process's loss, [1]."""
    device = next(model.parameters()).device
    total = torch.zeros(1, device=device)
    for micro in range(loop.grad_accum):
        tensors = [tensor.to(device) for tensor in next_batch(step, micro)]
        last = micro == loop.grad_accum - 1   # only then do the processes exchange gradients
        with contextlib.nullcontext() if WORLD == 1 or last else model.no_sync():
            with autocast(device, loop.dtype):
                share = loss(model, *tensors) / loop.grad_accum
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


def learning_rate(step, loop):
    """Linear warm-up, then a cosine down to a tenth."""
    if step < loop.warmup:
        return loop.lr * (step + 1) / loop.warmup
    progress = (step - loop.warmup) / max(1, loop.steps - loop.warmup)
    return loop.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def check_finite(name, value, step, loop):
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value} at step {step}; {kept(loop)}; lower --lr")


# ------------------------------------------------------------------------------------ one training


def train(args):
    """Run one training as `parse_args` describes it; returns the report that --json writes."""
    fill_targets(args)
    if args.adapter == "none":
        return extra("pretrain", "--adapter none").pretrain(args)
    if args.from_lora:
        return extra("lora_to_flora", "--from-lora").copy_lora(args)
    with begin(args) as run:
        model, tokenizer = load_base(args, run.device, getattr(torch, args.dtype))
        model.requires_grad_(False)
        adapter_id, parameters = new_adapter(args, model)
        data = encode_data(args, run.texts, tokenizer)
        task = text_task(args, model, data, adapter_id)
        with interrupts() as stop:
            log, rate = fit(model, parameters, *task, loop_of(args), stop, run.checkpoint)
        report = make_report(args, model, parameters, data, log, rate)
        report = finish_adapter(args, model, adapter_id, report)
        show_samples(args, model, tokenizer, run.texts[1], report)
    return report


def fill_targets(args):
    """The default --targets, which depend on the base's family."""
    if args.targets is None and not args.from_lora:
        family = model_class(read_config(args.weights or EMBEDDED).model_type)
        args.targets = flora.default_targets(family, args.adapter)


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


def new_adapter(args, model):
    """Add the adapter that the flags describe -> (its id, {name: Parameter})."""
    options = {name: getattr(args, f"{args.adapter}_{name}")
               for name in flora.adapter_class(args.adapter).options}
    adapter_id = flora.add_adapter(model, args.adapter, args.rank, args.targets, args.alpha,
                                   **options)
    parameters = flora.adapter_parameters(model, adapter_id)
    say_sizes(args, model, parameters)
    return adapter_id, parameters


def text_task(args, model, data, adapter_id, loss=loss_of):
    """What fit asks of a training on Data -> its (next_batch, loss, heldout).

    loss(model, x, y, adapter_ids) -> the mean loss."""
    if args.fast:
        loss = extra("fast", "--fast").speed_up(model, args)
    ids = row_ids(adapter_id, args.batch_size // WORLD, model.wte.weight.device)

    def loss_of_rows(model, x, y):
        return loss(model, x, y, ids)

    return (partial(batch, data.tokens, args), loss_of_rows,
            partial(heldout_loss, model, data, adapter_id, args.dtype))


def finish_adapter(args, model, adapter_id, report):
    """Write OUT/adapter.safetensors, with a summary inside, and the report -> the report."""
    file = os.path.join(args.out, "adapter.safetensors")
    summary = {key: value for key, value in report.items() if key != "log"}
    save = partial(flora.save_adapter, model, adapter_id, file, summary)
    return finish(args, report | dict(adapter_file=file), save)


def show_samples(args, model, tokenizer, heldout, report):
    """Print how the base and the saved adapter go on after a line from the middle of three held-out
    texts, by sampling, side by side. All are rows of one batch."""
    if RANK > 0:
        return
    given, new = min(32, args.block_size // 2), 64   # tokens
    prompts = [tokenizer.encode(middle_line(text), bos=True)[:given] for text in heldout[:3]]
    rows = [prompt for prompt in prompts for _ in ("base", "adapter")]
    ids = [flora.BASE, flora.load_adapter(model, report["adapter_file"])] * len(prompts)
    texts = generate(model, rows, ids, max_new_tokens=new, temperature=0.8, seed=args.seed,
                     eos_id=tokenizer.eos_ids)
    texts = [new_text(tokenizer, text) for text in texts]
    say(f"\nafter a line of a held-out file, sampled at temperature 0.8 with seed {args.seed}; "
        "look at which language each writes\n(a model as small as the embedded one makes no sense "
        "in any):")
    for prompt, base, adapter in zip(prompts, texts[::2], texts[1::2]):
        say(f"\n>>> {tokenizer.decode(prompt).strip()}\n"
            + side_by_side([f"[base]\n{base}", f"[adapter]\n{adapter}"], width=48))


# -------------------------------------------------------------------------------------- the command


def parse_args(argv=None):
    args = training_flags.parse_args(argv, __doc__, flora.KINDS)
    kind = None if args.adapter == "none" else flora.adapter_class(args.adapter)
    return training_flags.fill_in(args, kind)


def main():
    args = parse_args()
    if args.plot:
        return extra("curves", "--plot").plot(args.plot, args.out)
    train(args)


if __name__ == "__main__":
    run_main(main)
