#!/usr/bin/env bash
# Runs the tests of quantizers on portable operators compiled with AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: tools/sanitize.sh [arguments of pytest]; PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export PYTHONPATH=$PWD
GLUONQUANT_CACHE=$(mktemp -d)
export GLUONQUANT_CACHE
trap 'rm -rf "$GLUONQUANT_CACHE"' EXIT

GLUONQUANT_OPS=pure $python -c "
from gluonquant.ops import build, find
build.build('portable', find.cache_folder(), sanitize=True)"
# The interpreter itself leaks and is not instrumented, so the runtime has to be there before it.
export LD_PRELOAD=$(${CXX:-g++} -print-file-name=libasan.so):$(${CXX:-g++} -print-file-name=libubsan.so)
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export GLUONQUANT_OPS=portable
$python -m pytest -q -k portable "${@:-tests/quantizers}"
