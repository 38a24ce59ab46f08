"""The flags of train.py, which of them go together, and the defaults that follow from others."""
import argparse
import os

from plumbing.flags import EMBEDDED, Help, add_common_flags, check_numbers
from plumbing.registry import extra

# The rate and targets with which the embedded base learns most in the default steps, by sweep
# (extras/RESULTS.md). Elsewhere a kind's own hold: the paper's rate, for a 15B model, PEFT's targets.
EMBEDDED_DEFAULTS = {"flora": (6.4e-2, ["all"]), "lora": (1.6e-2, ["all"]), "ia3": (8e-2, ["all"])}


def parse_args(argv, description, kinds):
    """The flags; --lr is None where it was not given. kinds: the core's kinds of adapters."""
    parser = argparse.ArgumentParser(description=description, fromfile_prefix_chars="@",
                                     formatter_class=Help)
    add_adapter_flags(parser.add_argument_group("what is trained").add_argument, kinds)
    add_data_flags(parser.add_argument_group("on what").add_argument)
    add_loop_flags(parser.add_argument_group("how").add_argument, kinds)
    add_common_flags(parser, dtypes=["float32", "bfloat16"])
    parser.set_defaults(weights=None)   # none without --weights starts from scratch
    args = parser.parse_args(argv)
    check_args(args, parser.error)
    return args


def add_adapter_flags(add, kinds):
    add("--adapter", default="flora", metavar="KIND",
        help=f"{', '.join(kinds)}, a kind of extras/ (as ffba), or none: the base itself")
    add("--rank", type=int, default=1, help="r of FLoRA and LoRA; IA3 has none")
    add("--targets", nargs="+", help="StarCoder: c_attn c_attn.qk c_attn.k c_proj c_fc mlp.c_proj, "
        "or all (default: on the embedded base all; on another c_attn; ia3: c_attn mlp.c_proj). "
        "Llama: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, or all (default: q_proj "
        "v_proj; ia3: k_proj v_proj down_proj). ffba: attn mlp, or all (default)")
    add("--alpha", type=float, default=8.0, help="LoRA's and FFBA's scale is alpha / rank")
    add("--ffba-activation", choices=["identity", "block"], default="identity",
        help="between FFBA's halves: nothing, or the block's activation")
    add("--from-lora", metavar="FILE", help="with --adapter flora: start from the best fit to this "
        "LoRA, and train towards its predictions on --data (no labels)")
    add("--n-layer", type=int, default=6,
        help="size of a base model from scratch, with --n-head --n-embd --vocab-size")
    add("--n-head", type=int, default=4, help="of it: attention heads")
    add("--n-embd", type=int, default=256, help="of it: width")
    add("--vocab-size", type=int, default=4096, help="of it: tokens")


def add_data_flags(add):
    add("--data", nargs="+", metavar="PATH", help="folders, globs or files, @FILE for a list "
        "(default: torch's C++ headers; none: Python's standard library)")
    add("--ext", nargs="+", default=[], metavar=".EXT",
        help="take only files with these extensions, as .lua or lua")
    add("--keep-duplicates", action="store_true",
        help="train on near-duplicates too: for texts made by a program")
    add("--block-size", type=int, default=256, help="tokens per sequence")
    add("--eval-tokens", type=int, default=32768,
        help="about how many held-out tokens: entire files, or the beginning of a larger one")


def add_loop_flags(add, kinds):
    add("--steps", type=int, default=200, help="0 measures alone (with --from-lora: the fit)")
    add("--batch-size", type=int, default=8, help="sequences of a micro-batch, of all processes")
    add("--grad-accum", type=int, default=1, help="micro-batches of --batch-size per step")
    swept = ", ".join(f"{name} {rate:g}" for name, (rate, _) in EMBEDDED_DEFAULTS.items())
    rates = ", ".join(f"{name} {kind.learning_rate:g}" for name, kind in kinds.items())
    add("--lr", type=float, help="peak learning rate (default: on the embedded base the best of a "
        f"sweep: {swept}; on another the kind's, of which FLoRA's and IA3's are the paper's: "
        f"{rates}; ffba 0.001, hira 0.0045, none 0.002)")
    add("--warmup", type=int, help="steps (default: a twentieth)")
    add("--clip", type=float, default=1.0, help="gradient norm")
    add("--eval-every", type=int,
        help="steps between held-out losses and checkpoints (default: a fifth)")
    add("--compile", action="store_true", help="train with torch.compile")
    add("--fast", action="store_true", help="on a CPU: faster and, up to rounding, the same "
        "(extras/fast.py)")
    add("--gradient-checkpointing", action="store_true",
        help="compute each block again in backward, to save memory")
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


def fill_in(args, kind):
    """The defaults that follow from other flags and the kind (None: the base) -> args."""
    args.fixed_rank = kind.fixed_rank if kind else None
    if os.path.realpath(args.weights or EMBEDDED) == os.path.realpath(EMBEDDED):
        fill_in_embedded(args)
    if args.lr is None and kind is None:
        args.lr = extra("pretrain", "--adapter none").LEARNING_RATE
    elif args.lr is None:
        args.lr = kind.learning_rate
    if args.targets is None and args.adapter == "none":
        args.targets = []
    if args.warmup is None:
        args.warmup = args.steps // 20
    args.eval_every = args.eval_every or max(1, args.steps // 5)
    args.tokens_per_step = args.batch_size * args.grad_accum * args.block_size
    rank = "" if args.fixed_rank or args.adapter == "none" else f"-r{args.rank}"
    args.out = args.out or f"out/{args.adapter}{rank}{'-from-lora' if args.from_lora else ''}"
    args.made_with = {}   # filled in by plumbing/runs.py
    return args


def fill_in_embedded(args):
    """The defaults of an adapter of the embedded base."""
    rate, targets = EMBEDDED_DEFAULTS.get(args.adapter, (None, None))
    args.lr = args.lr or rate
    if args.targets is None and not args.from_lora:
        args.targets = targets
