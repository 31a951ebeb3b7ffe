"""Checkpoints to and from a live model: PEFT's format, always with the projections that were trained with.

`VeraModel` is built on `StoredAdapters`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed, nn

from vera_tools.checkpoints import card, peft_arguments
from vera_tools.checkpoints.base import rounds_through
from vera_tools.checkpoints.checkpoint import MODULES, ROOT, Checkpoint
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.keys import VECTORS
from vera_tools.checkpoints.manifest import BaseRecord, ProjectionRecord
from vera_tools.checkpoints.resolution import Assumptions, Resolved, arrays, resolve
from vera_tools.checkpoints.writing import replaced_files, write_checkpoint
from vera_tools.dtypes import FLOATS, HALVES, Array
from vera_tools.errors import CheckFailedError, FormatError, UsageError, WrongSizeError, warn
from vera_tools.files import atomic
from vera_tools.nn import embeddings, state_dicts, targets, tying
from vera_tools.nn.adapters import Adapters
from vera_tools.nn.base_layers import cast_dtype, features, whole_shape
from vera_tools.nn.live import base_record
from vera_tools.nn.projection import dtype_name, to_array, to_tensor
from vera_tools.nn.state_dicts import LoadResult
from vera_tools.nn.targets import Plan
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.projections.recipe import Recipe
from vera_tools.verifying.recorded import refuse_changed
from vera_tools.verifying.refusals import refuse_no_floats


class StoredAdapters(Adapters):
    """A model's adapters, loaded from checkpoints and saved to them."""

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        config: VeraConfig | None = None,
        strict: bool = False,
        allow_pickle: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> LoadResult:
        """Load another adapter beside those that are there; it is not made active. As `VeraModel.from_pretrained`.

        A name that is there stands for that adapter, which gets the checkpoint's values: the same parameters, so that
        an optimizer goes on with them.

        Args:
            model_id: As there.
            adapter_name: The adapter's name here.
            is_trainable: Let it be trained, active or not; else the model is put into evaluation mode.
            torch_device: Taken as PEFT takes it; vectors go to the device of their layer.
            autocast_adapter_dtype: As there.
            ephemeral_gpu_offload: As there.
            low_cpu_mem_usage: As there.
            key_mapping: Regular expressions for the names of tensors below ``base_model.model.``, with what to put in
                their place; the first that is found counts. Default: `model._checkpoint_conversion_mapping`, by which
                a class of transformers takes checkpoints of an older layout of its modules.
            config: As there.
            strict: As there.
            allow_pickle: As there.
            revision: A branch, tag or commit, where `model_id` is on the Hub.
            subfolder: A folder below `model_id`.
            **options: As there.

        Returns:
            No missing and no unexpected keys: a checkpoint that does not fit is refused.

        Raises:
            As `VeraModel.from_pretrained`; and UsageError where the adapter of that name is another one.
        """
        peft_arguments.check({**options, "ephemeral_gpu_offload": ephemeral_gpu_offload}, peft_arguments.LOADING)
        reference = peft_arguments.located(model_id, revision=revision, subfolder=subfolder)
        there = adapter_name in self.peft_config
        with Checkpoint.open(reference, allow_pickle=allow_pickle) as checkpoint:
            refuse_changed(checkpoint)  # by the names that it was recorded with
            refuse_no_floats(checkpoint)
            _map_names(checkpoint, key_mapping or getattr(self.model, "_checkpoint_conversion_mapping", None) or {})
            given = checkpoint.config if config is None else _given(config, checkpoint)
            if not there:
                self.check_new(adapter_name, given)
            plan = targets.plan(given, self.model)
            plan.config.inference_mode = not is_trainable
            _check_fits(checkpoint, self, adapter_name, plan)
            if there:
                _check_same(self, adapter_name, plan)
            resolved, pair = projections(checkpoint, list(plan.bases.values()), strict=strict)
            tensors = {
                name: to_tensor(checkpoint.weights.read(name))
                for name in checkpoint.weights.tensors
                if name.startswith(MODULES)
            }
        if plan.config.ensure_weight_tying:
            tying.check(self.model, tensors, prefix=MODULES, label=checkpoint.label)
        if there:
            self.hold_pair(adapter_name, self.plan_of(adapter_name), resolved.record, pair)
        else:
            chosen = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": autocast_adapter_dtype}
            self.attach(adapter_name, plan, resolved.record, pair, **chosen)
        state_dicts.put(self, state_dicts.places(self, adapter_name), tensors)
        self.tie(adapter_name)
        if is_trainable:
            self.set_requires_grad(adapter_name)
        else:
            self.eval()
        return LoadResult([], [])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool | None = None,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Write adapters in PEFT's format, with a manifest.

        The adapter "default" goes into the folder itself, others into subfolders with their names, as PEFT has it.
        Files of other names are left alone. Under FSDP every process has to call this; one writes.

        Args:
            save_directory: Where to.
            safe_serialization: True: adapters are written as safetensors only.
            selected_adapters: Which adapters. Default: all.
            is_main_process: Whether this process writes. Default: the process of rank 0.
            path_initial_model_for_weight_conversion: None: VeRA does not change the base when it begins.
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
        options["safe_serialization"] = safe_serialization
        options["path_initial_model_for_weight_conversion"] = path_initial_model_for_weight_conversion
        peft_arguments.check(options, peft_arguments.SAVING)
        if os.path.isfile(save_directory):
            raise UsageError("should be a directory, not a file", where=f"Provided path ({os.fspath(save_directory)})")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in self.check_known(names):
            folder = os.fspath(save_directory) if name == "default" else os.path.join(save_directory, name)
            save(
                self,
                folder,
                name,
                is_main_process=is_main_process,
                state_dict=state_dict,
                save_embedding_layers=save_embedding_layers,
            )

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write README.md into a folder, or add the metadata that it lacks: what `save_pretrained` does beside it.

        `transformers.Trainer` calls it, where it finds such a card.
        """
        name = self.active_adapters[0] if self.active_adapters else next(iter(self.peft_config))
        write_card(Path(output_dir), self, self.peft_config[name])

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the base model's own would upload the base.

        Raises:
            UsageError: always; it names the command that does it.
        """
        raise UsageError(
            "an adapter is uploaded from a saved checkpoint",
            hint="save_pretrained(folder), then `vera-tools push folder owner/name`",
        )


def _map_names(checkpoint: Checkpoint, mapping: Mapping[str, str]) -> None:
    """Let the checkpoint call its tensors as the model does."""
    names = {}
    for name in checkpoint.weights.tensors:
        prefix = next((part for part in (MODULES, ROOT) if name.startswith(part)), "")
        rest = name.removeprefix(prefix)
        renamed = (re.subn(pattern, replacement, rest) for pattern, replacement in mapping.items())
        names[name] = prefix + next((text for text, found in renamed if found), rest)
    if len(set(names.values())) < len(names):
        raise UsageError("two tensors would have one name", where="key_mapping")
    if any(name != new for name, new in names.items()):
        checkpoint.weights.rename(names)


def _given(config: Any, checkpoint: Checkpoint) -> VeraConfig:
    """A config that was handed in, unless the checkpoint's vectors were trained with other projections."""
    given, own = VeraConfig.of(config), checkpoint.config
    for name in ("r", "projection_prng_key"):
        if getattr(given, name) != getattr(own, name):
            raise UsageError(
                "the checkpoint was trained with another value",
                where=f"config: {name}",
                expected=str(getattr(own, name)),
                found=str(getattr(given, name)),
            )
    return given


def _check_same(model: Adapters, adapter_name: str, plan: Plan) -> None:
    """Refuse a checkpoint that is no other state of the adapter that is there."""
    there = model.plan_of(adapter_name)
    same = there.layers.keys() == plan.layers.keys() and there.saved.keys() == plan.saved.keys()
    keys = ("r", "bias", "projection_prng_key")
    if not same or any(getattr(there.config, key) != getattr(plan.config, key) for key in keys):
        raise UsageError(
            f"the adapter {adapter_name!r} that is there is another one: it differs in rank, key, bias or modules",
            hint="delete_adapter it first, or load under another name",
        )
    if any(adapter_name in layer.merged_adapters for layer in model.vera_layers().values()):
        raise UsageError(f"the adapter {adapter_name!r} is merged", hint="call unmerge_adapter() first")


def projections(
    checkpoint: Checkpoint, layers: Sequence[nn.Module], *, strict: bool
) -> tuple[Resolved, tuple[Array, Array]]:
    """The projections that a checkpoint was trained with, given the live layers that it adapts, and how they are known.

    Raises:
        CheckFailedError: they are too small for the layers, or not the recorded ones.
        UnprovenError: `strict`, and nothing records which recipe made them.
    """
    sizes = [features(layer) for layer in layers]
    in_max, out_max = max(size[0] for size in sizes), max(size[1] for size in sizes)
    dtypes = frozenset(dtype_name(cast_dtype(layer)) for layer in layers)
    assumptions = Assumptions(
        in_features=None if checkpoint.projections or checkpoint.recorded else in_max,  # a wider pair than needed fits
        weight_dtypes=dtypes,
        strict=strict,
    )
    resolved = resolve(checkpoint, assumptions)
    if resolved.origin == "assumed" and (narrow := sorted(dtypes - set(FLOATS))):
        raise CheckFailedError(
            "PEFT rounds the projections through the dtype of these layers, and no recipe describes that",
            where=checkpoint.label,
            found=", ".join(narrow),
            hint="save the adapter with its projections: save_projection=True",
        )
    record = resolved.record
    if record.shape.in_max < in_max or record.shape.out_max < out_max:
        raise CheckFailedError(
            "the projections are too small for the layers of this model",
            where=checkpoint.label,
            expected=f"in_max {in_max} and out_max {out_max} at least",
            found=f"{record.shape.in_max} and {record.shape.out_max}",
        )
    return resolved, arrays(checkpoint, resolved)


def save(
    model: Adapters,
    folder: str,
    adapter_name: str,
    *,
    is_main_process: bool | None = None,
    state_dict: Mapping[str, Any] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> None:
    """Write one adapter into a folder, which may hold other files, as `VeraModel.save_pretrained` says.

    Of a state dict all tensors are taken but the projections: these are buffers, whole in every process.
    """
    config = config_to_save(model, adapter_name)
    together = distributed.is_available() and distributed.is_initialized()
    if is_main_process is None:
        is_main_process = not together or distributed.get_rank() == 0
    named = state_dicts.named(model, adapter_name, save_embedding_layers=save_embedding_layers)
    keys = dict(sorted(named.items()))
    try:
        if is_main_process:
            _check_pair(model, adapter_name, state_dict or {})
            tensors = {name: to_array(tensor) for name, tensor in state_dicts.gathered(model, keys, state_dict)}
            record = model.record_of(adapter_name)
            if config.save_projection:
                tensors |= {ROOT + n: array for n, array in model.stored_pair(adapter_name, record.dtype).items()}
            else:
                _check_seed_only(model, record, where=folder)
            base = base_record(model.plan_of(adapter_name).bases, config)
            _write(Path(folder), model, config, tensors, record, base)
        elif state_dict is None:  # to gather what FSDP2 has spread takes all processes
            spread = {n: key for n, key in keys.items() if hasattr(state_dicts.tensor_at(model, key), "full_tensor")}
            for _ in state_dicts.gathered(model, spread):
                pass
    finally:
        # Also where the process that writes has failed: the others wait for it, or would for ever.
        if together:
            distributed.barrier()


def _check_pair(model: Adapters, adapter_name: str, given: Mapping[str, Any]) -> None:
    """Refuse a state dict of a time when the model had another pair: its vectors were trained with that one."""
    for name, held in (("vera_A", model.vera_A), ("vera_B", model.vera_B)):
        values = given.get(f"{name}.{adapter_name}")
        if values is not None and not torch.equal(values.cpu().double(), held[adapter_name].cpu().double()):
            raise UsageError(
                "the projections are not the model's",
                where=f"state_dict: {name}.{adapter_name}",
                hint="load it into the model first",
            )


def _check_fits(checkpoint: Checkpoint, model: Adapters, adapter_name: str, plan: Plan) -> None:
    """Refuse a checkpoint whose tensors are not those of the adapter, by name and by shape."""
    expected = plan.tensors(model.model, adapter_name)
    # With bias="all" PEFT saves the biases of saved modules a second time, under the names they have in memory.
    again = tuple(f"{MODULES}{name}.{part}." for name in plan.saved for part in ("modules_to_save", "original_module"))
    pair = tuple(ROOT + name for name in PROJECTIONS)
    found = {name for name in checkpoint.weights.tensors if name not in pair and not name.startswith(again)}
    base = embeddings.parameters(model.model, plan.layers)  # which a checkpoint may bring
    brought = {MODULES + name: tensor for name, tensor in base.items() if MODULES + name in found}
    found -= brought.keys() - expected.keys()
    problems = [
        f"{len(names)} tensors {what} ({', '.join(name.removeprefix(MODULES) for name in sorted(names)[:3])}"
        + (", ...)" if len(names) > 3 else ")")
        for what, names in (
            ("are missing from the checkpoint", expected.keys() - found),
            ("have no place in the model", found - expected.keys()),
        )
        if names
    ]
    if problems:
        raise CheckFailedError(
            "the checkpoint does not fit the model: " + "; ".join(problems),
            where=checkpoint.label,
            hint="it was made for another model class, or its config is not its own",
        )
    if brought and any(layer.merged for layer in model.vera_layers().values()):
        raise UsageError(
            "the checkpoint brings weights of the base, and an adapter is merged into these",
            where=f"{checkpoint.label}: {min(brought)}",
            hint="call unmerge_adapter() first",
        )
    shapes = {name: held.shape for name, held in expected.items()}
    shapes |= {name: tuple(whole_shape(tensor)) for name, tensor in brought.items()}
    for name, shape in shapes.items():
        if (saved := checkpoint.weights.tensors[name].shape) != shape:
            raise _misfit(name, saved, shape, of_vocabulary=name in brought, label=checkpoint.label)


def _misfit(
    name: str, saved: tuple[int, ...], shape: tuple[int, ...], *, of_vocabulary: bool, label: str
) -> CheckFailedError:
    """What is wrong with a tensor that has the shape `saved` in a checkpoint and `shape` in the model."""
    module, _, kind = name.removeprefix(MODULES).rpartition(".")
    sizes = [str(size[0] if len(size) == 1 and kind in VECTORS else list(size)) for size in (saved, shape)]
    if kind == "vera_lambda_d":
        what = "vera_lambda_d contradicts the config's r"
        return CheckFailedError(what, where=f"{label}: {module}", expected=sizes[1], found=sizes[0])
    where, expected, hint = f"{label}: {name}", sizes[0], "this is another base than the adapter was trained on"
    what = "the model has another shape"
    if of_vocabulary:
        what = "the vocabulary is not as large as the one that the adapter was trained with"
        hint = f"call model.resize_token_embeddings({saved[0] if saved else 0}) first"
    elif kind == "vera_lambda_b":
        what, where, expected = "the layer does not fit vera_lambda_b", module, f"out_features {sizes[0]}"
    return WrongSizeError(what, where=where, expected=expected, found=sizes[1], hint=hint)


def _check_seed_only(model: Adapters, record: ProjectionRecord, *, where: str) -> None:
    if record.recipe is None:
        raise UsageError(
            "no known recipe makes these projections, so they would be lost",
            where=where,
            hint="set save_projection to True",
        )
    dtypes = {dtype_name(cast_dtype(layer.base_layer)) for layer in model.vera_layers().values()}
    through = rounds_through(dtypes) if len(dtypes & set(HALVES)) < 2 else None
    peers = Recipe(prng_key=record.recipe.prng_key, rounded_through=through)
    if record.recipe != peers or not dtypes <= set(FLOATS):
        warn(
            f"{where}: vera-tools will regenerate exactly these projections ({record.recipe.name}) from the manifest, "
            "but PEFT would draw others on this base; set save_projection to True for PEFT"
        )


def config_to_save(model: Adapters, adapter_name: str) -> VeraConfig:
    """An adapter's config as it is written.

    Where no task says which class the base is of, it names that class: PEFT's AutoPeftModel makes the base by it.
    """
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    if config.task_type is None and config.auto_mapping is None:
        own = class_of(model.model)
        config.auto_mapping = {"base_model_class": own.__name__, "parent_library": own.__module__}
    return config


def class_of(base: nn.Module) -> type:
    """The base's class, without the one that fully_shard puts in front of it."""
    return next(cls for cls in type(base).__mro__ if not cls.__module__.startswith("torch.distributed."))


def _write(
    folder: Path,
    model: Adapters,
    config: VeraConfig,
    tensors: dict[str, Array],
    record: ProjectionRecord,
    base: BaseRecord,
) -> None:
    if not folder.exists():
        with atomic.folder(folder) as temporary:
            write_checkpoint(temporary, config, tensors, record, base=base)
            write_card(temporary, model, config)
        return
    with replaced_files(folder) as scratch:
        write_checkpoint(scratch, config, tensors, record, base=base)
    write_card(folder, model, config)


def write_card(folder: Path, model: Adapters, config: VeraConfig) -> None:
    """Write README.md, or add what it lacks; one that cannot be read is left as it is, with a warning."""
    path = folder / card.CARD_NAME
    try:
        existing = path.read_bytes().decode("utf-8") if path.exists() else None
        base_name = getattr(getattr(model.model, "config", None), "_name_or_path", None)
        text = card.beside_adapter(existing, config, base_name)
    except (OSError, UnicodeDecodeError, FormatError) as error:
        warn(f"{path} is left as it is: {error}")
        return
    if text != existing:
        atomic.write_bytes(path, text.encode())
