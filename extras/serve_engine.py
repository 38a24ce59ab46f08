"""The engine of extras/serve.py: one thread that steps, and runs between its steps what others ask for.

An event loop hands it functions by a queue (EngineThread.do) and gets back what jobs generate, by each job's
asyncio.Queue; so nothing here waits for a client, and no client waits for more than a step. Names of adapters are
looked up in this thread, between steps: an adapter that is unloaded keeps its row until its last request has ended.
"""
import asyncio
import contextlib
import math
import queue
import re
import sys
import threading
import time
from dataclasses import dataclass

from extras import hot_swap
from extras.blend import NUMBER, blend
from extras.serve_metrics import Metrics
from flora import BASE
from plumbing.files import BadInput

NAME = re.compile(r"[\w.\-/]{1,100}")
BLEND = re.compile(rf"({NAME.pattern}):({NUMBER})(?:\+|$)")
MOST_PARTS = 8      # of a blend: each makes every row of the bank longer
MOST_BLENDS = 32    # kept while no request uses them


class UnknownModel(BadInput):
    """A `model` that is neither the base, an adapter nor a blend of these."""


@dataclass(eq=False)
class Job:
    """One text to generate for a client. events gets (job, new ids, whether it has ended)."""
    prompt: list
    settings: dict                       # of generate.Request
    index: int                           # among the choices of its answer
    events: asyncio.Queue
    arrived: float                       # time.perf_counter()
    label: str = ""                      # its model's name in the metrics; the lines from here on are the engine's
    request: object = None
    error: str | None = None
    status: int = 400                    # that goes with an error: 400 is the request's fault, 500 and 503 ours


class EngineThread(threading.Thread):
    """Serves jobs with new_engine()'s Engine. names: {name: adapter id} of the model, the base's (id 0) among them.

    What begins with an underscore runs in this thread alone, by `do` and `post`.
    """

    def __init__(self, new_engine, names):
        super().__init__(daemon=True, name="engine")
        self.new_engine, self.engine = new_engine, new_engine()
        self.names = names                # replaced, never changed, so that others may read it
        self.blends = {}                  # {((adapter id, weight), ...): adapter id}, the last used last
        self.retired = set()              # adapter ids that are to go once no request uses them
        self.jobs = {}                    # {Request: Job}
        self.inbox = queue.SimpleQueue()
        self.metrics = Metrics()
        self.batch = []                   # (model, tokens in the cache) of each running request, by slot
        self.loop = None                  # the event loop, which starts this thread
        self.stopping = False

    # what others call

    async def do(self, function, *args):
        """function(*args), run in this thread between two steps: what it returns or raises."""
        future = self.loop.create_future()
        self.inbox.put((function, args, future))
        return await future

    def post(self, function, *args):
        """The same without waiting for it."""
        self.inbox.put((function, args, None))

    def stop(self):
        """End the thread after its step, and wait for that."""
        self.post(self._stop)
        if self.is_alive():
            self.join()

    # the thread

    def run(self):
        while not self.stopping:
            self._take(wait=not self.engine.busy)
            if self.engine.busy:
                self._report(self._step())
            self.batch = [(self.jobs[r].label, len(r.prompt) + len(r.ids))
                          for r in self.engine.running if r in self.jobs]

    def _take(self, wait):
        """Run what is in the inbox; wait for it to hold something."""
        while wait or not self.inbox.empty():
            function, args, future = self.inbox.get()
            wait, result, error = False, None, None
            try:
                result = function(*args)
            except Exception as e:   # is its caller's to tell
                error = e
            if future is not None:
                self._tell(settle, future, result, error)

    def _tell(self, function, *args):
        with contextlib.suppress(RuntimeError):   # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(function, *args)

    def _stop(self):
        self.stopping = True

    def _step(self):
        """engine.step(). An engine that breaks, as for want of memory, fails what it held and is made anew."""
        try:
            return self.engine.step()
        except Exception as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            print(f"the engine broke and is made anew: {reason}", file=sys.stderr)
            held = [*self.engine.waiting, *self.engine.running]
            self.engine = None
            self.engine = self.new_engine()
            for request in held:
                request.state, request.error = "failed", f"the engine broke: {reason}"
                request.ended = time.perf_counter()
                if request in self.jobs:
                    self.jobs[request].status = 500
            return [(request, []) for request in held]

    def _report(self, events):
        """Give each job its new ids."""
        told = []
        for request, ids in events:
            job, ended = self.jobs.get(request), request.state not in ("waiting", "running")
            if job is None:   # refused by submit
                continue
            if ended:
                del self.jobs[request]
                job.error = job.error or request.error
                self.metrics.ended(request, job.label)
            told.append((job, ids, ended))
        if told:
            self._tell(deliver, told)
        if self.retired:
            self._collect()

    def _submit(self, jobs, model):
        """Queue jobs for the adapter that `model` names. UnknownModel, or BadInput for what the engine refuses;
        those before the refused one are then queued, and for the caller to cancel."""
        adapter_id, label = self._find(model)
        for job in jobs:
            job.label, job.request = label, self.engine.submit(job.prompt, adapter_id=adapter_id, **job.settings)
            if job.request.error:
                raise BadInput(job.request.error)
            job.request.arrived = job.arrived
            self.jobs[job.request] = job

    def _cancel(self, jobs):
        """End jobs whose client went away; those that have ended are left alone."""
        for job in jobs:
            if job.request is not None:
                self.engine.cancel(job.request)

    def _abort(self):
        """End all jobs, telling their clients that the server goes."""
        for request, job in self.jobs.items():
            job.error, job.status = "the server is shutting down", 503
            self.engine.cancel(request)

    # names, adapters and blends

    def _find(self, model):
        """A model's name -> (adapter id, its name in the metrics). Makes a blend that is not there yet."""
        if model in self.names:
            return self.names[model], model
        weights = parse(model)
        for name in weights or [model]:
            if name not in self.names:
                known = ", ".join(list(self.names)[:40])
                raise UnknownModel(f"model {name[:100]!r}: there is no such model; use one of {known}, or a blend "
                                   "such as name:0.7+name:0.3")
        key = tuple(sorted((self.names[name], weight) for name, weight in weights.items()))
        if key not in self.blends:
            self._make_room()
            self.blends[key] = hot_swap.add_adapter(self.engine, lambda model: blend(model, dict(key)))
        self.blends[key] = self.blends.pop(key)   # last
        return self.blends[key], "blend"

    def _make_room(self):
        """Let blends go, the longest unused first, until there is room for one more or all are in use."""
        used = hot_swap.in_use(self.engine)
        for key, adapter_id in list(self.blends.items()):
            if len(self.blends) >= MOST_BLENDS and adapter_id not in used:
                del self.blends[key]
                self._retire(adapter_id)

    def _load(self, name, file):
        """Load an adapter file between two steps, for requests to name."""
        if name in self.names:
            raise BadInput(f"{name!r} is a model already; unload it first, or take another name")
        self.names = self.names | {name: hot_swap.load_adapter(self.engine, file)}

    def _unload(self, name):
        """Take a name away at once, and its adapter, with the blends of it, when their last requests have ended."""
        if self.names.get(name, BASE) == BASE:
            raise UnknownModel(f"{name!r}: there is no such adapter")
        adapter_id = self.names[name]
        self.names = {other: i for other, i in self.names.items() if other != name}
        self.metrics.forget(name)
        for key in [key for key in self.blends if adapter_id in dict(key)]:
            self._retire(self.blends.pop(key))
        self._retire(adapter_id)

    def _retire(self, adapter_id):
        if adapter_id != BASE:   # a blend of the base alone
            self.retired.add(adapter_id)
            self._collect()

    def _collect(self):
        """Remove the retired adapters that no request uses."""
        for adapter_id in self.retired - hot_swap.in_use(self.engine):
            hot_swap.remove_adapter(self.engine, adapter_id)
            self.retired.discard(adapter_id)


def settle(future, result, error):
    """In the event loop: give a future its result, unless who waited has gone."""
    if not future.done():
        future.set_result(result) if error is None else future.set_exception(error)


def deliver(told):
    """In the event loop: give jobs their new ids."""
    for job, ids, ended in told:
        job.events.put_nowait((job, ids, ended))


def parse(model):
    """'perl:0.7+bash:0.3' -> {name: weight}; None if a name is not of that form. BadInput for too many parts."""
    weights, end = {}, 0
    while end < len(model) or not weights:
        term = BLEND.match(model, end)
        if term is None or (term.end() == len(model)) == term[0].endswith("+"):
            return None
        name, end = term[1], term.end()
        weights[name] = weights.get(name, 0.0) + float(term[2])
    if len(weights) > MOST_PARTS:
        raise BadInput(f"a blend has {len(weights)} parts; use at most {MOST_PARTS}")
    return weights if all(map(math.isfinite, weights.values())) else None
