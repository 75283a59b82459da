"""The checksum of a tensor: a sum over its parts that knows where each of them stands.

Layer: pure.
"""

import pytest
import torch

from megatron_sod.reshard.checksum import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checksum_is_the_sum_of_its_parts_and_knows_their_place(dtype):
    whole = torch.randn(37, 24).to(dtype)
    total = int(checksum(whole, dim=0, start=0))
    rows = [checksum(whole[a:b], dim=0, start=a) for a, b in ((0, 5), (5, 30), (30, 37))]
    columns = [checksum(whole[:, a:b], dim=1, start=a) for a, b in ((0, 8), (8, 24))]
    assert int(sum(rows)) == int(sum(columns)) == total
    assert int(checksum(whole.flip(0), dim=0, start=0)) != total
    assert int(checksum(whole.roll(8, 1), dim=0, start=0)) != total
    assert int(checksum(whole, dim=0, start=1)) != total
    changed = whole.clone()
    changed[36, 23] += 1
    assert int(checksum(changed, dim=0, start=0)) != total


def test_checksums_of_odd_widths_do_not_depend_on_strides_or_alignment():
    whole = torch.randn(9, 7).bfloat16()  # 14-byte rows
    for dim, start, length in ((0, 2, 5), (1, 1, 3), (1, 2, 4)):
        part = whole.narrow(dim, start, length)
        sum_of_view = int(checksum(part, dim=dim, start=start))
        assert int(checksum(part.contiguous(), dim=dim, start=start)) == sum_of_view
    vector = torch.randn(11)
    parts = [checksum(vector[a:b], dim=0, start=a) for a, b in ((0, 4), (4, 11))]
    assert len({int(p) for p in parts}) == 2
