"""Agreement of clusters with labels, against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from ser_core.clustering.agreement import agreement, agreement_by_k
from ser_core.clustering.pseudo_labels import read_labels, write_labels
from ser_core.errors import InputError

Pairs = list[tuple[int, int]]


def columns(pairs: Pairs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    table = np.asarray(pairs, dtype=np.int64)
    return table[:, 0], table[:, 1]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), min_size=1, max_size=60))
@example([(3, 1)] * 7)  # one cluster, one label
@example([(3, 1), (3, 0)])  # one cluster
@example([(3, 1), (5, 1)])  # one label
@example([(4, 0), (4, 0), (9, 1), (9, 1)])  # the same, by other names
def test_equal_to_scikit_learn(pairs: Pairs) -> None:
    """Purity from its contingency table, and its normalised mutual information; clusters and labels that nothing has do not count."""
    clusters, labels = columns(pairs)
    found = agreement(clusters, labels)
    assert found.purity == pytest.approx(contingency_matrix(labels, clusters).max(axis=0).sum() / len(labels))
    assert found.nmi == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-9)
    assert 0 <= found.nmi <= 1


def test_every_frame_has_the_label_of_its_utterance(tmp_path: Path) -> None:
    """Of an artifact as the cluster stage writes it, for each k, smallest first."""
    ids, frames = ["u", "v", "w"], np.asarray([2, 3, 1])
    rng = np.random.default_rng(0)
    for k in (6, 2):
        (tmp_path / str(k)).mkdir()
        write_labels(tmp_path / str(k), ids, rng.integers(0, k, 6).astype(np.int32), frames, np.zeros((k, 4), np.float32))
    found = agreement_by_k(ids, [1, 0, 1], {6: tmp_path / "6", 2: tmp_path / "2"})
    assert list(found) == [2, 6]
    for k, each in found.items():
        clusters = read_labels(tmp_path / str(k), ids)
        assert [len(one) for one in clusters] == [2, 3, 1]
        assert each == agreement(np.concatenate(clusters), np.asarray([1, 1, 0, 0, 0, 1]))
    with pytest.raises(InputError, match="other utterances"):
        agreement_by_k(ids[:2], [1, 0], {2: tmp_path / "2"})


@pytest.mark.parametrize(("clusters", "labels"), [([], []), ([0, 1], [0])])
def test_frames_without_labels_are_refused(clusters: list[int], labels: list[int]) -> None:
    with pytest.raises(ValueError, match="one of each"):
        agreement(np.asarray(clusters, dtype=np.int64), np.asarray(labels, dtype=np.int64))
