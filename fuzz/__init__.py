"""Fuzzing of whatever vera-tools reads: see README.md."""
