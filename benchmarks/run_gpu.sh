#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most nine minutes, on a machine with torch, triton, pybind11 and nvcc:
#   benchmarks/run_gpu.sh FOLDER [options of benchmarks.gpu.run]
# builds the extensions in place; then, side by side, runs the tests marked gpu and those of the kernels, looks for bad
# memory accesses and races, compiles what is to be measured and, where FASTMETA_DATA names the folder of omniglot28.npz,
# meta-trains on Omniglot as the MAML paper does; then, alone, times operations and whole meta-steps beside peers. Logs,
# JSON, tables and a picture are left in FOLDER.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
export JAX_COMPILATION_CACHE_DIR=$out/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 XLA_PYTHON_CLIENT_PREALLOCATE=false
status=0
say() { printf '== %s (%d s)\n' "$1" "$SECONDS"; }

say build
for what in conv attention omniglot_5way omniglot_20way conv4_84; do
    timeout 200 python3 -m benchmarks.gpu.prepare $what >"$out/prepare_$what.log" 2>&1 &
done
FASTMETA_BUILD=cuda python3 setup.py -q build_ext --inplace >"$out/build.log" 2>&1 || { tail -40 "$out/build.log"; exit 1; }

say "tests, training, compilation"
waited=()
if [ -f "${FASTMETA_DATA:-}/omniglot28.npz" ]; then
    timeout 200 python3 -m fastmeta train omniglot --device cuda --data "$FASTMETA_DATA/omniglot28.npz" --filters 64 \
        --queries 1 --meta-batch 32 --iterations 60000 --meta-lr 1e-3 --val-every 10000 --log-every 1000 --threads 1 \
        --minutes 2.8 --out "$out/omniglot" >"$out/train.log" 2>&1 &
    waited+=($!)
fi
for what in mlp784 sinusoid_k1; do
    timeout 120 nice python3 -m benchmarks.gpu.prepare $what >"$out/prepare_$what.log" 2>&1 &
done
for what in sinusoid_k1 sinusoid_k5 sinusoid_tanh mlp784; do
    timeout 120 nice python3 -m benchmarks.gpu.jax_step $what >"$out/jax_$what.log" 2>&1 &
done
# The kernels' tests run compiled where there is a GPU; names are printed as they go, for a run that is cut off.
FASTMETA_REQUIRE=native,cuda timeout 150 nice python3 -m pytest -v -n 6 tests/ops tests/engine tests/learner -m gpu \
    -p no:cacheprovider >"$out/tests.log" 2>&1 &
waited+=($!)
timeout 185 nice python3 -m pytest -v -n 8 tests/kernels --ignore-glob 'tests/kernels/test_res*' -p no:cacheprovider \
    >"$out/kernels.log" 2>&1 &
waited+=($!)
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        timeout 150 nice compute-sanitizer --tool $tool --error-exitcode 9 python3 -m benchmarks.gpu.sanitize \
            >"$out/$tool.log" 2>&1 &
        waited+=($!)
    done
fi
for job in "${waited[@]}"; do wait "$job" || status=1; done
wait
for log in tests kernels; do grep -E "^(FAILED|ERROR) | passed| failed" "$out/$log.log" | tail -15; done
for log in memcheck racecheck train; do [ -f "$out/$log.log" ] && tail -9 "$out/$log.log"; done

say measure
timeout 275 python3 -m benchmarks.gpu.run --out "$out" --seconds 220 "$@" 2>"$out/run.log" || { status=1; tail -20 "$out/run.log"; }
say done
exit $status
