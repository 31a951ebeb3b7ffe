"""Other forms of a checkpoint: `strip`, `embed`, `lora`; `foreign` ones brought in; `batch` does whole registries."""
