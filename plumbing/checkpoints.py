"""A training's checkpoint: written as it goes, and gone on from by --resume if base, data and flags
are the same."""
import shlex
import sys
from pathlib import Path

import torch

from plumbing.files import BadInput, check_json, check_weights, existing_file
from plumbing.flags import EMBEDDED
from plumbing.outputs import open_output
from plumbing.processes import RANK, say
from plumbing.provenance import adapter_digest, base_digest, difference, digest

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


def interrupted_at(step, loop):
    """Say how a run that was stopped goes on, and raise KeyboardInterrupt."""
    resume = [] if loop.resume else ["--resume"]
    command = shlex.join([sys.executable, *sys.argv, *resume])
    say(f"interrupted at step {step}; go on with: {command}")
    raise KeyboardInterrupt


CHECKPOINT = {"step": int, "trained": {}, "optimizer": {}, "args": {"steps": int},
              "log": [{"step": int, "loss?": float, "heldout_loss": float, "seconds": float}]}


def load_checkpoint(file):
    existing_file(file, "checkpoint")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged zip or pickle raises
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise BadInput(f"{file}: not a readable checkpoint ({reason}); delete it to start "
                       "again") from e
    check_json(checkpoint, CHECKPOINT, file)
    if any(isinstance(value, torch.Tensor) for value in checkpoint["args"].values()):
        raise BadInput(f"{file}: not a readable checkpoint (a tensor stands among its flags); "
                       "delete it to start again")
    return checkpoint


def restore(checkpoint, parameters, optimizer):
    """Put a checkpoint into the parameters and the optimizer -> (its step, its log)."""
    trained = checkpoint["trained"]
    shapes = {name: getattr(tensor, "shape", None) for name, tensor in trained.items()}
    if shapes != {name: p.shape for name, p in parameters.items()}:
        raise BadInput("the checkpoint was made with another base model or other targets, so that "
                       "its parameters do not fit; give the flags it was made with, or another "
                       "--out")
    for name, parameter in parameters.items():
        check_weights(name, trained[name], "the checkpoint")
        parameter.data.copy_(trained[name])
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(f"the checkpoint's optimizer is damaged ({e}); delete it to start "
                       "again") from None
    say(f"resumed at step {checkpoint['step']}")
    return checkpoint["step"], checkpoint["log"]


def save_checkpoint(step, parameters, optimizer, log, loop):
    if RANK > 0:
        return
    state = dict(step=step, trained=parameters, optimizer=optimizer.state_dict(), log=log,
                 args=loop.made_with)
    try:
        with open_output(Path(loop.out, "checkpoint.pt")) as f:
            torch.save(state, f)
    except BadInput as e:
        raise BadInput(f"{e} at step {step}; {kept(loop)}") from None


def kept(loop):
    """What is kept of a run that stops before its end."""
    file = Path(loop.out, "checkpoint.pt")
    if file.exists():
        return f"the last good checkpoint is kept in {file}"
    return "no checkpoint was written yet"
