"""For toolkit tests on a machine without CUDA: lets the CUDA builds of torchvision and torchaudio from PyPI be imported.

torchvision's compiled part can't load there, so the two operators that its Python part registers shapes for are declared first.
torchaudio can't load at all; AI-Toolkit imports it and uses it only for audio, an empty package beside this file is enough.
"""

import importlib.abc
import sys

_kept = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.version.cuda:
                library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _kept.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
