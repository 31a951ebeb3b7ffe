"""The VeRA update as one differentiable function that keeps nothing of full width for the backward pass.

Kopiczko, Blankevoort and Asano, "VeRA: Vector-based Random Matrix Adaptation" (arXiv 2310.11454), equation 2::

    h = W0 x + b * (B (d * (A x)))

with A and B frozen, random and shared by all layers, and the vectors d (r,) and b (out_features,) trained.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


class _AddVera(torch.autograd.Function):
    """``result + b * (B (d * (A x)))``, saving only ``u = A x``, which is r wide.

    Written as matrices, with g the gradient of the output and one row per position, everything the two vectors need is
    in one matrix of B's own shape, ``H = B * (g^T u)``: then ``grad_b = H d`` and ``grad_d = H^T b``. Plain autograd
    keeps ``B (d * u)`` instead, which is out_features wide and for every layer alive until the backward pass.

    u is an output too, and so has a gradient of its own: a second derivative reaches x through it.
    """

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        total, u = _forward(result, x, A, B, d, b, dtype)
        _AddVera.keep(ctx, (result, x, A, B, d, b, dtype), (total, u))
        return total, u

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        """Save what `backward` needs."""
        result, x, A, B, d, b, _ = inputs
        ctx.save_for_backward(outputs[1], A, B, d, b)
        ctx.x_dtype, ctx.result_dtype = x.dtype, result.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        u, A, B, d, b = ctx.saved_tensors
        needs_result, needs_x, _, _, needs_d, needs_b, _ = ctx.needs_input_grad
        grad_result = grad_x = grad_d = grad_b = None
        with _products_in(
            B.device.type
        ):  # where somebody goes back under autocast, it would round what sums up d's and b's
            if g is not None:
                rows = g.reshape(-1, g.shape[-1]).to(B.dtype)
                if needs_result:
                    grad_result = (rows.reshape(g.shape) if B.dtype == ctx.result_dtype else g).to(ctx.result_dtype)
                if needs_x:
                    # Scaling B costs out_features * r products; scaling the gradient, out_features for every row.
                    through = (rows @ (b.unsqueeze(1) * B * d).to(B.dtype)).reshape(u.shape)
                    grad_u = through if grad_u is None else grad_u + through
                if needs_d or needs_b:
                    grad_d, grad_b = _of_vectors(rows, u, B, d, b)
            if needs_x and grad_u is not None:
                grad_x = (grad_u @ A).to(ctx.x_dtype)
        return grad_result, grad_x, None, None, grad_d, grad_b, None


class _LinearVera(torch.autograd.Function):
    """``x W^T + bias`` and the update in one, for a frozen W: the gradient of x is then one product instead of three.

    Where there are many rows, ``g (W + diag(b) B diag(d) A)`` takes fewer products than ``g W`` and, of width r, two
    more; the sum of weights is made for it alone, and the output is that of `_AddVera`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, d: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, u = _forward(F.linear(x, W, bias), x, A, B, d, b)
        ctx.save_for_backward(u, W, A, B, d, b)
        ctx.set_materialize_grads(False)
        return total, u

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        u, W, A, B, d, b = ctx.saved_tensors
        needs_x, *_, needs_d, needs_b = ctx.needs_input_grad
        grad_x = grad_d = grad_b = None
        if g is not None:
            rows = g.reshape(-1, g.shape[-1])
            if needs_x:
                grad_x = (rows @ torch.addmm(W, b.unsqueeze(1) * B * d, A)).reshape(*g.shape[:-1], W.shape[1])
            if needs_d or needs_b:
                grad_d, grad_b = _of_vectors(rows, u, B, d, b)
        if needs_x and grad_u is not None:
            through = grad_u @ A
            grad_x = through if grad_x is None else grad_x + through
        return grad_x, None, None, None, None, grad_d, grad_b


def _of_vectors(rows: Tensor, u: Tensor, B: Tensor, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of d and b, from those of the output, one row per position."""
    H = (rows.T @ u.reshape(-1, u.shape[-1])).to(b.dtype) * B
    return b @ H, H @ d


class _AddVeraTransformed(torch.autograd.Function):
    """The same in the form that torch.func takes, which costs every call more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        result: Tensor, x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        return _forward(result, x, A, B, d, b, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _AddVera.keep(ctx, inputs, output)

    backward = staticmethod(_AddVera.backward)


def add_vera(
    result: Tensor, x: Tensor, *, A: Tensor, B: Tensor, d: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """The base layer's output with the adapter's update added.

    The matrix products run in A's and B's dtype, or in autocast's where autocast is on. The vectors stay in their own,
    as PEFT does it.

    Args:
        result: The base layer's output, (..., out_features).
        x: Its input, after dropout, (..., in_features).
        A: (r, in_features), a slice of the shared vera_A.
        B: (out_features, r), a slice of the shared vera_B.
        d: vera_lambda_d, (r,).
        b: vera_lambda_b, (out_features,).
        dtype: What to round the sum to. Default: that which `result` and the vectors promote to.

    Returns:
        (..., out_features).
    """
    with _products_in(x.device.type) as products:
        A, B, d, b = _cast(A, B, d, b, dtype=products)
        if not torch.is_grad_enabled():
            return _forward(result, x, A, B, d, b, dtype)[0]
        function = _AddVeraTransformed if _is_functional() else _AddVera
        total: Tensor = function.apply(result, x, A, B, d, b, dtype)[0]  # type: ignore[no-untyped-call]
        return total


def linear_vera(
    x: Tensor, W: Tensor, bias: Tensor | None, *, A: Tensor, B: Tensor, d: Tensor, b: Tensor
) -> Tensor | None:
    """A frozen linear layer and its update in one, where that takes fewer products in training; else None.

    Args:
        x: The input of both, (..., in_features).
        W: The layer's weight, (out_features, in_features).
        bias: (out_features,), or None.
        A: As `add_vera` takes it.
        B: The same.
        d: The same.
        b: The same.

    Returns:
        (..., out_features), bit for bit what `add_vera` gives; None where anything differs in dtype, W or bias is
        trained, no gradient of x is wanted, or the rows are too few.
    """
    out_features, in_features = W.shape
    rows = x.numel() // max(in_features, 1)
    tensors = [x, W, A, B, d, b] if bias is None else [x, W, A, B, d, b, bias]
    fits = (
        torch.is_grad_enabled()
        and x.requires_grad
        and not W.requires_grad
        and not (bias is not None and bias.requires_grad)
        and rows * (in_features + out_features) > 2 * in_features * out_features
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and len({tensor.dtype for tensor in tensors}) == 1
        and len({tensor.device for tensor in tensors}) == 1
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and not _is_functional()
    )
    if not fits:
        return None
    total: Tensor = _LinearVera.apply(x, W, bias, A, B, d, b)[0]  # type: ignore[no-untyped-call]
    return total


def add_vera_rows(result: Tensor, x: Tensor, *, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """`add_vera` where every row of the batch has vectors of its own: two matrix products for all adapters together.

    Args:
        result: (rows, ..., out_features).
        x: (rows, ..., in_features).
        A: (r, in_features), shared by all rows.
        B: (out_features, r), shared by all rows.
        d: (rows, r), one vera_lambda_d for each row.
        b: (rows, out_features).

    Returns:
        As `add_vera`.
    """
    between = (1,) * (x.dim() - 2)
    d, b = (vectors.view(vectors.shape[0], *between, vectors.shape[1]) for vectors in (d, b))
    with _products_in(x.device.type) as dtype:
        A, B, d, b = _cast(A, B, d, b, dtype=dtype)
        return _forward(result, x, A, B, d, b)[0]


def delta_weight(*, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """What merging adds to the base weight: ``diag(b) B diag(d) A``, (out_features, in_features), in A's dtype."""
    return (b.unsqueeze(1) * B) @ (d.unsqueeze(1) * A)


def _forward(
    result: Tensor, x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The sum, rounded to a dtype once, and ``u = A x``."""
    u = F.linear(x.to(A.dtype), A)
    update = F.linear((u * d).to(B.dtype), B)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_functional():  # these do not take out=
        alike = result.dtype == update.dtype == b.dtype
        total = torch.addcmul(result, update, b) if alike else result + update * b
        return total if dtype is None else total.to(dtype), u
    dtype = dtype or functools.reduce(torch.promote_types, (result.dtype, update.dtype, b.dtype))
    # The only reference to the update is here.
    out = update if update.dtype == dtype else torch.empty_like(update, dtype=dtype)
    return torch.addcmul(result, update, b, out=out), u


def _is_functional() -> bool:
    """Whether torch.func transforms what is computed."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@contextlib.contextmanager
def _products_in(device: str) -> Iterator[torch.dtype | None]:
    """Autocast's dtype where autocast is on, with autocast off inside; None where it is off, at no cost."""
    if not torch.is_autocast_enabled(device):
        yield None
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield dtype


def _cast(A: Tensor, B: Tensor, d: Tensor, b: Tensor, *, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """The matrices in autocast's dtype and the vectors in float32; without autocast all in the matrices' own dtype."""
    if dtype is not None:
        return A.to(dtype), B.to(dtype), d.float(), b.float()
    return A, B, d.to(A.dtype), b.to(A.dtype)  # at least float32: the shared pair is never narrower
