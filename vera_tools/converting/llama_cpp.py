"""`to_gguf`: the LoRA that an adapter exactly is (see `lora`), in the file that llama.cpp loads with ``--lora``.

The format is that of llama.cpp's convert_lora_to_gguf.py: ``<tensor of the base>.lora_a``, [r, in], and ``.lora_b``,
[out, r], under the base's names in GGUF, and ``adapter.lora.alpha``. Where llama.cpp orders the rows of a base's weight
otherwise than transformers, those of lora_b are ordered so too: its Llama rotates neighbouring elements of a head, and
transformers' the two halves, so that its q and k have the rows of the halves in turn.

Only classes of models are taken whose logits were compared, with the adapter, between llama.cpp and PEFT
(tests/converting/test_llama_cpp.py); the others are refused by name.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vera_tools.checkpoints import destination
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.resolution import Assumptions, resolve
from vera_tools.converting.lora import Tensors
from vera_tools.converting.output import ConversionReport, corrections, refuse_half_a_pair
from vera_tools.dtypes import Array
from vera_tools.errors import CheckFailedError, FormatError, UsageError
from vera_tools.files import atomic, local
from vera_tools.files.safetensors import Deferred
from vera_tools.verifying.recorded import refuse_changed
from vera_tools.verifying.refusals import refuse_another_base, refuse_contradictions, refuse_drift

DTYPES = ("float32", "float16", "bfloat16")
#: A layer of a block, in the classes below.
_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")


@dataclass(frozen=True)
class Form:
    """How llama.cpp has a class of models.

    Attributes:
        name: Its architecture in GGUF.
        turned: Layers whose rows it has in another order, and the number of heads that they are of, in config.json.
    """

    name: str
    turned: Mapping[str, str]


_LLAMA = Form("llama", {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"})
FORMS = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Form("qwen2", {}),
    "Qwen3ForCausalLM": Form("qwen3", {}),
}


@dataclass(frozen=True, kw_only=True, repr=False)
class GgufReport(ConversionReport):
    """What was converted to llama.cpp's LoRA.

    Attributes:
        architecture: The base's, in GGUF.
        r: The rank, and the alpha.
        dtype: Of the matrices.
        layers: Number of adapted layers.
        factor: How many times larger the file is.
    """

    name: ClassVar[str] = "convert"

    architecture: str
    r: int
    dtype: str
    layers: int
    factor: float

    def body(self) -> dict[str, Any]:
        """The convert/v1 document's own part."""
        return {
            **super().body(),
            "to": "gguf",
            "gguf": {
                "architecture": self.architecture,
                "r": self.r,
                "alpha": self.r,
                "dtype": self.dtype,
                "layers": self.layers,
            },
            "factor": self.factor,
        }


def to_gguf(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    dtype: str = "float32",
    in_features: int | None = None,
    recipe: str | None = None,
    stored_dtype: str = "float32",
    strict: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> GgufReport:
    """Write the checkpoint as a LoRA adapter that llama.cpp loads. Needs the extra vera-tools[gguf].

    The file's metadata says which pair it was made from, and whether that was assumed.

    Args:
        checkpoint: A folder, a safetensors file, or ``hf://owner/name[@revision][/subfolder]``.
        output: The file to write.
        base: The base model as transformers has it. Only its config and headers are read, and of one on disk the
            weights of which digests are recorded.
        dtype: "float32", "float16" or "bfloat16".
        in_features: Largest in_features of the adapted layers, for a seed-only checkpoint.
        recipe: Name of the recipe where none is recorded. Default: PEFT's is assumed, with a warning.
        stored_dtype: The dtype that an assumed pair was kept in.
        strict: Refuse to assume a recipe, and a stored pair that is not what its key gives, of which a
            warning tells else.
        overwrite: Replace `output` where it exists.
        allow_pickle: Read a legacy adapter_model.bin too.

    Raises:
        FormatError: unreadable, malformed, or not VeRA.
        CheckFailedError: it is not what its manifest records; config and file contradict each other; the base does not
            fit, is not the one that was recorded, or is of a class that was not tried; there is more than llama.cpp's
            LoRA holds; a value would not be finite.
        UnprovenError: something would have to be assumed, and `strict`.
        UsageError: the output cannot be where it was asked for, or the extra is not installed.
    """
    if dtype not in DTYPES:
        raise UsageError("not a dtype for llama.cpp's LoRA", expected=" or ".join(DTYPES), found=dtype)
    library = _library()
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(Checkpoint.open(checkpoint, allow_pickle=allow_pickle))
        here = opened.folder.path if isinstance(opened.folder, local.LocalFolder) else None
        path = destination.refuse_output(output, overwrite=overwrite, inputs=(here, base), is_file=True)
        opened.refuse_unusable_manifest()
        refuse_half_a_pair(opened)
        model = stack.enter_context(BaseModel.open(base))
        form = _form(model)
        _refuse_what_is_not_held(opened)
        names = _names(opened, model, form, library)
        assumptions = Assumptions.stated(
            model, in_features=in_features, recipe=recipe, stored_dtype=stored_dtype, strict=strict
        )
        resolved = resolve(opened, assumptions)
        refuse_changed(opened)
        refuse_another_base(opened, model)
        refuse_contradictions(opened, model)
        refuse_drift(opened, resolved, strict=strict)
        tensors = Tensors(opened, resolved, opened.in_features(model), dtype)
        matrices: dict[str, tuple[Deferred, Array | None]] = {}
        for layer in opened.layers.values():
            a, b = tensors.matrices(layer)
            order = _order(layer.module, b.shape[0], form, model)
            matrices |= {f"{names[layer.module]}.lora_a": (a, None), f"{names[layer.module]}.lora_b": (b, order)}
        r = resolved.record.shape.r
        with atomic.file(path, overwrite=overwrite) as temporary:
            _write(temporary, library, form.name, matrices, r=r, metadata=resolved.record.to_metadata())
            size = temporary.stat().st_size
            opened.check_unchanged()
            model.check_unchanged()
        own = {Path(opened.weights.label).name}
        return GgufReport(
            path=opened.label,
            output=str(path),
            in_place=False,
            projections=resolved.record,
            origin=resolved.origin,
            input_bytes=opened.weights.size,
            output_bytes=size,
            manifest_bytes=0,
            carried_over=(),
            left_out=tuple(name for name in opened.folder.names() if name not in own and not name.startswith(".")),
            notes=corrections(opened),
            architecture=form.name,
            r=r,
            dtype=dtype,
            layers=len(opened.layers),
            factor=size / opened.weights.size,
        )


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UsageError("--to gguf needs the gguf package", hint="pip install 'vera-tools[gguf]'") from error
    return gguf


def _form(model: BaseModel) -> Form:
    named = model.config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    form = FORMS.get(name) if isinstance(name, str) else None
    if form is None:
        raise CheckFailedError(
            "llama.cpp's LoRA was not tried on such a base",
            where=model.label,
            expected=" or ".join(FORMS),
            found=f"architectures {named!r} in config.json",
            hint="convert it --to lora with this --base, and that with llama.cpp's convert_lora_to_gguf.py, or "
            "merge it into its base",
        )
    return form


def _refuse_what_is_not_held(checkpoint: Checkpoint) -> None:
    """llama.cpp's LoRA is two matrices for a weight: biases and saved modules would be lost."""
    others = sorted(checkpoint.other_tensors)
    if others:
        raise CheckFailedError(
            "llama.cpp's LoRA holds no biases and no saved modules",
            where=f"{checkpoint.label}: {others[0]}" + (f" and {len(others) - 1} more" if len(others) > 1 else ""),
            hint="merge it into its base: `vera-tools merge`",
        )


def _names(checkpoint: Checkpoint, model: BaseModel, form: Form, library: Any) -> dict[str, str]:
    """The names of the base's weights in GGUF, by module."""
    if not checkpoint.layers:
        raise CheckFailedError("no layer is adapted, so there is nothing to write", where=checkpoint.label)
    config = model.config
    blocks = _count(model, "num_hidden_layers")
    architecture = next(key for key, name in library.MODEL_ARCH_NAMES.items() if name == form.name)
    known = library.get_tensor_name_map(architecture, blocks)
    found: dict[str, str] = {}
    for module in checkpoint.layers:
        match = _LAYER.fullmatch(module)
        name = known.get_name(f"{module}.weight", try_suffixes=(".weight",)) if match else None
        if match is None or int(match[1]) >= blocks or name is None or name in found.values():
            raise CheckFailedError(
                "no layer that llama.cpp's LoRA was tried on",
                where=f"{checkpoint.label}: {module}",
                expected=f"layers of attention or MLP in the {blocks} blocks of {config['architectures'][0]}",
                hint="merge it into its base: `vera-tools merge`",
            )
        found[module] = name
    return found


def _order(module: str, rows: int, form: Form, model: BaseModel) -> Array | None:
    """Which of transformers' rows each of llama.cpp's is; None where they have the same order."""
    key = form.turned.get(module.rpartition(".")[2])
    if key is None:
        return None
    heads = _count(model, key) if key in model.config else _count(model, "num_attention_heads")
    if rows % (2 * heads):
        raise CheckFailedError(
            "its rows do not make up the heads that config.json tells of",
            where=f"{model.label}: {module}",
            expected=f"a multiple of {2 * heads}",
            found=str(rows),
        )
    order: Array = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
    return order


def _count(model: BaseModel, key: str) -> int:
    value = model.config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError("no number", where=f"{model.label}: config.json: {key}", found=repr(value)[:60])
    return value


def _write(
    path: Path,
    library: Any,
    architecture: str,
    matrices: Mapping[str, tuple[Deferred, Array | None]],
    *,
    r: int,
    metadata: Mapping[str, str],
) -> None:
    """The file. One matrix at a time is in memory."""
    types = library.GGMLQuantizationType
    raw = {"float32": types.F32, "float16": types.F16, "bfloat16": types.BF16}
    writer = library.GGUFWriter(path, architecture)
    try:
        writer.add_type(library.GGUFType.ADAPTER)
        writer.add_string(library.Keys.Adapter.TYPE, "lora")
        writer.add_float32(library.Keys.Adapter.LORA_ALPHA, float(r))
        for key, value in metadata.items():
            if key != "format":  # which is about safetensors
                writer.add_string(key, value)
        for name, (matrix, _) in matrices.items():
            size = int(np.prod(matrix.shape)) * (4 if matrix.dtype == "float32" else 2)
            writer.add_tensor_info(name, matrix.shape, np.dtype(np.int16), size, raw_dtype=raw[matrix.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for matrix, order in matrices.values():
            whole = np.concatenate([np.asarray(piece) for piece in matrix.pieces()])
            writer.write_tensor_data(np.ascontiguousarray(whole if order is None else whole[order]))
    finally:
        writer.close()
