"""Scripts in processes of their own, which start at once: each is forked from a server that has
imported torch before."""
import importlib
import multiprocessing
import os
import sys

import torch

from plumbing.flags import run_main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed", "safetensors.torch", "sentencepiece", "tqdm"])


class Started:
    """A module's main() with a command line, as `python -m module flags` runs it in this folder. As
    of a subprocess.Popen: pid, poll, kill, send_signal, communicate."""

    def __init__(self, module, *flags, **environment):
        self.output, output = FORKS.Pipe(duplex=False)
        command = [module, *map(str, flags)]
        here = os.getcwd(), sys.executable
        self.process = FORKS.Process(target=run, args=(command, output, *here, environment),
                                     daemon=True)   # it does not outlive the tests
        self.process.start()
        output.close()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self):
        """Wait for its end -> (its exit status, below 0 a signal's; what it printed and told of
        errors)"""
        with open(os.dup(self.output.fileno()), errors="replace") as output:
            printed = output.read()
        self.process.join()
        return self.process.exitcode, printed


def run(command, output, folder, executable, environment):
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    module, *sys.argv[1:] = command
    sys.argv[0] = f"{module}.py"
    sys.executable, sys.orig_argv = executable, [executable, "-m", *command]
    run_main(importlib.import_module(module).main)
