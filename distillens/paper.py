"""What *What is Dataset Distillation Learning?* found, beside what a study finds.

Yang, Zhu, Deng, Russakovsky, ICML 2024: CIFAR-10, 10 images a class, one set a method, one run. Its values stand here on
the scale of our claims, from the authors' notebooks (their figures were measured to +-0.003). Its methods go by our
names: gradient matching is ``dc``, trajectory matching ``mtt``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distillens.core.result import Claim, Estimate

# By falling accuracy (section 3), and the pairs of which it says that the first is recognised far better.
ORDER = ("bptt", "mtt", "dc", "dm")
PAIRS = (("bptt", "dc"), ("bptt", "dm"), ("mtt", "dc"), ("mtt", "dm"))


@dataclass(frozen=True)
class Finding:
    """A finding of the paper: the claim of ours that tests it, and its values by set.

    ``said`` stands in for values on another scale than the claim's.
    """

    name: str
    sentence: str
    analysis: str
    claim: str
    values: Mapping[str, float] = field(default_factory=dict)
    said: str = ""


FINDINGS = (
    Finding(
        "T1",
        "Networks trained on real data recognise distilled images far above chance.",
        "behaviour/recognition",
        "recognised",
        # The mean over its four judges less chance (0.1), with the labels of its figure put right.
        {"bptt": 0.865, "mtt": 0.870, "dc": 0.400, "dm": 0.430},
    ),
    Finding(
        "T1",
        "BPTT and trajectory matching are recognised far better than gradient and distribution matching.",
        "behaviour/recognition",
        "recognised better",
        {
            "bptt than dc": 0.465,
            "bptt than dm": 0.435,
            "mtt than dc": 0.470,
            "mtt than dm": 0.440,
        },
    ),
    Finding(
        "T2",
        "ConvNets recognise them better than ResNets do, beyond what the two do on real images.",
        "behaviour/recognition",
        "recognition falls with distance",
        # (ConvNets - ResNets) on the set, less the same on the test split: 0.746 - 0.918.
        {"bptt": 0.241, "mtt": 0.231, "dc": 0.401, "dm": 0.361},
    ),
    Finding(
        "T3",
        "Accuracy after 300 steps falls in this order: BPTT, trajectory, gradient, distribution matching.",
        "behaviour/accuracy",
        "better",
        {"bptt than mtt": 0.053, "mtt than dc": 0.077, "dc than dm": 0.033, "dm than random_subset": 0.156},
    ),
    Finding(
        "T3",
        "All of them train better networks than a random real subset.",
        "behaviour/accuracy",
        "beats random",
        {"bptt": 0.314, "mtt": 0.259, "dc": 0.174, "dm": 0.156},
    ),
    Finding(
        "T4",
        "Adding about as many real images as they hold (10 a class) lowers their accuracy.",
        "behaviour/mixing",
        "real data hurts",
        {"bptt": -0.089, "mtt": -0.079, "dc": -0.023, "dm": -0.011},
    ),
    Finding(
        "T5",
        "With the most real images added (250 a class there) all sets end at the accuracy of random ones.",
        "behaviour/mixing",
        "converges",
        {"bptt": 0.012, "mtt": 0.008, "dc": 0.004, "dm": 0.006},
    ),
    Finding(
        "T6",
        "Their models predict like real models stopped early rather than like models of little real data.",
        "representativeness/early_agreement",
        "early-stopped",
        said="gaps of +0.067 (dc), +0.111 (dm), +0.058 (mtt), +0.037 (bptt); ours is the gap beyond that of real subsets",
    ),
    Finding(
        "T7",
        "Real training recognises them earlier than unseen real images.",
        "representativeness/recognition_curve",
        "recognised early",
        said="BPTT and trajectory matching reach 1.0 after 100 to 125 updates, where real test accuracy is 0.56",
    ),
    Finding(
        "T8",
        "Early in real training the curvature of the loss on them is above that on real data.",
        "representativeness/curvature",
        "rises above real",
        said="1.65 to 2 times real at update 60",
    ),
    Finding(
        "T8",
        "Later it collapses below it.",
        "representativeness/curvature",
        "curvature collapses",
        said="BPTT and trajectory matching below real from about updates 160 and 205, the others not within 300",
    ),
    Finding(
        "T9",
        "The real images that one distilled image moves most are of its class.",
        "pointwise/leave_one_out",
        "the most moved are of its class",
        said="90 of 90 images shown",
    ),
    Finding(
        "Semantics",
        "The real images that one distilled image moves most share something beyond their class.",
        "pointwise/semantics",
        "semantics beyond class",
        said="shown with a vision-language model; no figures are at hand",
    ),
    Finding(
        "T10",
        "Distilled pixels leave the valid range.",
        "behaviour/pixels",
        "leaves the valid range",
        said="one image each: distribution matching -0.3 to 1.6, trajectory matching -0.4 to 1.5",
    ),
)


@dataclass(frozen=True)
class Row:
    """One finding about one set: the paper's value, ours with its verdict, and how far they are apart.

    ``estimate`` is None where the study did not ask, or could not answer.
    """

    finding: Finding
    subject: str
    published: float | None
    estimate: Estimate | None
    verdict: str

    @property
    def deviation(self) -> float | None:
        """Ours minus the paper's."""
        if self.published is None or self.estimate is None:
            return None
        return self.estimate.value - self.published

    def _words(self) -> str:
        values = "" if self.subject else ", ".join(f"{k} {v:+.3f}" for k, v in self.finding.values.items())
        return self.finding.said or values

    def to_json(self) -> dict[str, Any]:
        """The row as a file keeps it."""
        e = self.estimate
        return {
            "name": self.finding.name,
            "sentence": self.finding.sentence,
            "subject": self.subject,
            "published": self._words() if self.published is None else self.published,
            "estimate": None if e is None else e.to_json(),
            "verdict": self.verdict,
            "deviation": self.deviation,
        }


def beside(claims: Iterable[tuple[str, Claim]], asked: Collection[str]) -> list[Row]:
    """Every finding of the paper beside the claims of a study, given as (analysis, claim); ``asked`` are its analyses.

    One that was asked and made no such claim could not answer: its result says why.
    """
    tested: dict[tuple[str, str], list[Claim]] = {}
    for analysis, claim in claims:
        tested.setdefault((analysis, claim.name.partition(" than ")[0]), []).append(claim)
    rows = []
    for finding in FINDINGS:
        own = tested.get((finding.analysis, finding.claim), [])
        if not own:
            answered = finding.analysis in asked
            rows.append(Row(finding, "", None, None, "not answered" if answered else "not asked"))
        for claim in own:
            against = claim.name.partition(" than ")[2]
            subject = f"{claim.subject} than {against}" if against else claim.subject
            published = finding.values.get(subject)
            rows.append(Row(finding, subject, published, claim.estimate, claim.verdict))
    return rows
