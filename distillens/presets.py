"""What a study does unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("dm", "dc", "mtt", "bptt")
BASELINES = ("random_subset", "herding")


@dataclass(frozen=True)
class Preset:
    """A design of a study by name.

    ``analyses`` are asked in this order, all there are where it is empty. ``published`` asks them by the paper's
    protocol in place of the defaults for the data. ``whole`` lists the sizes at which single points are asked about in
    every method; at others in the first method only (they retrain once a point). ``inits`` are their initialisations.
    """

    name: str
    about: str
    ipc: tuple[int, ...]
    replicates: int
    methods: tuple[str, ...] = METHODS
    analyses: tuple[str, ...] = ()
    whole: tuple[int, ...] | None = None
    inits: int = 3
    published: bool = False


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "quick",
            "four methods, 1 and 10 images a class, 5 replicates; every analysis but the longest",
            (1, 10),
            5,
            # Those that train every set many times over, or follow training in depth, are asked one at a time, or in full.
            analyses=(
                "behaviour/accuracy",
                "behaviour/recognition",
                "behaviour/feature_map",
                "behaviour/pixels",
                "behaviour/mixing",
                "behaviour/robustness",
                "behaviour/fairness",
                "representativeness/early_agreement",
                "representativeness/recognition_curve",
                "pointwise/leave_one_out",
            ),
            whole=(1,),
        ),
        Preset(
            "full",
            "every analysis, 10 replicates, leave-one-out of every set from 5 initialisations",
            (1, 10),
            10,
            inits=5,
        ),
        Preset(
            "smoke",
            "the least that passes through every room",
            (1,),
            2,
            analyses=(
                "behaviour/accuracy",
                "behaviour/mixing",
                "behaviour/recognition",
                "pointwise/leave_one_out",
                "representativeness/early_agreement",
            ),
            whole=(),
            inits=2,
        ),
        Preset(
            "wddl",
            "Yang et al. 2024, experiment by experiment at the published settings; 3 replicates where it has one",
            (10,),
            3,
            # By falling accuracy, as the paper finds them.
            methods=("bptt", "mtt", "dc", "dm"),
            # In the order of the paper's figures; then what its first table of accuracies rests on.
            analyses=(
                "behaviour/recognition",
                "behaviour/feature_map",
                "behaviour/pixels",
                "behaviour/mixing",
                "behaviour/accuracy",
                "representativeness/early_agreement",
                "representativeness/recognition_curve",
                "representativeness/curvature",
                "pointwise/leave_one_out",
                "pointwise/semantics",
            ),
            published=True,
        ),
    )
}
