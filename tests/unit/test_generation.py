"""How tokens are chosen, what the model gets, and when a text ends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.weight_cases import make_model
from torch import Tensor, nn

from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import MismatchError, NonFiniteError
from kempnerforge.train.generation import Chooser, Prompt, Sampling, continue_prompt, next_logits

CPU = torch.device("cpu")
PROBABILITIES = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625], dtype=torch.float64)


def chosen(logits: Tensor, count: int = 4000, **settings: Any) -> Counter[int]:
    choose = Chooser(Sampling(**settings))
    return Counter(choose(logits) for _ in range(count))


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(0.01, {1}), (0.49, {1}), (0.51, {1, 3}), (0.74, {1, 3}), (0.76, {1, 3, 0}), (1.0, {0, 1, 2, 3, 4})],
)
def test_top_p_nucleus_ends_with_token_that_reaches_it(top_p: float, nucleus: set[int]) -> None:
    found = chosen(PROBABILITIES.log(), temperature=1.0, top_p=top_p)
    assert set(found) == nucleus
    total = PROBABILITIES[list(nucleus)].sum()
    for token, count in found.items():
        assert count / 4000 == pytest.approx(float(PROBABILITIES[token] / total), abs=0.04)


def test_temperature_scales_logits() -> None:
    found = chosen(PROBABILITIES.log(), temperature=0.5, top_p=1.0)
    squared = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    for token in range(5):
        assert found[token] / 4000 == pytest.approx(float(squared[token]), abs=0.04)
    assert set(chosen(PROBABILITIES.log(), 20, temperature=1e-300, top_p=1.0)) == {1}
    assert set(chosen(PROBABILITIES.log(), 20, temperature=0, top_p=0.5)) == {1}


def test_sampling_seed_decides() -> None:
    logits = torch.zeros(50, dtype=torch.float64)
    first, again, other = (Chooser(Sampling(seed=seed)) for seed in (3, 3, 4))
    # Each token takes one random number, a certain token too.
    again(torch.tensor([0.0, 900.0], dtype=torch.float64))
    first(logits)
    drawn = [first(logits) for _ in range(20)]
    assert drawn == [again(logits) for _ in range(20)]
    assert drawn != [other(logits) for _ in range(20)]


def test_next_logits_padding_is_not_seen() -> None:
    model = make_model(n_kv_heads=2)
    tokens = [5, 9, 60, 3, 1]
    with torch.no_grad():
        plain = next_logits(model, tokens, device=CPU)
        padded = next_logits(model, tokens, multiple_of=4, device=CPU)
        assert torch.equal(plain, model(torch.tensor([tokens]))[0, -1].double())
    torch.testing.assert_close(plain, padded, rtol=1e-5, atol=1e-5)


class Counting(nn.Module):
    """Predicts the token after the last one. It keeps what it was given."""

    def __init__(self, largest: int = 9) -> None:
        super().__init__()
        self.seen: list[list[int]] = []
        self.largest = largest

    def forward(self, tokens_BT: Tensor) -> Tensor:
        self.seen.append(tokens_BT[0].tolist())
        logits = nn.functional.one_hot((tokens_BT + 1) % 10, 10).float()
        logits[..., self.largest + 1 :] = 2.0
        return logits


def texts(model: nn.Module, prompt: Prompt, *, wanted: int = 99, **options: Any) -> tuple[list[int], Any]:
    """Return the new tokens, and the end token."""
    found: list[int] = []

    def keep(token: int) -> bool:
        found.append(token)
        return len(found) < wanted

    sampling = Sampling(max_tokens=options.pop("max_tokens", 6), temperature=0)
    options = {"context_len": 100, "control": ControlGroup(None), "device": CPU} | options
    return found, continue_prompt(model, prompt, sampling, keep, **options)


def test_generation_ends_at_end_token_or_limit() -> None:
    assert texts(Counting(), Prompt([1, 2], 10, {5, 7})) == ([3, 4], 5)
    assert texts(Counting(), Prompt([1, 2], 10, ())) == ([3, 4, 5, 6, 7, 8], None)
    assert texts(Counting(), Prompt([4], 10, {5})) == ([], 5)


def test_generation_context_is_last_tokens() -> None:
    model = Counting()
    texts(model, Prompt([1, 2, 3], 10, ()), context_len=4, max_tokens=4)
    assert model.seen == [[1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]


def test_generation_ids_without_text_are_never_chosen() -> None:
    assert texts(Counting(largest=6), Prompt([1], 7, ()), max_tokens=3)[0] == [2, 3, 4]


def test_generation_unwanted_text_ends() -> None:
    model = Counting()
    assert texts(model, Prompt([1], 10, ()), wanted=2) == ([2, 3], None)
    assert len(model.seen) == 3


def test_generation_model_without_logits_raises() -> None:
    model = nn.Linear(2, 3)
    model.forward = lambda _tokens: torch.zeros(1, 3)  # type: ignore[method-assign]
    with pytest.raises(MismatchError, match=r"Linear returned \(1, 3\) for tokens \[1, 2\]"):
        next_logits(model, [1, 2], device=CPU)


class LossOnly(nn.Module):
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x"].sum()


def test_generation_model_without_forward_raises() -> None:
    with pytest.raises(MismatchError, match=r"LossOnly has no forward\(\)\. To generate text") as caught:
        texts(LossOnly(), Prompt([1], 10, ()))
    assert caught.value.agreed
    assert caught.value.exit_status == 2


def test_generation_logits_not_finite_raises() -> None:
    model = Counting()
    model.forward = lambda tokens_BT: torch.full((1, tokens_BT.size(1), 10), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError):
        texts(model, Prompt([1], 10, ()))
