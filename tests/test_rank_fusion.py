"""Fusing rankings by their ranks."""

from __future__ import annotations

import numpy as np

from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.ranking.rank_fusion import reciprocal_rank_fusion


def in_order(*rows):
    return Hits.from_order(np.array(rows))


def test_rank_fusion_by_hand():
    """Row 7: 1/61 + 1/62. Row 5: 1/61 + 1/63. Row 9, in one ranking alone: 1/62."""
    one, other = in_order([5, 7, -1], [-1, -1, -1]), in_order([7, 9, 5], [2, 1, -1])
    assert reciprocal_rank_fusion([one, other]).tolist() == [[7, 5, 9], [2, 1, -1]]


def test_a_ranking_of_little_weight_only_adds_what_the_other_lacks():
    """With a tenth of the weight, rank 1 has 1/610 points, and rank 3 of the other 1/63."""
    one, other = in_order([5, 7, 3, -1]), in_order([9, 7, 5, 1])
    assert reciprocal_rank_fusion([one, other], [1.0, 0.1]).tolist() == [[5, 7, 3, 9]]
    assert reciprocal_rank_fusion([one, other], [0.1, 1.0]).tolist() == [[7, 5, 9, 1]]


def test_where_words_cannot_tell_products_apart_the_other_ranking_does_whatever_its_weight():
    """Rows 4 and 6 share rank 2.5 of the words.

    The index puts 6 before 4, and 8, which words put last, first.
    """
    words = Hits(np.array([[3.0, 1.0, 1.0, 0.5]], np.float32), np.array([[2, 4, 6, 8]]))
    assert words.mean_ranks().tolist() == [[1, 2.5, 2.5, 4]]
    assert reciprocal_rank_fusion([words, in_order([8, 6, 4, 2])], [1000.0, 1.0]).tolist() == [
        [2, 6, 4, 8]
    ]
    assert reciprocal_rank_fusion([words, in_order([8, 6, 4, 2])], [0.001, 1.0]).tolist() == [
        [8, 6, 4, 2]
    ]
