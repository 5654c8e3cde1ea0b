"""The document mask on a CUDA device: its kernel, and a whole model with it.

The test of the model runs on the CPU too.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.documents import alone, document_ids, gradients, targets_of
from torch import Tensor

from kempnerforge.config.schema import ModelConfig
from kempnerforge.model.document_attention import document_attention, document_mask, positions
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama
from kempnerforge.model.recompute import Recompute, recompute_activations

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUTS = [[[300, 1, 723], [1024]], [[128] * 8, [7, 1017]]]


def attention_gradients(inputs: list[Tensor], ids_BT: Tensor) -> list[Tensor]:
    """Return the result and the gradients for queries, keys and values, in fp32 on the CPU."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    mixed = document_attention(q, k, v, document_mask(ids_BT))
    grads = torch.autograd.grad(mixed.float().square().sum(), (q, k, v))
    return [x.detach().float().cpu() for x in (mixed, *grads)]


@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 64), ((8, 2), 128), ((3, 1), 6)])
def test_cuda_document_attention_as_on_cpu(dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 1024, count, head_dim) for count in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, generator=generator).transpose(1, 2).to(dtype) for shape in shapes]
    for cut in CUTS:
        ids_BT = document_ids(cut)
        expected = attention_gradients([x.float() for x in inputs], ids_BT)
        found = attention_gradients([x.cuda() for x in inputs], ids_BT.cuda())
        again = attention_gradients([x.cuda() for x in inputs], ids_BT.cuda())
        for ours, same, wanted in zip(found, again, expected, strict=True):
            assert torch.equal(ours, same), "the bits repeat"
            assert (ours - wanted).norm() <= (1e-5 if dtype is torch.float32 else 1e-2) * wanted.norm()
        assert torch.equal(positions(ids_BT.cuda()).cpu(), positions(ids_BT))


@NEEDS_CUDA
def test_cuda_document_attention_makes_no_matrix_of_pairs() -> None:
    seq_len = 32768
    q = torch.randn(1, 1, seq_len, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids_BT = document_ids([[seq_len // 4] * 4]).cuda()
    document_attention(q, q, q, document_mask(ids_BT)).sum().backward()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    document_attention(q, q, q, document_mask(ids_BT)).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < seq_len * seq_len // 8


MODEL_CUTS = [[[100, 1, 199], [300]], [[128, 128, 44], [1, 299]], [[300], [30] * 10]]
"""Documents that end within blocks of the mask and with them, of one token and of the whole row."""


@pytest.mark.parametrize("compiles_blocks", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_device_masked_model_is_as_documents_alone(
    device: str, recompute: Recompute, compiles_blocks: bool
) -> None:
    """Logits and gradients in fp32, for rows that are cut into other documents each time."""
    config = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, max_seq_len=300)
    plain = Llama(config)
    init_weights_(plain, seed=3, init_std=0.3, n_layers=config.n_layers)
    plain.to(device)
    model = copy.deepcopy(plain)
    torch._dynamo.reset()
    for block in model.fsdp_units():
        recompute_activations(block, recompute)
        if compiles_blocks:
            block.compile(backend="inductor" if device == "cuda" else "aot_eager")
    generator = torch.Generator().manual_seed(5)
    for cut in MODEL_CUTS:
        tokens_BT = torch.randint(config.vocab_size, (2, 300), generator=generator).to(device)
        ids_BT = document_ids(cut).to(device)
        logits, expected_logits = model(tokens_BT, document_ids=ids_BT), alone(plain, tokens_BT, cut)
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
        targets_BT = targets_of(tokens_BT, ids_BT)
        expected = gradients(plain, expected_logits, targets_BT)
        found = gradients(model, logits, targets_BT)
        assert found.keys() == expected.keys() == dict(plain.named_parameters()).keys()
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
