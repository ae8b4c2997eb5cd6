#!/usr/bin/env bash
# Everything that wants a GPU, in parts of at most 8 minutes each, the default ones 29 together, with results in one folder:
#
#   benchmarks/gpu_session.sh --out DIR [--wheels DIR] [--data hh_train.jsonl] [PART ...]
#
#   check   what is installed, what the GPU is                                                          under 1 minute
#   test    the tests marked gpu (as `make gpu-test`), and the benchmarks' smoke runs                    6 minutes at most
#   head    benchmarks/gpu_head.py                                                                       2.5
#   8b      Llama-3.1-8B, UltraFeedback-like lengths, beside TRL                                         7
#   1b      Llama-3.2-1B, hh lengths (UltraFeedback-like without --data): shared and repeated prompts,   6
#           beside TRL
#   fp8     float8 beside bfloat16, Llama-3.1-8B with as many layers as fit; needs Transformer Engine    6
#   trl     which of TRL's settings is its best, Llama-3.2-1B                                            7.5
#   ours    which of our settings is our best, Llama-3.2-1B                                              7.5
#
# Default: check test head 8b 1b fp8. Where a command may take 10 minutes: `check test head`, then each of the others.
# --wheels: installs them into a folder of their own, without a network, in front of what is there. PYTHON: the
# interpreter (python3). The exit code is 1 where a part failed; the others ran all the same.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} out="" wheels="" data="" parts=()
while (($#)); do
  case $1 in
    --out) out=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    check | test | head | 8b | 1b | fp8 | trl | ours) parts+=("$1"); shift ;;
    *) echo "gpu_session.sh: unknown argument $1; see its first lines" >&2; exit 2 ;;
  esac
done
[[ -n $out ]] || { echo "gpu_session.sh: --out DIR is missing" >&2; exit 2; }
((${#parts[@]})) || parts=(check test head 8b 1b fp8)
mkdir -p "$out"
out=$(cd "$out" && pwd)

if [[ -n $wheels ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit 1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
# Transformer Engine looks for cuDNN and cuBLAS by the loader's path; torch carries them in folders of its own.
libraries=$("$python" -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/lib")))')
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # of both sides: packs and batches differ in length

lengths=(--lengths ultrafeedback)
[[ -n $data ]] && lengths=(--lengths hh --data "$data")
# bench NAME SECONDS ARGUMENTS: gpu.py ends by itself; `timeout` is for when it doesn't
bench() {
  local minutes
  minutes=$("$python" -c "print($2 / 60)")
  timeout --kill-after=10 $(($2 + 20)) "$python" benchmarks/gpu.py --minutes "$minutes" --out "$out/$1.json" "${@:3}"
}

run() {
  case $1 in
    check)
      nvidia-smi
      "$python" -m benchmarks.gpu_machine
      "$python" -c 'import transformer_engine.pytorch as te; print("Transformer Engine imports:", te.__name__)' ||
        echo "Transformer Engine does not import: its tests skip, 8b runs with fewer layers, fp8 says so"
      "$python" -c 'import trl; print("TRL", trl.__version__)' || echo "TRL does not import: 8b and 1b run without it"
      ;;
    test)
      timeout 270 "$python" -m pytest -m gpu -q -p no:cacheprovider
      local tests=$?
      timeout 90 "$python" benchmarks/gpu.py --smoke --out "$out/smoke.json" && return "$tests"
      ;;
    head) timeout 150 "$python" benchmarks/gpu_head.py --minutes 1.5 --out "$out/head.json" ;;
    8b) bench 8b 420 --model llama-3.1-8b ;;
    1b) bench 1b 360 --model llama-3.2-1b "${lengths[@]}" --global-batch 64 --steps 12 --ours ours,ours-unshared \
      --trl trl-bf16-mb8-sorted,trl-bf16-mb8-sorted-liger,trl-mixed-mb4-sorted ;;
    fp8) bench fp8 360 --model llama-3.1-8b --rounds 1 --ours ours,ours-fp8,ours-fp8-tensorwise --trl "" ;;
    trl)
      bench trl 450 --model llama-3.2-1b "${lengths[@]}" --ours "" --rounds 1 --trl \
        trl-bf16-mb8-sorted,trl-bf16-mb4-sorted,trl-bf16-mb16-sorted,trl-bf16-mb8-sorted-liger,trl-bf16-mb16-sorted-liger,trl-bf16-mb8,trl-mixed-mb4-sorted,trl-bf16-mb8-sorted-checkpointing,trl-bf16-mb4-sorted-flash
      ;;
    ours)
      bench ours 450 --model llama-3.2-1b "${lengths[@]}" --trl "" --global-batch 64 --ours \
        ours,ours-unshared,ours-torch-head,ours-te-attention,ours-te-layers,ours-local-layers,ours-sdpa
      ;;
  esac
}

failed=0
for part in "${parts[@]}"; do
  echo "== $part"
  run "$part" 2>&1 | tee "$out/$part.log" || { failed=1; echo "== $part FAILED"; }
done
exit "$failed"
