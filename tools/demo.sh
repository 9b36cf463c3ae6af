#!/usr/bin/env bash
# From nothing to a trained, evaluated network, on two CPU ranks: `bash tools/demo.sh` with a made corpus, or
# `bash tools/demo.sh DIR` with DIR/train_list.txt, DIR/test_list.txt and the files they name. Words behind it are options of
# the training: `bash tools/demo.sh DIR --train.max_steps 60`.
set -euo pipefail
corpus=demo/corpus
out=demo
if [ $# -ge 1 ] && [ "${1#--}" = "$1" ]; then
  corpus=$(realpath -m -- "$1") # before setup.sh goes to the checkout
  out=demo/$(basename "$corpus")
  shift
fi
# shellcheck source=tools/setup.sh
source "$(dirname "$0")/setup.sh"
steps=${SPKNET_DEMO_STEPS:-180}
python -m spknet.train --config small_corpus "$@" --print_config > /dev/null # a mistyped option is told before any work
if [ "$corpus" = demo/corpus ] && [ ! -f "$corpus/test_list.txt" ]; then
  python -m tools.synth --out "$corpus"
fi
for list in train_list.txt test_list.txt; do
  [ -f "$corpus/$list" ] || { echo "error: $corpus/$list is missing: a training list has lines 'speaker path', a test list 'label path path'" >&2; exit 1; }
done
python -m shards.pack --list "$corpus/train_list.txt" --root "$corpus" --out "$out/shards"
# As many speakers a batch as the corpus allows, at most 64, even for two ranks; as many in AS-norm, at most 30.
speakers=$(awk 'NF {print $1}' "$corpus/train_list.txt" | sort -u | wc -l)
top=$(( speakers < 30 ? speakers : 30 ))
speakers=$(( speakers < 64 ? speakers / 2 * 2 : 64 ))
run=$out/run
export OMP_NUM_THREADS=1
torchrun --standalone --nproc_per_node 2 -m spknet.train --config small_corpus --data.train_shards "$out/shards" \
  --data.speakers_per_batch "$speakers" --train.max_steps "$steps" --run_dir "$run" "$@"
torchrun --standalone --nproc_per_node 2 -m spknet.evaluate --checkpoint "$run" --trials "$corpus/test_list.txt" \
  --root "$corpus" --as_norm "$top" --subtract_mean --untrained --out "$run/evaluation"
python -m tools.summary "$run"
