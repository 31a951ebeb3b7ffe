"""What is written beside the merged weights: vera_merge.json, which says how to do it again, and a model card."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from vera_tools._version import TOOL
from vera_tools.checkpoints.manifest import ProjectionRecord
from vera_tools.files import local, markup
from vera_tools.files.hub_reference import name_of
from vera_tools.merging.entries import Kind
from vera_tools.merging.plan import Plan

RECORD_NAME = "vera_merge.json"
CARD_NAME = "README.md"

KINDS: tuple[Kind, ...] = ("merged", "replaced", "added", "cast")

# What a base's model card says that holds for the merged model too.
_KEPT_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")


def merge_record(plan: Plan, base_sha256: Mapping[str, str]) -> dict[str, Any]:
    """The merge record, valid against ``schemas/merge_record.v1.schema.json``. The same merge gives the same record.

    Args:
        plan: What was merged.
        base_sha256: Digest of every weight that a product was merged into, by the base's name.
    """
    base = plan.base
    return {
        "schema": "vera-tools/merge_record/v1",
        "tool": dict(TOOL),
        "base": {
            "path": base.label,
            "names": sorted({a.checkpoint.config.base_model_name_or_path or "" for a in plan.adapters} - {""}),
            "files": {
                name: {"bytes": file.size, "header_sha256": _sha256(file.header)} for name, file in base.files.items()
            },
            "weights": {
                name: {"shape": list(info.shape), "dtype": info.dtype, "sha256": base_sha256[name]}
                for name, (_, info) in sorted(base.tensors.items())
                if name in base_sha256
            },
        },
        "adapters": [adapter.to_dict() for adapter in plan.adapters],
        "dtype": plan.options.dtype,
        "max_shard_size": plan.options.max_shard_size,
        "tensors": {kind: plan.names(kind) for kind in KINDS},
        "redo": redo(plan),
    }


def redo(plan: Plan) -> str:
    """The command line that gives the same weights again; a merge cannot be undone exactly, because it rounds."""
    words = ["vera-tools", "merge"]
    for adapter in plan.adapters:
        words.append(adapter.label)
    if any(adapter.weight != 1 for adapter in plan.adapters):
        for adapter in plan.adapters:
            words += ["--weight", repr(adapter.weight)]
    words += ["--base", plan.base.label]
    for adapter in plan.adapters:
        if adapter.resolved.origin == "assumed":
            words += _recipe_options(adapter.resolved.record)
            break
    if any(adapter.pickled for adapter in plan.adapters):
        words.append("--allow-pickle")
    if plan.options.dtype:
        words += ["--dtype", plan.options.dtype]
    if plan.options.max_shard_size:
        words += ["--max-shard-size", str(plan.options.max_shard_size)]
    if plan.options.resize_vocabulary:
        words.append("--resize-vocabulary")
    if plan.options.tokenizer != "base":
        words += ["--tokenizer", plan.options.tokenizer]
    return shlex.join([*words, "-o", "OUT"])


def _recipe_options(record: ProjectionRecord) -> list[str]:
    """What was assumed of the seed-only adapters, said aloud; one recipe holds for all of them."""
    recipe = record.recipe
    assert recipe is not None
    words = ["--drawn-dtype", recipe.drawn_dtype, "--rounding", recipe.rounding]
    words += ["--half-sampling", recipe.half_sampling] if recipe.half_sampling else []
    words += ["--rounded-through", recipe.rounded_through or "none"]
    return words + ([] if record.dtype == "float32" else ["--stored-dtype", record.dtype])


def model_card(plan: Plan) -> str:
    """README.md: front matter that the Hub reads, and what was merged into what."""
    names = sorted({a.checkpoint.config.base_model_name_or_path or "" for a in plan.adapters} - {""})
    name = names[0] if len(names) == 1 else plan.base.label
    known = name_of(name) or name_of(plan.base.label)  # the Hub refuses a card that names anything else
    front = [f"base_model: {json.dumps(known)}", "base_model_relation: merge"] if known else []
    front += ["library_name: transformers", "tags:", "- vera", "- merge", *_kept(plan)]
    lines = ["---", *front, "---", "", f"# {markup.markdown(name)}, merged with VeRA", ""]
    lines += [
        f"The weights of {markup.code(name)} with these VeRA adapters added to them, in float32 and rounded once:",
        "",
    ]
    lines += ["| adapter | weight | r | projections | sha256 of its weights |", "|---|---|---|---|---|"]
    for adapter in plan.adapters:
        record = adapter.resolved.record
        recipe = record.recipe.name if record.recipe else "stored, made by no known recipe"
        cells = [markup.code(adapter.label), f"{adapter.weight:g}", str(record.shape.r)]
        cells += [recipe + (" (assumed)" if record.assumed else ""), f"`{adapter.sha256}`"]
        lines.append(f"| {' | '.join(cells)} |")
    counts = [f"{len(names)} {kind}" for kind in KINDS if (names := plan.names(kind))]
    rest = "" if plan.options.dtype else "; every other one is the base's, byte for byte"
    lines += ["", f"Tensors: {', '.join(counts)}{rest}. `{RECORD_NAME}` holds the digests of what went in."]
    lines += [f"Written by {TOOL['name']} {TOOL['version']}. To do it again:", "", markup.code_block(redo(plan)), ""]
    return "\n".join(lines)


def _kept(plan: Plan) -> list[str]:
    if CARD_NAME not in plan.base.folder.names() or "config.json" not in plan.base.folder.names():
        return []
    import yaml

    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", local.read_text(plan.base.folder, CARD_NAME), re.DOTALL)
    where = plan.base.folder.path_of(CARD_NAME)
    metadata = markup.yaml(match[1], where=where, first=2) if match else {}
    kept = {key: metadata[key] for key in _KEPT_KEYS if key in metadata} if isinstance(metadata, dict) else {}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=10**6).splitlines() if kept else []


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
