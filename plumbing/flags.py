"""The flags that mean the same in every script, their checks, and how a script ends."""
import argparse
import io
import os
import sys
import textwrap

import torch

from plumbing.files import BadInput
from plumbing.folders import LARGEST
from plumbing.registry import extra

EMBEDDED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "base")


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with the description as it stands, and after each flag's text its default, unless the
    text tells of one itself."""

    def _get_help_string(self, action):
        value, text = action.default, action.help
        if not action.option_strings or value is argparse.SUPPRESS or "default" in text:
            return text
        if action.required:
            return f"{text} (required)"
        value = " ".join(map(str, value)) if isinstance(value, list) else value
        shown = "none" if value in (None, "") else "off" if value is False else str(value)
        return f"{text} (default: {shown.replace('%', '%%')})"


def add_common_flags(parser, dtypes):
    """The flags that mean the same in every script."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--weights", metavar="FOLDER", default=EMBEDDED,
                        help="base model, a Hugging Face folder (default: the embedded one)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu",
                        help="cpu, cuda or cuda:N (default: cuda where there is one)")
    auto = "auto: the fastest here; " if "auto" in dtypes else ""
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16" if cuda else "float32",
                        help=f"{auto}default: bfloat16 on cuda, otherwise float32")
    parser.add_argument("--quantize", choices=["int8", "int8-dynamic"],
                        help="hold the base's projections as int8, a scale per output; dynamic: on "
                             "an x86 CPU round what goes in as well, which is faster")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    parser.add_argument("--json", metavar="FILE", help="write the results there as JSON")


def check_numbers(args, at_least_1=(), at_least_0=(), above_0=()):
    """BadInput unless the flags of these names are in range; one that was not given (None) is."""
    for flag in (*at_least_1, *at_least_0, *above_0):
        value = getattr(args, flag)
        for v in value if isinstance(value, list) else [value]:
            least = 1 if flag in at_least_1 else 0
            if v is None or least <= v <= LARGEST and not (v == 0 and flag in above_0):
                continue
            number = "whole number" if isinstance(v, int) else "number"
            range = "above 0" if flag in above_0 else f"of at least {least}"
            range = f"of at most {LARGEST}" if v > LARGEST else range
            raise BadInput(f"--{flag.replace('_', '-')} is {v}; use a {number} {range}")


def get_dtype(args):
    """--dtype as torch's. In the place of "auto" args keeps what extras/packed.py chose."""
    if args.dtype == "auto":
        packed = extra("packed", "--dtype auto")
        args.dtype, why = packed.choose_dtype(get_device(args.device))
        print(f"--dtype auto: {args.dtype}, {why}", file=sys.stderr)
    return getattr(torch, args.dtype)


def get_device(name):
    """"cpu", "cuda", "cuda:1" -> torch.device; BadInput where this machine has no such device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = str(e).splitlines()[0].split(". ")[0]
        others = "use cpu or cuda" if torch.cuda.is_available() else "use cpu"
        raise BadInput(f"--device {name}: not usable here ({textwrap.shorten(reason, 80)}); "
                       f"{others}") from None
    return torch.device(name)


def set_up(model, args):
    """Do to a model what --attention and --quantize say -> the model."""
    model.set_attention(args.attention == "flash")
    if args.quantize:
        int8 = extra("int8", f"--quantize {args.quantize}")
        int8.quantize_int8(model, dynamic=args.quantize == "int8-dynamic")
    return model


def run_main(main):
    """Run a script's main(): bad input is one sentence and exit status 2, a loss that is not finite
    one and status 1, Ctrl-C is status 130, and a reader of the output that goes away, as head does,
    is status 141. What the output's encoding lacks is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (BadInput, FloatingPointError) as e:
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, BadInput) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # for Python's last flush
        sys.exit(141)
