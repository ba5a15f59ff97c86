#!/bin/sh
# The tests of the native kernels against a library built with AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: csrc/sanitize.sh [python]     (a minute of CPU time)
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cmake -S csrc -B "$build" -G Ninja -DGLM4_SANITIZE=ON >"$build/log" || { cat "$build/log"; exit 1; }
cmake --build "$build"
# The program itself is not built with the sanitizer, so its runtime is loaded first. It must not count what Python and
# torch leave behind at exit.
GLM4_CPU_LIBRARY="$build/_kernels.so" LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    "$python" -m pytest -q -p no:cacheprovider tests/ops_cpu
