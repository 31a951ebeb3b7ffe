"""Train and serve VeRA layers: vera_tools.nn against PEFT, and against their matrix products alone, in one process.

    python benchmarks/nn_performance.py [--layers 6] [--width 1024] [--rank 256] [--positions 2048] [--repeats 15]

Three figures for each:

- bytes that the graph keeps from the forward to the backward pass, beyond parameters and projections;
- CPU time of a forward pass without gradients. "products alone" is ``x W^T``, ``x A^T`` and ``u B^T`` for every layer,
  nothing else;
- CPU time of one training step, forward and backward.

The variants take turns, so that whatever else the machine does falls on all of them alike, and each turn's times are
divided by one another; the median of these shares is printed. It exits 1 where one is above what is promised: 1.1 of
the products for forward, 0.35 of PEFT's for what is kept, and PEFT's own time for a step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vera_tools.nn import VeraConfig, VeraModel


def stack(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def options(rank: int, layers: int) -> dict[str, object]:
    return {"r": rank, "target_modules": [str(i) for i in range(layers)]}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Distinct storages that the graph keeps for the backward pass."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    return sum(kept.values())


def in_turn(
    variants: dict[str, Callable[[], object]], repeats: int, *, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds, of CPU time unless another clock is given, of every repeat of every variant, the variants in turns."""
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def show(title: str, seconds: dict[str, list[float]], reference: str) -> dict[str, float]:
    """Print the times, and return each variant's share of the reference's."""
    print(f"\n{title}")
    shares = {}
    for name, times in seconds.items():
        shares[name] = statistics.median(t / r for t, r in zip(times, seconds[reference], strict=True))
        print(f"  {name:<16} median {1e3 * statistics.median(times):8.2f} ms  {shares[name]:.3f} x {reference}")
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("width", 1024), ("rank", 256), ("positions", 2048), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import peft

    ours = VeraModel(stack(args.width, args.layers), VeraConfig(**options(args.rank, args.layers)))
    peers = peft.get_peft_model(stack(args.width, args.layers), peft.VeraConfig(**options(args.rank, args.layers)))
    with torch.no_grad():
        for name, parameter in (*ours.named_parameters(), *peers.named_parameters()):
            if "lambda_b" in name:
                parameter.fill_(0.1)
    x = torch.randn(args.positions, args.width)
    torch.testing.assert_close(ours(x), peers(x), rtol=1e-4, atol=1e-5)
    A, B = ours.vera_A["default"], ours.vera_B["default"]
    weights = [layer.weight for layer in ours.vera_layers().values()]
    biases = [layer.bias for layer in ours.vera_layers().values()]

    def products() -> None:
        for weight, bias in zip(weights, biases, strict=True):
            linear(x, weight, bias)
            linear(linear(x, A), B)

    def forward(model: nn.Module) -> Callable[[], object]:
        return lambda: model(x)

    def step(model: nn.Module) -> Callable[[], object]:
        inputs = x.clone().requires_grad_()  # as in a model whose first adapted layer is not its first
        return lambda: model(inputs).sum().backward()

    print(
        f"torch {torch.__version__}, peft {peft.__version__}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(f"{args.layers} layers of {args.width}, r {args.rank}, {args.positions} positions, float32")
    print("\nkept for the backward pass")
    kept = {name: kept_bytes(model, x) for name, model in (("vera-tools", ours), ("PEFT", peers))}
    for name, size in kept.items():
        print(f"  {name:<16} {size / 1e6:8.1f} MB  {size / kept['PEFT']:.3f} x PEFT")
    with torch.no_grad():
        variants = {"products alone": products, "vera-tools": forward(ours), "PEFT": forward(peers)}
        forwards = show("forward", in_turn(variants, args.repeats), "products alone")
    steps = show("training step", in_turn({"PEFT": step(peers), "vera-tools": step(ours)}, args.repeats), "PEFT")
    promised = {"forward": (forwards["vera-tools"], 1.1), "kept": (kept["vera-tools"] / kept["PEFT"], 0.35)}
    promised["training step"] = (steps["vera-tools"], 1.0)
    broken = [f"{name}: {share:.3f}, at most {most}" for name, (share, most) in promised.items() if share > most]
    print("\n" + ("; ".join(broken) or "all as promised"))
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
