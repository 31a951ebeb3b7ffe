"""What torch can compute on this machine: where both roundings are wanted, its CPU must have kernels of both kinds."""

from __future__ import annotations

import pytest

from tests import X86
from tests.projections import torch_draws

FUSED_X86 = X86 and torch_draws.rounding() == "fused"

x86 = pytest.mark.skipif(not FUSED_X86, reason="needs an x86-64 CPU with AVX2, which has both roundings")
