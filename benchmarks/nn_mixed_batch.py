"""Serve one batch whose rows use different adapters: in one pass, against one pass for each adapter.

    python benchmarks/nn_mixed_batch.py [--layers 12] [--width 512] [--rank 256] [--rows 16] [--adapters 8]

"in one pass" gives `adapter_names`, one for each row. "one after another" is what PEFT can do for VeRA: choose an
adapter, run its rows, choose the next. "one adapter for all" is the bound: the same batch without any choice. The
variants take turns; medians are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics

import torch
from nn_performance import in_turn, options, stack
from torch import Tensor

from vera_tools.nn import VeraConfig, VeraModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"layers": 12, "width": 512, "rank": 256, "rows": 16, "positions": 1, "adapters": 8, "repeats": 30}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    config = VeraConfig(**options(args.rank, args.layers))
    model = VeraModel(stack(args.width, args.layers).eval(), config, "0")
    for i in range(1, args.adapters):
        model.add_adapter(str(i), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda_b" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    x = torch.randn(args.rows, args.positions, args.width)
    names = [str(row % args.adapters) for row in range(args.rows)]
    groups = {name: [row for row, own in enumerate(names) if own == name] for name in dict.fromkeys(names)}

    def one_pass() -> Tensor:
        return model(x, adapter_names=names)

    def one_after_another() -> Tensor:
        output = torch.empty_like(x)
        for name, own in groups.items():
            model.set_adapter(name)
            output[own] = model(x[own])
        return output

    with torch.no_grad():
        torch.testing.assert_close(one_pass(), one_after_another(), rtol=1e-4, atol=1e-5)
        variants = {
            "one adapter for all": lambda: model(x),
            "in one pass": one_pass,
            "one after another": one_after_another,
        }
        seconds = in_turn(variants, args.repeats)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(
        f"{args.layers} layers of {args.width}, r {args.rank}; {args.rows} rows of {args.positions} positions, "
        f"{args.adapters} adapters"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"  {name:<20} {1e3 * median:8.2f} ms  {args.rows / median:10.0f} rows/s")


if __name__ == "__main__":
    main()
