"""What a training tells at its end: printed, and as JSON."""
import shlex
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch

from plumbing.outputs import write_each, write_json
from plumbing.processes import RANK, say
from plumbing.provenance import peak_memory, provenance


def count(parameters):
    return sum(p.numel() for p in parameters.values())


def say_sizes(args, model, parameters):
    trained, total = count(parameters), count(model.base_parameters())
    on = f" on {' '.join(args.targets)}" if args.targets else ""
    say(f"{args.adapter}{on}: {trained:,} trainable parameters, {100 * trained / total:.4f} % of "
        f"the base model's {total:,}; peak learning rate {args.lr:g}")


def side_by_side(columns, width=None):
    """Texts, as columns of one text; lines longer than `width` are cut."""
    columns = [[line[:width] for line in text.rstrip("\n").split("\n")] for text in columns]
    widths = [width or max(map(len, lines)) for lines in columns]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join("   ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
                     for row in rows)


def make_report(args, model, parameters, data, log, rate):
    """What --json and OUT/log.json hold; bpb: bits per byte of held-out text."""
    before, after = log[0]["heldout_loss"], log[-1]["heldout_loss"]
    return provenance(model.wte.weight.device) | dict(
        adapter=args.adapter, rank=args.fixed_rank or args.rank,
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


def finish(args, report, save):
    """Print the report, save() what was trained, write the report: each even if another fails."""
    if RANK > 0:
        return report
    say(f"held-out loss {report['heldout_loss_before']:.4f} -> {report['heldout_loss_after']:.4f} "
        f"nats/token, {report['heldout_bpb_before']:.4f} -> {report['heldout_bpb_after']:.4f} "
        "bits/byte\n"
        f"{report['seconds']:.0f} s, {report['tokens_per_second'] or 0:.0f} tokens/s, "
        f"peak memory {report['peak_memory_bytes'] / 2**20:.0f} MiB")
    files = {str(Path(args.out, "log.json")), args.json} - {None}
    write_each(save, *(partial(write_json, file, report) for file in sorted(files)))
    weights = args.weights if report["adapter_file"] else args.out
    flags = {"--weights": weights, "--quantize": args.quantize, "--adapter": report["adapter_file"]}
    used = " ".join(f"{flag} {shlex.quote(value)}" for flag, value in flags.items() if value)
    say(f"saved {report['adapter_file'] or args.out}; try it:\n"
        f"  python generate.py {used} --prompt {shlex.quote(args.try_prompt)} --temperature 0.8")
    return report
