#!/usr/bin/env bash
# Tests and measures on this machine's NVIDIA GPU: scripts/gpu_run.sh FOLDER STAGE...
#
# Each stage ends within ten minutes, so that stages fit machines that are lent for short; its log is FOLDER/STAGE.log,
# and the benchmark's stages add to one FOLDER/gpu_h200.json. A stage that fails does not keep the next from running.
#   check          what there is, and one small model end to end: two minutes
#   test           all tests of the GPU's kernels and of the engine on it
#   limits         the device's limits, then one sequence in each format
#   offline-1, -2, -3    throughput at the rows of the yardstick: about 4, 6 and 5 minutes
#   rest           start-up, and the deterministic mode's cost
#   beside         transformers on the same shape
#   trace          kernels of decode steps, by torch's profiler
# Nothing is installed: PYTHON (python3) must have torch, triton and pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:?give a folder for results, and stages}
shift
mkdir -p "$out"
export PYTHONPATH=src PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

bench() { timeout 570 "$python" benchmarks/gpu_h200.py --out "$out" --seconds 500 "$@"; }

stage() {
  case $1 in
    check)
      nvidia-smi
      timeout 60 "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' &&
        timeout 60 "$python" -m puna info &&
        timeout 240 "$python" -m puna generate --model demo --device cuda --echo --seed 1 --stats "Once upon a time"
      ;;
    test)
      # Without one, the tests would run in triton's interpreter, and prove nothing about a GPU.
      "$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no NVIDIA GPU here"' || return
      # Most of the time goes to compiling kernels, on the host: in eight processes where pytest-xdist is there.
      workers=()
      if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 8); fi
      # Interrupted rather than ended, pytest still tells what failed; each test has a line of its own.
      OMP_NUM_THREADS=2 timeout -s INT -k 20 550 "$python" -m pytest tests/triton -vv --durations 20 \
        -p no:cacheprovider "${workers[@]}"
      ;;
    limits) bench --parts limits,single ;;
    offline-1) bench --parts offline --rows 128/128,2048/128,1000/1000,128/2048 ;;
    offline-2) bench --parts offline --rows 5000/500,500/2000,2048/2048,1000/2000 ;;
    offline-3) bench --parts offline --rows 20000/2000,128/4096 ;;
    rest) bench --parts startup,deterministic ;;
    beside) bench --parts beside ;;
    trace) bench --parts trace ;;
    *)
      echo "there is no stage $1: see the head of scripts/gpu_run.sh" >&2
      return 2
      ;;
  esac
}

failed=()
for name in "$@"; do
  echo "== $name"
  stage "$name" 2>&1 | tee "$out/$name.log" || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
