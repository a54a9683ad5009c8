#!/usr/bin/env bash
# What to ask a GPU, most wanted first: bash benchmarks/gpu.sh CIFAR10_FOLDER OUT
# CIFAR-10 is a folder, train/<class>/* and test/<class>/*. A part that succeeded is skipped,
# and a stopped training resumes, so the same command continues after an interruption.
set -uo pipefail
data=$1 out=$2
mkdir -p "$out"
part() { # name, command...
    [ -e "$out/$1.done" ] || { "${@:2}" 2>&1 | tee -a "$out/$1.md" && touch "$out/$1.done"; }
}
train() { # name, recipe, options...
    part "$1" python "recipes/$2_gradmix.py" --run "$out/$1" --data.name folder --data.root "$data" \
        --backbone.name resnet18_small --training.epochs 100 --training.batch_size 512 \
        --training.precision bf16 --optimizer.lr 0.12 --optimizer.warmup_epochs 10 "${@:3}" &&
        part "$1-probe" python eval/linear_probe.py "$out/$1"
}
part tests python -m pytest -q -n 0 tests/test_gradmix.py tests/test_methods.py \
    tests/training/test_on_the_device.py
part step python benchmarks/step_cost.py --precision bf16 --batch 512
part throughput python -m benchmarks.throughput --data "$data" --backbone resnet18_small \
    --batch 512 --precision bf16 --workers "$(nproc)"
train plain simclr --extra_view none
train simclr simclr
train byol byol --augmentation.min_scale 0.2
