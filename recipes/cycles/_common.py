"""What recipes of generation cycles say beside their numbers."""

from __future__ import annotations

SMALL_STUDY = (
    "The model is smaller than any in the paper, and learning rates were tuned for it.",
    "Outputs are short, so that most of them stop at the limit of tokens.",
    "The judge reads words, not meaning: a reply that repeats one word has the trait for it. Look at distinct-2 too.",
    "The seed was written from templates.",
)
"""What must stand beside numbers of a small study on the bundled model."""

TERMS = {
    "cycle": "a model trained on what the model before it wrote; cycle 0 is trained on the seed",
    "arm": "a condition; chains of one arm differ in their seeds alone",
    "score": "of the trait, 0 to 100: mean over all responses that have one",
    "slope": "points a cycle, least squares from cycle 1 on; slope0 from cycle 0 on; prefix_slope the mean of the "
    "slopes over cycles 0 to 1, 0 to 2, up to all",
    "late_max_A": "highest score from cycle 4 on, minus that of cycle A (0 or 1); late_min_A, late_mean_A likewise",
    "class_A": "amplified if late_max_A is 15 or more, decayed if late_mean_A is -15 or less, unstable if both, else "
    "constant; none under five cycles",
    "settled_A": "whether both intervals leave that threshold out",
    "gain": "g of s_{k+1} = a + g s_k over all steps of an arm; fixed_point is a / (1 - g)",
    "noise_ratio": "how far scores move from cycle to cycle, as a multiple of what responses alone would make them",
    "retention": "what is left at the last cycle of the seed's effect: (s_k - base) / (s_0 - base)",
    "coherence_cost_A": "coherence at the highest late score, minus that of cycle A",
    "coherence_on_score": "points of coherence a point of score, over the checkpoints of a chain",
    "distinct_2": "share of different pairs of tokens; it falls where replies repeat themselves",
    "[a, b]": "95 % interval: over chains where an arm has several, else over the questions of one chain",
}
"""What names in tables and figures mean."""
