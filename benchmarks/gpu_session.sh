#!/usr/bin/env bash
# Everything that wants a GPU, in calls of under 8 minutes each, with results in one folder:
#
#   benchmarks/gpu_session.sh [--out DIR] [--wheels DIR] [--pack FILE.tgz] [--from FILE.tgz] [--data hh_train.jsonl]
#                             [--again] [PART ...]
#
#   first   check, te, kernels, head, four, then as many GPU tests as there is time for                  7.5 minutes at most
#   test    the GPU tests that have not passed yet (as `make gpu-test`)                                  6.5
#   trl8b   which of TRL's settings is its best at 8B's width, 8 layers, of those that fit with all      6.5
#   8b      Llama-3.1-8B, UltraFeedback-like lengths, beside the fastest that trl8b found                7
#   alike   18 layers of 8B, fp32 weights and moments on both sides: with all 32 TRL's don't fit         6
#   trl     which of TRL's settings is its best, Llama-3.2-1B                                            7
#   1b      Llama-3.2-1B, hh lengths (UltraFeedback-like without --data): shared and repeated prompts,   6
#           beside the fastest that trl found
#   fp8     float8 beside bfloat16, Llama-3.1-8B with as many layers as fit; needs Transformer Engine    6
#   ours8b  Llama-3.1-8B: packs of 8,192 with a cached reference, AdamW in one pass, other attention     7
#   8b128   Llama-3.1-8B with 128 pairs a step: AdamW's share of a step is a quarter of that with 32      7
#   ours    which of our settings is our best, Llama-3.2-1B                                              7
#   of `first`:
#   check   what is installed, what the GPU is                                                           1
#   te      Transformer Engine beside float64 (benchmarks/gpu_te.py)                                     1
#   kernels attention and AdamW by everything that can run here, timed (benchmarks/gpu_kernels.py)       0.9
#   head    benchmarks/gpu_head.py                                                                       1.5
#   four    4 layers of Llama-3.1-8B: ours and TRL beside float64                                        2.7
#
# Default: first. What to run next is printed at the end. Where a command may take 10 minutes, one part a call.
# A part that fails does not stop the next. One that came to its end is not run again in the same --out with the same code
# (--again: it is); one that did not goes on from its file of results. --out: benchmarks/results/DATE by default. --wheels:
# installed into a folder of their own, without a network, in front of what is there; exit code 2 where that fails. --pack:
# after each part, all of --out as one archive. --from: such an archive, unpacked into --out first. PYTHON: the interpreter
# (python3). LIMIT_S: seconds for the whole call, wheels included (450 a part named). The exit code is 1 where a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} out="" wheels="" pack="" from="" data="" again="" parts=() first=(check te kernels head four test)
while (($#)); do
  case $1 in
    --out) out=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --pack) pack=$2; shift 2 ;;
    --from) from=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --again) again=1; shift ;;
    first | check | te | kernels | head | four | test | trl8b | 8b | alike | trl | 1b | fp8 | ours8b | 8b128 | ours) parts+=("$1"); shift ;;
    *) echo "gpu_session.sh: unknown argument $1; see its first lines" >&2; exit 2 ;;
  esac
done
((${#parts[@]})) || parts=(first)
limit=${LIMIT_S:-$((450 * ${#parts[@]}))}
out=${out:-benchmarks/results/$(date +%F)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [[ -n $from ]]; then tar -xzf "$from" -C "$out" || exit 2; fi
code=$("$python" benchmarks/gpu_code.py) || exit 2
left() { echo $((limit - SECONDS)); } # bash counts SECONDS from the script's start

# note PART RC SECONDS: a line of session.jsonl, and then everything into the archive, which is always a whole one
note() {
  printf '{"part": "%s", "rc": %d, "seconds": %d, "date": "%s", "code": "%s"}\n' \
    "$1" "$2" "$3" "$(date -u +%FT%TZ)" "$code" >>"$out/session.jsonl"
  if [[ -n $pack ]]; then tar -czf "$pack.part" -C "$out" . && mv "$pack.part" "$pack"; fi
}
ended() { [[ -f $out/session.jsonl ]] && grep -q "\"part\": \"$1\", \"rc\": 0,.*\"code\": \"$code\"" "$out/session.jsonl"; }

if [[ -n $wheels ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  if ! compgen -G "$wheels/*.whl" >/dev/null ||
    ! "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl; then
    echo "gpu_session.sh: $wheels/*.whl: nothing there, or it could not be installed" >&2
    exit 2
  fi
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  note wheels 0 "$SECONDS"
fi
# Transformer Engine looks for cuDNN and cuBLAS by the loader's path; torch carries them in folders of its own.
libraries=$("$python" -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/lib")))')
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # of both sides: packs and batches differ in length

lengths=(--lengths ultrafeedback)
[[ -n $data ]] && lengths=(--lengths hh --data "$data")
# within SECONDS: so many, or what is left of the call
within() { echo $(($1 < $(left) ? $1 : $(left))); }
# limited SECONDS COMMAND: interrupted then, so that it says what it has, and killed 15 s later
limited() { timeout --signal=INT --kill-after=15 "$1" "${@:2}"; }
# bench NAME SECONDS ARGUMENTS: gpu.py ends by itself; `limited` is for when it doesn't
bench() {
  local seconds
  seconds=$(within "$2")
  limited $((seconds + 10)) "$python" benchmarks/gpu.py --minutes "$(((seconds * 100) / 60))e-2" --out "$out/$1.json" "${@:3}"
}

run() {
  case $1 in
    check)
      command -v nvidia-smi >/dev/null && nvidia-smi
      "$python" -c 'import transformer_engine.pytorch as te; print("Transformer Engine imports:", te.__name__)' ||
        echo "Transformer Engine does not import: its tests skip, 8b runs with fewer layers, fp8 says so"
      "$python" -c 'import trl; print("TRL", trl.__version__)' || echo "TRL does not import: its contenders are left out"
      limited "$(within 60)" "$python" -m benchmarks.gpu_machine | tee "$out/check.json"
      ;;
    te) limited "$(within 60)" "$python" benchmarks/gpu_te.py --out "$out/te.json" ;;
    kernels) limited "$(within 70)" "$python" benchmarks/gpu_kernels.py --minutes 0.7 --out "$out/kernels.json" ;;
    head) limited "$(within 100)" "$python" benchmarks/gpu_head.py --minutes 0.9 --out "$out/head.json" ;;
    four) bench four 160 --model llama-3.1-8b --layers 4 --rounds 1 --steps 3 --float64 --ours ours --trl trl-bf16-mb2-sorted ;;
    test)
      local seconds
      seconds=$(within 390)
      "$python" benchmarks/gpu_tests.py --minutes "$(((seconds * 100) / 60))e-2" --out "$out/tests.json"
      ;;
    trl8b) bench trl8b 390 --model llama-3.1-8b --layers 8 --trl-fit-layers 32 --ours "" --rounds 1 --trl auto ;;
    8b) bench 8b 420 --model llama-3.1-8b --trl-from "$out/trl8b.json" ;;
    alike) bench alike 360 --model llama-3.1-8b --layers 18 --optimizer full --rounds 2 --ours ours,ours-lean --trl \
      trl-mixed-mb2-sorted-liger,trl-mixed-mb8-sorted-checkpointing-liger ;;
    trl) bench trl 420 --model llama-3.2-1b "${lengths[@]}" --ours "" --rounds 1 --trl auto ;;
    1b) bench 1b 360 --model llama-3.2-1b "${lengths[@]}" --global-batch 64 --steps 12 --ours ours,ours-unshared \
      --trl-from "$out/trl.json" ;;
    fp8) bench fp8 360 --model llama-3.1-8b --rounds 1 --ours ours,ours-fp8,ours-fp8-tensorwise --trl "" ;;
    ours8b) bench ours8b 420 --model llama-3.1-8b --rounds 1 --trl "" --ours \
      ours,ours-cached-8192,ours-one-pass,ours-joined-qkv,ours-te-attention,ours-flash3 ;;
    8b128) bench 8b128 420 --model llama-3.1-8b --global-batch 128 --rounds 1 --warmup-steps 1 --steps 3 --trl "" \
      --ours ours,ours-one-pass ;;
    ours)
      bench ours 420 --model llama-3.2-1b "${lengths[@]}" --trl "" --global-batch 64 --ours \
        ours,ours-unshared,ours-lean,ours-one-pass,ours-joined-qkv,ours-torch-head,ours-te-attention,ours-flash3,ours-te-layers,ours-local-layers,ours-sdpa
      ;;
  esac
}

failed=0
one() {
  local began=$SECONDS rc
  if [[ -z $again ]] && ended "$1"; then
    echo "== $1: ended before; --again runs it once more"
  elif (($(left) < 20)); then
    echo "== $1: not started, $(left) s are left"
  else
    echo "== $1"
    run "$1" 2>&1 | tee -a "$out/$1.log"
    rc=${PIPESTATUS[0]}
    note "$1" "$rc" $((SECONDS - began))
    case $rc in
      0) ;;
      3) echo "== $1: the time was up; the same command goes on" ;;
      *) failed=1; echo "== $1 FAILED with code $rc" ;;
    esac
  fi
}
for part in "${parts[@]}"; do
  if [[ $part == first ]]; then
    for each in "${first[@]}"; do one "$each"; done
  else
    one "$part"
  fi
done

echo "== next, in this order, one a call${pack:+, with --from and the archive of this one}:"
for part in "${first[@]}" trl8b 8b alike ours8b trl 1b fp8 8b128 ours; do
  ended "$part" || echo "  benchmarks/gpu_session.sh --out $out${wheels:+ --wheels $wheels}${pack:+ --pack $pack}${data:+ --data $data} $part"
done
exit "$failed"
