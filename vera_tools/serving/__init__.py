"""Adapters on demand for a server that knows LoRA: found by name, verified, converted once, kept in a bounded cache.

A server has no command line of ours, so all of it is set by variables, read in `settings`.
"""

PREFIX = "VERA_TOOLS_VLLM_"
ADAPTERS, CACHE, CACHE_BYTES, REQUIRE = (PREFIX + name for name in ("ADAPTERS", "CACHE", "CACHE_BYTES", "REQUIRE"))
VARIABLES = (ADAPTERS, CACHE, CACHE_BYTES, REQUIRE)
