"""A linear layer with VeRA adapters.

For an input x the layer computes, with the paper's names (arXiv 2310.11454, section 3.1)::

    W0 x + bias + lambda_b * (B (lambda_d * (A dropout(x))))

where A (r, in_features) and B (out_features, r) are the upper left corners of the model's shared, frozen, random
vera_A (r, in_max) and vera_B (out_max, r), and lambda_d (r,) and lambda_b (out_features,) are trained. The attributes
have the names of PEFT's layer (``peft.tuners.vera.layer.Linear``), so that code for one can look at the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.errors import BrokenValuesError, UsageError, WrongTypeError, warn
from vera_tools.nn.adapted import AdaptedModule
from vera_tools.nn.base_layers import PLAIN, Kind, features, is_conv1d, kind_of, weight_like, whole_shape
from vera_tools.nn.functional import add_vera, add_vera_rows, delta_weight, linear_vera
from vera_tools.nn.projection import ProjectionDict
from vera_tools.nn.rows import Rows


class VeraLinear(AdaptedModule):
    """A linear base layer and the VeRA adapters on it.

    Attributes:
        base_layer: The frozen layer: `torch.nn.Linear`, a Conv1D of transformers, whose weight is (in, out), a
            quantised layer, or what else maps in_features to out_features.
        in_features, out_features: Dimensions of the linear map.
        fan_in_fan_out: Whether the weight is stored as (in, out).
        vera_A, vera_B: The model's shared projections, by adapter name.
        vera_lambda_b, vera_lambda_d: The trained vectors, by adapter name.
        vera_dropout: Dropout before A, by adapter name.
        r: Ranks, by adapter name.
        merged_adapters: The adapters whose updates are in the base weight at the moment.
    """

    vera_A: ProjectionDict
    vera_B: ProjectionDict
    module_type = "vera.Linear"
    base_name = "base_layer"
    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    other_param_names = ("vera_A", "vera_B")

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        vera_A: ProjectionDict,
        vera_B: ProjectionDict,
        name: str = "",
        torchao_config: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(name=name)
        self.base_layer = base_layer
        self.in_features, self.out_features = features(base_layer)
        self.fan_in_fan_out = is_conv1d(base_layer)
        # Written past nn.Module.__setattr__, which would register the model's projections as this layer's own.
        self.__dict__["vera_A"], self.__dict__["vera_B"] = vera_A, vera_B
        self.vera_lambda_b = nn.ParameterDict()
        self.vera_lambda_d = nn.ParameterDict()
        self.vera_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self._torchao_config = torchao_config
        self._unmerged: dict[str, Any] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features), in the base layer's dtype."""
        if not args and not kwargs and (total := self._in_one(x)) is not None:
            return total
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if x.requires_grad and not result.requires_grad and torch.is_grad_enabled():
            # The layers below would be trained with the update's part of their gradient alone.
            raise UsageError(
                "no gradient goes back through the base layer",
                where=self.name,
                found=type(self.base_layer).__name__,
                hint="load the base with kernels that can be trained through, or compute under torch.no_grad()",
            )
        dtype = result.dtype
        if self.rows is not None:
            return self._by_row(self.rows, x, result).to(dtype)
        names = [name for name in self.active_adapters if name in self.r]
        for name in names:
            A, B = self.projections(name, x.device)
            d, b = self.vera_lambda_d[name], self.vera_lambda_b[name]
            # Several are added up in the dtype of the vectors, and rounded once.
            last = dtype if name == names[-1] else None
            result = add_vera(result, self.vera_dropout[name](x), A=A, B=B, d=d, b=b, dtype=last)
        return result

    def _in_one(self, x: Tensor) -> Tensor | None:
        """The output, where base layer and update can be computed together and that is faster in training."""
        base, names = self.base_layer, [name for name in self.active_adapters if name in self.r]
        if self.disable_adapters or self.merged or self.rows is not None or len(names) != 1:
            return None
        dropout = self.vera_dropout[names[0]]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            return None
        if type(base) is not nn.Linear or "forward" in base.__dict__ or _is_watched(base):
            return None
        A, B = self.projections(names[0], x.device)
        d, b = self.vera_lambda_d[names[0]], self.vera_lambda_b[names[0]]
        return linear_vera(x, base.weight, base.bias, A=A, B=B, d=d, b=b)

    def _by_row(self, rows: Rows, x: Tensor, result: Tensor) -> Tensor:
        """The layer's output, with every row's own adapter.

        Args:
            rows: The adapter of each row.
            x: The input, (rows, ..., in_features).
            result: The base layer's output, (rows, ..., out_features).
        """
        names = rows.for_input(x, where=self.name)
        for adapters in self.adapters_by_pair(names):
            number = {name: i for i, name in enumerate(adapters)}
            chosen = [row for row, name in enumerate(names) if name in number]
            A, B = self.projections(adapters[0], x.device)
            which = rows.index([number[names[row]] for row in chosen], x.device)
            d = torch.stack([self.vera_lambda_d[name] for name in adapters])[which]
            b = torch.stack([self.vera_lambda_b[name] for name in adapters])[which]
            if len(chosen) == len(names):
                result = add_vera_rows(result, x, A=A, B=B, d=d, b=b)
            else:
                at = rows.index(chosen, x.device)
                update = add_vera_rows(result[at], x[at], A=A, B=B, d=d, b=b)
                result = result.to(update.dtype).index_copy(0, at, update)
        return result

    def projections(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """This layer's part of an adapter's pair: (r, in_features) and (out_features, r), views of the shared ones."""
        A, B = self.vera_A.on(name, device), self.vera_B.on(name, device)
        return A[:, : self.in_features], B[: self.out_features]

    def adapters_by_pair(self, names: Iterable[str]) -> list[list[str]]:
        """Those of the names that have an adapter on this layer, in groups that share one pair."""
        groups: dict[int, list[str]] = {}
        for name in dict.fromkeys(names):
            if name in self.r:
                groups.setdefault(id(self.vera_A[name]), []).append(name)
        return list(groups.values())

    def add_adapter(
        self, name: str, config: VeraConfig, device: torch.device | None = None, autocast_adapter_dtype: bool = True
    ) -> None:
        """Give the layer the vectors of a new adapter, whose pair the model holds already.

        With init_weights, lambda_b is 0 and lambda_d is d_initial, so that the adapter starts without effect; else they
        are 1 and standard normal, as PEFT has them.

        Args:
            name: The adapter.
            config: Its config.
            device: Where the vectors are made. Default: where the base weight is.
            autocast_adapter_dtype: Hold them in float32 on a half-precision weight, in which training them would lose
                small steps; else in the weight's dtype. A quantised weight has the dtype that it is computed in.
        """
        weight = weight_like(self.base_layer)
        options: dict[str, Any] = {
            "dtype": torch.promote_types(weight.dtype, torch.float32) if autocast_adapter_dtype else weight.dtype,
            "device": device or weight.device,
        }
        self.r[name] = config.r
        self.vera_dropout[name] = nn.Dropout(config.vera_dropout) if config.vera_dropout > 0 else nn.Identity()
        self.vera_lambda_b[name] = nn.Parameter(torch.ones(self.out_features, **options))
        self.vera_lambda_d[name] = nn.Parameter(torch.randn(config.r, **options))
        if config.init_weights:
            self.reset_vera_parameters(name, d_initial=config.d_initial)

    def reset_vera_parameters(self, adapter_name: str, d_initial: float = 0.1) -> None:
        """Set an adapter's vectors to their initial values: lambda_b to 0, lambda_d to `d_initial`."""
        nn.init.constant_(self.vera_lambda_d[adapter_name], d_initial)
        nn.init.zeros_(self.vera_lambda_b[adapter_name])

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's vectors."""
        super().delete_adapter(adapter_name)
        if self.r.pop(adapter_name, None) is not None:
            del self.vera_dropout[adapter_name]

    def enable_adapters(self, enabled: bool) -> None:
        """Compute the adapters, or the base layer alone; adapters that are merged are taken out for that."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    @property
    def merged(self) -> bool:
        """Whether the base weight contains an adapter at the moment."""
        return bool(self.merged_adapters)

    @torch.no_grad()
    def merge(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, *, keep_original: bool = True
    ) -> None:
        """Add adapters' updates to the base weight.

        Args:
            safe_merge: Leave the weight as it was where the sum would not be finite.
            adapter_names: Which adapters. Default: the active ones.
            keep_original: Keep a copy of the weight, which `unmerge` puts back bit by bit. Arithmetic could not:
                ``(w + delta) - delta`` is rounded twice.

        Raises:
            BrokenValuesError: `safe_merge`, and the merged weight has values that are not finite.
            UsageError: as `check_mergeable`.
        """
        wanted = self.active_adapters if adapter_names is None else list(adapter_names)
        if isinstance(adapter_names, str):
            raise WrongTypeError("adapter_names is a list of names", found=repr(adapter_names))
        new = [name for name in wanted if name not in self.merged_adapters and name in self.r]
        if self.merged:  # PEFT's words
            message = "All adapters are already merged, nothing to do."
            if new:
                message = (
                    f"Already following adapters were merged {','.join(self.merged_adapters)}. "
                    f"You are now additionally merging {','.join(new)}."
                )
            warn(message)
        if not new:
            return
        self.check_mergeable()
        merged, kind = self.merged_weight(new, safe_merge=safe_merge), self.kind
        if kind.rounds:
            warn(
                f"what is merged into {kind.name} weights is rounded to them again: the results are not quite those of "
                "the adapter"
            )
        if keep_original and self._unmerged is None:
            self._unmerged = kind.keep(self.base_layer)
        kind.write(self.base_layer, merged)
        self.merged_adapters += new

    def check_mergeable(self) -> None:
        """Refuse a weight that an update cannot be added to.

        Raises:
            UsageError: it is computed from other parameters, quantised so that it cannot be read and written, holds no
                values, or is spread over processes.
        """
        if reason := self.kind.check(self.base_layer):
            hint = "load the adapter onto the base without quantisation, and merge there"
            if self.kind is PLAIN:
                hint = "remove the parametrisation first"
            raise UsageError(reason, where=self.name, found=type(self.base_layer).__name__, hint=hint)
        weight = getattr(self.base_layer, "weight", None)
        if weight is None:  # HQQ's layers have none
            return
        if weight.device.type == "meta":
            raise UsageError("the weight is on the meta device: there is nothing to merge into", where=self.name)
        if hasattr(weight, "full_tensor") or whole_shape(weight) != weight.shape:
            raise UsageError(
                "the weight is spread over processes",
                where=self.name,
                hint="save the adapter, and merge it in one process",
            )

    @torch.no_grad()
    def merged_weight(self, adapter_names: Sequence[str], *, safe_merge: bool = False) -> Tensor:
        """The base weight with adapters' updates added one after another, each sum rounded to the weight's dtype.

        A quantised weight is the dequantised one, and not rounded to what it can hold yet.

        Raises:
            BrokenValuesError: `safe_merge`, and the result has values that are not finite.
        """
        weight = self.kind.read(self.base_layer)
        for name in adapter_names:
            weight = (weight + self.get_delta_weight(name)).to(weight.dtype)
            if safe_merge and not torch.isfinite(weight).all():
                raise BrokenValuesError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken",
                    where=self.name,
                    hint="nothing was merged",
                )
        return weight

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit by bit as it was before the first `merge`."""
        if not self.merged:
            warn("Already unmerged. Nothing to do.")
            return
        if self._unmerged is None:
            raise UsageError("the original weight was not kept", where=self.name)
        self.kind.restore(self.base_layer, self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What `merge` adds to the base weight, in its layout, in the projections' dtype."""
        A, B = self.projections(adapter, self.vera_lambda_d[adapter].device)
        d, b = self.vera_lambda_d[adapter].to(A.dtype), self.vera_lambda_b[adapter].to(A.dtype)
        delta = delta_weight(A=A, B=B, d=d, b=b)
        return delta.T if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: VeRA is a LoRA of rank r, exactly."""
        return True

    @property
    def kind(self) -> Kind:
        """How the base layer holds its weight, as it is now."""
        return kind_of(self.base_layer, self._torchao_config)

    @property
    def quantization_backend(self) -> str | None:
        """What the base layer's weight is quantised with, by PEFT's name; None where it is held as it is."""
        return self.kind.name

    def get_base_layer(self) -> nn.Module:
        """The base layer."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, which models read for its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Ranks by adapter name."""
        return f"r={self.r}, active={self.active_adapters}"

    def _apply(self, fn: Any, recurse: bool = True) -> VeraLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._unmerged is not None:
            kept = self._unmerged.items()
            self._unmerged = {name: fn(part) if isinstance(part, Tensor) else part for name, part in kept}
        return self


def _is_watched(module: nn.Module) -> bool:
    """Whether something is called when the module is: hooks of accelerate's, DeepSpeed's, profilers', ..."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]
