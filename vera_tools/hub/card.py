"""The model card, README.md: metadata as PEFT and the Hub expect it, and one section that tells how to use the adapter.

Whatever else a card says is kept, byte for byte: the section stands between two HTML comments, and the metadata is
written anew only where a key that the Hub needs is missing. This module does no I/O.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Any

from vera_tools import schema
from vera_tools.checkpoints.card import completed, head, split
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.manifest import ProjectionRecord
from vera_tools.errors import FormatError
from vera_tools.files import markup
from vera_tools.files.hub_reference import Reference
from vera_tools.platforms import rows
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.report import printable
from vera_tools.verifying.advice import lora_command
from vera_tools.verifying.loads import BASE_KINDS, Load
from vera_tools.verifying.report import CheckpointReport

BEGIN = "<!-- vera-tools: begin. `vera-tools push` writes this section anew; edit outside of it. -->"
END = "<!-- vera-tools: end -->"

#: The class that loads a base for a task of PEFT's in transformers.
MODEL_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

#: What PEFT's template asks for, and what an author has not yet told.
_PLACEHOLDER = "[More Information Needed]"
_FRAMEWORK = "### Framework versions"
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
#: The template's own sentences, by how they begin, and its headings.
_TEMPLATE = (
    "Users (both direct and downstream) should be made aware",
    "Use the code below to get started with the model.",
    "Carbon emissions can be estimated using",
    "**BibTeX:**",
    "**APA:**",
    "- PEFT ",
)
_HEADINGS = frozenset(
    """Model Card for Model ID/Model Details/Model Description/Model Sources [optional]/Uses/Direct Use/Downstream Use
    [optional]/Out-of-Scope Use/Bias, Risks, and Limitations/Recommendations/How to Get Started with the Model/Training
    Details/Training Data/Training Procedure/Preprocessing [optional]/Training Hyperparameters/Speeds, Sizes, Times
    [optional]/Evaluation/Testing Data, Factors & Metrics/Testing Data/Factors/Metrics/Results/Summary/Model Examination
    [optional]/Environmental Impact/Technical Specifications [optional]/Model Architecture and Objective/Compute
    Infrastructure/Hardware/Software/Citation [optional]/Glossary [optional]/More Information [optional]/Model Card
    Authors [optional]/Model Card Contact/Framework versions""".replace("\n    ", " ").split("/")
)
_SECTION = re.compile(re.escape(BEGIN[:24]) + r".*?" + re.escape(END), re.DOTALL)


def render(
    existing: str | None,
    *,
    reference: str,
    config: VeraConfig,
    base_model: str | None,
    record: ProjectionRecord | None,
    verification: CheckpointReport,
) -> str:
    """The card's text.

    Args:
        existing: The card so far, or None.
        reference: Where the adapter goes: ``hf://owner/name[/subfolder]``.
        config: The adapter's config.
        base_model: The base's name on the Hub, or None.
        record: The projections, or None where nothing is known of them.
        verification: What `verify` says of the adapter.

    Raises:
        FormatError: the existing card's metadata is not YAML, or breaks the Hub's rules.
    """
    existing = (existing or "").removeprefix("\ufeff")
    newline = "\r\n" if "\r\n" in existing else "\n"
    metadata, body = split(existing)
    metadata = _without_local_base(metadata, config, base_model)
    if is_empty_template(existing):
        body = _SECTION.sub("", body)
        body = body[body.index(_FRAMEWORK) :].rstrip() + newline if _FRAMEWORK in body else ""
    wanted = completed(metadata, config, base_model)
    section = _section(reference, config, base_model, record, verification).replace("\n", newline)
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: section, body, count=1)
    elif _PLACEHOLDER in body or body.startswith(_FRAMEWORK):
        # What matters stands before what is still to be filled in.
        at = re.search(r"^##", body, re.MULTILINE)
        title = body[: at.start() if at else 0].strip() or f"# {_name(reference)}"
        body = newline.join(("", title, "", section, "", body[at.start() if at else 0 :]))
    elif body.strip():
        body = body.rstrip() + newline * 2 + section + newline
    else:
        body = newline.join(("", f"# {_name(reference)}", "", section, ""))
    text = head(existing, wanted) + body
    check(text)
    return text


def is_empty_template(text: str) -> bool:
    """Whether a card is the template that PEFT writes, and nobody has filled anything in."""
    _, body = split(text)
    if _PLACEHOLDER not in body:
        return False
    lines = (line.strip() for line in _COMMENT.sub("", _SECTION.sub("", body)).splitlines())
    return not any(line for line in lines if not _is_of_the_template(line))


def _is_of_the_template(line: str) -> bool:
    if line.startswith("#"):
        return line.lstrip("#").strip() in _HEADINGS
    return not line or line.endswith(_PLACEHOLDER) or line.startswith(_TEMPLATE)


def _without_local_base(metadata: dict[str, Any], config: VeraConfig, base_model: str | None) -> dict[str, Any]:
    """The metadata without the path that PEFT takes for the base's name where it was loaded from a folder."""
    path = config.base_model_name_or_path
    if not path or base_model == path or metadata.get("base_model") != path:
        return metadata
    kept = {key: value for key, value in metadata.items() if key != "base_model"}
    if isinstance(kept.get("tags"), list):
        kept["tags"] = [tag for tag in kept["tags"] if tag != f"base_model:adapter:{path}"]
    return kept


def _name(reference: str) -> str:
    return reference.rsplit("/", 1)[-1]


def check(text: str) -> None:
    """Hold a card against the rules by which the Hub would refuse it, before anything is sent.

    Raises:
        FormatError: names the key.
    """
    from huggingface_hub import ModelCardData

    metadata, _ = split(text)
    schema.validate(metadata, "model_card.v1", where="README.md: metadata")
    try:
        ModelCardData(**metadata)
    except (TypeError, ValueError) as error:
        raise FormatError(f"wrong metadata: {error}", where="README.md: metadata") from error


def _section(
    reference: str,
    config: VeraConfig,
    base_model: str | None,
    record: ProjectionRecord | None,
    verification: CheckpointReport,
) -> str:
    parts = [
        BEGIN,
        "## The VeRA adapter",
        "[VeRA](https://arxiv.org/abs/2310.11454) trains two small vectors per layer; the two large projections "
        "`vera_A` and `vera_B` are random, frozen and shared by all layers. "
        + _origin(record, stored=verification.projections_stored is True),
        _facts(config, base_model, record, verification),
        f"Check it yourself: {markup.code(f'vera-tools verify {shlex.quote(reference)}')}",
        "### Which loaders compute with exactly these projections",
        _loaders(verification.loads),
        "### Loading it",
        _loading(reference, config, base_model),
        "### Everywhere else",
        "transformers' own `load_adapter` refuses VeRA, and so do servers that know LoRA only. The adapter is exactly "
        f"a LoRA of rank {config.r}, which they take:",
        markup.code_block(lora_command(reference, base_model and f"hf://{base_model}", "lora"), "sh"),
        END,
    ]
    return "\n\n".join(part for part in parts if part)


def _origin(record: ProjectionRecord | None, *, stored: bool) -> str:
    where = "They are stored in this repository" if stored else "They are not stored here"
    if record is None:
        return where + (", and nothing says yet what made them." if not stored else ".")
    if record.recipe is None:
        return where + "; no known recipe makes them."
    made = f"the key `{record.recipe.prng_key}` under the recipe {markup.code(record.recipe.name)}"
    if record.assumed:
        return f"{where}; {made} is {record.origin} to make them, and nothing proves it."
    return f"{where}, and proven to be, bit for bit, what {made} makes."


def _facts(
    config: VeraConfig, base_model: str | None, record: ProjectionRecord | None, verification: CheckpointReport
) -> str:
    # A name on the Hub has no character that Markdown knows, but the underscore, which does nothing within a word.
    facts = [("Base model", f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "not named")]
    facts += [("Rank", f"{config.r}"), ("Key", f"`{config.projection_prng_key}` (`projection_prng_key`)")]
    if record:
        recipe = markup.code(record.recipe.name) if record.recipe else "none known"
        facts.append(("Recipe", recipe + (f" ({record.origin})" if record.assumed else "")))
        for name in PROJECTIONS:
            shape = list(record.shape.of(name))
            facts.append(
                (f"`{name}`", f"{shape}, {markup.markdown(record.dtype)}, sha256 {markup.code(record.sha256[name])}")
            )
    facts.append(("Verified", f"{verification.verdict}; {printable(verification.scope)}"))
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {text} |" for label, text in facts)])


def _loaders(loads: Iterable[Load]) -> str:
    """The loader table: a row for each loader and its options, a column for each kind of base.

    Where platforms differ, each group of them has a row of its own.
    """
    cells: dict[tuple[str, str], dict[str, list[bool | None]]] = {}
    for load in loads:
        options = ", ".join(f"{key}={value}" for key, value in load.options.items())
        cells.setdefault((load.loader, options), {}).setdefault(load.rounding, []).append(load.exact)
    if not cells:
        return ""
    head = ["Loader", *(f"{kind} base" for kind in BASE_KINDS.values())]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    by_platform = False
    for (loader, options), exact in cells.items():
        label = f"{loader}, {options}" if options else loader
        answers = {tuple(row) for row in exact.values()}
        if len(answers) == 1:
            lines.append(f"| {label} | {' | '.join(map(_word, answers.pop()))} |")
            continue
        by_platform = True
        for rounding, row in exact.items():
            where = ", ".join(rows.places(rounding))
            lines.append(f"| {label}, on {where} | {' | '.join(map(_word, row))} |")
    if by_platform:
        lines += ["", f"{rows.caveat()}."]
    return "\n".join(lines)


def _word(exact: bool | None) -> str:
    return {True: "exact", False: "**not exact**", None: "unknown"}[exact]


def _loading(reference: str, config: VeraConfig, base_model: str | None) -> str:
    model_class = MODEL_CLASSES.get(config.task_type or "", "AutoModel")
    parsed = Reference.parse(reference)
    within = f", subfolder={markup.python(parsed.subfolder)}" if parsed.subfolder else ""
    revision = f", revision={markup.python(config.revision)}" if config.revision else ""
    base = markup.python(base_model or "the base model")
    return markup.code_block(
        "\n".join(
            [
                f"from transformers import {model_class}",
                "",
                f"base = {model_class}.from_pretrained({base}{revision})",
                "",
                "# with PEFT",
                "from peft import PeftModel",
                "",
                f"model = PeftModel.from_pretrained(base, {markup.python(parsed.repo)}{within})",
                "",
                "# or with vera-tools, which is exact on every platform",
                "from vera_tools import VeraModel",
                "",
                f"model = VeraModel.from_pretrained(base, {markup.python(reference)})",
            ]
        ),
        "python",
    )
