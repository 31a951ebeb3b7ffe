"""Merging adapters into a base on disk: `plan` it, `staging` for what is under way, `execution`, `verification`."""
