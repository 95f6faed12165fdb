#!/usr/bin/env bash
# The compiled module's tests under AddressSanitizer with UndefinedBehaviorSanitizer, and its thread pool under ThreadSanitizer.
# The module is built into build/sanitize, the one in use stays as it is. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$python")
export PATH="$PWD/$bin:$PATH"
folder=build/sanitize
package=$PWD/$folder/package

generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
# Two levels, the plainest code and the widest vectors, as compiling takes most of the time.
levels=portable
if [ "$(uname -m)" = x86_64 ]; then levels="portable;avx512"; fi
configure() {
  cmake -S . -B "$folder/$1" "${generator[@]}" -DPython_EXECUTABLE="$(command -v "$python")" -DPUNA_SANITIZE="$1" \
    -DPUNA_LEVELS="$levels" -DPUNA_MODULE_FOLDER="$package/puna" \
    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" >/dev/null
}

configure thread
cmake --build "$folder/thread" --target pool_stress -j 2
"$folder/thread/pool_stress" 1000
echo "The pool's stress test passed under ThreadSanitizer."

# The package as it is, with another module inside.
rm -rf "$package"
mkdir -p "$package/puna"
for file in src/puna/*; do
  case $file in */_kernels*.so) ;; *) ln -s "$PWD/$file" "$package/puna/" ;; esac
done
# An editable install finds the package before PYTHONPATH is looked at.
cat >"$package/sitecustomize.py" <<'PYTHON'
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
PYTHON
configure address
cmake --build "$folder/address" --target _kernels -j 2

# Both libraries come first: the sanitizer's must, and it looks for the C++ library's functions when it is loaded. Python and torch
# leave memory behind on purpose. The crash tests start processes of their own, which inherit all of this.
preload=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$package OMP_NUM_THREADS=1 \
  "$python" -m pytest tests/kernels --ignore tests/kernels/test_vec.py -p no:cacheprovider -n 2 "$@"
