"""The experiment `ssr` in the real AI-Toolkit, with all inputs of some modules kept beside it, in float64, for least squares.

usage: ssr_in_toolkit.py OUT.pt WORDS...: those of the experiment's command line
The file in the variable TOUCHED changes meanwhile.
"""

import os
import sys
from contextlib import contextmanager

import torch

from extensions_built_in.zit_merge.experiments import ssr
from extensions_built_in.zit_merge.host.render import ToolkitRenderer

KEPT = ("layers.0.attention.to_q", "layers.0.attention.to_v", "layers.3.feed_forward.w2", "layers.7.attention.to_out.0")
inputs: list[dict[str, torch.Tensor]] = []  # of each LoRA: module -> (tokens, in)


class Kept(ToolkitRenderer):
    """The renderer, which keeps what it shows: the adapter changes when the next LoRA's turn comes."""

    def set_adapter(self, deltas):
        super().set_adapter(deltas)
        inputs.append({})
        if path := os.environ.get("TOUCHED"):
            os.utime(path, (1, 1))

    @contextmanager
    def watching(self, see, shapes):
        def keep(module):
            def call(x):
                before = inputs[-1].get(module, x[:0].double())
                inputs[-1][module] = torch.cat([before, x.detach().double()])

            return call

        with super().watching(see, shapes), super().watching({module: keep(module) for module in KEPT}, shapes):
            yield


ssr.ToolkitRenderer = Kept
code = ssr.main(sys.argv[2:])
if not code:
    torch.save(inputs[:2], sys.argv[1])  # then it is closed, which takes the LoRA off
raise SystemExit(code)
