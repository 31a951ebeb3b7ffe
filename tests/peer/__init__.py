"""PEFT's own tests about VeRA, run on `VeraModel`.

``python -m tests.peer`` fetches the source of the PEFT that is installed, takes the tests out of it, and runs them
twice: on PEFT itself, and with its model swapped for ours. What PEFT passes we pass too, but for `differences.toml`.
"""
