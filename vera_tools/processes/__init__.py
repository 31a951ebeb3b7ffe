"""Processes that work for this one: `forking` copies it, `workers` hands out what is to be done."""
