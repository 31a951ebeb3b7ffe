"""Other forms of a checkpoint: `strip`, `embed`, `lora`, and `foreign` ones brought in; `batch` does whole registries."""
