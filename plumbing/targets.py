"""What --rank and --targets ask of a kind of adapter and a model: which layers, or a refusal."""
import reprlib

from plumbing.files import BadInput


def check_rank(kind, rank):
    """The rank of an adapter of this kind; BadInput unless it can be one."""
    if kind.fixed_rank:
        return kind.fixed_rank
    if type(rank) is not int or not 1 <= rank < 2**31:
        raise BadInput(f"rank is {reprlib.repr(rank)}; use a whole number of at least 1")
    return rank


def default_targets(model, kind):
    """Where an adapter of this kind goes by default."""
    places = kind.places or model.DEFAULT_TARGETS.get(kind.kind)
    return list(places or model.DEFAULT_TARGETS["flora"])


def layers_of(model, kind, targets, layers):
    """Yield (target, layer name, options) for each of `layers` that a target names. None: the
    default targets; a list with "all": all that are not parts of others."""
    places = kind.places or {target: [(end, {})] for target, end in model.TARGETS.items()}
    if targets is None:
        targets = default_targets(model, kind)
    elif "all" in targets:
        targets = [target for target in places if model.columns(target) is None]
    seen = set()
    for target in targets:
        if target not in places:
            raise BadInput(f"unknown target {target!r}; use one of {', '.join(places)}, or all")
        for end, options in places[target]:
            for name in [name for name in layers if name.endswith("." + end)]:
                if name in seen:
                    raise BadInput(f"targets {' '.join(targets)} adapt {name} twice; name it once")
                seen.add(name)
                yield target, name, options
