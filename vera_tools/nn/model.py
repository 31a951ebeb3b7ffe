"""`VeraModel`: a model whose linear layers carry VeRA adapters.

Plays the part of PEFT's ``PeftModel`` and ``VeraModel`` together, with their names. What it does not define it passes
on to the model that it wraps.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vera_tools.config import VeraConfig
from vera_tools.errors import UsageError, VeraToolsWarning
from vera_tools.identification import identify
from vera_tools.manifest import PROJECTIONS, ProjectionRecord
from vera_tools.nn import targets
from vera_tools.nn.layer import VeraLinear
from vera_tools.nn.projection import ProjectionDict, to_array, to_tensor
from vera_tools.nn.rows import NO_ADAPTER, Rows
from vera_tools.nn.saved_module import SavedModule
from vera_tools.prng import Array, generate
from vera_tools.recipe import Recipe


class VeraModel(nn.Module):
    """A model and the VeRA adapters on it.

    The model's layers are changed in place. Its own parameters are frozen; the active adapter's are trainable.

    Args:
        model: Any `torch.nn.Module` with linear layers.
        config: What to adapt and how. It is copied; the copy in `peft_config` names what was found.
        adapter_name: The first adapter's name.
        low_cpu_mem_usage: Make the adapter's vectors on the meta device, to be loaded later.

    Attributes:
        model: The wrapped model.
        peft_config: Config by adapter name.
        vera_A: The shared projections (r, in_max), by adapter name; adapters with the same values share one buffer.
        vera_B: The same for (out_max, r).

    Raises:
        UsageError: (a ValueError) nothing matches target_modules, or something that does cannot be adapted. The model
            is then as it was.
    """

    model: nn.Module

    def __init__(
        self, model: nn.Module, config: VeraConfig, adapter_name: str = "default", *, low_cpu_mem_usage: bool = False
    ) -> None:
        self._wrap(model)
        self.add_adapter(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage)
        self._freeze_base()
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def _wrap(self, model: nn.Module) -> None:
        super().__init__()
        if isinstance(model, VeraModel) or any(isinstance(module, VeraLinear) for module in model.modules()):
            raise UsageError(
                "the model carries VeRA adapters already", hint="add another with add_adapter, or unload() it first"
            )
        self.model = model
        self.vera_A = ProjectionDict()
        self.vera_B = ProjectionDict()
        self.peft_config: dict[str, VeraConfig] = {}
        self._records: dict[str, ProjectionRecord] = {}
        self._active: list[str] = []
        self._disabled = False

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        checkpoint: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        strict: bool = False,
        allow_pickle: bool = False,
    ) -> VeraModel:
        """Put a checkpoint's adapter on a model, with the projections that it was trained with.

        Args:
            model: The base model. On the meta device it stays there; the adapter is loaded all the same.
            checkpoint: A folder, an adapter_model.safetensors file, or ``hf://owner/name[@revision][/subfolder]``.
            adapter_name: The adapter's name here.
            is_trainable: Whether its vectors are to be trained on; else the model is put into evaluation mode.
            strict: Refuse what can only be assumed.
            allow_pickle: Read a legacy adapter_model.bin too, by torch with weights_only.

        Raises:
            FormatError: unreadable, malformed, or not VeRA.
            CheckFailedError: it does not fit the model, or regenerated projections are not the recorded ones.
            UnprovenError: `strict`, and nothing records which recipe made the projections.
        """
        self = cls.__new__(cls)
        self._wrap(model)
        self.load_adapter(checkpoint, adapter_name, is_trainable, strict=strict, allow_pickle=allow_pickle)
        self._freeze_base()
        self.set_adapter(adapter_name, inference_mode=not is_trainable)
        return self

    def load_adapter(
        self,
        checkpoint: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        strict: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        """Load another adapter beside those that are there; it is not made active. As `from_pretrained`."""
        from vera_tools.nn import io

        io.load(self, checkpoint, adapter_name, is_trainable=is_trainable, strict=strict, allow_pickle=allow_pickle)
        if not is_trainable:
            self.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool | None = None,
    ) -> None:
        """Write adapters in PEFT's format, with a manifest.

        The adapter "default" goes into the folder itself, others into subfolders with their names, as PEFT has it.
        Files of other names are left alone. Under FSDP every process has to call this; one writes.

        Args:
            save_directory: Where to.
            selected_adapters: Which adapters. Default: all.
            is_main_process: Whether this process writes. Default: the process of rank 0.

        Raises:
            UsageError: no such adapter, or save_projection is off for projections that no recipe makes.
        """
        from vera_tools.nn import io

        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in self._known(names):
            folder = os.fspath(save_directory) if name == "default" else os.path.join(save_directory, name)
            io.save(self, folder, name, is_main_process=is_main_process)

    # Adapters: add, choose, delete.

    def add_adapter(self, adapter_name: str, config: VeraConfig, *, low_cpu_mem_usage: bool = False) -> None:
        """Add a new adapter; it is not made active.

        Its projections are drawn from its key exactly as PEFT draws them in float32, on every machine, and are not
        rounded through the base's dtype. An adapter whose pair equals that of an earlier one shares it; one of another
        rank or for other shapes gets a pair of its own.

        Raises:
            UsageError: (a ValueError) the name is taken, the key is not that of the other adapters, or nothing matches.
        """
        self.check_new(adapter_name, config)
        config = targets.complete(config, self.model)
        modules = targets.find(config, self.model)
        if missed := targets.unmatched(config, self.model):
            warnings.warn(
                f"{', '.join(map(repr, missed))} matched nothing in the model", VeraToolsWarning, stacklevel=2
            )
        recipe, shape = Recipe(prng_key=config.projection_prng_key), targets.pair_shape(config, modules)
        same = [r for r in self._records.values() if (r.recipe, r.shape, r.dtype) == (recipe, shape, "float32")]
        if same:
            self.attach(adapter_name, config, modules, same[0], None, low_cpu_mem_usage=low_cpu_mem_usage)
        else:
            pair = generate(recipe, shape)
            record = ProjectionRecord(recipe, False, shape, "float32", _digests(pair))
            self.attach(adapter_name, config, modules, record, pair, low_cpu_mem_usage=low_cpu_mem_usage)

    def check_new(self, adapter_name: str, config: VeraConfig) -> None:
        """Refuse an adapter that cannot stand beside those that are there.

        Raises:
            UsageError: (a ValueError) with PEFT's words where PEFT refuses too.
        """
        if adapter_name in self.peft_config:
            raise UsageError(f"there is an adapter called {adapter_name!r} already", hint="delete it first")
        if (
            not adapter_name
            or "." in adapter_name
            or hasattr(nn.ParameterDict, adapter_name)
            or adapter_name == NO_ADAPTER
        ):
            raise UsageError("not a name for an adapter", expected="a name without dots", found=repr(adapter_name))
        for existing in self.peft_config.values():
            if existing.projection_prng_key != config.projection_prng_key:
                raise UsageError(
                    "Vera PRNG initialisation key must be the same for all adapters. Got "
                    f"{config.projection_prng_key=} but previous config had {existing.projection_prng_key}."
                )
            if config.bias != "none" or existing.bias != "none":
                raise UsageError(
                    "VeraModel supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for "
                    "all adapters."
                )

    def attach(
        self,
        adapter_name: str,
        config: VeraConfig,
        modules: dict[str, nn.Module],
        record: ProjectionRecord,
        pair: tuple[Array, Array] | None,
        *,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Put an adapter on layers, once everything is checked; nothing in here can fail half-way.

        Args:
            adapter_name: Its name.
            config: Its completed config.
            modules: The layers, from `targets.find`.
            record: Recipe, shapes and digests of its projections.
            pair: vera_A and vera_B in the record's dtype; None where an adapter with this very record is there.
            low_cpu_mem_usage: Make the vectors on the meta device.
        """
        saved = targets.saved(config, self.model)
        self._warn_of_shared_weights(modules)
        self._hold_pair(adapter_name, config, modules, record, pair)
        self.peft_config[adapter_name] = config
        for name, module in modules.items():
            if not isinstance(module, VeraLinear):
                layer = VeraLinear(module, vera_A=self.vera_A, vera_B=self.vera_B, name=name)
                layer.active_adapters, layer.disable_adapters = list(self._active), self._disabled
                self._replace(name, layer)
                module = layer
            module.add_adapter(adapter_name, config, device=torch.device("meta") if low_cpu_mem_usage else None)
            module.requires_grad_(False)
        for name, module in saved.items():
            if not isinstance(module, SavedModule):
                wrapper = SavedModule(module, name=name)
                wrapper.active_adapters, wrapper.disable_adapters = list(self._active), self._disabled
                self._replace(name, wrapper)
                module = wrapper
            module.add_adapter(adapter_name)
            module.requires_grad_(False)
        self._update_trainable(self._active, inference_mode=False)

    def _hold_pair(
        self,
        adapter_name: str,
        config: VeraConfig,
        modules: dict[str, nn.Module],
        record: ProjectionRecord,
        pair: tuple[Array, Array] | None,
    ) -> None:
        persistent = config.save_projection
        for other, known in self._records.items():
            if (known.sha256, known.dtype) == (record.sha256, record.dtype) and self.record_of(other) is known:
                self.vera_A.share(adapter_name, other, persistent=persistent)
                self.vera_B.share(adapter_name, other, persistent=persistent)
                break
        else:
            if pair is None:  # the buffers of the adapter that had this record have been overwritten since
                assert record.recipe is not None
                pair = generate(record.recipe, record.shape, stored_dtype=record.dtype)
            weights = [targets.weight_of(module) for module in modules.values()]
            like = next((weight for weight in weights if weight.dtype == torch.float64), weights[0])
            for held, values in zip((self.vera_A, self.vera_B), pair, strict=True):
                held.add(adapter_name, to_tensor(values), persistent=persistent, like=like)
        self._records[adapter_name] = record

    def record_of(self, adapter_name: str) -> ProjectionRecord:
        """Recipe, shapes and digests of an adapter's projections, as they are now.

        What was known when they were drawn or loaded is checked against the buffers; values that came in since, by
        `load_state_dict` for instance, are identified.
        """
        known = self._records[adapter_name]
        if _digests(self.stored_pair(adapter_name, known.dtype)) != known.sha256:
            pair = tuple(to_array(held[adapter_name]) for held in (self.vera_A, self.vera_B))
            found = identify(pair[0], pair[1], prng_key=self.peft_config[adapter_name].projection_prng_key)
            known = self._records[adapter_name] = ProjectionRecord(
                found.recipe if found.exact else None,
                False,
                known.shape,
                pair[0].dtype.name,
                _digests((pair[0], pair[1])),
            )
        return known

    def stored_pair(self, adapter_name: str, dtype: str) -> tuple[Array, Array]:
        """An adapter's vera_A and vera_B as arrays of a dtype (a name such as "float32")."""
        wanted: torch.dtype = getattr(torch, dtype)
        return (
            to_array(self.vera_A[adapter_name].to(wanted)),
            to_array(self.vera_B[adapter_name].to(wanted)),
        )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several together, active.

        Args:
            adapter_name: Which.
            inference_mode: Freeze its parameters; otherwise they become trainable, and all others frozen.
        """
        names = self._known([adapter_name] if isinstance(adapter_name, str) else list(adapter_name))
        self._active = names
        for module in self._adapted():
            module.active_adapters = list(names)
        self._update_trainable(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first that is left becomes active."""
        self._known([adapter_name])
        for module in self._adapted():
            module.delete_adapter(adapter_name)
        del self.vera_A[adapter_name], self.vera_B[adapter_name]
        del self.peft_config[adapter_name], self._records[adapter_name]
        left = [name for name in self._active if name != adapter_name]
        if not left and self.peft_config:
            left = [next(iter(self.peft_config))]
            warnings.warn(f"the active adapter was deleted; {left[0]!r} is active now", VeraToolsWarning, stacklevel=2)
        self._active = left
        for module in self._adapted():
            module.active_adapters = list(left)
        self._update_trainable(left, inference_mode=False)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self._active)

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter, where there is one."""
        if len(self._active) != 1:
            raise UsageError("not one active adapter", found=str(self._active))
        return self._active[0]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute the base model inside the ``with``. Adapters that are merged are taken out and put back.

        Biases that an adapter with ``bias="all"`` or ``"vera_only"`` has trained are the base's own, and stay.
        """
        merged = [(layer, list(layer.merged_adapters)) for layer in self.layers().values() if layer.merged]
        for layer, _ in merged:
            layer.unmerge()
        self._set_disabled(True)
        try:
            yield
        finally:
            self._set_disabled(False)
            for layer, names in merged:
                layer.merge(adapter_names=names)

    # Merging.

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters to the base weights; a copy of each weight is kept, for `unmerge_adapter`.

        Args:
            adapter_names: Which adapters. Default: the active ones.
            safe_merge: Refuse, and leave every weight as it was, where a merged one would not be finite.

        Raises:
            CheckFailedError: `safe_merge` refused.
        """
        names = self._active if adapter_names is None else self._known(adapter_names)
        if safe_merge:
            self._check_merged(names)
        for layer in self.layers().values():
            layer.merge(adapter_names=names)

    def unmerge_adapter(self) -> None:
        """Put every base weight back, bit by bit as it was."""
        for layer in self.layers().values():
            if layer.merged:
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Add adapters to the base weights for good, and return the plain model. No copies are kept.

        Args:
            progressbar: Show one on stderr.
            safe_merge: As `merge_adapter`. Every merged weight is computed and checked first, then computed again.
            adapter_names: Which adapters. Default: the active ones.
        """
        names = self._active if adapter_names is None else self._known(adapter_names)
        if safe_merge:
            self._check_merged(names)
        layers = self.layers()
        for name in _progress(layers, enabled=progressbar):
            layers[name].merge(adapter_names=names, keep_original=False)
            self._replace(name, layers[name].base_layer)
        for name, module in self.saved_modules().items():
            module.active_adapters, module.disable_adapters = list(names), False
            self._replace(name, module.active_module)
        return self.model

    def unload(self) -> nn.Module:
        """Take the adapters off and return the plain model, with its weights as they were."""
        self.unmerge_adapter()
        for name, layer in self.layers().items():
            self._replace(name, layer.base_layer)
        for name, module in self.saved_modules().items():
            self._replace(name, module.original_module)
        return self.model

    def _check_merged(self, names: Sequence[str]) -> None:
        for layer in self.layers().values():
            layer.merged_weight([name for name in names if name in layer.r], safe_merge=True)

    # Running.

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model.

        Args:
            *args: As the model takes them.
            adapter_names: One adapter name for each row of the batch; "__base__" for a row without adapter. In
                evaluation mode only.
            **kwargs: As the model takes them.
        """
        with self._rows(adapter_names):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own generate; `adapter_names` as in `forward`, one for each prompt."""
        options = kwargs.get("generation_config")
        copies = max(
            int(kwargs.get(option, getattr(options, option, None)) or 1)
            for option in ("num_beams", "num_return_sequences")
        )
        with self._rows(adapter_names, copies=copies):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextlib.contextmanager
    def _rows(self, names: Sequence[str] | None, *, copies: int = 1) -> Iterator[None]:
        if names is None:
            yield
            return
        if self.training:
            raise UsageError("Cannot pass `adapter_names` when the model is in training mode.")
        self._known([name for name in dict.fromkeys(names) if name != NO_ADAPTER])
        if any(layer.merged for layer in self.layers().values()):
            raise UsageError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if any(config.bias != "none" for config in self.peft_config.values()):
            raise UsageError("adapter_names cannot choose biases by row", hint="use adapters with bias='none'")
        rows = Rows(names, copies=copies)
        modules = list(self._adapted())
        handle = self.model.register_forward_pre_hook(rows.see_inputs, with_kwargs=True)
        for module in modules:
            module.rows = rows
        try:
            yield
        finally:
            handle.remove()
            for module in modules:
                module.rows = None

    # The rest of the peer's interface.

    def get_base_model(self) -> nn.Module:
        """The wrapped model, adapters and all."""
        return self.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; the projections are buffers and in neither."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers, as PEFT does."""
        trainable, every = self.get_nb_trainable_parameters()
        share = 100 * trainable / max(every, 1)
        print(f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {share:.4f}")

    def layers(self) -> dict[str, VeraLinear]:
        """The adapted layers, by their names in the model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, VeraLinear)}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel would send the pair to every process at every step; it is the same everywhere.
        return [f"{which}.{name}" for which in PROJECTIONS for name in self.peft_config]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)

    def _known(self, names: Sequence[str]) -> list[str]:
        if isinstance(names, str):
            raise UsageError("expected a list of adapter names", found=repr(names))
        for name in names:
            if name not in self.peft_config:
                raise UsageError(f"there is no adapter {name!r}", expected=" or ".join(map(repr, self.peft_config)))
        return list(names)

    def saved_modules(self) -> dict[str, SavedModule]:
        """The modules that are saved whole, by their names in the model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, SavedModule)}

    def _adapted(self) -> Iterator[VeraLinear | SavedModule]:
        yield from self.layers().values()
        yield from self.saved_modules().values()

    def _replace(self, name: str, module: nn.Module) -> None:
        parent_name, _, child = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        module.train(getattr(parent, child).training)
        setattr(parent, child, module)

    def _set_disabled(self, disabled: bool) -> None:
        self._disabled = disabled
        for module in self._adapted():
            module.disable_adapters = disabled

    def _freeze_base(self) -> None:
        mine = {id(p) for layer in self._adapted() for p in _adapter_parameters(layer)}
        for parameter in self.model.parameters():
            if id(parameter) not in mine:
                parameter.requires_grad_(False)

    def _update_trainable(self, names: Sequence[str], *, inference_mode: bool) -> None:
        for module in self._adapted():
            for name in self.peft_config:
                for parameter in _adapter_parameters(module, name):
                    parameter.requires_grad_(name in names and not inference_mode)
        for name, config in self.peft_config.items():
            for bias in self.biases(config.bias).values():
                bias.requires_grad_(name in names and not inference_mode)

    def biases(self, which: str) -> dict[str, Tensor]:
        """The base's biases that an adapter with this `VeraConfig.bias` trains, by their names in the model."""
        if which == "none":
            return {}
        own = {f"{name}.base_layer.bias" for name in self.layers()}
        inside = tuple(f"{name}." for name in self.saved_modules())
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if (name in own if which == "vera_only" else name == "bias" or name.endswith(".bias"))
            and not name.startswith(inside)
        }

    def _warn_of_shared_weights(self, modules: dict[str, nn.Module]) -> None:
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for name, module in modules.items():
            if not isinstance(module, VeraLinear) and len(shared := names.get(id(module.weight), [])) > 1:
                others = ", ".join(other for other in shared if not other.startswith(f"{name}."))
                warnings.warn(
                    f"the weight of {name} is tied to {others}: merging an adapter into it will change both",
                    VeraToolsWarning,
                    stacklevel=4,
                )


def _adapter_parameters(module: VeraLinear | SavedModule, name: str | None = None) -> Iterator[nn.Parameter]:
    if isinstance(module, SavedModule):
        for own, copy in module.modules_to_save.items():
            if name in (None, own):
                yield from copy.parameters()
    else:
        for vectors in (module.vera_lambda_b, module.vera_lambda_d):
            yield from (parameter for own, parameter in vectors.items() if name in (None, own))


def _digests(pair: tuple[Array, Array]) -> dict[str, str]:
    return {
        name: hashlib.sha256(values.reshape(-1).view("u1").data).hexdigest()
        for name, values in zip(PROJECTIONS, pair, strict=True)
    }


def _progress(layers: dict[str, VeraLinear], *, enabled: bool) -> Iterator[str]:
    if not enabled:
        yield from layers
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(layers, description="Merging", console=Console(stderr=True))
