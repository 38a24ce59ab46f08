"""CUDA without a GPU: tensors that say cuda and hold nothing, and a record of what the host waits for.

torch's FakeTensorMode computes devices, dtypes and shapes alone, and raises where two devices meet. What would
need values raises too; under a `Traffic` it is counted instead, by the function that asked: `reads`, for which the
host waits until the GPU has caught up, and `uploads`, copies from the host's memory, which CUDA graphs cannot hold.

A CUDA wheel of torch needs nothing else. One for CPUs lacks the object through which torch sets the device;
GUARD registers the one that does nothing. Backward is not possible: torch starts no thread for a GPU that is not there.
"""
import contextlib
import ctypes
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
OURS = (ROOT, ROOT / "plumbing", ROOT / "extras")   # and not an environment in ROOT, as CI's .venv
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static impl::NoOpDeviceGuardImpl<DeviceType::CUDA> guard;
extern "C" void set_guard(bool there) {
  auto& place = impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  place.store(there ? &guard : nullptr);
}
"""
LACKING = "needs a CUDA wheel of torch, or g++ and torch's headers to do without one"
TOKEN = 5   # what is read of any tensor of whole numbers


def build_guard(folder):
    """Compile GUARD in a folder -> set_guard(bool); None where there is no g++ or no header."""
    torch_folder = Path(torch.__file__).parent
    header = torch_folder / "include/c10/core/impl/DeviceGuardImplInterface.h"
    if not shutil.which("g++") or not header.exists():
        return None
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    subprocess.run(["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-I", torch_folder / "include", source,
                    "-o", library, "-L", torch_folder / "lib", "-lc10"], check=True)
    return ctypes.CDLL(str(library)).set_guard


def asker():
    """"file.py function" of the innermost function of this project that runs, tests left out."""
    frame = sys._getframe(1)
    while frame:
        file = Path(frame.f_code.co_filename)
        name = frame.f_code.co_name
        if file.parent in OURS and not name.startswith("<"):   # as <listcomp>
            return f"{file.name} {name}"
        frame = frame.f_back
    return "a test"


def count(counter, happened):
    if happened:
        counter[asker()] += 1


def on_cuda(x):
    return isinstance(x, torch.Tensor) and x.device.type == "cuda"


def of_host(x):
    return isinstance(x, torch.Tensor) and x.device.type == "cpu"


class Traffic(TorchDispatchMode):
    """Counts what passes between a fake GPU and the host, and gives what needs values a likely answer."""

    def __init__(self):
        super().__init__()
        self.reads, self.uploads = Counter(), Counter()

    def clear(self):
        self.reads.clear()
        self.uploads.clear()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name, x = kwargs or {}, op._schema.name.removeprefix("aten::"), args[0] if args else None
        if name == "_local_scalar_dense":
            count(self.reads, on_cuda(x))
            return TOKEN if not x.dtype.is_floating_point and x.dtype != torch.bool else x.dtype == torch.bool or 1.0
        if name == "_unique2":   # as if there were two
            count(self.reads, on_cuda(x))
            return x.new_empty(2), x.new_empty(x.shape, dtype=torch.int64), x.new_empty(2, dtype=torch.int64)
        if name in ("nonzero", "masked_select", "equal"):
            raise AssertionError(f"{asker()}: {name} reads a whole tensor")
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            count(self.reads, masks and on_cuda(x))
            count(self.uploads, on_cuda(x) and any(of_host(i) for i in args[1]))
            if masks and name == "index":   # as if one were set
                return x.new_empty(1, *x.shape[masks[0].dim():])
            if masks and name == "index_put_":
                return x
        if name in ("to", "item", "is_nonzero"):   # in inference_mode; elsewhere torch did it
            with self:
                return op.decompose(*args, **kwargs)
        answer = op(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], x) if name == "copy_" else (x, answer)
            count(self.reads, on_cuda(source) and of_host(target))
            count(self.uploads, of_host(source) and on_cuda(target))
        return answer


def fake_tolist(traffic):
    """Tensor.tolist for fake tensors, which no dispatch mode sees."""
    def tolist(self):
        count(traffic.reads, on_cuda(self))

        def filled(shape):
            return TOKEN if not shape else [filled(shape[1:]) for _ in range(shape[0])]
        return filled(list(self.shape))
    return tolist


def apply_to(module, function, recurse=True):
    """Module._apply, as Module.to() calls it, which cannot write fake tensors into others."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(function(p.detach()), requires_grad=p.requires_grad)
    return module


@contextlib.contextmanager
def fake_cuda(set_guard):
    """Inside, device "cuda" is there, and all tensors are fake -> the Traffic."""
    traffic = Traffic()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if set_guard:
            set_guard(True)
            stack.callback(set_guard, False)
        patch.setattr(torch.nn.Module, "_apply", apply_to)
        patch.setattr(FakeTensor, "tolist", fake_tolist(traffic), raising=False)
        stack.enter_context(FakeTensorMode())
        stack.enter_context(traffic)
        yield traffic
