"""The chunked loss on a CUDA device, where products of bf16 matrices are summed in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kempnerforge.train.losses.chunked_cross_entropy import chunked_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_chunked_loss_is_as_precise_as_plain(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    hidden = torch.randn(2, 300, 64, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(5000, 64, generator=generator, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(5000, (2, 300), generator=generator, device="cuda")
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]

    def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, w).flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")

    expected = torch.autograd.grad(plain(*exact) / 600, exact)
    others = torch.autograd.grad(plain(hidden, weight) / 600, (hidden, weight))
    loss, _ = chunked_cross_entropy(hidden, targets, weight, chunk_tokens=128)
    found = torch.autograd.grad(loss / 600, (hidden, weight))
    for ours, other, wanted in zip(found, others, expected, strict=True):
        error, known = ((one.double() - wanted).norm().item() for one in (ours, other))
        assert error <= max(1.05 * known, 1e-6 * wanted.norm().item())
