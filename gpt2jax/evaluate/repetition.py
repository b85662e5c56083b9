"""How much a generated text repeats itself."""

from __future__ import annotations

from collections.abc import Sequence


def repetition(token_ids: Sequence[int]) -> dict[str, float | None]:
    """Figures of one text; None where it has no n-gram of that size.

    Returns:
        distinct_1, distinct_2: different 1-grams and 2-grams over all of them, 1 = none occurs twice.
        repeated_4: share of the 4-grams that occurred before in the text, 0 = none.

    Source: distinct-n of Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models";
    repeated n-grams (seq-rep-4) of Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training".
    """
    four = distinct(token_ids, 4)
    return {
        "distinct_1": distinct(token_ids, 1),
        "distinct_2": distinct(token_ids, 2),
        "repeated_4": None if four is None else 1.0 - four,
    }


def distinct(token_ids: Sequence[int], n: int) -> float | None:
    """Different n-grams over all n-grams; None if there are none."""
    grams = list(zip(*(token_ids[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None
