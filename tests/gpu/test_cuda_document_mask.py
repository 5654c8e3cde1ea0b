"""The kernel of the document mask on a CUDA device, against the attention by document of the CPU."""

from __future__ import annotations

import pytest
import torch
from support.documents import document_ids
from torch import Tensor

from kempnerforge.model.document_attention import document_attention, document_mask, positions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUTS = [[[300, 1, 723], [1024]], [[128] * 8, [7, 1017]]]


def gradients(inputs: list[Tensor], ids_BT: Tensor) -> list[Tensor]:
    """Return the result and the gradients for queries, keys and values, in fp32 on the CPU."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    mixed = document_attention(q, k, v, document_mask(ids_BT))
    grads = torch.autograd.grad(mixed.float().square().sum(), (q, k, v))
    return [x.detach().float().cpu() for x in (mixed, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 64), ((8, 2), 128), ((3, 1), 6)])
def test_cuda_document_attention_as_on_cpu(dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 1024, count, head_dim) for count in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, generator=generator).transpose(1, 2).to(dtype) for shape in shapes]
    for cut in CUTS:
        ids_BT = document_ids(cut)
        expected = gradients([x.float() for x in inputs], ids_BT)
        found = gradients([x.cuda() for x in inputs], ids_BT.cuda())
        again = gradients([x.cuda() for x in inputs], ids_BT.cuda())
        for ours, same, wanted in zip(found, again, expected, strict=True):
            assert torch.equal(ours, same), "the bits repeat"
            assert (ours - wanted).norm() <= (1e-5 if dtype is torch.float32 else 1e-2) * wanted.norm()
        assert torch.equal(positions(ids_BT.cuda()).cpu(), positions(ids_BT))


def test_cuda_document_attention_makes_no_matrix_of_pairs() -> None:
    seq_len = 32768
    q = torch.randn(1, 1, seq_len, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids_BT = document_ids([[seq_len // 4] * 4]).cuda()
    document_attention(q, q, q, document_mask(ids_BT)).sum().backward()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    document_attention(q, q, q, document_mask(ids_BT)).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < seq_len * seq_len // 8
