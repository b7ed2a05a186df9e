#!/usr/bin/env bash
# The paper's first question on real CIFAR-10 at a reduced setting: three sets of each of its methods, 10 images a class, a
# quarter of the ConvNet's width (an eighth of the ResNets'), and a small share of the authors' steps and of the judges'.
#   cd FOLDER WITH cifar10/*.parquet && PATH/benchmarks/paper_cifar10.sh
# Two cores take about an hour for the sets and a quarter of an hour for the study.
set -euo pipefail
for r in 0 1 2; do
  common=(--data parquet:cifar10 --ipc 10 --replicate "$r" --threads 1 --precision float32 --set net.width=32)
  distillens distill dm "${common[@]}" --set steps=150 --to "sets/dm-$r"
  distillens distill mtt "${common[@]}" --set experts=2 --set max_start_epoch=5 --set expert_epochs=1 \
    --set lr_start=0.01 --set lr_lr=1e-7 --set lr_img=100 --set syn_steps=20 --set steps=60 --to "sets/mtt-$r"
  distillens distill bptt "${common[@]}" --set inner_steps=50 --set init=real --set batch_real=32 --set lr_img=30 \
    --set steps=30 --to "sets/bptt-$r"
  distillens distill dc "${common[@]}" --set init=real --set steps=4 --to "sets/dc-$r"
done
given=$(printf ',sets/%s' {bptt,mtt,dc,dm}-{0,1,2})
exec distillens study --preset wddl --precision bfloat16 --analyses behaviour --data parquet:cifar10 --distilled "${given:1}" --to study \
  --set "recognition.judges=convnet(width=4),convnet(width=32),resnet18(width=8 norm=batch),resnet34(width=8 norm=batch)" \
  --set recognition.recipe.steps=200 \
  --set feature_map.net=resnet18 --set feature_map.net.width=8 --set feature_map.net.norm=batch \
  --set feature_map.recipe.steps=200 \
  --set mixing.net.width=32 --set mixing.recipe.batch=256 --set mixing.real_per_class=0,10,250 --set accuracy.net.width=32 --set herding.net.width=32 --set herding.recipe.steps=300
