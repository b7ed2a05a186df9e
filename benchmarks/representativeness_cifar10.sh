#!/usr/bin/env bash
# The paper's second question on real CIFAR-10 at a reduced setting, on the sets that paper_cifar10.sh has made: a quarter of the
# ConvNet's width, small pools, 48 moments of real training.
#   cd FOLDER WITH cifar10/*.parquet AND sets/ && PATH/benchmarks/representativeness_cifar10.sh
# Two cores take about half an hour.
set -euo pipefail
given=$(printf ',sets/%s' {bptt,mtt,dc,dm}-{0,1,2})
exec distillens study --preset wddl --precision bfloat16 --analyses representativeness --data parquet:cifar10 --distilled "${given:1}" --to study \
  --set early_agreement.net.width=32 --set early_agreement.early=4 --set early_agreement.early_recipe.steps=100 \
  --set early_agreement.subset=24 --set early_agreement.subset_recipe.steps=200 --set early_agreement.least_per_class=4 \
  --set early_agreement.most_per_class=60 --set early_agreement.tolerance=0.02 \
  --set recognition_curve.net.width=32 --set recognition_curve.moments=48 --set recognition_curve.tested=2000 \
  --set curvature.net.width=32 --set curvature.moments=48 --set curvature.looks=8 --set curvature.last=0 --set curvature.error=0.1 \
  --set curvature.most=8 --set curvature.images=32 --set curvature.top=0 --set herding.net.width=32 --set herding.recipe.steps=300
