"""Bytes, on disk and on the Hub: reading by ranges, safetensors, strict JSON, writing in one step."""
