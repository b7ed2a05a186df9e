#!/usr/bin/env bash
# The main job on real CIFAR-10 at a reduced setting that two cores finish in under an hour: 1 image a class,
# 3 replicates, a quarter of the network's width, and a small share of the authors' steps.
#   benchmarks/cifar10.sh FOLDER_OF_PARQUET_FILES
set -euo pipefail
exec distillens study --data "parquet:$1" --to runs/cifar10 --preset smoke --ipc 1 --replicates 3 \
  --set dm.steps=200 --set dm.net.width=32 \
  --set dc.steps=60 --set dc.net.width=32 --set dc.init=real \
  --set mtt.steps=60 --set mtt.net.width=32 --set mtt.syn_steps=30 --set mtt.experts=2 \
  --set mtt.max_start_epoch=2 --set mtt.expert_epochs=1 --set mtt.lr_lr=1e-6 \
  --set bptt.steps=60 --set bptt.net.width=32 --set bptt.inner_steps=50 --set bptt.init=real --set bptt.lr_img=10 \
  --set herding.net.width=32 --set herding.recipe.steps=300 \
  --set accuracy.net.width=32 --set mixing.net.width=32 --set mixing.real_per_class=0,1,10 \
  --set recognition.recipe.steps=300 --set recognition.seeds=1 \
  --set early_agreement.net.width=32 --set early_agreement.early=4 --set early_agreement.early_recipe.steps=100 \
  --set early_agreement.subset=16 --set early_agreement.subset_recipe.steps=150 \
  --set early_agreement.least_per_class=2 --set early_agreement.most_per_class=30 \
  --set early_agreement.tolerance=0.02 \
  --set leave_one_out.net.width=32 --set leave_one_out.only=dm,dc,mtt,bptt,random_subset
