"""Train an adapter on a folder of source files, or (--adapter none) the base model itself.

  python train.py --adapter flora --rank 1                      the embedded base learns C++
  python train.py --adapter lora --rank 8 --weights starcoderbase-1b --data src/ --ext .lua
  python train.py --adapter flora --rank 4 --from-lora out/lora-r4/adapter.safetensors    a LoRA's copy
  torchrun --nproc-per-node=4 train.py --adapter flora          data-parallel, same global batch

Writes OUT/adapter.safetensors (none: a Hugging Face folder), OUT/log.json and OUT/checkpoint.pt.
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
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import flora
from flora import BadInput
from model import (EMBEDDED, GPT, GPTConfig, Tokenizer, add_common_flags, get_device, read_config, read_json,
                   run_main, save_figure, write_json)

# flora and ia3: the paper's (App. A). lora: the paper's 1e-4 is for 1,500 steps of a 15B model; 1e-3
# measured better on the embedded one (README).
LEARNING_RATE = {"flora": 8e-3, "lora": 1e-3, "ia3": 5e-3, "ffba": 1e-3, "none": 2e-3}


# ------------------------------------------------------------------------------------------- data


def find_files(data, extensions=()):
    """Folders (searched through, hidden parts skipped), globs and files -> sorted list of Paths."""
    found = set()
    for pattern in data:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            raise BadInput(f"--data {pattern}: no such file, folder or glob match")
        for match in map(Path, matches):
            found.update([match] if match.is_file() else (
                p for p in match.rglob("*") if p.is_file()
                and not any(part.startswith(".") for part in p.relative_to(match).parts)))
    return sorted(p for p in found if not extensions or p.suffix in extensions)


def default_files(adapter):
    """Real code that is on the machine already: Python's standard library without its tests for the
    base model, torch's C++ headers (a language that the embedded base has not seen) for adapters."""
    if adapter == "none":
        stdlib = sysconfig.get_paths()["stdlib"]
        skipped = {"test", "tests", "idle_test", "site-packages"}
        return [p for p in find_files([stdlib], [".py"])
                if not skipped & set(p.relative_to(stdlib).parts)]
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
        lines = [s for s in (re.sub(r"\w+", "a", line).strip() for line in text.splitlines()) if s]
        windows = {hash(tuple(lines[i:i + window])) for i in range(max(1, len(lines) - window + 1))}
        if 2 * len(windows & seen) <= len(windows):
            kept.append(text)
            seen |= windows
    return kept


def split(texts, share=0.05):
    """-> (training texts, held-out texts), whole files. The order and the split follow from the
    texts' SHA-1 alone, so they are the same on every machine and for every seed."""
    if len(texts) < 2:
        raise BadInput(f"--data holds {len(texts)} distinct readable text files after deduplication; "
                       "at least 2 are needed, one of them held out (check the path and --ext)")
    texts = sorted(texts, key=lambda text: hashlib.sha1(text.encode()).digest())
    n = max(1, min(4, len(texts) // 5), round(share * len(texts)))   # of a few files, more than one
    return texts[n:], texts[:n]


def encode_texts(texts, tokenizer, budget):
    """Texts -> int32 ids of whole files, the eos before each (and a bos, if the tokenizer has one), until
    `budget` tokens are reached."""
    parts, total = [], 0
    for text in texts:
        parts.append(np.array([tokenizer.eos_id] + tokenizer.encode(text, bos=True), dtype=np.int32))
        total += len(parts[-1])
        if total >= budget:
            break
    return parts


def heldout_blocks(texts, tokenizer, block_size, budget):
    """Whole held-out files of about `budget` tokens -> (x [N, block], y [N, block], bytes of text).

    Every token of each file is predicted once; y is -100 on padding.
    """
    rows, size = [], 0
    budget_left = budget
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    for text in texts:
        ids = [first] + tokenizer.encode(text)
        if rows and len(ids) > budget_left:
            continue
        budget_left -= len(ids)
        size += len(text.encode())
        rows += [ids[i:i + block_size + 1] for i in range(0, len(ids) - 1, block_size)]
    x = torch.zeros(len(rows), block_size, dtype=torch.int64)
    y = torch.full((len(rows), block_size), -100)
    for i, row in enumerate(rows):
        x[i, :len(row) - 1], y[i, :len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
    return x, y, size


def batch(tokens, step, args, part):
    """Training windows x, y [n, block] of one micro-step, drawn from (seed, step) alone: a resumed
    run and any number of processes see the same global batch. part: this process's slice of it."""
    rng = np.random.default_rng([args.seed, *step])
    starts = rng.integers(0, len(tokens) - args.block_size, args.batch_size)[part]
    windows = torch.from_numpy(np.stack([tokens[s:s + args.block_size + 1] for s in starts])).long()
    return windows[:, :-1], windows[:, 1:]


def train_tokenizer(texts, file, vocab_size):
    """Write a sentencepiece BPE model that keeps whitespace exactly and falls back to bytes."""
    import sentencepiece
    indents = ["\n" + " " * n for n in (2, 4, 6, 8, 12, 16, 20)]
    with open(f"{file}.tmp", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines(keepends=True)),
            model_writer=f, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
            user_defined_symbols=["\n", "\n\n", "\t", *indents], max_sentence_length=1 << 20,
            eos_id=0, eos_piece="<|endoftext|>", unk_id=1, bos_id=-1, pad_id=-1, minloglevel=2)
    os.replace(f"{file}.tmp", file)


# --------------------------------------------------------------------------------------- training


def loss_of(model, x, y, adapter_ids):
    """Mean next-token loss in nats, over the targets y that are not -100."""
    logits = model(x, adapter_ids)                                            # [B, T, vocab]
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def distillation_loss(model, base_model, x, adapter_ids, teacher_ids):
    """Mean over all positions of x of KL(teacher ‖ student) in nats: both are adapters of one model.

    base_model: the same model for the teacher, outside of DDP and compilation. x [B, T] has no labels."""
    with torch.no_grad():
        teacher = base_model(x, teacher_ids).flatten(0, 1).float().log_softmax(-1)      # [B T, vocab]
    student = model(x, adapter_ids).flatten(0, 1).float().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


@torch.no_grad()
def heldout_loss(model, x, y, adapter_id, autocast, device):
    """Mean held-out loss in nats per token."""
    total, count = 0.0, 0
    for xs, ys in zip(x.split(8), y.split(8)):
        xs, ys, n = xs.to(device), ys.to(device), int((ys != -100).sum())
        ids = None if adapter_id is None else torch.full((len(xs),), adapter_id, device=device)
        with autocast:
            total += n * loss_of(model, xs, ys, ids).item()
        count += n
    return total / count


def learning_rate(step, args):
    """Linear warm-up, then a cosine down to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def peak_memory(device):
    """Bytes: the GPU's peak allocation, or this process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# What a checkpoint must share with the run that resumes it.
RESUME_KEYS = ("adapter", "from_lora", "rank", "targets", "alpha", "ffba_activation", "data", "ext", "keep_duplicates", "steps",
               "batch_size", "grad_accum", "block_size", "lr", "warmup", "seed", "vocab_size", "n_layer", "n_head",
               "n_embd", "quantize")


def save_checkpoint(file, step, trained, optimizer, log, args):
    torch.save(dict(step=step, trained=trained, optimizer=optimizer.state_dict(), log=log,
                    args={key: getattr(args, key) for key in RESUME_KEYS}), f"{file}.tmp")
    os.replace(f"{file}.tmp", file)


def load_checkpoint(file):
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged zip or pickle raises
        raise BadInput(f"{file}: not a readable checkpoint ({e}); delete it to start anew") from e


def train(args):
    """Run one training as `parse_args` describes it; returns the report that --json writes."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = get_device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = print if rank == 0 else lambda *_, **__: None
    if args.batch_size % world:
        raise BadInput(f"--batch-size {args.batch_size} is not a multiple of {world} processes")
    if args.targets is None and not args.from_lora:
        args.targets = [] if args.adapter == "none" else list(
            flora.DEFAULT_TARGETS[read_config(args.weights or EMBEDDED).model_type][args.adapter])
    part = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
    out = Path(args.out)
    checkpoint_file = out / "checkpoint.pt"
    checkpoint = load_checkpoint(checkpoint_file) if checkpoint_file.exists() else None
    if args.resume and checkpoint is None:
        say(f"{checkpoint_file}: no checkpoint yet, so starting at step 0")
    elif args.resume:
        for key, value in checkpoint["args"].items():
            if value != getattr(args, key):
                raise BadInput(f"{checkpoint_file} was made with --{key.replace('_', '-')} {value}, not "
                               f"{getattr(args, key)}; give the same flags to --resume")
    elif checkpoint and checkpoint["step"] < checkpoint["args"]["steps"]:
        raise BadInput(f"{checkpoint_file} is an unfinished run at step {checkpoint['step']}; add --resume "
                       "to go on with it, or choose another --out")
    else:
        checkpoint = None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out {out}: cannot be made a folder ({e.strerror})") from None

    # Data and model
    files = find_files(args.data, args.ext) if args.data else default_files(args.adapter)
    texts, skipped = read_texts(files)
    distinct = texts if args.keep_duplicates else drop_near_duplicates(texts)
    train_texts, heldout_texts = split(distinct)
    say(f"data: {len(files):,} files, {skipped:,} skipped (empty, binary or not UTF-8), "
        f"{len(texts) - len(distinct):,} near-duplicates dropped; "
        f"{len(train_texts):,} to train on, {len(heldout_texts):,} held out")
    torch.manual_seed(args.seed)
    from_scratch = args.adapter == "none" and not args.weights
    folder = out if from_scratch else Path(args.weights or EMBEDDED)
    if from_scratch:
        if rank == 0 and not checkpoint:
            train_tokenizer(train_texts, out / "tokenizer.model", args.vocab_size)
        if world > 1:
            dist.barrier()
        config = GPTConfig(args.vocab_size, args.block_size, args.n_embd, args.n_layer, args.n_head,
                           4 * args.n_embd)
        model = GPT(config).to(device)
    else:
        keep = torch.float32 if args.adapter == "none" else getattr(torch, args.dtype)
        model = GPT.from_pretrained(folder, device, keep)
        if args.block_size > model.config.n_positions:
            raise BadInput(f"--block-size {args.block_size} is more than the model's context of "
                           f"{model.config.n_positions} (n_positions in {folder}/config.json)")
    if args.quantize:
        flora.quantize_int8(model)
    tokenizer = Tokenizer(folder)
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.adapter == "none":
        adapter_id, trained = None, model.base_parameters()
        matrices = [p for p in trained.values() if p.dim() > 1]
        groups = [dict(params=matrices, weight_decay=0.1),
                  dict(params=[p for p in trained.values() if p.dim() < 2], weight_decay=0.0)]
    else:
        if args.from_lora:
            teacher_id = flora.load_adapter(model, args.from_lora)
        model.requires_grad_(False)
        if args.from_lora:
            tick = time.time()
            adapter_id, fit_error = flora.flora_from_lora(model, teacher_id, args.rank)
            fit_seconds = time.time() - tick
            say(f"fitted to {args.from_lora} in {fit_seconds:.1f} s: relative error of the weights {fit_error:.4f}")
        else:
            adapter_id = flora.add_adapter(model, args.adapter, args.rank, args.targets, args.alpha,
                                           args.ffba_activation if args.adapter == "ffba" else None)
        trained = flora.adapter_parameters(model, adapter_id)
        # No decay: it would pull a multiplicative adapter to 0, and the identity is 1
        groups = [dict(params=list(trained.values()), weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    trainable = sum(p.numel() for p in trained.values())
    total = sum(p.numel() for p in model.base_parameters().values())
    say(f"{args.adapter}: {trainable:,} trainable parameters, {100 * trainable / total:.4f} % of the base "
        f"model's {total:,}")

    tokens_per_step = args.batch_size * args.grad_accum * args.block_size
    budget = max(args.steps * tokens_per_step, args.block_size + 1)
    tokens = np.concatenate(encode_texts(train_texts, tokenizer, budget))
    if len(tokens) <= args.block_size:
        raise BadInput(f"--data holds {len(tokens)} training tokens, fewer than --block-size "
                       f"{args.block_size}; give more files or a smaller block")
    x_held, y_held, held_bytes = heldout_blocks(heldout_texts, tokenizer, args.block_size, args.eval_tokens)
    held_tokens = int((y_held != -100).sum())
    say(f"{len(tokens):,} distinct training tokens; held-out: {held_tokens:,} tokens, {held_bytes:,} bytes")
    autocast = torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")

    def evaluate(i=adapter_id):
        return heldout_loss(model, x_held, y_held, i, autocast, device) if rank == 0 else 0.0

    def check_finite(name, value, step):
        if not math.isfinite(value):
            kept = f"the last good checkpoint is kept in {checkpoint_file}" \
                if checkpoint_file.exists() else "no checkpoint was written yet"
            raise FloatingPointError(f"the {name} is {value} at step {step}; {kept}; lower --lr")

    step, log, seconds_before = 0, [], 0.0
    if checkpoint:
        step, log = checkpoint["step"], checkpoint["log"]
        for name, p in trained.items():
            p.data.copy_(checkpoint["trained"][name])
        optimizer.load_state_dict(checkpoint["optimizer"])
        seconds_before = log[-1]["seconds"]
        say(f"resumed at step {step}")
    else:
        log.append(dict(step=0, loss=None, heldout_loss=evaluate(), seconds=0.0))

    step_model = model
    if world > 1:
        step_model = torch.nn.parallel.DistributedDataParallel(model)
    if args.compile:
        step_model = torch.compile(step_model)
    ids = None if adapter_id is None else torch.full((part.stop - part.start,), adapter_id, device=device)
    teacher_ids = torch.full_like(ids, teacher_id) if args.from_lora else None

    # Training
    asked_to_stop, interrupted = torch.zeros(1), False
    previous = signal.signal(signal.SIGINT, lambda *_: asked_to_stop.fill_(1))
    start, losses, tokens_timed, seconds_timed = time.time(), [], 0, 0.0
    bar = tqdm(total=args.steps, initial=step, disable=rank > 0, desc=args.adapter, unit="step")
    while step < args.steps and not interrupted:
        tick = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss = torch.zeros(1, device=device)
        for micro in range(args.grad_accum):
            x, y = (t.to(device) for t in batch(tokens, (step, micro), args, part))
            last = micro == args.grad_accum - 1
            with contextlib.nullcontext() if world == 1 or last else step_model.no_sync():
                with autocast:
                    micro_loss = (distillation_loss(step_model, model, x, ids, teacher_ids) if args.from_lora
                                  else loss_of(step_model, x, y, ids)) / args.grad_accum
                micro_loss.backward()
            loss += micro_loss.detach()
        state = torch.cat([loss / world, asked_to_stop.to(device)])
        if world > 1:  # the loss of the global batch; and where one process was interrupted, all stop
            dist.all_reduce(state)
        loss, interrupted = state[0].item(), bool(state[1] > 0)
        check_finite("loss", loss, step + 1)
        torch.nn.utils.clip_grad_norm_(trained.values(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        step += 1
        tokens_timed, seconds_timed = tokens_timed + tokens_per_step, seconds_timed + time.time() - tick
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", heldout=f"{log[-1]['heldout_loss']:.3f}",
                        tok_s=f"{tokens_timed / seconds_timed:.0f}")
        if step % args.eval_every == 0 or step == args.steps or interrupted:
            log.append(dict(step=step, loss=sum(losses) / len(losses), heldout_loss=evaluate(),
                            seconds=seconds_before + time.time() - start))
            check_finite("held-out loss", log[-1]["heldout_loss"], step)
            losses = []
            if rank == 0:
                save_checkpoint(checkpoint_file, step, trained, optimizer, log, args)
    bar.close()
    signal.signal(signal.SIGINT, previous)
    if step < args.steps:
        say(f"interrupted at step {step}; go on with: {shlex.join([sys.executable, *sys.argv])} --resume")
        raise KeyboardInterrupt

    # Report
    def bits_per_byte(loss):
        return loss * held_tokens / held_bytes / math.log(2)
    before, after = log[0]["heldout_loss"], log[-1]["heldout_loss"]
    report = dict(
        adapter=args.adapter, rank=0.5 if args.adapter == "ia3" else args.rank, targets=args.targets,
        lr=args.lr, seed=args.seed, steps=args.steps, batch_size=args.batch_size,
        block_size=args.block_size, tokens_seen=args.steps * tokens_per_step,
        heldout_loss_before=before, heldout_loss_after=after,
        heldout_bpb_before=bits_per_byte(before), heldout_bpb_after=bits_per_byte(after),
        heldout_tokens=held_tokens, heldout_bytes=held_bytes,
        trainable_parameters=trainable, total_parameters=total,
        tokens_per_second=tokens_timed / seconds_timed if seconds_timed else None,
        seconds=log[-1]["seconds"], peak_memory_bytes=peak_memory(device),
        device=args.device, dtype=args.dtype, quantize=args.quantize, torch=torch.__version__, log=log)
    if args.from_lora:
        base, teacher = evaluate(flora.BASE), evaluate(teacher_id)
        share = None if teacher >= base else (base - after) / (base - teacher)
        targets = list(dict.fromkeys(a.target for a in flora.adapters_of(model, adapter_id).values()))
        report |= dict(from_lora=args.from_lora, targets=targets, fit_error=fit_error, fit_seconds=fit_seconds,
                       heldout_loss_base=base, heldout_loss_teacher=teacher, share_of_gain=share)
        say(f"held-out loss of the base {base:.4f}, of the LoRA {teacher:.4f}; "
            + ("the LoRA gains nothing" if share is None else f"{100 * share:.1f} % of its gain survives"))
    if rank == 0:
        if args.adapter == "none":
            model.save_pretrained(out, torch.float16)
            tokenizer.save(out)
            report["adapter_file"], hint = None, f"--weights {shlex.quote(args.out)}"
        else:
            file = report["adapter_file"] = str(out / "adapter.safetensors")
            summary = {k: v for k, v in report.items() if k not in ("log", "adapter_file")}
            flora.save_adapter(model, adapter_id, file, summary)
            weights = f"--weights {shlex.quote(args.weights)} " if args.weights else ""
            weights += f"--quantize {args.quantize} " if args.quantize else ""
            hint = f"{weights}--adapter {shlex.quote(file)}"
        for file in {str(out / "log.json"), args.json} - {None}:
            write_json(file, report)
        say(f"held-out loss {before:.4f} -> {after:.4f} nats/token, "
            f"{bits_per_byte(before):.4f} -> {bits_per_byte(after):.4f} bits/byte\n"
            f"{report['seconds']:.0f} s, {report['tokens_per_second'] or 0:.0f} tokens/s, "
            f"peak memory {report['peak_memory_bytes'] / 2**20:.0f} MiB\n"
            f"saved {report['adapter_file'] or args.out}; try it:\n"
            f"  python generate.py {hint} --prompt 'namespace at {{'")
    if world > 1:
        dist.destroy_process_group()
    return report


def plot(json_files, png):
    """Held-out loss against steps, one line per --json file of a run."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 4))
    for file in json_files:
        run = read_json(file)
        if "log" not in run:
            raise BadInput(f"--plot {file}: not a --json report of train.py")
        label = run["adapter"] + (f" rank {run['rank']}" if run["adapter"] in ("flora", "lora", "ffba") else "")
        axes.plot([p["step"] for p in run["log"]], [p["heldout_loss"] for p in run["log"]], "o-",
                  ms=3, label=f"{label}, {run['trainable_parameters']:,} parameters")
    axes.set(xlabel="steps", ylabel="held-out loss (nats per token)")
    axes.legend()
    save_figure(figure, png, dpi=150)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, fromfile_prefix_chars="@",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapter", choices=[*flora.KINDS, "none"], default="flora", help="none trains the base model")
    add("--rank", type=int, default=1)
    add("--targets", nargs="+", help="StarCoder: c_attn c_attn.qk c_attn.k c_proj c_fc mlp.c_proj, or all "
        "(default: c_attn; ia3: c_attn mlp.c_proj). Llama: q_proj k_proj v_proj o_proj gate_proj up_proj "
        "down_proj, or all (default: q_proj v_proj; ia3: k_proj v_proj down_proj). ffba: attn mlp, or all (default)")
    add("--alpha", type=float, default=8.0, help="LoRA's and FFBA's scale is alpha / rank")
    add("--ffba-activation", choices=["identity", "block"], default="identity",
        help="between FFBA's halves: nothing, or the block's activation")
    add("--data", nargs="+", metavar="PATH", help="folders, globs or files, @FILE for a list "
        "(default: torch's C++ headers; none: Python's standard library)")
    add("--ext", nargs="+", default=[], metavar=".EXT", help="take only files with these extensions")
    add("--keep-duplicates", action="store_true", help="train on near-duplicates too: for texts made by a program")
    add("--from-lora", metavar="FILE", help="with --adapter flora: start from the best fit to this LoRA, and train "
        "towards its predictions on --data (no labels); --steps 0 is the fit alone")
    add("--steps", type=int, default=300)
    add("--batch-size", type=int, default=8, help="sequences per step and process group")
    add("--grad-accum", type=int, default=1, help="micro-batches of --batch-size per step")
    add("--block-size", type=int, default=256, help="tokens per sequence")
    add("--lr", type=float, help=f"peak learning rate (default: {LEARNING_RATE})")
    add("--warmup", type=int, help="steps (default: a twentieth)")
    add("--clip", type=float, default=1.0, help="gradient norm")
    add("--eval-every", type=int, help="steps between held-out losses and checkpoints (default: a tenth)")
    add("--eval-tokens", type=int, default=32768, help="about how many held-out tokens, in whole files")
    add("--n-layer", type=int, default=6, help="size of a base model from scratch, with "
        "--n-head --n-embd --vocab-size")
    add("--n-head", type=int, default=4)
    add("--n-embd", type=int, default=256)
    add("--vocab-size", type=int, default=4096)
    add("--compile", action="store_true", help="torch.compile")
    add("--gradient-checkpointing", action="store_true")
    add("--out", help="folder (default: out/ADAPTER-rRANK, with --from-lora out/flora-rRANK-from-lora)")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    add("--plot", nargs="+", metavar="JSON", help="no training: draw these runs' held-out losses into --out PNG")
    add_common_flags(parser, dtypes=["float32", "bfloat16"])
    parser.set_defaults(weights=None)  # none without --weights starts from scratch
    args = parser.parse_args(argv)
    for flag in ("rank", "steps", "batch_size", "grad_accum", "block_size", "eval_tokens"):
        least = 0 if flag == "steps" and args.from_lora else 1
        if getattr(args, flag) < least:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; use a whole number of at least {least}")
    if args.quantize and args.adapter == "none":
        parser.error("--quantize int8 freezes the base; it cannot be trained with --adapter none")
    if args.from_lora and args.adapter != "flora":
        parser.error(f"--from-lora makes a FLoRA; it does not go with --adapter {args.adapter}")
    if args.from_lora and args.targets:
        parser.error("--from-lora takes the LoRA's targets; leave out --targets")
    args.lr = LEARNING_RATE[args.adapter] if args.lr is None else args.lr
    args.warmup = args.steps // 20 if args.warmup is None else args.warmup
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    rank = f"-r{args.rank}" if args.adapter in ("flora", "lora", "ffba") else ""
    args.out = args.out or f"out/{args.adapter}{rank}{'-from-lora' if args.from_lora else ''}"
    return args


def main():
    args = parse_args()
    if args.plot:
        return plot(args.plot, args.out)
    try:
        train(args)
    except FloatingPointError as e:
        print(f"train.py: error: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
