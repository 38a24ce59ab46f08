"""Decoding by torch.compile and CUDA graphs: an Engine whose step has shapes that repeat.

  python generate.py --requests in.jsonl --results out.jsonl --compile

Compiled code and graphs are made once per shape, so a step computes all slots, and the cache up to
a multiple of 256 tokens. On a CPU the compiled step has the plain products, and is slower than the
packed one (extras/RESULTS_APPENDIX.md). NOT TESTED ON A GPU: there was none to test on.
"""
import torch

import flora
from generate import Engine

BLOCK = 256   # tokens; cache lengths are rounded up to multiples, one graph each


class GraphEngine(Engine):
    """Engine, with the decoding step compiled (compile=True) and, on CUDA, replayed as a graph."""

    def __init__(self, model, slots=8, compile=False, **settings):
        super().__init__(model, slots, **settings)
        self.forward = model
        if compile:
            self.forward = torch.compile(model, dynamic=False)
            # once for each cache length; beyond its limit, 8, torch silently compiles no more
            torch._dynamo.config.recompile_limit += -(-self.length // BLOCK)
        self.layers = [layer for _, layer in flora.adapter_layers(model)]
        self.graphs = {}      # {cache length: (graph, its logits)}
        self.banks = []       # of each layer, as the graphs read them

    def batch_adapters(self):
        """The ids of all slots: their rows are gathered within the step, so that ids and bank may
        change in place. Graphs over a bank that was replaced are dropped."""
        banks = [layer.frozen_bank for layer in self.layers]
        if len(banks) != len(self.banks) or any(a is not b for a, b in zip(banks, self.banks)):
            self.graphs.clear()
        self.banks = banks
        if any(layer.adapters or layer.frozen_bank for layer in self.layers):
            return self.table["adapter_id"]

    def decode(self):
        n, length = len(self.running), self.cached()
        length = min(self.length, -(-length // BLOCK) * BLOCK)
        self.written = max(self.written, length)   # slots without a request write as well
        run = self.replay if self.device.type == "cuda" else self.run_all_slots
        self.logits = run(length)[:n]
        self.table["position"][:n] += 1

    def run_all_slots(self, length):
        """One step of all slots over `length` cached tokens -> logits [slots, vocab].

        Slots without a request compute nonsense in their own rows, which prefill overwrites.
        """
        position = self.table["position"].clamp(max=length - 1)[:, None]
        kv_cache = self.kv_cache[:, :, :, :, :length]
        return self.forward(self.table["token"][:, None], self.adapters, kv_cache, position)[:, 0]

    def replay(self, length):
        """The same as a CUDA graph, captured at the first use of each length."""
        if length not in self.graphs:
            with torch.cuda.device(self.device):   # streams belong to the current one
                self.graphs[length] = self.capture(length)
        graph, logits = self.graphs[length]
        graph.replay()
        return logits

    def capture(self, length):
        """-> (a graph of run_all_slots, the logits that it writes)."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run_all_slots(length)   # compiles, and sets up what a capture may not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):   # its own default is one for all devices
            return graph, self.run_all_slots(length)
