"""What is asked of one request: a prompt and settings that can run, and why it failed."""
import contextlib
import reprlib

from plumbing.files import BadInput

DIVERGED = ("its logits are not finite: its adapter or its prompt's values diverged, or overflow "
            "this dtype; use --dtype float32 or another adapter")


def as_list(ids):
    """None, an id or several -> a list."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def complete_request(request, length, config):
    """Make a Request ready for an engine of `length` tokens: an empty prompt is the eos_token_id
    (or 0, without one), eos_id a list, max_new_tokens at most what the slot leaves.

    BadInput if it was refused before, or if its prompt or settings cannot run."""
    if request.error:
        raise BadInput(request.error)
    starts = [i for i in as_list(config.eos_token_id) if i < config.vocab_size]
    request.prompt, request.eos_id = request.prompt or [*starts, 0][:1], as_list(request.eos_id)
    check_prompt(request.prompt, length, config)
    check_settings(request)
    room = max(1, length - len(request.prompt))   # one token follows a full slot too
    request.max_new_tokens = min(request.max_new_tokens, room)


def check_prompt(prompt, length, config):
    """BadInput for token ids that an engine of `length` tokens cannot run."""
    room = f"the {length} of a slot (length)"
    if length == config.n_positions:
        room = f"the model's context of {length} (n_positions)"
    if len(prompt) > length:
        raise BadInput(f"a prompt has {len(prompt)} tokens, more than {room}; shorten it, "
                       "or use --truncate")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise BadInput(f"a prompt has token ids outside 0 to {config.vocab_size - 1}; "
                       "encode it with this model's tokenizer")


def check_settings(r):
    """BadInput for settings of a Request, or flags of these names, that are out of range."""
    if not (r.temperature >= 0 and r.top_k >= 0 and 0 < r.top_p <= 1):
        raise BadInput(f"temperature {reprlib.repr(r.temperature)}, top_k {reprlib.repr(r.top_k)}, "
                       f"top_p {r.top_p}: the first two must be at least 0, top_p in (0, 1]")
    for name, least, most in [("temperature", 0, 1e9), ("top_k", 0, 2**31),
                              ("max_new_tokens", 1, 2**31), ("seed", 0, 2**62)]:
        value = getattr(r, name)
        if not least <= value <= most:
            raise BadInput(f"{name} is {reprlib.repr(value)}; it must be from {least} to "
                           f"{most:.4g}")


def refuse_failed(requests):
    """BadInput that tells why requests failed, if any did."""
    failed = [f"prompt {row}: {r.error}" for row, r in enumerate(requests, 1) if r.error]
    if failed:
        raise BadInput("; ".join(failed))


@contextlib.contextmanager
def fits_in_memory(what):
    """Inside, `what` is allocated; BadInput if there is no room for it."""
    try:
        yield
    except RuntimeError as e:   # of the allocator
        raise BadInput(f"{what} does not fit in memory ({str(e).splitlines()[0]}); "
                       "use fewer --slots") from None
