#!/bin/sh
# Makes src/puna/demo, the model that `--model demo` opens: corpus, training, and the files around the weights.
#   scripts/make_demo_model.sh TEACHER TEXT WORK
# TEACHER is the 260K story model's folder, TEXT has grimm.txt and alice.txt, WORK gets the corpus and the run (a stopped
# one goes on). Takes two cores a bit more than an hour. docs/demo_model.md says what came out.
set -eu
teacher=$1 text=$2 work=$3
scripts=$(dirname "$0")

python "$scripts/make_demo_corpus.py" --teacher "$teacher" --text "$text" --out "$work/corpus"

# Two processes of one thread each are faster than one of two threads on a machine that does other things as well: they
# wait for each other once a step, and not in every matrix product.
OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc-per-node 2 -m puna train \
    --data "$work/corpus/stories.txt" --data "$work/corpus/grimm.txt" --data "$work/corpus/alice.txt" \
    --held-out "$work/corpus/stories.held-out.txt" \
    --held-out "$work/corpus/grimm.held-out.txt" \
    --held-out "$work/corpus/alice.held-out.txt" \
    --out "$work/run" --resume \
    --hidden-size 256 --num-layers 5 --num-heads 8 --num-kv-heads 4 --mlp-hidden-size 512 --vocab-size 2048 \
    --context 512 --steps 2800 --batch-size 8 --learning-rate 2e-3 --warmup-steps 100 --weight-decay 0.1 \
    --dtype float32 --save-dtype bfloat16 --save-every 200 --eval-every 400 --seed 1

python "$scripts/package_demo_model.py" "$work/run" "$scripts/../src/puna/demo"
