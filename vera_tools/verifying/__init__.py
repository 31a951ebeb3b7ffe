"""Is a checkpoint what it says? `verify` answers, and `record` notes what there is, so that it can be answered later.

What `verify` consists of: `checks` (config, header, values), `recorded` (against a manifest), `fit` (against a base),
`loads` (the loader table), and `registry` (many checkpoints).
"""
