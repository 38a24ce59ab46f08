"""One run of a training: its processes, its folder, and what it goes on from."""
import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from plumbing.checkpoints import check_same, contents, flags_of, open_checkpoint
from plumbing.files import BadInput
from plumbing.outputs import JSON, check_writable, locked
from plumbing.processes import RANK, WORLD, start_processes
from plumbing.texts import load_texts


class Run(NamedTuple):
    device: torch.device
    texts: tuple               # (training texts, held-out texts)
    checkpoint: dict | None    # to go on from


@contextlib.contextmanager
def begin(args):
    """Inside, a training runs as train.py's flags describe it; yields its Run."""
    device = start_processes(args)
    with outputs(args):
        checkpoint, texts = prepare(args)
        torch.manual_seed(args.seed)
        yield Run(device, texts, checkpoint)
    if WORLD > 1:
        dist.destroy_process_group()


def prepare(args):
    """Read the checkpoint to go on from, or None, and the texts, and check that they belong
    together."""
    checkpoint, texts = open_checkpoint(args), load_texts(args)
    args.made_with = contents(args, texts) | flags_of(args) if RANK == 0 else {}
    if checkpoint and RANK == 0:
        check_same(checkpoint, args)
    return checkpoint, texts


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
