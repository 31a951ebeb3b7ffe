"""`VeraConfig` and adapter_config.json: PEFT's fields, defaults and checks; unknown keys are kept.

Which modules a config adapts is decided here too (`VeraConfig.targets`), for the model and for the checkpoint checks.
"""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vera_tools import schema
from vera_tools.checkpoints import expressions, names, peft_arguments, peft_values
from vera_tools.checkpoints.expressions import Expression
from vera_tools.checkpoints.targeting import IN_LAYERS, Targeting, kept_by, needs_no_expression
from vera_tools.errors import FormatError, NotVeraError, UsageError
from vera_tools.files import atomic, local
from vera_tools.files.opening import locate

CONFIG_NAME = "adapter_config.json"
#: Bytes of it. One that lists every expert of the largest mixtures by name has half of that.
MOST_BYTES = 4 << 20
_LISTS = ("target_modules", "modules_to_save", "layers_pattern", "layers_to_transform")


TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


class PeftType(str, enum.Enum):
    """The kind of an adapter, as PEFT's own enumeration has it: a string, with a `value`."""

    VERA = "VERA"

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, spec: str) -> str:
        return format(str(self.value), spec)


@dataclass(kw_only=True)
class VeraConfig:
    """Configuration of a VeRA adapter, with the fields and defaults of ``peft.VeraConfig`` (0.11 to 0.21).

    Attributes:
        r: Rank: rows of vera_A and columns of vera_B.
        target_modules: Names (suffixes) of the linear modules to adapt, a regular expression, or "all-linear".
            None takes the default of the model's type.
        projection_prng_key: Seed of the generator that vera_A and vera_B are drawn from; an int in [-2**63, 2**64),
            of which only the low 32 bits matter.
        save_projection: Whether vera_A and vera_B are written into the checkpoint.
        vera_dropout: Dropout probability of the adapter's input.
        d_initial: Initial value of vera_lambda_d.
        fan_in_fan_out: The base weight is stored as (in, out): GPT-2's Conv1D.
        bias: Which biases are trained and saved: "none", "all" or "vera_only".
        modules_to_save: Further modules that are trained and saved whole.
        init_weights: Initialise lambda_b to 0 and lambda_d to d_initial.
        layers_to_transform: Layer indices to adapt; None adapts all.
        layers_pattern: Name of the layer list, where layers_to_transform is set.
        task_type: PEFT's task type, e.g. "CAUSAL_LM".
        inference_mode: Whether the adapter was loaded for inference.
        base_model_name_or_path: The base model.
        revision: The base model's revision.
        auto_mapping: PEFT's class mapping for models without a task type.
        ensure_weight_tying: Save all modules that share a parameter, such as embedding and output layer, where one is
            in modules_to_save, and let them share it. PEFT's LoraConfig has it; it is written where it is true.
        peft_version: The PEFT that wrote the file, where it says so (0.18 and later).
        extra: Unknown keys, kept as found and written back.

    Raises:
        UsageError: (a ValueError) a field has a value that PEFT or torch would refuse.
    """

    r: int = 256
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    task_type: str | None = field(default=None, kw_only=False)
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    ensure_weight_tying: bool = False
    peft_version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    peft_type = PeftType.VERA
    #: What code for any of PEFT's configs asks.
    is_prompt_learning = False
    is_adaption_prompt = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, set | frozenset):
                setattr(self, name, sorted(value))
            elif isinstance(value, tuple):
                setattr(self, name, list(value))
        document = self.to_dict()
        for name in _LISTS:
            document[name] = _looked_at(document[name], name)
        for problem in schema.problems(document, "adapter_config.v1"):
            if problem.where == "task_type" and isinstance(self.task_type, str):
                # PEFT's own words, which code written for PEFT may look for.
                tasks = ", ".join(TASK_TYPES)
                raise UsageError(
                    f"Invalid task type: {self.task_type!r}. Must be one of the following task types: {tasks}.",
                    where="task_type",
                )
            raise UsageError(problem.what, where=problem.where, expected=problem.expected, found=problem.found)
        if self.layers_pattern and self.layers_to_transform is None:
            # PEFT's own words, which code written for PEFT may look for.
            raise UsageError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        try:
            expressions.check(list(self._expressions()))
        except FormatError as error:
            key = (error.where or "").rpartition(": ")[2]
            raise UsageError(error.what, where=key, expected=error.expected, found=error.found) from error

    def to_dict(self) -> dict[str, Any]:
        """The config as PEFT would write it: every field, then the unknown keys."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        if self.peft_version is None:
            del known["peft_version"]
        if not self.ensure_weight_tying:
            del known["ensure_weight_tying"]
        return {**known, "peft_type": self.peft_type.value, **self.extra}

    def to_json(self) -> str:
        """The text of adapter_config.json, in PEFT's own layout: sorted keys, two spaces."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, where: str = CONFIG_NAME) -> VeraConfig:
        """Check and take over a parsed adapter_config.json, with the values that PEFT takes its values for.

        Raises:
            NotVeraError: an adapter of another kind.
            FormatError: a key has a wrong value; the message names it.
        """
        if not isinstance(data, dict):
            raise FormatError("not an adapter config", where=where, expected="a JSON object", found=schema.shown(data))
        data = peft_values.meaning(data)
        kind = data.get("peft_type")
        if kind is not None and not isinstance(kind, str):
            raise FormatError(
                "has a wrong value", where=f"{where}: peft_type", expected='"VERA"', found=json.dumps(kind)
            )
        if isinstance(kind, str) and kind.upper() != "VERA":
            raise NotVeraError(f"this is an adapter of kind {kind}, not VeRA", kind=kind, where=where)
        if kind is None:
            raise FormatError(
                "the key 'peft_type' is missing",
                where=where,
                expected='"VERA"',
                hint="without it nothing says that this is a VeRA adapter"
                + (" (lora_alpha suggests LoRA)" if "lora_alpha" in data else ""),
            )
        known = {f.name for f in fields(cls)} - {"extra"}
        try:
            return cls(
                **{key: value for key, value in data.items() if key in known},
                extra={key: value for key, value in data.items() if key not in known and key != "peft_type"},
            )
        except UsageError as error:
            key = f"{where}: {error.where}" if error.where else where
            raise FormatError(error.what, where=key, expected=error.expected, found=error.found) from error

    @classmethod
    def of(cls, config: Any) -> VeraConfig:
        """The config itself, or what another library's config object says: ``peft.VeraConfig`` for one.

        Args:
            config: A `VeraConfig`, or any object whose `to_dict` gives the keys of adapter_config.json.

        Raises:
            UsageError: (a ValueError) no config of VeRA, or a key has a wrong value.
        """
        if isinstance(config, cls):
            return config
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        if not callable(getattr(config, "to_dict", None)):
            raise UsageError("not an adapter config", expected="a VeraConfig", found=kind)
        try:
            return cls.from_dict(_plain(config.to_dict()), where=kind)
        except FormatError as error:
            raise UsageError(
                error.what, where=error.where, expected=error.expected, found=error.found, hint=error.hint
            ) from error

    @classmethod
    def from_json(cls, text: str, *, where: str = CONFIG_NAME) -> VeraConfig:
        """Parse the text of an adapter_config.json, as loosely as PEFT does: `peft_values.read` says how.

        Raises:
            FormatError: not JSON, or `from_dict`'s reasons.
        """
        return cls.from_dict(peft_values.read(text, where=where).document, where=where)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """What an adapter_config.json holds, as PEFT's method of this name returns it: a dict, nothing filled in.

        Raises:
            FormatError: it cannot be read, or is not JSON.
        """
        path = Path(path_json_file)
        text = local.read_text(local.LocalFolder(path.parent), path.name, limit=MOST_BYTES)
        document: dict[str, Any] = peft_values.read(text, where=str(path)).document
        return {key: value for key, value in document.items() if key != "runtime_config"}  # PEFT's too

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        **options: Any,
    ) -> VeraConfig:
        """Read the adapter_config.json of a checkpoint, which need not be whole.

        Args:
            pretrained_model_name_or_path: A folder, or ``hf://owner/name[@revision][/subfolder]``.
            subfolder: A folder below it.
            revision: A branch, tag or commit, where it is on the Hub.
            **options: PEFT's further arguments, `peft_arguments.HUB`, with the values for which nothing is done
                otherwise.

        Raises:
            FormatError: no such file, or `from_json`'s reasons.
            UsageError: no such folder, or an option that is not supported.
        """
        peft_arguments.check(options, peft_arguments.HUB)
        where = peft_arguments.located(pretrained_model_name_or_path, revision=revision, subfolder=subfolder)
        folder, _ = locate(where)
        text = local.read_text(folder, CONFIG_NAME, limit=MOST_BYTES)
        return cls.from_json(text, where=folder.path_of(CONFIG_NAME))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json into a folder."""
        path = Path(save_directory)
        path.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path / CONFIG_NAME, self.to_json().encode())

    def targets(self, module: str) -> bool:
        """Whether this config adapts the module with this dotted name: see `Targeting.adapts`, which does for many."""
        return self.targeting().adapts(module)

    def targeting(self) -> Targeting:
        """What this config says of modules, to be asked of many."""
        targets, layers = self.target_modules, self.layers_to_transform
        by_name = frozenset(targets) if isinstance(targets, list) else None
        by_expression = isinstance(targets, str) and targets != "all-linear"
        everywhere = layers is None or layers == []
        return Targeting(
            by_name,
            next(self._expressions()) if by_expression else None,
            None if everywhere else frozenset(map(str, [layers] if isinstance(layers, int) else layers or ())),
            self._layer_lists(),
            self.saved_modules,
            CONFIG_NAME,
        )

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """The modules that PEFT trains and saves whole: those that modules_to_save names, and the task's heads."""
        heads = names.TASK_HEADS.get(self.task_type or "", ())
        return tuple(dict.fromkeys([*(self.modules_to_save or ()), *heads]))

    def _expressions(self) -> Iterator[Expression]:
        """The values that PEFT takes for regular expressions, but for those that are plain names."""
        if isinstance(self.target_modules, str):
            yield Expression(self.target_modules, f"{CONFIG_NAME}: target_modules", whole=True)
        where = f"{CONFIG_NAME}: modules_to_save"
        yield from (kept_by(name, where=where) for name in self.modules_to_save or () if not needs_no_expression(name))
        yield from self._layer_lists()

    def _layer_lists(self) -> tuple[Expression, ...]:
        """layers_pattern as the expressions that PEFT makes of it; empty text is none, as to PEFT."""
        given = self.layers_pattern or ()
        where = f"{CONFIG_NAME}: layers_pattern"
        patterns = [given] if isinstance(given, str) else given
        return tuple(Expression(IN_LAYERS.format(pattern), where, written=pattern) for pattern in patterns)


def _looked_at(value: Any, name: str) -> Any:
    """A list as far as the schema still has to look at it: up to and with its first wrong entry.

    By hand, because a schema takes its time for each entry.
    """
    if not isinstance(value, list):
        return value
    numbers = name == "layers_to_transform"
    good = ((type(item) is int and item >= 0) if numbers else isinstance(item, str) for item in value)
    wrong = next((n for n, is_good in enumerate(good) if not is_good), None)
    if wrong is None:
        return []
    if wrong < 1000:
        return value[: wrong + 1]
    expected = "an integer of 0 or more" if numbers else "a string"
    raise UsageError("has a wrong value", where=f"{name}.{wrong}", expected=expected, found=schema.shown(value[wrong]))


def _plain(value: Any) -> Any:
    """The value as JSON has it: enums by value, sets sorted."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
