#!/bin/sh
# From raw text to a chat model that other programs can load; quickstart.toml is the same chain, which can be resumed.
# quickstart.sh [FOLDER [OPTION...]]: options, such as `--set train.steps=10`, go to each training.
set -eu
runs=${1:-runs}
[ $# -eq 0 ] || shift
base=$(anarcho pretrain --preset quickstart --runs-dir "$runs" "$@")
chat=$(anarcho sft --from "$base" --runs-dir "$runs" "$@")
aligned=$(anarcho preference --from "$chat" --runs-dir "$runs" "$@")
anarcho eval "$base" "$chat" "$aligned" --compare
anarcho export "$aligned" --to hf --out "$aligned/huggingface"
echo "$aligned"
