"""Looking at a checkpoint: `verify`, `inspect`, `record`, `regenerate`.

What `verify` consists of: `checks` (config, header, values), `recorded` (against a manifest), `fit` (against a base),
`loads` (the loader table), and `registry` (many checkpoints).
"""
