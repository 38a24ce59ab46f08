"""The flags of train.py, some of which extras share."""


def add_adapter_flags(add, kinds):
    add("--adapter", default="flora", metavar="KIND",
        help=f"{', '.join(kinds)}, a kind of extras/ (as ffba), or none: the base itself")
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
