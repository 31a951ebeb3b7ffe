"""Verify a registry on a dask cluster, and merge on it: python verify_dask.py SCHEDULER REGISTRY."""

import sys

from distributed import Client

import vera_tools

if __name__ == "__main__":
    address, registry = sys.argv[1:]
    with Client(address) as client, client.get_executor() as executor:
        report = vera_tools.verify(registry, recursive=True, executor=executor, log="registry.jsonl")
    print(report)
    sys.exit(report.exit_code)
