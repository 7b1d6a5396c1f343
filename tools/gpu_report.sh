#!/usr/bin/env bash
# Everything that needs a GPU, within a limited time, most important first: a smoke test, `pytest -m cuda`, the
# benchmarks, and training in the time that is left.
#
#   tools/gpu_report.sh --seconds 600 --out OUT [--parts PARTS] [--run RUN] [--only smoke,tests,benchmarks,training]
#   tools/gpu_report.sh --seconds 120 --dry
#
# OUT gets at most eight files below 16 MiB, rewritten at least every minute, so that a cut costs little: report.txt,
# speed.jsonl, metrics.csv, run.yaml, and model.fp16.0 to .3 (`python tools/gpu_parts.py join OUT FILE` makes one file of
# them). PARTS is where `python tools/gpu_parts.py split` has put Tiny-ImageNet as train/<class>/ and val/<class>/; a
# second call with the same --run goes on with the training. --dry does the same on the CPU with tiny sizes.
# The exit status is 0 if every stage that ran succeeded; one that the time cut short counts as a success.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD:$PWD/tools:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
seconds=600 out=gpu_report parts="" run=runs/gpu_report only=smoke,tests,benchmarks,training dry=""
while [ $# -gt 0 ]; do
    case $1 in
        --seconds) seconds=$2 && shift 2 ;;
        --out) out=$2 && shift 2 ;;
        --parts) parts=$2 && shift 2 ;;
        --run) run=$2 && shift 2 ;;
        --only) only=$2 && shift 2 ;;
        --dry) dry=1 && shift ;;
        *) sed -n '2,14s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
done
python=${PYTHON:-python3}
work=$(mktemp -d)
mkdir -p "$out"
report=$out/report.txt
if [ "$dry" ]; then run=$work/run; fi
status=0 copier="" reserved=0
trap 'if [ "$copier" ]; then kill "$copier" 2>/dev/null; fi; rm -rf "$work"' EXIT

# Seconds that are left for a stage: some are kept for the end and the last copy, and until it begins for the training.
left() { echo $((seconds - SECONDS - 30 - reserved)); }

# stage NAME LIMIT COMMAND...: runs a command for at most LIMIT seconds; what it prints goes to the report.
stage() {
    local name=$1 limit=$2 code=0 began=$SECONDS
    shift 2
    if [ "$limit" -gt "$(left)" ]; then limit=$(left); fi
    if [ "$limit" -lt 5 ]; then echo "== $name: no time left" | tee -a "$report" && return; fi
    timeout --signal=TERM --kill-after=10 "$limit" "$@" >"$work/output" 2>&1 || code=$?
    # at most 200 kB of each stage, so that the report stays small
    { echo "== $name" && tail -c 200000 "$work/output"; } >>"$report"
    case $code in
        0) result="done" ;;
        124 | 137 | 143) result="cut after $limit s" ;;
        *) result="FAILED with exit status $code" && status=1 ;;
    esac
    echo "== $name: $result, $((SECONDS - began)) s, $(left) s left" | tee -a "$report"
}

# rows NAME LIMIT COMMAND...: a stage whose lines of JSON go to speed.jsonl, too.
rows() {
    stage "$@"
    grep '^{' "$work/output" >>"$out/speed.jsonl" || true
}

# Copies what the training has written so far to OUT.
copy() {
    for file in metrics.csv run.yaml; do
        if [ -f "$run/$file" ]; then cp "$run/$file" "$out/$file.new" && mv "$out/$file.new" "$out/$file"; fi
    done
    if [ -f "$run/log.txt" ]; then tail -n 1 "$run/log.txt"; fi
    "$python" tools/gpu_parts.py checkpoint "$run" "$out"
}

asked() { case ",$only," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

if [ "$dry" ]; then
    device=cpu
    marks=(-m "slow or not slow" -k "conversion_and_folding")
    speed=(--network pyconvresnet18 --batch 1 2 --image-size 32 --rounds 1 --no-memory)
    eager=(--forms inference-fp32-channels_last-eager) compiled=(--forms inference-fp32-contiguous-eager)
    detection=(--network yolov8n --batch 1 --image-size 64 --rounds 1 --no-memory "${eager[@]}")
    pyramids=(--network pyconvresnet18 --batch 2 --image-size 32 --rounds 1)
    input=(--network cifar_resnet20 --images 1000 --batch 16 --steps 1 --rounds 1)
    training=(cifar_resnet20_pfd --batch-size 16 --image-size 32 --epochs 1000)
else
    device=cuda
    marks=(-m cuda)
    speed=(--network pyconvresnet50 --batch 256 1 --rounds 15)
    eager=(--forms "*-eager" "*-eager-folded") compiled=(--forms "*-bf16-channels_last-compile")
    detection=(--network yolov8n_spd --batch 16 --image-size 640 --rounds 15 --forms "*-channels_last-eager")
    pyramids=(--network pyconvresnet50 --batch 256 --rounds 9 --bf16)
    input=(--bf16 --steps 10 --rounds 5)
    training=(pyconvresnet50_spd --batch-size 512 --image-size 64 --epochs 40 --workers 12 --bf16)
fi

if asked training && [ "$dry$parts" ]; then reserved=$((seconds * 2 / 5)); fi
: >"$report"
if asked smoke; then
    stage smoke $((seconds / 8)) "$python" -c "
import torch, timm, spd_zoo
from spd_zoo.models import families
from spd_zoo.training.run import environment
print(environment())
net = timm.create_model('cifar_resnet20_pfd').to('$device').train()
net(torch.randn(4, 3, 32, 32, device='$device')).sum().backward()
print('smoke: forward and backward on $device work')"
    if [ "$status" != 0 ]; then tail -n 20 "$report" && exit 1; fi
fi
if asked tests; then
    stage tests $((seconds / 4)) "$python" -m pytest -p no:cacheprovider -q tests/test_cuda.py "${marks[@]}"
fi
if asked benchmarks; then
    common=(--device "$device" --json)
    limit=$((seconds / 10))
    rows "benchmark, eager" $((2 * limit)) "$python" tools/benchmark.py "${speed[@]}" "${eager[@]}" "${common[@]}"
    rows "benchmark of the pyramids" $limit "$python" tools/benchmark_pyramids.py "${pyramids[@]}" "${common[@]}"
    rows "benchmark of the input" $limit "$python" tools/benchmark_input.py "${input[@]}" "${common[@]}"
    rows "benchmark of a detector" $limit "$python" tools/benchmark.py "${detection[@]}" "${common[@]}"
    rows "benchmark, compiled" $limit "$python" tools/benchmark.py "${speed[@]}" "${compiled[@]}" "${common[@]}"
fi
if asked training && [ "$dry$parts" ]; then
    reserved=0 data=${run}_data
    if [ "$dry" ]; then
        stage "pictures, split" 60 "$python" -c "
from pathlib import Path
from gpu_parts import split
from pictures import make_folders
print(split(make_folders(Path('$work/made'), train=60, val=10), Path('$work/parts'), 0.1))"
        parts=$work/parts
    fi
    stage data 120 "$python" tools/gpu_parts.py unpack "$parts" "$data"
    (while sleep "$([ "$dry" ] && echo 10 || echo 60)"; do copy >>"$work/copies" 2>&1; done) &
    copier=$!
    stage training "$(left)" "$python" -m spd_zoo finetune "${training[@]}" --no-pretrained --data "$data" \
        --out "$run" --no-check --device "$device" --save-minutes "$([ "$dry" ] && echo 0 || echo 1)"
    kill "$copier" 2>/dev/null
    copier=""
    copy 2>&1 | tee -a "$work/copies"
    { echo "== copies" && cat "$work/copies"; } >>"$report"
fi
echo "== done, $SECONDS s, exit status $status" | tee -a "$report"
exit "$status"
