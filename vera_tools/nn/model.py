"""`VeraModel`: a model whose linear layers carry VeRA adapters.

Plays the part of PEFT's ``PeftModel`` and ``VeraModel`` together, with their names. What it does not define it passes
on to the model that it wraps.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.errors import UsageError
from vera_tools.nn import io, peft_arguments
from vera_tools.nn.adapters import Adapters
from vera_tools.nn.layer import VeraLinear
from vera_tools.nn.rows import NO_ADAPTER, Rows
from vera_tools.nn.status import LayerStatus, ModelStatus, layer_status, model_status
from vera_tools.projections.pair import PROJECTIONS


class _with_signature_of_base:  # noqa: N801 (a decorator)
    """A forward whose signature is asked of the instance: trainers choose a batch's columns by it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: VeraModel | None, owner: type) -> Any:
        return self.function if instance is None else _Forward(self.function, instance)


class _Forward:
    """An instance's forward, which says what its base takes."""

    def __init__(self, function: Callable[..., Any], model: VeraModel) -> None:
        self.function, self.model = function, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.model, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # A bound method has the attributes of its function; torch.export looks at its code.
        if name == "function":
            raise AttributeError(name)
        return getattr(self.function, name)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.model.model.forward)
        own = inspect.Parameter("adapter_names", inspect.Parameter.KEYWORD_ONLY, default=None)
        taken = list(signature.parameters.values())
        at = len(taken) - (bool(taken) and taken[-1].kind is inspect.Parameter.VAR_KEYWORD)
        return signature.replace(parameters=[*taken[:at], own, *taken[at:]])


class VeraModel(Adapters):
    """A model and the VeRA adapters on it.

    The model's layers are changed in place. Its own parameters are frozen; the active adapter's are trainable.

    Args:
        model: Any `torch.nn.Module` with linear layers.
        config: What to adapt and how; a ``peft.VeraConfig`` will do. It is copied; the copy in `peft_config` names what
            was found.
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

    def __init__(
        self, model: nn.Module, config: VeraConfig, adapter_name: str = "default", *, low_cpu_mem_usage: bool = False
    ) -> None:
        super().__init__(model)
        config = VeraConfig.of(config)
        self.add_adapter(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage)
        self._freeze_base()
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

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
        **options: Any,
    ) -> VeraModel:
        """Put a checkpoint's adapter on a model, with the projections that it was trained with.

        Args:
            model: The base model. On the meta device it stays there; the adapter is loaded all the same.
            checkpoint: A folder, an adapter_model.safetensors file, or ``hf://owner/name[@revision][/subfolder]``.
            adapter_name: The adapter's name here.
            is_trainable: Whether its vectors are to be trained on; else the model is put into evaluation mode.
            strict: Refuse what can only be assumed, and what was assumed or stated when it was recorded.
            allow_pickle: Read a legacy adapter_model.bin too, by torch with weights_only.
            **options: PEFT's further arguments: revision and subfolder, and `peft_arguments.LOADING`, with the values
                for which nothing is done otherwise.

        Raises:
            FormatError: unreadable, malformed, or not VeRA.
            CheckFailedError: it does not fit the model, or regenerated projections are not the recorded ones.
            UnprovenError: `strict`, and nothing records which recipe made the projections.
            UsageError: an option that is not supported, or the model carries adapters already.
        """
        self = cls.__new__(cls)
        Adapters.__init__(self, model)
        self.load_adapter(checkpoint, adapter_name, is_trainable, strict=strict, allow_pickle=allow_pickle, **options)
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
        revision: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> None:
        """Load another adapter beside those that are there; it is not made active. As `from_pretrained`."""
        peft_arguments.check(options, peft_arguments.LOADING)
        checkpoint = peft_arguments.located(checkpoint, revision=revision, subfolder=subfolder)
        io.load(self, checkpoint, adapter_name, is_trainable=is_trainable, strict=strict, allow_pickle=allow_pickle)
        if not is_trainable:
            self.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool | None = None,
        state_dict: Mapping[str, Any] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        **options: Any,
    ) -> None:
        """Write adapters in PEFT's format, with a manifest.

        The adapter "default" goes into the folder itself, others into subfolders with their names, as PEFT has it.
        Files of other names are left alone. Under FSDP every process has to call this; one writes.

        Args:
            save_directory: Where to.
            selected_adapters: Which adapters. Default: all.
            is_main_process: Whether this process writes. Default: the process of rank 0.
            state_dict: The model's state dict, where it was gathered already (under DeepSpeed's ZeRO-3, for instance):
                its vectors, biases and saved modules are written.
            save_embedding_layers: Write the base's embedding and output layer too. "auto": where the vocabulary is not
                as large as in the base's own config, or one of them is adapted.
            **options: PEFT's further arguments, `peft_arguments.SAVING`, with the values for which nothing is done
                otherwise.

        Raises:
            UsageError: no such adapter, save_projection is off for projections that no recipe makes, a tensor has no
                values here or is not in `state_dict`, or an option that is not supported.
        """
        peft_arguments.check(options, peft_arguments.SAVING)
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in self.check_known(names):
            folder = os.fspath(save_directory) if name == "default" else os.path.join(save_directory, name)
            io.save(
                self,
                folder,
                name,
                is_main_process=is_main_process,
                state_dict=state_dict,
                save_embedding_layers=save_embedding_layers,
            )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the base model's own would upload the base.

        Raises:
            UsageError: always; it names the command that does it.
        """
        raise UsageError(
            "an adapter is uploaded from a saved checkpoint",
            hint="save_pretrained(folder), then `vera-tools push folder owner/name`",
        )

    # Adapters: add, choose, delete.

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute the base model inside the ``with``. Adapters that are merged are taken out and put back.

        Biases that an adapter with ``bias="all"`` or ``"vera_only"`` has trained are the base's own, and stay: a
        warning says so.
        """
        self._warn_of_biases(stacklevel=4)
        merged = [(layer, list(layer.merged_adapters)) for layer in self.vera_layers().values() if layer.merged]
        before = self._disabled
        self._set_disabled(True)
        try:
            yield
        finally:
            self._set_disabled(before)
            for layer, names in merged:
                layer.merge(adapter_names=names)

    # Merging.

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters to the base weights; a copy of each weight is kept, for `unmerge_adapter`.

        Args:
            adapter_names: Which adapters. Default: those that are active in a layer.
            safe_merge: Refuse, and leave every weight as it was, where a merged one would not be finite.

        Raises:
            CheckFailedError: `safe_merge` refused.
            UsageError: no such adapter, adapters are disabled, or a weight cannot be merged into; it is named.
        """
        if self._disabled:
            raise UsageError("merged adapters would be computed, and adapters are disabled", hint="enable them first")
        names = None if adapter_names is None else self.check_known(adapter_names)
        self._check_merged(names, safe_merge=safe_merge)
        for layer in self.vera_layers().values():
            layer.merge(adapter_names=names)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Add adapters to the base weights for good, and return the plain model. No copies are kept.

        Args:
            progressbar: Show one on stderr.
            safe_merge: As `merge_adapter`. Every merged weight is computed and checked first, then computed again.
            adapter_names: Which adapters. Default: those that are active in a layer.

        Raises:
            CheckFailedError: `safe_merge` refused.
            UsageError: no such adapter, or a weight cannot be merged into; it is named.
        """
        names = None if adapter_names is None else self.check_known(adapter_names)
        self._check_merged(names, safe_merge=safe_merge)
        layers = self.vera_layers()
        for name in _progress(layers, enabled=progressbar):
            layers[name].merge(adapter_names=names, keep_original=False)
            self._replace(name, layers[name].base_layer)
        for name, module in self.saved_modules().items():
            if names is not None:
                module.active_adapters = names
            module.disable_adapters = False
            self._replace(name, module.active_module)
        return self.model

    def unload(self) -> nn.Module:
        """Take the adapters off and return the plain model, with its weights as they were."""
        self.unmerge_adapter()
        for name, layer in self.vera_layers().items():
            self._replace(name, layer.base_layer)
        for name, module in self.saved_modules().items():
            self._replace(name, module.original_module)
        return self.model

    def _check_merged(self, names: Sequence[str] | None, *, safe_merge: bool) -> None:
        for layer in self.vera_layers().values():
            # As `layer.merge` takes them: a layer's own may have been chosen by its `set_adapter`.
            wanted = layer.active_adapters if names is None else names
            if new := [name for name in wanted if name in layer.r and name not in layer.merged_adapters]:
                layer.check_mergeable()
                if safe_merge:
                    layer.merged_weight(new, safe_merge=True)

    # Running.

    @_with_signature_of_base
    def forward(self, *args: Any, labels: Any = None, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model. An instance's forward has the signature of its base's, with `adapter_names` added.

        Args:
            *args: As the model takes them.
            labels: As the model takes them; named here because ``transformers.Trainer`` asks the class for it.
            adapter_names: One adapter name for each row of the batch; "__base__" for a row without adapter. In
                evaluation mode only.
            **kwargs: As the model takes them.
        """
        if labels is not None:
            kwargs["labels"] = labels
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
        self.check_known(names if isinstance(names, str) else [name for name in {*names} if name != NO_ADAPTER])
        if any(layer.merged for layer in self.vera_layers().values()):
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

    @property
    def active_peft_config(self) -> VeraConfig:
        """The active adapter's config, where there is one active adapter."""
        return self.peft_config[self.active_adapter]

    def get_layer_status(self) -> list[LayerStatus]:
        """The state of every adapted layer, then of every module that is saved whole."""
        return layer_status(self)

    def get_model_status(self) -> ModelStatus:
        """The state of the adapters as a whole; "irregular" where layers do not agree."""
        return model_status(self)

    def get_base_model(self) -> nn.Module:
        """The wrapped model, adapters and all."""
        return self.model

    def print_trainable_parameters(self) -> None:
        """Print the two numbers, as PEFT does."""
        trainable, every = self.get_nb_trainable_parameters()
        share = 100 * trainable / max(every, 1)
        print(f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {share:.4f}")

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


def _progress(layers: dict[str, VeraLinear], *, enabled: bool) -> Iterator[str]:
    if not enabled:
        yield from layers
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(layers, description="Merging", console=Console(stderr=True))
