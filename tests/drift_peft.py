"""What PEFT really computes with when it loads seed-only adapters, as JSON: a script, run once for each capability.

Its argument is JSON [[checkpoint, base, base dtype, options], ...]. The answer lists {tensor: sha256} of the loaded
pair's values in float32, in the same order.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings


def main() -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    warnings.simplefilter("ignore")
    answers = []
    for checkpoint, base, dtype, options in json.loads(sys.argv[1]):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        tuner = PeftModel.from_pretrained(model, checkpoint, **options).base_model
        answers.append(
            {
                name: hashlib.sha256(
                    getattr(tuner, name)["default"].detach().float().contiguous().numpy().tobytes()
                ).hexdigest()
                for name in ("vera_A", "vera_B")
            }
        )
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
