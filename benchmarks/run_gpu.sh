#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most nine minutes, on a machine with torch, triton, pybind11 and nvcc:
#   benchmarks/run_gpu.sh FOLDER [options of benchmarks.gpu.run]
# builds the extensions in place, runs the tests marked gpu and those of the kernels, looks for bad memory accesses and
# races, times operations and whole meta-steps beside peers, and leaves logs, JSON, tables and a picture in FOLDER.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
status=0
say() { printf '== %s (%d s)\n' "$1" "$SECONDS"; }

say build
FASTMETA_BUILD=cuda python3 setup.py -q build_ext --inplace >"$out/build.log" 2>&1 || { tail -40 "$out/build.log"; exit 1; }

say tests
# The kernels' tests run compiled where there is a GPU; names are printed as they go, for a run that is cut off.
FASTMETA_REQUIRE=native,cuda timeout 60 python3 -m pytest -v -n 8 tests/ops tests/engine -m gpu \
    -p no:cacheprovider >"$out/tests.log" 2>&1 || status=1
grep -E "FAILED|ERROR| passed| failed" "$out/tests.log" | tail -15
timeout 120 python3 -m pytest -v -n 12 tests/kernels -p no:cacheprovider \
    --deselect tests/kernels/test_resources.py >"$out/kernels.log" 2>&1 || status=1
grep -E "FAILED|ERROR| passed| failed" "$out/kernels.log" | tail -15

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        say "$tool"
        timeout 30 compute-sanitizer --tool "$tool" --error-exitcode 9 python3 -m benchmarks.gpu.sanitize \
            >"$out/$tool.log" 2>&1 || status=1
        tail -3 "$out/$tool.log"
    done
fi

say measure
timeout 230 python3 -m benchmarks.gpu.run --out "$out" --seconds 170 "$@" 2>"$out/run.log" || { status=1; tail -20 "$out/run.log"; }
say done
exit $status
