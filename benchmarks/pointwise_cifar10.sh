#!/usr/bin/env bash
# The paper's third question on real CIFAR-10 at a reduced setting, on the sets that paper_cifar10.sh has made: an eighth of the
# ConvNet's width, 100 steps a model. Points of one set a method are looked at, so the other replicates are left out.
#   cd FOLDER WITH cifar10/*.parquet AND sets/ && PATH/benchmarks/pointwise_cifar10.sh
# Two cores take about half an hour.
set -euo pipefail
given=$(printf ',sets/%s' {bptt,mtt,dc,dm}-0)
exec distillens study --preset wddl --precision bfloat16 --analyses pointwise --data parquet:cifar10 --distilled "${given:1}" --to pointwise \
  --set leave_one_out.net.width=16 --set leave_one_out.recipe.steps=100 --set semantics.net.width=16 --set semantics.recipe.steps=100 \
  --set herding.net.width=16 --set herding.recipe.steps=100
