"""One training in several processes (torchrun), and Ctrl-C."""
import contextlib
import os
import signal

import torch
import torch.distributed as dist

from plumbing.files import BadInput
from plumbing.flags import get_device

# torchrun's: this process's number and how many there are; without torchrun there is one.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    """Print, once for all processes."""
    if RANK == 0:
        print(text)


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
    mean, stopped = state.tolist()
    return mean, stopped > 0


@contextlib.contextmanager
def interrupts():
    """Inside, Ctrl-C only sets the tensor that this yields, [1], from 0 to 1."""
    asked = torch.zeros(1)
    previous = signal.signal(signal.SIGINT, lambda *_: asked.fill_(1))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
