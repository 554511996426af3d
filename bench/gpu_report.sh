#!/usr/bin/env bash
# Everything that needs a GPU, in pieces of under ten minutes, so that a broken session can be resumed:
#
#   bench/gpu_report.sh              all pieces that are not done yet
#   bench/gpu_report.sh PIECE ...    these pieces, done or not
#   bench/gpu_report.sh list         the pieces and how each ended
#
# Results go to $OUT (default gpu_report): CSVs, plots, and PIECE.log. PIECE.done marks a piece that succeeded and
# PIECE.failed one that did not; a failure does not stop the others. DEVICE=cpu tries the script without a GPU, on small
# cases. PY is the Python to use. Peers that need no compilation may be installed in a folder on PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=$(mkdir -p "${OUT:-gpu_report}" && cd "${OUT:-gpu_report}" && pwd)
PY=${PY:-python3}
DEVICE=${DEVICE:-cuda}
PIECES=(machine tests verify bench_1 tune bench_2 plots)
case $DEVICE in
  cuda) LIMIT=${LIMIT:-590}; BUDGET=${BUDGET:-420}; CASES=() ;;
  cpu)  LIMIT=${LIMIT:-300}; BUDGET=${BUDGET:-60}; CASES=(--op divergence policy_loss --shape tiny --tokens 128 256) ;;
  *) echo "DEVICE is '$DEVICE', needs cuda or cpu" >&2; exit 2 ;;
esac

machine() {
  if [ "$DEVICE" = cuda ]; then nvidia-smi; fi
  "$PY" - <<'PYTHON'
import platform, sys, torch
from sgcd_kernels import backend_status
print(sys.version, platform.platform(), f"torch {torch.__version__}", sep="\n")
for name, status in backend_status().items():
    print(f"{name}: {'usable' if status.usable else 'not usable'}, {status.reason}")
PYTHON
}
tests() { # of the kernels; compiling them takes most of the time, and Triton keeps what it compiled for a second try
  if [ "$DEVICE" = cpu ]; then
    "$PY" -m pytest -q tests/sgcd_kernels/test_package.py tests/bench/test_truth.py
  else
    make test-gpu PY="$PY"
  fi
}
verify() { # the gate on the cases that will be measured, whether or not the tests passed
  "$PY" -m bench verify --device "$DEVICE" --budget 240 "${CASES[@]}"
}
bench() { "$PY" -m bench run --device "$DEVICE" --budget "$BUDGET" --out "$OUT/$1" "${CASES[@]}"; }
bench_1() { bench before; }
tune() { "$PY" -m bench tune; }
bench_2() { bench after; }
plots() { "$PY" -m bench plot --results "$OUT/after" --out "$OUT/plots"; }

list() {
  for piece in "${PIECES[@]}"; do
    state="to do"
    for end in done failed; do if [ -e "$OUT/$piece.$end" ]; then state="$end, $(cat "$OUT/$piece.$end")"; fi; done
    printf '%-8s  %s\n' "$piece" "$state"
  done
}

attempt() { # one piece, in a process of its own, cut off at the limit
  local piece=$1 code=0 start=$SECONDS
  rm -f "$OUT/$piece.done" "$OUT/$piece.failed"
  echo "== $piece"
  timeout --kill-after=10 "$LIMIT" bash "$0" __run "$piece" 2>&1 | tee "$OUT/$piece.log" || code=${PIPESTATUS[0]}
  local took="$((SECONDS - start)) s"
  case $code in
    0) echo "$took" >"$OUT/$piece.done" ;;
    124|137) echo "cut off after $LIMIT s" >"$OUT/$piece.failed" ;;
    *) echo "exit code $code after $took" >"$OUT/$piece.failed" ;;
  esac
}

export OUT PY DEVICE LIMIT BUDGET
case ${1:-} in
  __run) "$2"; exit ;;
  list) list; exit ;;
  "") chosen=(); for piece in "${PIECES[@]}"; do [ -e "$OUT/$piece.done" ] || chosen+=("$piece"); done ;;
  *) chosen=("$@") ;;
esac
for piece in "${chosen[@]+"${chosen[@]}"}"; do
  case " ${PIECES[*]} " in *" $piece "*) ;; *) echo "unknown piece '$piece'; there are ${PIECES[*]}" >&2; exit 2 ;; esac
done
for piece in "${chosen[@]+"${chosen[@]}"}"; do attempt "$piece"; done
list
compgen -G "$OUT/*.failed" >/dev/null && exit 1 || exit 0
