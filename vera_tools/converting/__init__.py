"""Other forms of a checkpoint: `strip`, `embed`, `regenerate`, `lora`; `foreign` ones brought in; `batch` for many."""
