"""The logits of one model under two pairs of projections, as JSON: a script that needs torch, transformers and numpy.

Run by path: ``python logits.py BASE adapter.npz``. The adapter is applied by forward hooks, in float32 throughout, so
that what changes is the projections' doing and not a low-precision sum's::

    y + lambda_b * (B[:out_features] @ (lambda_d * (A[:, :in_features] @ x)))
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
#: Length of the fixed input, and the step from one token to the next.
POSITIONS, STEP = 32, 7919


def main() -> None:
    """Answer for the base and the adapter in the arguments."""
    # A script's folder leads sys.path; this one's neighbours must not pass for modules that torch imports.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import numpy as np
    import torch
    import transformers

    base, file = sys.argv[1:]
    arrays = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
    config = transformers.AutoConfig.from_pretrained(base)
    architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    model = architecture.from_pretrained(base, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    for name, value in arrays.items():
        own = name.removeprefix("other.").replace(".base_layer.", ".")
        if name.startswith("other.") and own in parameters:
            parameters[own].data.copy_(value)

    pair: dict[str, Any] = {}
    for name in arrays:
        if name.endswith(".vera_lambda_b"):
            module = name.removesuffix(".vera_lambda_b")
            hook = _hook(arrays[name], arrays[f"{module}.vera_lambda_d"], pair)
            model.get_submodule(module).register_forward_hook(hook)

    inputs = (torch.arange(POSITIONS) * STEP % config.vocab_size)[None]
    logits = {}
    for kind in ("trained", "loaded"):
        pair["A"], pair["B"] = arrays[f"{kind}.vera_A"], arrays[f"{kind}.vera_B"]
        with torch.no_grad():
            logits[kind] = model(input_ids=inputs)[0].double()
    change = logits["loaded"] - logits["trained"]
    argmax = {kind: values.argmax(-1) for kind, values in logits.items()}
    result = {
        "max_abs": change.abs().max().item(),
        "relative": (change.norm() / logits["trained"].norm()).item(),
        "largest": logits["trained"].abs().max().item(),
        "argmax_changed": int((argmax["trained"] != argmax["loaded"]).sum()),
        "positions": argmax["trained"].numel(),
    }
    print(json.dumps(result), file=answer, flush=True)


def _hook(lambda_b: Any, lambda_d: Any, pair: dict[str, Any]) -> Callable[[Any, Any, Any], Any]:
    def add(module: Any, inputs: Any, output: Any) -> Any:
        x = inputs[0]
        hidden = lambda_d * (x @ pair["A"][:, : x.shape[-1]].T)
        return output + lambda_b * (hidden @ pair["B"][: output.shape[-1]].T)

    return add


if __name__ == "__main__":
    main()
