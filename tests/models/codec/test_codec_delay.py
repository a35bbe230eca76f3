"""The delay pattern: exact inverse, where everything goes, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.codec.delay import delay, training_pair, undelay


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.sampled_from([torch.int64, torch.int32, torch.uint8])
)
def test_undelay_inverts_delay_exactly(batch, n_codebooks, frames, dtype):
    codes = torch.randint(0, 200, (batch, n_codebooks, frames)).to(dtype)
    delayed = delay(codes, pad=255)
    assert delayed.shape == (batch, n_codebooks, frames + n_codebooks - 1)
    assert delayed.dtype == dtype
    assert torch.equal(undelay(delayed), codes)


def test_codebook_k_moves_k_steps_and_leaves_pad():
    codes = torch.arange(6).view(1, 2, 3)
    assert delay(codes, pad=9).tolist() == [[[0, 1, 2, 9], [9, 3, 4, 5]]]


def test_eight_seconds_of_encodec_are_607_steps():
    inputs, targets = training_pair(torch.zeros(1, 8, 600, dtype=torch.long), pad=1024, bos=1025)
    assert inputs.shape == targets.shape == (1, 8, 607)


def test_inputs_are_the_targets_one_step_later_behind_bos():
    codes = torch.randint(0, 50, (2, 4, 7))
    inputs, targets = training_pair(codes, pad=50, bos=51)
    assert (inputs[..., 0] == 51).all()
    assert torch.equal(inputs[..., 1:], targets[..., :-1])
    assert int((targets != 50).sum()) == codes.numel()


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"expected \[B, K, T\] with T >= 1"):
        delay(torch.zeros(1, 3, 0), pad=0)
    with pytest.raises(ValueError, match="no frame is complete"):
        undelay(torch.zeros(1, 3, 2))
