"""What processes send each other."""

from pathlib import Path

import pytest
import torch

from gradlab.engine.messages import packed, unpacked


@pytest.mark.parametrize("dtype", [torch.uint32, torch.bool, torch.float32, torch.int64])
def test_tensors_of_all_types_reach_other_processes(dtype):
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    first = torch.arange(3.0)
    (found, part), said = unpacked(packed(((tensor.mT, first[1:]), {"whole": first, "nan": [3]})))
    assert said.pop("nan") == [3]
    assert torch.equal(part, said.pop("whole")[1:])
    assert found.dtype is dtype
    assert torch.equal(found.long(), tensor.mT.long())


def test_what_is_no_plain_value_is_not_sent():
    with pytest.raises(TypeError, match="PosixPath can't be sent"):
        packed([Path("r")])
