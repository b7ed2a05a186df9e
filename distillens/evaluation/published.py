"""The published protocols, one a row of the field's table: what each paper's code does with a finished set.

Small images by their code at 32 pixels and ten classes (CIFAR-10) wherever it has several settings. Each says in ``quirks`` where
its published figures are not made like this. Storage is never rounded to JPEG or 8 bits here, as SRe2L and RDED do.
"""

from __future__ import annotations

from distillens.core.recipe import Recipe
from distillens.evaluation.protocol import NEUTRAL, WDDL, Protocol
from distillens.evaluation.teaching import Teaching
from distillens.nets.convnet import ConvNet
from distillens.nets.resnet18 import ResNet18

SIAMESE = "color_crop_cutout_flip_scale_rotate"  # one of them a step, for each image its own numbers
ONE_MORE = "The code counts one pass more than the paper, as here; its rate falls another pass later."
ALONG = (
    "Published is the best of many looks at the test split along the distillation, each at another set. "
    "A finished set leaves nothing to choose: last counts, and that optimism is not in our figures."
)

DC = Protocol(
    "dc",
    "Zhao et al. 2021: 300 passes, SGD 0.01, momentum 0.9, decay 5e-4, a tenth from half-time; no augmentation",
    Recipe(steps=301, batch=256, weight_decay=5e-4, schedule="tenth_at_half"),
    passes=301,
    labels="hard",
    nets=20,
    quirks=(ONE_MORE, "MNIST and networks with batch norm were augmented: here nothing is."),
)
DSA = Protocol(
    "dsa",
    "Zhao & Bilen 2021, 2023 (DSA, DM): as dc for 1,000 passes with siamese-style augmentation",
    Recipe(steps=1001, batch=256, weight_decay=5e-4, schedule="tenth_at_half", augment=SIAMESE),
    passes=1001,
    labels="hard",
    nets=20,
    quirks=(ONE_MORE,),
)
IDC = Protocol(
    "idc",
    "Kim et al. 2022: 1,000 passes of batches of 64, SGD 0.01, momentum 0.9, decay 5e-4, a fifth at 2/3 and 5/6; "
    "colour, crop, CutMix with chance 0.5",
    Recipe(
        steps=1000,
        batch=64,
        weight_decay=5e-4,
        schedule="fifth_at_4_and_5_sixths",
        augment="color+crop",
        cutmix=0.5,
    ),
    passes=1000,
    labels="hard",
    nets=3,
    quirks=(
        "ImageNet's passes go by images a class: here they are 1,000.",
        "The code prints the best look too.",
    ),
)
MTT = Protocol(
    "mtt",
    "Cazenavette et al. 2022, Cui et al. 2023, Du et al. 2023 (MTT, TESLA, FTD): as dsa, at the step size that the set learned",
    DSA.recipe,
    passes=1001,
    learned_rate=True,
    labels="hard",
    nets=5,
    quirks=(
        ONE_MORE,
        ALONG,
        "Sets without a learned step size are trained at 0.01.",
        "FTD's averaged sets were looked at with networks trained before: here all are fresh.",
        "TESLA's soft labels are ImageNet's only.",
    ),
)
DATM = Protocol(
    "datm",
    "Guo et al. 2024: as mtt in batches of 128, with the soft labels that the set learned",
    DSA.recipe.but(batch=128),
    passes=1001,
    learned_rate=True,
    nets=5,
    quirks=(ONE_MORE, ALONG, "Sets without learned labels or step size keep hard labels and 0.01."),
)
WANG2018 = Protocol(
    "wang2018",
    "Wang et al. 2018: the set's own steps, replayed from 200 initialisations",
    Recipe(steps=30, lr=0.02, momentum=0.0),
    learned_rate=True,
    labels="hard",
    nets=200,
    quirks=(
        "Sets without steps of their own take 30 full-batch steps of plain gradient descent at their learned rate, "
        "else at 0.02, where the method begins: nobody tuned that for them.",
    ),
)
RTP = Protocol(
    "rtp",
    "Deng & Russakovsky 2022: 300 passes of batches of 640, SGD 0.01, momentum 0.9, nothing else",
    Recipe(steps=300, batch=640),
    passes=300,
    labels="hard",
    nets=10,
    quirks=(ALONG, "Some of its sets were augmented (flip, rotate): here none is."),
)
RAT_BPTT = Protocol(
    "rat_bptt",
    "Feng et al. 2024: 3,000 full-batch steps of Adam 0.001, flip or rotation, the best of four looks at the test split",
    Recipe(steps=3000, optimiser="adam", lr=0.001, momentum=0.0, augment="flip_rotate"),
    moments=(300, 600, 1000, 3000),
    selection="best_test",
    nets=8,
    quirks=("The batch is the distillation's, which can be part of the set: here it is the whole set.",),
)
KIP = Protocol(
    "kip",
    "Nguyen et al. 2021: squared error on the set's labels, a ConvNet of width 1,024 without norm, tuned",
    Recipe(steps=1000),
    rates=(0.001, 0.003, 0.01, 0.03, 0.1),
    selection="best_validation",
    labels="targets",
    net=ConvNet(width=1024, norm="none"),
    quirks=(
        "Only the finite network: ridge regression with the infinite one's kernel is not a training, and not here.",
        "The paper tunes optimiser, rate and length and does not say on what: here it is SGD's rate, on validation.",
    ),
)
FREPO = Protocol(
    "frepo",
    "Zhou et al. 2022: squared error on the set's labels, Adam 3e-4, warm-up and cosine, 1,000 to 40,000 steps by size",
    Recipe(
        steps=1000,
        batch=500,
        optimiser="adam",
        lr=3e-4,
        momentum=0.0,
        schedule="warm_up_cosine",
        augment=SIAMESE,
    ),
    sizes=(10, 100, 500, 1000, 5000),
    steps_by_size=(1000, 2000, 5000, 10_000, 40_000),
    labels="targets",
    net=ConvNet(norm="none"),
    nets=5,
    quirks=(
        "Theirs has widths 128, 256, 512: here all are 128.",
        "Labels that a set has not learned are one-hot - 1/k; theirs are over sqrt(k / 10), the same for ten classes.",
    ),
)
NCFM = Protocol(
    "ncfm",
    "Wang et al. 2025: 2,000 passes of batches of 128, AdamW 0.001, half at each fifth, colour, flip, one move, CutMix; "
    "the best look at the test split",
    Recipe(
        steps=2000,
        batch=128,
        optimiser="adamw",
        lr=0.001,
        weight_decay=5e-4,
        schedule="half_at_fifths",
        augment="flip+color+crop_scale_rotate",
        cutmix=0.5,
    ),
    passes=2000,
    moments=tuple(range(200, 2001, 200)),
    selection="best_test",
    labels="hard",
    nets=10,
    quirks=(
        "The code looks more often than ten times, which makes for more optimism.",
        "Tiny ImageNet's 300 and 40 passes are not followed.",
        "The evaluation's decay differs between its configurations: here it is the distillation's, 5e-4.",
    ),
)
SRE2L = Protocol(
    "sre2l",
    "Yin et al. 2023: ResNet-18, 300 passes of AdamW 0.001, decay 0.01, cosine, crop, flip, CutMix; a teacher's labels for "
    "every view, temperature 20",
    Recipe(
        steps=300,
        batch=128,
        optimiser="adamw",
        lr=0.001,
        weight_decay=0.01,
        schedule="cosine",
        augment="crop+flip",
        cutmix=1.0,
    ),
    passes=300,
    teaching=Teaching(
        Recipe(batch=128, lr=0.1, weight_decay=5e-4, schedule="cosine", augment="crop+flip"),
        passes=200,
        temperature=20.0,
        views=300,
    ),
    net=ResNet18(norm="batch"),
    nets=3,
    quirks=(
        "Crop and flip of small images, where ImageNet's are resized crops; CutMix, where CIFAR-100's script mixes up.",
        "A mixed image has shares of two labels; theirs is what the teacher says of the mix.",
        "300 views: with several batches a pass they come around again.",
        "The rate follows its cosine step by step, theirs pass by pass. Their images went through 8-bit JPEG.",
    ),
)
RDED = Protocol(
    "rded",
    "Sun et al. 2024: ResNet-18, 300 passes of AdamW 0.001, decay 0.01, half a cosine, flip, CutMix; a teacher's labels, "
    "temperature 20; the best look at the test split in the last fifth",
    Recipe(
        steps=300,
        batch=100,
        optimiser="adamw",
        lr=0.001,
        weight_decay=0.01,
        schedule="half_cosine",
        augment="flip",
        cutmix=1.0,
    ),
    passes=300,
    moments=(250, 260, 270, 280, 290, 300),
    selection="best_test",
    batch_by_ipc=((1, 10), (10, 50)),
    teaching=SRE2L.teaching,
    net=ResNet18(norm="batch"),
    nets=3,
    quirks=(
        "Their teacher looks anew at every mixed image: here it labels 300 views beforehand, and a mix has shares.",
        "At 32 pixels their crop and patch shuffle do nothing; larger images' are not followed.",
        "Their student's statistics saw each batch twice (a second forward pass), and their images were 8-bit JPEG.",
        "The teacher's own training is not published: here it is SRe2L's.",
    ),
)
DC_BENCH = Protocol(
    "dc_bench",
    "Cui et al. 2022: as dsa with the augmentation of full training (crop, flip), whatever step size the set learned",
    DSA.recipe.but(augment="crop+flip"),
    passes=1001,
    labels="hard",
    quirks=(
        ONE_MORE,
        "Its arms without augmentation and with siamese-style augmentation are dc and dsa; AutoAugment and RandAugment "
        "are not here.",
        "It reports the last of five sets: here every replicate counts.",
    ),
)
DD_RANKING_HARD = Protocol(
    "dd_ranking_hard",
    "Li et al. 2025 (DD-Ranking), hard labels: 300 passes, SGD, momentum 0.9, decay 5e-4, the rate tuned for every set",
    Recipe(steps=300, batch=256, weight_decay=5e-4, schedule="tenth_at_half"),
    rates=(0.001, 0.005, 0.01, 0.05, 0.1),
    selection="best_validation",
    passes=300,
    labels="hard",
    nets=5,
    quirks=(
        "Their rate, and the pass that counts, are the best on the test split: here the rate is the best on validation, "
        "and the last pass counts.",
        "Their schedule is configured method by method: here it is a tenth from half-time.",
    ),
)
DD_RANKING_SOFT = Protocol(
    "dd_ranking_soft",
    "Li et al. 2025 (DD-Ranking), soft labels: as dd_ranking_hard, with one label an image by one teacher for all sets",
    DD_RANKING_HARD.recipe,
    rates=DD_RANKING_HARD.rates,
    selection="best_validation",
    passes=300,
    teaching=Teaching(
        Recipe(batch=256, weight_decay=5e-4, schedule="cosine"),
        passes=60,
        temperature=4.0,
    ),
    nets=5,
    quirks=(
        *DD_RANKING_HARD.quirks,
        "Their sets keep their own method's soft labels and loss; here one teacher labels them and the random images alike.",
        "Teacher and temperature are configured method by method: ours are an equal network, 60 passes, temperature 4.",
    ),
)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        *(NEUTRAL, WDDL, DC, DSA, IDC, MTT, DATM, WANG2018, RTP, RAT_BPTT, KIP, FREPO, NCFM, SRE2L, RDED),
        *(DC_BENCH, DD_RANKING_HARD, DD_RANKING_SOFT),
    )
}
