"""Verify a registry on the Ray cluster that RAY_ADDRESS names, or on this machine: python verify_ray.py REGISTRY."""

import functools
import sys
from concurrent.futures import Executor

import ray

import vera_tools


class Tasks(Executor):
    """Ray's tasks as an executor. Ray's references give futures of the kind that executors give."""

    remote = staticmethod(functools.cache(ray.remote))

    def submit(self, function, /, *arguments, **named):
        """Have a worker call a function."""
        return self.remote(function).remote(*arguments, **named).future()


if __name__ == "__main__":
    ray.init()
    report = vera_tools.verify(sys.argv[1], recursive=True, executor=Tasks(), log="registry.jsonl")
    print(report)
    sys.exit(report.exit_code)
