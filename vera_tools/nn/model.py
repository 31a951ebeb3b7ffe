"""`VeraModel`: a model whose linear layers carry VeRA adapters.

Plays the part of PEFT's ``PeftModel`` and ``VeraModel`` together, with their names. What it does not define it passes
on to the model that it wraps.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from vera_tools.checkpoints.config import PeftType, VeraConfig
from vera_tools.errors import UsageError, warn
from vera_tools.nn import lora, status
from vera_tools.nn.adapted import base_layer
from vera_tools.nn.forwarding import by_row, with_signature_of_base
from vera_tools.nn.input_gradients import require_input_gradients
from vera_tools.nn.io import StoredAdapters
from vera_tools.nn.layer import VeraLinear
from vera_tools.nn.tying import note_untied
from vera_tools.projections.pair import PROJECTIONS


class VeraModel(StoredAdapters):
    """A model and the VeRA adapters on it.

    The model's layers are changed in place. Its own parameters are frozen; the active adapter's are trainable.

    Args:
        model: Any `torch.nn.Module` with linear layers.
        config: What to adapt and how; a ``peft.VeraConfig`` will do. It is copied; the copy in `peft_config` names what
            was found.
        adapter_name: The first adapter's name.
        low_cpu_mem_usage: Make the adapter's vectors on the meta device, to be loaded later.
        autocast_adapter_dtype: Hold the vectors in float32 on a half-precision layer, in which training them would
            lose small steps; False holds them in the layer's dtype. The projections are never rounded.

    Attributes:
        model: The wrapped model.
        peft_config: Config by adapter name.
        vera_A: The shared projections (r, in_max), by adapter name; adapters with the same values share one buffer.
        vera_B: The same for (out_max, r).

    Raises:
        UsageError: (a ValueError) nothing matches target_modules, or something that does cannot be adapted. The model
            is then as it was.
    """

    peft_type = PeftType.VERA

    def __init__(
        self,
        model: nn.Module,
        config: VeraConfig,
        adapter_name: str = "default",
        *,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__(model)
        config = VeraConfig.of(config)
        self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
        self._begin(adapter_name, inference_mode=config.inference_mode)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: VeraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        strict: bool = False,
        allow_pickle: bool = False,
        **options: Any,
    ) -> VeraModel:
        """Put a checkpoint's adapter on a model, with the projections that it was trained with.

        Args:
            model: The base model. On the meta device it stays there; the adapter is loaded all the same.
            model_id: The checkpoint: a folder, an adapter_model.safetensors file, or
                ``hf://owner/name[@revision][/subfolder]``.
            adapter_name: The adapter's name here.
            is_trainable: Whether its vectors are to be trained on; else the model is put into evaluation mode.
            config: A config to take in the place of the checkpoint's own. Rank and key are the checkpoint's.
            autocast_adapter_dtype: Hold the vectors in float32 on a half-precision layer, not in the layer's dtype.
            strict: Refuse what can only be assumed, and what was assumed or stated when it was recorded.
            allow_pickle: Read a legacy adapter_model.bin too, by torch with weights_only.
            ephemeral_gpu_offload: False: move the model with ``.to()``.
            low_cpu_mem_usage: Taken as PEFT takes it; an adapter is always loaded straight from its file.
            key_mapping: As `load_adapter` takes it.
            **options: PEFT's further arguments: revision and subfolder as `load_adapter` takes them, and
                `peft_arguments.LOADING`, with the values for which nothing is done otherwise.

        Raises:
            FormatError: unreadable, malformed, or not VeRA.
            CheckFailedError: it does not fit the model, or is not what its manifest records. One that was trained on
                since is loaded, with a warning.
            UnprovenError: `strict`, and nothing records which recipe made the projections.
            UsageError: an option that is not supported, or the model carries adapters already.
        """
        self = cls.__new__(cls)
        StoredAdapters.__init__(self, model)
        self.load_adapter(
            model_id,
            adapter_name,
            is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            config=config,
            strict=strict,
            allow_pickle=allow_pickle,
            **options,
        )
        self._begin(adapter_name, inference_mode=not is_trainable)
        return self

    # Adapters: add, choose, delete.

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute the base model inside the ``with``. Adapters that are merged are taken out and put back.

        Biases that an adapter with ``bias="all"`` or ``"vera_only"`` has trained are the base's own, and stay: a
        warning says so.
        """
        self._warn_of_biases()
        if len({module.disable_adapters for module in self.adapted().values()}) > 1:
            warn(
                "The model contains some adapter layers that are enabled and others that are disabled; after this "
                f"`with` all are {'disabled' if self._disabled else 'enabled'}"
            )
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
        note_untied(self.model)
        return self.model

    def unload(self) -> nn.Module:
        """Take the adapters off and return the plain model, with its weights as they were."""
        self.unmerge_adapter()
        for name, module in self.adapted().items():
            self._replace(name, base_layer(module))
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

    @with_signature_of_base
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
        with by_row(self, adapter_names):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own generate; `adapter_names` as in `forward`, one for each prompt."""
        options = kwargs.get("generation_config")
        copies = max(
            int(kwargs.get(option, getattr(options, option, None)) or 1)
            for option in ("num_beams", "num_return_sequences")
        )
        with by_row(self, adapter_names, copies=copies):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    # The rest of the peer's interface.

    @property
    def active_peft_config(self) -> VeraConfig:
        """The active adapter's config; the first one's, where several are active together.

        Raises:
            UsageError: none is active.
        """
        if not self._active:
            raise UsageError("no adapter is active")
        return self.peft_config[self._active[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is computed: some are active, and adapters are not disabled."""
        return bool(self._active) and not self._disabled

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that adapters save whole, by their configs and the heads of their tasks; None where none does."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def targeted_module_names(self) -> list[str]:
        """The names of the adapted layers in the base."""
        return list(self.vera_layers())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: VeRA is a LoRA of rank r, exactly; `to_lora` makes it."""
        return True

    to_lora = lora.to_lora
    get_layer_status = status.get_layer_status
    get_model_status = status.get_model_status
    prepare_model_for_gradient_checkpointing = staticmethod(require_input_gradients)

    def get_base_model(self) -> nn.Module:
        """The wrapped model, adapters and all."""
        return self.model

    def print_trainable_parameters(self) -> None:
        """Print the two numbers, as PEFT does."""
        trainable, every = self.get_nb_trainable_parameters()
        share = 100 * trainable / max(every, 1)
        print(f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {share:.4f}")

    @property
    def _hf_peft_config_loaded(self) -> bool:
        # transformers' Trainer asks for it, and trains a quantised base with adapters only.
        return True

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
