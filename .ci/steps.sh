# What .ci/run and .ci/full share; run in a clone that has README's .venv, or is about to make it.

step() { # a name, and the command: a line before it and one after it, with the seconds that it took
    local name=$1 begun=$SECONDS
    shift
    echo "== $name"
    "$@"
    echo "== $name: $((SECONDS - begun)) s"
}

weaker_capabilities() { # those below the one that torch takes here by itself
    .venv/bin/python -c '
import platform, torch
from vera_tools.drifting.environments import weaker_capabilities
print(*weaker_capabilities(platform.machine(), torch.backends.cpu.get_cpu_capability().lower()))'
}
