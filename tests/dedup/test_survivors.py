"""Who stays: what kin means there. Chains and large clusters are tested through `minhash` and `select`."""

import numpy as np

from dedup.survivors import elect


def test_kin_never_fall_to_each_other_by_either_proof():
    """0 is the parent of 1; 2 is alike to both, falls to 0, and proves nothing about 1."""
    a, b, jaccard = np.array([0, 0, 1]), np.array([1, 2, 2]), np.array([-0.95, 0.9, 0.9])
    assert elect(a, b, jaccard, np.arange(3), 0.75).tolist() == [-1, -1, 0]
    assert elect(a, b, np.abs(jaccard), np.arange(3), 0.75).tolist() == [-1, 0, 0]
