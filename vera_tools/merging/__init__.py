"""Merging adapters into a base on disk: `plan` it, `staging` for what is under way, `execution`, `verification`.

What a merged weight is: `changes`, `arithmetic` and `rounding`. Where it belongs: `tying`, `task_heads`, `vocabulary`.
"""
