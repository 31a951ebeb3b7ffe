# What .ci/run and .ci/full share; read in a clone that has README's .venv, or is about to make it.

# Which kernels torch takes by itself is the first thing to be tested.
unset ATEN_CPU_CAPABILITY

step() { # a name, and the command: one line with the time that it took, and what it printed where it fails
    local name=$1 begun=$SECONDS log code
    shift
    log=$(mktemp)
    printf '%s: ' "$name"
    if "$@" >"$log" 2>&1; then
        printf '%d s, %s\n' $((SECONDS - begun)) "$(tail -n 1 "$log")"
        rm "$log"
    else
        code=$?
        printf 'FAILED after %d s\n' $((SECONDS - begun))
        cat "$log"
        rm "$log"
        exit "$code"
    fi
}

weaker_capabilities() { # those below the one that torch takes here by itself
    .venv/bin/python -c '
import platform, torch
from vera_tools.drifting.environments import weaker_capabilities
print(*weaker_capabilities(platform.machine(), torch.backends.cpu.get_cpu_capability().lower()))'
}

fuzzing() { # how many inputs, and the first seed: shared by the cores, each with a seed of its own
    local cores seed failed=0 workers=()
    cores=$(.venv/bin/python -c 'import os; print(os.cpu_count())')
    for ((seed = $2; seed < $2 + cores; seed++)); do
        .venv/bin/python -m fuzz --runs $(($1 / cores)) --seed "$seed" &
        workers+=($!)
    done
    for worker in "${workers[@]}"; do
        wait "$worker" || failed=1
    done
    return $failed
}
