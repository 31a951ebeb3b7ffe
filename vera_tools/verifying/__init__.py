"""Looking at a checkpoint: `verify` with its `checks` and `loads` (the loader table), `inspect`, `record`, `regenerate`."""
