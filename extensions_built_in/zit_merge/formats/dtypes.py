"""The dtypes that files are written in, as torch has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .spec import DTYPES

TORCH_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, theirs) for name, theirs in DTYPES.items()}
STORED_DTYPES: Mapping[str, torch.dtype] = {  # by their names in headers
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
