"""The adapters on a model: adding, choosing and deleting them. `VeraModel` is built on this.

Everything is checked before a model is changed, so that a refused adapter leaves it as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.manifest import Origin, ProjectionRecord
from vera_tools.checkpoints.names import TASK_HEADS
from vera_tools.dtypes import Array
from vera_tools.errors import UsageError, WrongSizeError, WrongTypeError, warn
from vera_tools.nn import targets, tying
from vera_tools.nn.adapted import AdaptedModule
from vera_tools.nn.base_layers import weight_like, whole_shape
from vera_tools.nn.input_gradients import require_where_checkpointing
from vera_tools.nn.layer import VeraLinear
from vera_tools.nn.projection import ProjectionDict, described, is_recorded, recorded, to_array, to_tensor
from vera_tools.nn.rows import NO_ADAPTER
from vera_tools.nn.saved_module import SavedModule
from vera_tools.nn.targets import Plan
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe


class Adapters(nn.Module):
    """A model's adapters and the projections that they share.

    Attributes:
        model: The wrapped model.
        peft_config: Config by adapter name.
        vera_A, vera_B: The shared projections, by adapter name.

    Raises:
        UsageError: the model carries adapters already, vera-tools' or PEFT's.
    """

    model: nn.Module
    #: What the names of an adapter's parameters begin with, behind their layer's.
    prefix = "vera_lambda_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if any(isinstance(module, VeraLinear | Adapters) for module in model.modules()):
            raise UsageError(
                "the model carries VeRA adapters already", hint="add another with add_adapter, or unload() it first"
            )
        if any(hasattr(module, "base_layer") and hasattr(module, "merged_adapters") for module in model.modules()):
            raise UsageError(
                "this model already carries PEFT adapters",
                expected="a plain model",
                found=type(model).__name__,
                hint="take model.unload() of it, or stay with PEFT and use vera_tools.nn.peft.restore_projections",
            )
        self.model = model
        self.training = model.training
        self.vera_A = ProjectionDict()
        self.vera_B = ProjectionDict()
        self.peft_config: dict[str, VeraConfig] = {}
        self._records: dict[str, ProjectionRecord] = {}
        self._active: list[str] = []
        self._disabled = False
        self._task: str | None = None

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: VeraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter; it is not made active.

        Its projections are drawn from its key exactly as PEFT draws them in float32 on Linux with AVX2, the same on
        every machine, and are not rounded through the base's dtype. An adapter whose pair equals that of an earlier
        one shares it; one of another rank or for other shapes gets a pair of its own.

        Args:
            adapter_name: Its name.
            peft_config: What to adapt and how; it is copied.
            low_cpu_mem_usage: Make the vectors on the meta device, to be loaded later.
            autocast_adapter_dtype: Hold the vectors in float32 on a half-precision layer, not in the layer's dtype.

        Warns:
            VeraToolsWarning: entries of the config match nothing.

        Raises:
            UsageError: (a ValueError) the name is taken, the key is not that of the other adapters, or nothing matches.
        """
        config = VeraConfig.of(peft_config)
        self.check_new(adapter_name, config)
        # The first adapter's task is the model's, whose head PEFT trains with every other adapter too.
        heads = TASK_HEADS.get(self._task or "", ())
        if heads:
            saved = dict.fromkeys([*(config.modules_to_save or ()), *heads])
            config = dataclasses.replace(config, modules_to_save=list(saved))
        plan = targets.plan(config, self.model)
        if missed := [entry for entry in targets.unmatched(plan.config, self.model) if entry not in heads]:
            warn(f"{', '.join(map(repr, missed))} matched nothing in the model")
        recipe, shape = Recipe(prng_key=config.projection_prng_key), plan.shape
        same = [r for r in self._records.values() if (r.recipe, r.shape, r.dtype) == (recipe, shape, "float32")]
        if same:
            record, pair = dataclasses.replace(same[0], origin="live"), None
        else:
            pair = generate(recipe, shape)
            record = described((to_tensor(pair[0]), to_tensor(pair[1])), "live", recipe)
        options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": autocast_adapter_dtype}
        self.attach(adapter_name, plan, record, pair, **options)

    def check_new(self, adapter_name: str, config: VeraConfig) -> None:
        """Refuse an adapter that cannot stand beside those that are there.

        Raises:
            UsageError: (a ValueError) with PEFT's words where PEFT refuses too.
        """
        if adapter_name in self.peft_config:
            raise UsageError(f"Adapter with name '{adapter_name}' already exists.", hint="delete it first")
        taken = adapter_name == NO_ADAPTER or hasattr(nn.ParameterDict, adapter_name)
        if not adapter_name or "." in adapter_name or taken:
            raise UsageError("not a name for an adapter", expected="a name without dots", found=repr(adapter_name))
        if adapter_name in self.prefix:
            warn(
                f"Adapter name '{adapter_name}' should not be contained in the prefix '{self.prefix}'. This may lead "
                "to reinitialization of the adapter weights during loading, in PEFT."
            )
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
        plan: Plan,
        record: ProjectionRecord,
        pair: tuple[Array, Array] | None,
        *,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put an adapter on layers, once everything is checked; nothing in here can fail half-way.

        Args:
            adapter_name: Its name.
            plan: What it has of the model.
            record: Recipe, shapes and digests of its projections.
            pair: vera_A and vera_B in the record's dtype; None where an adapter with this very record is there.
            low_cpu_mem_usage: Make the vectors on the meta device.
            autocast_adapter_dtype: Hold the vectors in float32 on a half-precision layer.
        """
        tying.warn_of_merging(self.model, [n for n, layer in plan.layers.items() if not isinstance(layer, VeraLinear)])
        self.hold_pair(adapter_name, plan, record, pair)
        self._task = self._task if self.peft_config else plan.config.task_type
        self.peft_config[adapter_name] = plan.config
        device = torch.device("meta") if low_cpu_mem_usage else None
        for name, module in {**plan.layers, **plan.saved}.items():
            if not isinstance(module, AdaptedModule):
                module = SavedModule(module, name=name) if name in plan.saved else self._new_layer(module, name=name)
                module.disable_adapters = self._disabled
                self._replace(name, module)
            module.add_adapter(adapter_name, plan.config, device, autocast_adapter_dtype)
            module.set_requires_grad(adapter_name, False)
        self.tie(adapter_name)

    def _new_layer(self, module: nn.Module, *, name: str) -> VeraLinear:
        # Where transformers keeps what it let torchao quantise the model by, which merging needs again.
        quantizer = getattr(self.model, "hf_quantizer", None)
        config = getattr(getattr(quantizer, "quantization_config", None), "get_apply_tensor_subclass", None)
        layer = VeraLinear(module, vera_A=self.vera_A, vera_B=self.vera_B, name=name, torchao_config=config)
        layer.active_adapters = list(self._active)
        return layer

    def tie(self, adapter_name: str) -> None:
        """Let an adapter's copies of saved modules share what the base's share, where its config ensures that."""
        if self.peft_config[adapter_name].ensure_weight_tying:
            tying.tie(adapter_name, self.saved_modules().values())

    def hold_pair(
        self, adapter_name: str, plan: Plan, record: ProjectionRecord, pair: tuple[Array, Array] | None
    ) -> None:
        """Hold an adapter's projections, or share those of an adapter that has the same; as `attach` takes them."""
        persistent = plan.config.save_projection
        weights = [weight_like(layer) for layer in plan.bases.values()]
        first = next((weight for weight in weights if weight.dtype == torch.float64), weights[0])
        for other, known in self._records.items():
            if (known.sha256, known.dtype) == (record.sha256, record.dtype) and self.record_of(other) is known:
                self.vera_A.share(adapter_name, other, persistent=persistent, like=first)
                self.vera_B.share(adapter_name, other, persistent=persistent, like=first)
                break
        else:
            if pair is None:  # the buffers of the adapter that had this record have been overwritten since
                assert record.recipe is not None
                pair = generate(record.recipe, record.shape, stored_dtype=record.dtype)
            for held, values in zip((self.vera_A, self.vera_B), pair, strict=True):
                held.add(adapter_name, to_tensor(values), persistent=persistent, like=first)
        self._records[adapter_name] = record

    def set_pair(self, adapter_name: str, pair: tuple[Tensor, Tensor]) -> None:
        """Let an adapter's projections have other values, which no other adapter gets.

        Args:
            adapter_name: The adapter.
            pair: vera_A and vera_B.

        Raises:
            WrongSizeError: they have other shapes than those that are there.
        """
        held = (self.vera_A, self.vera_B)
        for name, own, values in zip(PROJECTIONS, held, pair, strict=True):
            if values.shape != own[adapter_name].shape:
                raise WrongSizeError(
                    "has another shape",
                    where=name,
                    expected=str(list(own[adapter_name].shape)),
                    found=str(list(values.shape)),
                )
        for own, values in zip(held, pair, strict=True):
            own[adapter_name] = values.detach().to(own[adapter_name].device, copy=True)

    def record_of(self, adapter_name: str) -> ProjectionRecord:
        """Recipe, shapes and digests of an adapter's projections, as they are now.

        What was known when they were drawn or loaded is checked against the buffers; values that came in since, by
        `load_state_dict` for instance, are identified.
        """
        known = self._records[adapter_name]
        pair = self.vera_A[adapter_name], self.vera_B[adapter_name]
        if not is_recorded(pair, known):
            # A pair that was assumed when it was loaded is so too after a cast to another dtype.
            origin: Origin = known.origin if known.assumed else "live"
            known = recorded(pair, origin, prng_key=self.peft_config[adapter_name].projection_prng_key)
            self._records[adapter_name] = known
        return known

    def stored_pair(self, adapter_name: str, dtype: str) -> dict[str, Array]:
        """An adapter's vera_A and vera_B, by these names, as arrays of a dtype (a name such as "float32")."""
        wanted: torch.dtype = getattr(torch, dtype)
        return {name: to_array(getattr(self, name)[adapter_name].to(wanted)) for name in PROJECTIONS}

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several together, active.

        Args:
            adapter_name: Which.
            inference_mode: Freeze its parameters; otherwise they become trainable, and all others frozen.

        Raises:
            UsageError: no such adapter, or two of them bring the same module in modules_to_save.
        """
        names = self.check_known([adapter_name] if isinstance(adapter_name, str) else list(adapter_name))
        for where, saved in self.saved_modules().items():
            if len(own := [name for name in names if saved.has(name)]) > 1:
                raise UsageError(
                    "Only one adapter can be set at a time for ModulesToSaveWrapper, one for each saved module",
                    where=where,
                    found=" and ".join(own),
                )
        if any(layer.merged for layer in self.vera_layers().values()):
            # PEFT's words and behaviour: what is merged would otherwise go on being computed.
            warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
            self.unmerge_adapter()
        self._choose(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first that is left becomes active.

        Raises:
            UsageError: no such adapter, or it is merged.
        """
        self.check_known([adapter_name])
        if any(adapter_name in layer.merged_adapters for layer in self.vera_layers().values()):
            raise UsageError(
                f"Cannot delete adapter(s) [{adapter_name!r}] while they are merged. Please unmerge them first."
            )
        for module in self.adapted().values():
            module.delete_adapter(adapter_name)
        del self.vera_A[adapter_name], self.vera_B[adapter_name]
        del self.peft_config[adapter_name], self._records[adapter_name]
        left = [name for name in self._active if name != adapter_name]
        if not left and self.peft_config:
            left = [next(iter(self.peft_config))]
            # PEFT's words
            warn(f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.")
        self._choose(left, inference_mode=all(self.peft_config[name].inference_mode for name in left))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make everything that adapters train trainable, or freeze it, whether they are active or not.

        Raises:
            UsageError: no such adapter.
        """
        for name in self.check_known([adapter_names] if isinstance(adapter_names, str) else adapter_names):
            for module in self.adapted().values():
                module.set_requires_grad(name, requires_grad)
            for bias in self.plan_of(name).biases(self.model).values():
                bias.requires_grad_(requires_grad)

    def disable_adapter_layers(self) -> None:
        """Compute the base model until `enable_adapter_layers`. Adapters that are merged are taken out for good.

        Biases that an adapter with ``bias="all"`` or ``"vera_only"`` has trained are the base's own, and stay: a
        warning says so. Unlike with PEFT, what is trainable stays so.
        """
        self._warn_of_biases()
        self._set_disabled(True)

    def enable_adapter_layers(self) -> None:
        """Compute the active adapters again, after `disable_adapter_layers`."""
        self._set_disabled(False)

    def unmerge_adapter(self) -> None:
        """Put every base weight back, bit by bit as it was."""
        for layer in self.vera_layers().values():
            if layer.merged:
                layer.unmerge()

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter; a list of names where there is not one."""
        return self._active[0] if len(self._active) == 1 else list(self._active)

    def vera_layers(self) -> dict[str, VeraLinear]:
        """The adapted layers, by their names in the model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, VeraLinear)}

    def check_known(self, names: Sequence[str]) -> list[str]:
        """The names as a list.

        Raises:
            UsageError: one of them is no adapter's.
        """
        if isinstance(names, str):
            raise WrongTypeError("expected a list of adapter names", found=repr(names))
        for name in names:
            if name not in self.peft_config:
                known = " or ".join(map(repr, self.peft_config))
                raise UsageError(f"Adapter {name} does not exist", expected=known or "none, for there is none")
        return list(names)

    def saved_modules(self) -> dict[str, SavedModule]:
        """The modules that are saved whole, by their names in the model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, SavedModule)}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; the projections are buffers and in neither."""
        sizes = [(whole_shape(parameter).numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)

    def adapted(self) -> dict[str, VeraLinear | SavedModule]:
        """The adapted layers, then the modules that are saved whole, by their names in the model."""
        return {**self.vera_layers(), **self.saved_modules()}

    def plan_of(self, adapter_name: str) -> Plan:
        """What an adapter that is there has of the model."""
        layers = {name: layer for name, layer in self.vera_layers().items() if layer.has(adapter_name)}
        saved = {name: module for name, module in self.saved_modules().items() if module.has(adapter_name)}
        return Plan(self.peft_config[adapter_name], layers, saved)

    def _replace(self, name: str, module: nn.Module) -> None:
        parent_name, _, child = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        module.train(getattr(parent, child).training)
        if isinstance(module, VeraLinear) and isinstance(parent, nn.TransformerEncoderLayer):
            # In evaluation mode the parent reads the weights of its layers and calls a fused kernel, past the adapter.
            # It calls the layers themselves where one of them has a hook.
            module.register_forward_pre_hook(_no_op)
        setattr(parent, child, module)

    def _set_disabled(self, disabled: bool) -> None:
        self._disabled = disabled
        for module in self.adapted().values():
            module.enable_adapters(not disabled)

    def _begin(self, adapter_name: str, *, inference_mode: bool) -> None:
        """Freeze the base, and make the first adapter active."""
        modules = self.adapted().values()
        mine = {id(p) for module in modules for name in self.peft_config for p in module.adapter_parameters(name)}
        for parameter in self.model.parameters():
            if id(parameter) not in mine:
                parameter.requires_grad_(False)
        self.set_adapter(adapter_name, inference_mode)
        require_where_checkpointing(self.model)

    def _choose(self, names: list[str], *, inference_mode: bool) -> None:
        self._active = names
        for module in self.adapted().values():
            module.set_adapter(names, inference_mode)
        for name, config in self.peft_config.items():
            if config.bias != "none":
                self.set_requires_grad(name, name in names and not inference_mode)

    def _warn_of_biases(self) -> None:
        for name in self._active:
            if (bias := self.peft_config[name].bias) != "none":
                warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    f"output as the base model would without adaption: the biases that adapter {name!r} has trained "
                    "stay."
                )


def adapters_of(model: nn.Module) -> Adapters:
    """The `Adapters` that a model is, or that something has been put around.

    Raises:
        UsageError: there are none.
    """
    found = next((module for module in model.modules() if isinstance(module, Adapters)), None)
    if found is None:
        raise UsageError("this is no VeraModel", expected="a VeraModel", found=type(model).__name__)
    return found


def _no_op(module: nn.Module, args: tuple[object, ...]) -> None:
    """A hook that does nothing; a function of the module's own, so that models can be pickled."""
