"""Where the modules that an adapter names lie in a base: through the class of models that PEFT adapted.

PEFT names modules as they are called in memory. Files may call them otherwise, hold several as one tensor, or store
one the other way round; only the class knows (see `vera_tools.architectures`). Which class it was, the adapter and the
base say together: the first of those that may be meant in which every adapted module is a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vera_tools import installed
from vera_tools.architectures import data, witness
from vera_tools.architectures.architecture import LINEAR, Architecture
from vera_tools.architectures.layout import Layout
from vera_tools.architectures.pieces import Piece
from vera_tools.checkpoints.base import BaseModel, Renaming, find_renaming
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.names import is_embedding
from vera_tools.dtypes import FLOATS
from vera_tools.errors import CheckFailedError, UnprovenError
from vera_tools.files.safetensors import TensorInfo

#: The auto class that PEFT's tasks are loaded by.
_AUTO = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
}
#: What a base may be loaded by that does not name its class.
_ANY = ("CausalLM", "Seq2SeqLM", "ImageTextToText", "MaskedLM", "SequenceClassification", "PreTraining", "Model")

# Classes of linear layers that compute W x + b in words of their own.
_AS_USUAL = ("FalconLinear",)
# What stands for the class of a layer whose weight is read and which is never called.
_NOT_CALLED = "MultiheadAttention"


@dataclass(frozen=True)
class Part:
    """Rows of one tensor of the base that are rows of a linear weight."""

    info: TensorInfo
    piece: Piece


@dataclass(frozen=True)
class Linear:
    """One adapted linear weight of the base.

    Attributes:
        module: The module's name in the adapter.
        parameter: The weight's name in the class.
        parts: Where it lies in the files; where it is tied to another, that one's.
        in_features: Columns of the linear map.
        out_features: Rows of the linear map.
        transposed: The weight is stored as (in, out), as GPT-2's Conv1D does.
        is_called: Its output is used. That of the output layer of torch.nn.MultiheadAttention is not: its weight is
            read past the layer, so that an adapter there changes nothing.
    """

    module: str
    parameter: str
    parts: tuple[Part, ...]
    in_features: int
    out_features: int
    transposed: bool
    is_called: bool = True

    @property
    def weight(self) -> str:
        """The full name of the tensor that it lies in, of the first of several."""
        return self.parts[0].info.name

    @property
    def info(self) -> TensorInfo:
        """That tensor's entry in its file."""
        return self.parts[0].info


@dataclass(frozen=True)
class Placement:
    """What the names in an adapter mean in a base.

    Attributes:
        base: The open base.
        layout: The base's files, as the class loads them.
        renaming: How the adapter's names become the files', where no class has modules of the adapter's names.
        fan_in_fan_out: The adapter's; decides for square weights of classes that are not known.
    """

    base: BaseModel
    layout: Layout
    renaming: Renaming | None = None
    fan_in_fan_out: bool = False

    @property
    def architecture(self) -> Architecture:
        """The class."""
        return self.layout.architecture

    def parameter(self, name: str) -> str:
        """The class's name of a parameter that an adapter names, be it there or not."""
        known = self.architecture
        if known.stores(name):
            return name
        if self.renaming is not None:
            options = [self.renaming(name)] if name.startswith(self.renaming.strip) else []
            for key in (*options, name):  # a head stands outside what is renamed
                if key in self.base.tensors:
                    pieces = self.layout.pieces_of(key)
                    return pieces[0].parameter if pieces else key
            return options[0] if options else name
        return known.parameter_of(name) or name

    def module(self, name: str) -> str:
        """The class's name of a module that an adapter names."""
        return self.parameter(f"{name}.weight").removesuffix(".weight")

    def name_in_adapter(self, name: str) -> str:
        """The adapter's name of a parameter or module of the class: the way back."""
        if self.renaming is None or not name.startswith(self.renaming.add):
            return name
        return self.renaming.strip + name.removeprefix(self.renaming.add)

    def holder(self, parameter: str) -> str | None:
        """The parameter under which the files hold a parameter: itself, or one that it is tied with."""
        if self.architecture.may_be_tied(parameter) and not self.layout.gives(parameter):
            raise CheckFailedError(
                "whether this is tied to another depends on the model's sizes",
                where=f"{self.base.label}: {parameter}",
                hint="install transformers 5 beside vera-tools, which is then asked",
            )
        return self.layout.holder(parameter)

    def parts(self, parameter: str) -> tuple[Part, ...]:
        """Where the files hold a parameter, or the one that it is tied with; nothing where they hold neither.

        Raises:
            CheckFailedError: not all of it is there, or how it is put together is not known.
        """
        holder = self.holder(parameter)
        if holder is None:
            return ()
        return tuple(Part(self.base.tensors[piece.key][1], piece) for piece in self.layout.pieces(holder))

    def new_name(self, parameter: str) -> str:
        """The name under which a parameter that the files lack is added to them."""
        return (self.layout.key_for(parameter) if self.architecture.stores(parameter) else None) or parameter

    def linear(self, module: str, *, out_features: int) -> Linear:
        """The weight of an adapted module.

        Args:
            module: The module's name in the adapter.
            out_features: Length of its vera_lambda_b.

        Raises:
            CheckFailedError: the base has no such module, it is quantised or not linear, or it does not fit.
        """
        parameter = self.parameter(f"{module}.weight")
        parts = self.parts(parameter)
        if not parts:
            raise self._missing(module, parameter)
        label, info = self.base.label, parts[0].info
        where = f"{label}: {info.name}"
        packed = next((part.info for part in parts if part.info.dtype not in FLOATS), None)
        if packed is not None or self.base.quantisation:
            raise CheckFailedError(
                "the base is quantised, so its header does not give in_features",
                where=where,
                found=f"{self.base.quantisation or info.dtype} {list(info.shape)}",
                hint="name the unquantised base, whose shapes are the same",
            )
        shape = shape_of(parts)
        if len(shape) != 2:
            raise CheckFailedError("not a linear weight", where=where, expected="2 dimensions", found=str(list(shape)))
        transposed = self._transposed(module, parameter, shape, out_features)
        rows, columns = shape[::-1] if transposed else shape
        if rows != out_features:
            raise CheckFailedError(
                "the weight does not fit vera_lambda_b",
                where=where,
                expected=f"out_features {out_features}",
                found=str(list(shape)),
                hint="this is another base than the adapter was trained on",
            )
        if transposed and not all(part.piece.is_whole or part.piece.transposed for part in parts):
            raise CheckFailedError("a Conv1D that is a part of a tensor", where=where, hint="merge with PEFT")
        name = parameter.removesuffix(".weight")
        called = self.architecture.computes_otherwise(name) != _NOT_CALLED
        return Linear(module, parameter, parts, columns, rows, transposed, called)

    def _transposed(self, module: str, parameter: str, shape: tuple[int, ...], out_features: int) -> bool:
        """Whether the parameter is (in, out): as its kind says, else as its shape does."""
        name, known = parameter.removesuffix(".weight"), self.architecture
        other = known.computes_otherwise(name) if known.is_known else None
        if other is not None and other not in (*_AS_USUAL, _NOT_CALLED):
            raise CheckFailedError(
                f"a {other} does not compute W x + b, so an adapter of it is not a change of its weight",
                where=f"{self.base.label}: {name}",
                hint=f"adapt other modules than {module}",
            )
        kind = self.layout.kind(name) if known.is_known else None
        if kind is None:
            return self.fan_in_fan_out if shape[0] == shape[1] else shape[1] == out_features
        if kind not in LINEAR:
            raise CheckFailedError(
                "not a linear layer", where=f"{self.base.label}: {name}", expected="Linear or Conv1D", found=kind
            )
        return kind == "Conv1D"

    def _missing(self, module: str, parameter: str) -> CheckFailedError:
        near = sorted(n for n in self.base.tensors if n.endswith(f".{module.rsplit('.', 1)[-1]}.weight"))
        return CheckFailedError(
            "the base has no such module",
            where=f"{self.base.label}: {module}",
            expected=f"a tensor {parameter}",
            found=f"{near[0]} and {len(near) - 1} more of that name" if near else "nothing of that name",
            hint=self._doubt,
        )

    @property
    def _doubt(self) -> str:
        known = self.architecture
        if known.is_known:
            return f"this is another base than the adapter was trained on: a {known.name} ({known.origin})"
        name = known.name or "the base's class"
        return f"nothing is known of {name}, so modules are looked for by the names in the files"


def shape_of(parts: Iterable[Part]) -> tuple[int, ...]:
    """The shape of a parameter that lies in these parts."""
    first, *others = parts
    shape = first.info.shape
    if first.piece.transposed:
        return (*shape[:-2], shape[-1], shape[-2])
    if first.piece.is_whole:
        return shape
    rows = sum(_count(part) for part in (first, *others))
    return (rows, shape[-1]) if len(shape) > 1 else (rows,)


def _count(part: Part) -> int:
    total = part.info.size // part.info.shape[-1] if len(part.info.shape) > 1 else part.info.size
    rows = part.piece.rows
    return len(range(*rows.indices(total))) if isinstance(rows, slice) else int(rows.size)


def place(
    base: BaseModel, configs: Iterable[VeraConfig], modules: Iterable[str], saved: Iterable[str] = ()
) -> Placement:
    """Where adapters' modules lie in a base.

    Args:
        base: The open base.
        configs: The adapters' configs.
        modules: All adapted modules, by the adapters' names.
        saved: All other parameters that the adapters hold, by their names.

    Raises:
        CheckFailedError: the modules fit as well in several places.
    """
    configs, modules, saved = list(configs), list(modules), list(saved)
    fan_in_fan_out = any(config.fan_in_fan_out for config in configs)
    named = data.class_for(base.config)
    found: list[tuple[tuple[int, ...], Placement]] = []
    for name in _classes(base, configs):
        known = known_class(base, name)
        if known is None:
            continue
        placement = Placement(base, base.layout(known), fan_in_fan_out=fan_in_fan_out)
        places = [placement.parameter(f"{module}.weight") for module in modules]
        if not all(known.stores(place) and _may_be_linear(placement, place) for place in places):
            continue
        others = [(parameter, placement.parameter(parameter)) for parameter in saved]
        if named is None and any(key in base.tensors and not known.stores(place) for key, place in others):
            continue  # nobody said that it is this class, and it has no use for what is trained
        there = all(placement.holder(place) is not None for place in places)
        direct = sum(place == f"{module}.weight" for place, module in zip(places, modules, strict=True))
        held = sum(known.stores(place) for _, place in others)
        found.append(((there, held, direct), placement))
    best = max(found, key=lambda entry: entry[0], default=None)  # the first of those that are as good
    if best is not None and best[0][0]:
        return best[1]
    known = (known_class(base, named) if named else None) or Architecture.unnamed(base.shapes, name=named or "")
    renaming = find_renaming(modules, base.tensors, where=base.label)
    by_names = Placement(base, base.layout(known), renaming, fan_in_fan_out)
    if best is None or all(by_names.layout.gives(by_names.parameter(f"{module}.weight")) for module in modules):
        return by_names
    return best[1]


@dataclass(frozen=True)
class Unfound:
    """Modules of an adapter that PEFT does not find by their names, and whose vectors it drops.

    Attributes:
        model_class: The class that PEFT is put around, by what adapter and base say.
        origin: Where its modules are known from.
        modules: Those of the adapter that it lacks, by the adapter's names.
        bare: The class without a head that has all of them; None where it has not.
    """

    model_class: str
    origin: str
    modules: tuple[str, ...]
    bare: str | None


def unfound(base: BaseModel, config: VeraConfig, modules: Iterable[str]) -> Unfound | None:
    """What PEFT does not find of an adapter; None where it finds all, or nothing says which class it is put around.

    `place` finds modules under names of older files and of wrapped models. PEFT looks for those of today alone.
    """
    live, task = _live_class(config), _AUTO.get(str(config.task_type))
    if live is not None:
        library = (config.auto_mapping or {}).get("parent_library")
        names = [live] if isinstance(library, str) and library.startswith("transformers.") else []
    else:
        names = [data.class_for(base.config, task) or "", *_own(base)] if task is not None else []
    options = [known_class(base, name) for name in dict.fromkeys(filter(None, names))]
    modules = list(modules)
    lacking = [(known, _lacking(known, modules)) for known in options if known is not None]
    if not lacking or len(lacking) < len(options) or not all(found for _, found in lacking):
        return None
    known, found = lacking[0]
    name = data.class_for(base.config, "Model") if live is None else None
    bare = known_class(base, name) if name else None
    has_all = bare is not None and not _lacking(bare, modules)
    return Unfound(known.name, known.origin, tuple(found), bare.name if bare is not None and has_all else None)


def _lacking(known: Architecture, modules: Iterable[str]) -> list[str]:
    return [name for name in modules if not known.stores(f"{name}.weight") and not known.is_unknown(name)]


def own_class(base: BaseModel) -> Architecture | None:
    """The class that the base's config.json names, or that its model type is loaded by; None where none is known."""
    return next((known for name in _own(base) if (known := known_class(base, name))), None)


def known_class(base: BaseModel, name: str) -> Architecture | None:
    """What is known of a class under the base's configuration.

    From the installed transformers, where the data lacks the class, a part of it or shapes that matter, or was made
    from another one; else from the data.
    """
    if name not in base.known:
        base.known[name] = known_under(base.config, name)
    return base.known[name]


def known_under(config: data.Config, name: str) -> Architecture | None:
    """What is known of a class under any configuration, from where `known_class` has it."""
    found = data.architecture(config, name)
    if found is not None and not data.is_of(config, name):
        return None
    if "auto_map" in config and found is None:
        return None  # code of the base's own, which nothing here runs
    there = installed.version("transformers")
    as_made = there is None or f"transformers {there}" == data.origin()
    if found is not None and as_made and not (found.varying or found.unknown or found.needs_shapes):
        return found
    if not witness.is_there() or (found is not None and int((there or "0").partition(".")[0]) < 5):
        return found
    try:
        return witness.ask_transformers(config, name)
    except UnprovenError:
        return found


def _classes(base: BaseModel, configs: Iterable[VeraConfig]) -> Iterator[str]:
    """The classes that PEFT may have adapted, the likeliest first.

    Where config.json names a class of which nothing is known, its model type says nothing of that: only a class that
    the adapter itself names counts then.
    """
    configs = list(configs)
    found = dict.fromkeys(name for config in configs if (name := _live_class(config)))
    named = data.class_for(base.config)
    if named is None or known_class(base, named) is not None:
        tasks = (data.class_for(base.config, _AUTO.get(str(config.task_type), "")) for config in configs)
        found |= dict.fromkeys(filter(None, tasks))
        found |= dict.fromkeys(_own(base))
        if bare := data.class_for(base.config, "Model"):
            found[bare] = None
    yield from found


def _live_class(config: VeraConfig) -> str | None:
    """The class that PEFT was put around, where the adapter says so: it does where it has no task."""
    name = (config.auto_mapping or {}).get("base_model_class")
    return name if isinstance(name, str) else None


def _own(base: BaseModel) -> Iterator[str]:
    name = data.class_for(base.config)
    if name is not None:
        yield name
        return
    yield from filter(None, (data.class_for(base.config, auto) for auto in _ANY))


def _may_be_linear(placement: Placement, parameter: str) -> bool:
    """Whether a parameter is the weight of a linear layer, as far as the class and the files say."""
    kind = placement.layout.kind(parameter.removesuffix(".weight"))
    return kind in LINEAR or (kind is None and not is_embedding(parameter))
