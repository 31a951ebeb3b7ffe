#!/bin/bash
# One machine, or several by ssh, without any scheduler: PARTS parts, HANDS of them at a time.
set -u
mkdir -p "$LOGS"
seq "$PARTS" | xargs -P "$HANDS" -I{} \
    vera-tools verify -q -R "$REGISTRY" --part "{}/$PARTS" --jobs 1 --log "$LOGS/{}.jsonl"
vera-tools summarize "$LOGS"/*.jsonl
