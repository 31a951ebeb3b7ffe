"""Which projections PEFT computes with after it has loaded an adapter: seen by loading it.

As a script it prints the answer for the folders named on its command line, for a process with another PEFT
(``PYTHONPATH``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

BASE_DTYPES = ("float32", "bfloat16", "float16")
OPTIONS: tuple[dict[str, bool], ...] = ({}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False})


def loaded(adapter: str, base: str, *, options: tuple[dict[str, bool], ...] = OPTIONS) -> list[dict[str, Any]]:
    """Load `adapter` onto a base of each dtype with each set of options: the pair's digests, over float64 values."""
    import transformers
    from peft import PeftModel

    config = transformers.AutoConfig.from_pretrained(base)
    kinds = {"llama": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM"}
    auto = getattr(transformers, kinds.get(config.model_type, "AutoModelForSequenceClassification"))
    rows = []
    for base_dtype in BASE_DTYPES:
        for chosen in options:
            import torch

            model = auto.from_config(config).to(getattr(torch, base_dtype))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns about adapters without projections
                peft_model = PeftModel.from_pretrained(model, adapter, **chosen)
            pair = (getattr(peft_model.base_model, name)["default"] for name in ("vera_A", "vera_B"))
            digests = [hashlib.sha256(t.detach().double().contiguous().numpy().tobytes()).hexdigest() for t in pair]
            rows.append({"base_dtype": base_dtype, "options": chosen, "digests": digests})
    return rows


def all_loaded(adapters: dict[str, tuple[str | Path, str | Path]]) -> dict[str, list[dict[str, Any]]]:
    """The same for many adapters and their bases, by name."""
    return {name: loaded(str(adapter), str(base)) for name, (adapter, base) in adapters.items()}


if __name__ == "__main__":
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    # The options came after the first PEFT with VeRA.
    newest = tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 21)
    known = {field.name for field in dataclasses.fields(peft.VeraConfig)}
    answer = {}
    for argument in sys.argv[1:]:
        adapter, base = argument.split("=")
        with tempfile.TemporaryDirectory() as folder:
            # The first releases refuse keys that they do not know.
            copy = Path(shutil.copytree(adapter, folder, dirs_exist_ok=True))
            config = json.loads((copy / "adapter_config.json").read_text())
            config = {key: value for key, value in config.items() if key in known}
            (copy / "adapter_config.json").write_text(json.dumps(config))
            try:
                answer[Path(adapter).name] = loaded(folder, base, options=OPTIONS if newest else ({},))
            except ValueError as error:
                if "Multiple target layers with different dimensions" not in str(error):  # PEFT 0.11 takes one shape
                    raise
    print(json.dumps(answer))
