#!/usr/bin/env bash
# Tests and measures on this machine's NVIDIA GPU: scripts/gpu_run.sh FOLDER STAGE...
#
# Each stage ends within ten minutes, so that stages fit machines that are lent for short; its log is FOLDER/STAGE.log,
# and the benchmark's stages add to one FOLDER/gpu_h200.json. A stage that fails does not keep the next from running.
#   check          what there is, and one small model end to end: two minutes
#   test           all tests of the GPU's kernels and of the engine on it, three minutes or so; TESTS: some of them, as
#                  pytest takes them; TEST_SECONDS: after which they are interrupted
#   memcheck       TESTS under NVIDIA's compute-sanitizer, which tells what reads or writes where it must not
#   limits         the device's limits, then one sequence in each format
#   offline-1, -2, -3    throughput at the rows of the yardstick: about 4, 6 and 5 minutes
#   rest           whether CPU and GPU agree, start-up, and the deterministic mode's cost
#   beside         transformers on the same shape
#   trace          kernels of decode steps, by torch's profiler
#   ncu            the largest kernels, by NVIDIA's Nsight Compute, where it may read the hardware's counters
# BENCH_ARGS are options of benchmarks/gpu_h200.py, such as "--without experts" where a kernel is broken.
# Nothing is installed: PYTHON (python3) must have torch, triton and pytest. Where an error comes later than what made it,
# CUDA_LAUNCH_BLOCKING=1 brings the two together.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:?give a folder for results, and stages}
shift
mkdir -p "$out"
# What triton has compiled and what was measured is kept in the home directory: if none can be written to, in another.
if [ ! -w "${HOME:-/nowhere}" ]; then
  export HOME=${TMPDIR:-/tmp}/gpu_run_home
  mkdir -p "$HOME"
fi
# Were kernels interpreted, on the CPU, this would prove nothing about a GPU.
export PYTHONPATH=src PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false TRITON_INTERPRET=0

has() { "$python" -c "import $1" 2>/dev/null; }
sees_gpu() { "$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no NVIDIA GPU here"'; }
bench() { timeout 570 "$python" benchmarks/gpu_h200.py --out "$out" --seconds 500 "$@" ${BENCH_ARGS:-}; }

stage() {
  case $1 in
    check)
      local went=0
      nvidia-smi || went=1
      timeout 60 "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' || went=1
      timeout 60 "$python" -m puna info || went=1
      timeout 240 "$python" -m puna generate --model demo --device cuda --echo --seed 1 --stats "Once upon a time" || went=1
      return $went
      ;;
    test)
      sees_gpu || return
      # Each test has a line of its own, and what failed stands at the end. Most of the time goes to compiling kernels,
      # on the host: in many processes where pytest-xdist is there, which also replaces those that lose their GPU.
      local options=(-vv --tb short -rfE --durations 10 -p no:cacheprovider)
      if has xdist; then options+=(-n "${WORKERS:-12}" --max-worker-restart 100); fi
      # A kernel that never ends can't be interrupted, only the process that waits for it.
      if has pytest_timeout; then options+=(--timeout 200 --timeout-method thread); fi
      # Interrupted rather than ended, pytest still tells what failed.
      OMP_NUM_THREADS=1 COLUMNS=160 timeout -s INT -k 20 "${TEST_SECONDS:-550}" "$python" -m pytest ${TESTS:-tests/triton} "${options[@]}"
      ;;
    memcheck)
      sees_gpu || return
      # Memory comes from the driver piece by piece, or what lies beside a tensor would be another one's.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT -k 20 560 compute-sanitizer --tool memcheck \
        --target-processes all --print-limit 20 "$python" -m pytest -vv --tb short -p no:cacheprovider \
        ${TESTS:?give the tests to run, such as tests/triton/test_fp8.py}
      ;;
    limits) bench --parts limits,single ;;
    offline-1) bench --parts offline --rows 128/128,2048/128,1000/1000,128/2048 ;;
    offline-2) bench --parts offline --rows 5000/500,500/2000,2048/2048,1000/2000 ;;
    offline-3) bench --parts offline --rows 20000/2000,128/4096 ;;
    rest) bench --parts agreement,startup,deterministic ;;
    beside) bench --parts beside ;;
    trace) bench --parts trace ;;
    ncu)
      sees_gpu || return
      timeout 560 ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy \
        --section WarpStateStats "$python" benchmarks/gpu_kernels.py
      ;;
    *)
      echo "there is no stage $1: see the head of scripts/gpu_run.sh" >&2
      return 2
      ;;
  esac
}

failed=()
for name in "$@"; do
  echo "== $name"
  started=$SECONDS
  stage "$name" 2>&1 | tee "$out/$name.log" || failed+=("$name")
  echo "== $name took $((SECONDS - started)) s"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
