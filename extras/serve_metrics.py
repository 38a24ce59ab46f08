"""What extras/serve.py counts, in Prometheus's text format.

A time per output token is bench.py's: from a request's arrival to its last token, over its new tokens.
"""
import bisect

BUCKETS = {   # of the histograms: upper bounds in seconds
    "time_to_first_token_seconds": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    "seconds_per_output_token": (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)}
COUNTERS = {
    "requests": "requests that ended, by outcome: done, failed or cancelled",
    "prompt_tokens": "tokens of the prompts", "generation_tokens": "new tokens"}


class Metrics:
    """Counters and histograms by model name. One thread writes, others may read at any time."""

    def __init__(self):
        self.counters = {}     # {(name, model, outcome or None): number}
        self.histograms = {}   # {(name, model): [count of each bucket, and above the last; sum]}

    def count(self, name, model, number=1, outcome=None):
        key = name, model, outcome
        self.counters[key] = self.counters.get(key, 0) + number

    def observe(self, name, model, seconds):
        buckets = BUCKETS[name]
        row = self.histograms.setdefault((name, model), [0] * (len(buckets) + 1) + [0.0])
        row[bisect.bisect_left(buckets, seconds)] += 1
        row[-1] += seconds

    def ended(self, request, model):
        """Take in a generate.Request that has ended."""
        outcome = request.state
        self.count("requests", model, outcome=outcome)
        self.count("prompt_tokens", model, len(request.prompt))
        self.count("generation_tokens", model, len(request.ids))
        if outcome == "done":
            self.observe("time_to_first_token_seconds", model, request.first_token - request.arrived)
            self.observe("seconds_per_output_token", model,
                         (request.ended - request.arrived) / len(request.ids))

    def forget(self, model):
        """Drop a model that was unloaded, so that memory does not grow with names."""
        for table in (self.counters, self.histograms):
            for key in [key for key in table if key[1] == model]:
                del table[key]

    def text(self, slots, waiting, batch):
        """The page of /metrics. batch: (model, tokens in the cache) of each running request, by slot."""
        lines = [*gauge("slots", "requests that can run at once", slots),
                 *gauge("requests_running", "requests in the batch", len(batch)),
                 *gauge("requests_waiting", "requests that wait for a slot", waiting),
                 *heading("slot_tokens", "gauge", "the batch as it is composed: tokens in each taken slot")]
        lines += [f"flora_slot_tokens{labels(slot=slot, model=model)} {tokens}"
                  for slot, (model, tokens) in enumerate(batch)]
        for name, what in COUNTERS.items():
            lines += heading(f"{name}_total", "counter", what)
            lines += [f"flora_{name}_total{labels(model=model, outcome=outcome)} {number}"
                      for (found, model, outcome), number in list(self.counters.items()) if found == name]
        for name, buckets in BUCKETS.items():
            lines += heading(name, "histogram", name.replace("_", " "))
            for (found, model), row in list(self.histograms.items()):
                if found == name:
                    lines += histogram(name, model, buckets, list(row))
        return "\n".join(lines) + "\n"


def histogram(name, model, buckets, row):
    total, lines = 0, []
    for bound, number in zip([*buckets, "+Inf"], row):
        total += number
        lines.append(f"flora_{name}_bucket{labels(model=model, le=bound)} {total}")
    return [*lines, f"flora_{name}_sum{labels(model=model)} {row[-1]:.6f}",
            f"flora_{name}_count{labels(model=model)} {total}"]


def heading(name, kind, what):
    return [f"# HELP flora_{name} {what}", f"# TYPE flora_{name} {kind}"]


def gauge(name, what, value):
    return [*heading(name, "gauge", what), f"flora_{name} {value}"]


def labels(**values):
    """{name="value",...}; those that are None are left out."""
    def quoted(value):
        return str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return "{" + ",".join(f'{name}="{quoted(value)}"' for name, value in values.items() if value is not None) + "}"
