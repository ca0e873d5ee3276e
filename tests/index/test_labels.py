"""Which rows of a shared collection belong to an index, without a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.index.labels import Labels, make_labels

from .conftest import names, unit


def test_a_label_is_of_id_and_vector() -> None:
    vectors = unit(3, 4, 0)
    labels = make_labels(vectors, names(3))
    assert labels.min() >= 0
    assert len({*labels.tolist()}) == 3
    assert make_labels(vectors[:1], ["other"])[0] != labels[0]
    assert make_labels(vectors[1:2], names(1))[0] != labels[0]
    assert make_labels(vectors[:1], names(1))[0] == labels[0]


def test_rows_are_found_by_label() -> None:
    labels = Labels(np.array([30, 10, 20]))
    positions, ours = labels.find(np.array([10, 15, 20, 30, 99]))
    assert ours.tolist() == [True, False, True, True, False]
    assert positions[ours].tolist() == [1, 2, 0]


def test_what_is_removed_is_deleted_two_saves_later(tmp_path: Path) -> None:
    """The state saved before it was removed may still be in use."""
    first = Labels(np.array([30, 10, 20]))
    fewer = first.without(np.array([True, False, True]))
    assert (first.rows.tolist(), first.removed) == ([30, 10, 20], frozenset())
    assert (fewer.rows.tolist(), fewer.removed, fewer.obsolete, fewer.foreign) == ([30, 20], {10}, frozenset(), {10})
    saved = fewer.save(tmp_path)
    assert (saved.removed, saved.obsolete) == (frozenset(), {10})
    loaded = Labels.load(tmp_path)
    assert (loaded.rows.tolist(), loaded.removed, loaded.obsolete, loaded.foreign) == ([30, 20], frozenset(), {10}, {10})
    again = loaded.with_foreign({77}).with_added(np.array([10]))
    assert (again.rows.tolist(), again.obsolete, again.foreign) == ([30, 20, 10], frozenset(), {77})
    assert again.find(np.array([10]))[0].tolist() == [2]


def test_two_rows_with_one_label_are_refused() -> None:
    with pytest.raises(ValueError, match="two rows have the same hash"):
        Labels(np.array([1, 2])).with_added(np.array([2]))
