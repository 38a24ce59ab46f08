"""The flags of generate.py, and which of them go together."""
import argparse

from plumbing.files import BadInput
from plumbing.flags import Help, add_common_flags, check_numbers
from plumbing.requests import check_settings


def parse_args(argv=None, description=None):
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=Help)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="a text to go on from; again for more rows")
    add("--prompt-file", action="append", default=[], metavar="FILE",
        help="a prompt from a file, - for standard input")
    add("--suffix", action="append",
        help="fill in the middle between prompt and this; one for all or one each")
    add("--adapter", action="append", default=[], metavar="FILE",
        help="a file, or a folder of PEFT; one for all prompts or one each; none is the base model")
    add("--max-new-tokens", type=int, default=64, help="tokens to generate at most")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 keeps all")
    add("--top-p", type=float, default=1.0, help="share of the mass that --top-k left to draw from")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end a row before this text; may be repeated")
    add("--truncate", action="store_true",
        help="drop the start of prompts that do not fit the context (and the end of suffixes)")
    add("--requests", metavar="FILE", help="JSONL of requests; with --results")
    add("--results", metavar="FILE", help="JSONL to write, or to complete")
    add("--slots", type=int, help="requests that run at once (default: 8 on a CPU, otherwise 64)")
    add("--max-batched-tokens", type=int, default=8192, help="of one step, padding included")
    add("--static-batching", action="store_true",
        help="admit requests only when all slots are empty")
    add("--compile", action="store_true", help="decode --requests with torch.compile")
    add("--attention", choices=["flash", "math"], default="flash",
        help="torch's fused attention, or plain matmuls as the paper's measurements had")
    add_common_flags(parser, dtypes=["float32", "bfloat16", "float16", "auto"])
    args = parser.parse_args(argv)
    check_args(args, parser.error)
    return args


def check_args(args, error):
    """Refuse flags that do not go together, by error(sentence)."""
    check_numbers(args, at_least_1=["max_new_tokens", "slots", "max_batched_tokens"],
                  at_least_0=["seed"])
    if bool(args.requests) != bool(args.results):
        error("--requests and --results go together")
    given = args.prompt or args.prompt_file or args.suffix or len(args.adapter) > 1
    if args.requests and given:
        error("--requests brings prompts and adapters itself; give no --prompt, --prompt-file or "
              "--suffix, and at most one --adapter, the default")
    if not (args.temperature >= 0 and args.top_k >= 0 and 0 < args.top_p <= 1):
        error("--temperature and --top-k must be at least 0, --top-p in (0, 1]")
    try:
        check_settings(args)
    except BadInput as e:
        error(f"--{e}")
    if "" in args.stop:
        error("--stop is empty, so that nothing would be left; give a text or leave it out")
