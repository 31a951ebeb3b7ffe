"""What names mean in PEFT's and transformers' files: saved modules, task heads, embeddings and output layers.

Each of PEFT's rules stands here once, under the name of the function of PEFT's that it mirrors.
"""

from __future__ import annotations

import re

#: What transformers' models call their input embedding, ...
INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
#: ... the output layer that may share its weight with it, ...
OUTPUT_LAYERS = ("lm_head", "embed_out", "output_layer")
#: ... and the embedding of positions, which is a matrix and no linear layer either.
POSITION_EMBEDDINGS = ("wpe",)

#: The names that PEFT looks for among adapted layers (``EMBEDDING_LAYER_NAMES``): it saves these layers themselves too.
EMBEDDING_LAYERS = ("embed_tokens", "lm_head")

#: The heads that PEFT trains and saves whole for these tasks, whether or not the config names them. A model has one.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

#: What PEFT puts around an entry of modules_to_save before it looks for it in a module's name.
KEPT_FROM_ADAPTING = r"(^|.*\.){}($|\..*)"

_EMBEDDING = re.compile(
    rf"(?:^|\.)({'|'.join(INPUT_EMBEDDINGS + OUTPUT_LAYERS + POSITION_EMBEDDINGS)})(\.base_layer)?\.weight$"
)


def is_embedding(parameter: str) -> bool:
    """Whether this is the weight of an embedding or of an output layer, by its name."""
    return _EMBEDDING.search(parameter) is not None


#: The two modules inside PEFT's wrapper of a saved module.
_INSIDE_WRAPPER = re.compile(r"^(.*)\.(?:modules_to_save|original_module)\.(.+)$", re.DOTALL)


def copied_from(parameter: str) -> tuple[str, ...]:
    """The parameters of a saved module that this one may be a copy of, by its name; none where it is no copy.

    PEFT's ``get_peft_model_state_dict`` adds whole embeddings (after their size was changed) and, with bias="all",
    biases, under the names that they have inside the wrapper of a saved module: ``X.modules_to_save.weight``,
    ``X.modules_to_save.default.bias`` and ``X.original_module.weight`` beside ``X.weight``. Loading takes ``X.weight``.
    """
    found = _INSIDE_WRAPPER.match(parameter)
    if found is None:
        return ()
    module, rest = found.groups()
    without_adapter = rest.partition(".")[2]
    return (f"{module}.{rest}", *([f"{module}.{without_adapter}"] if without_adapter else []))


def module_of(parameter: str) -> str:
    """The last part of the module's name, where the parameter is a weight; "" where it is none."""
    parts = parameter.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else ""


def lies_in_saved(parameter: str, saved: str) -> bool:
    """Whether a parameter lies in a module that an entry of modules_to_save means.

    PEFT's ``_set_trainable``: every module whose full name ends so, be it in the middle of a word.
    """
    return f"{saved}." in parameter  # a leading part that ends so has a dot behind it
