"""While attention is differentiated, and only then, torch is asked for deterministic algorithms.

What that changes shows on a GPU alone (test_cuda.py); that it is asked for shows anywhere.
"""

from collections import defaultdict

import pytest
import tiny
import torch
import torch.nn.functional as F
from mergekit.options import MergeOptions
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_dam.config import read_recipe
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.model.attention import in_one_order
from mergekit_dam.model.recompute import run

DEFAULT, WARN, ERROR = 0, 1, 2  # torch's modes
KERNEL = "_scaled_dot_product"


class Modes(TorchDispatchMode):
    """The modes in which every operation runs."""

    def __init__(self):
        super().__init__()
        self.of: dict[str, set[int]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.__name__].add(torch.get_deterministic_debug_mode())
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_it_was():
    plain = F.scaled_dot_product_attention
    yield
    assert F.scaled_dot_product_attention is plain
    assert torch.get_deterministic_debug_mode() == DEFAULT
    assert deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("recompute", ["block", "weights", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_is_strict_in_the_kernels_alone(recipe, tmp_path, name, recompute) -> None:
    models = tiny.save_models(tmp_path, tiny.CONFIGS[name], 2)
    merged = prepare(
        read_recipe(str(recipe(models))), MergeOptions(quiet=True), device="cpu"
    ).merged
    merged.recompute = recompute
    with Modes() as modes:
        merged(tiny.tokens()).square().mean().backward()
    (kernel,) = {name for name in modes.of if name.startswith(KERNEL) and "backward" in name}
    assert modes.of.pop(kernel) == {ERROR}
    del modes.of["detach.default"]  # autograd's own, of what it kept for the kernel
    assert set().union(*modes.of.values()) == {DEFAULT}


class Attention(torch.nn.Module):
    """A block that ends with it: its gradients are the first that ask for what was kept."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(8))
        self.tensors = ()

    def run_each(self, calls, weights):
        return [self(*args) for args, _ in calls]

    def weights(self, view, *, whole):
        return {"weight": self.weight}

    def forward(self, x):
        found = x @ self.weight
        return F.scaled_dot_product_attention(found, found, found)


def test_what_is_made_again_for_a_kernel_is_made_as_it_was() -> None:
    with Modes() as modes:
        (result,) = run(Attention(), [((heads(),), {})], "block")
        result.sum().backward()
    assert modes.of["mm.default"] == {DEFAULT}


def heads(width: int = 8) -> torch.Tensor:
    return torch.randn(1, 2, 5, width, requires_grad=True)


def modes_of(result: torch.Tensor) -> set[int]:
    with Modes() as modes:
        result.sum().backward()
    (found,) = (f for name, f in modes.of.items() if name.startswith(KERNEL))
    return found


def test_heads_that_are_padded(monkeypatch) -> None:
    plain = F.scaled_dot_product_attention

    def padded(*args, **kwargs):
        return plain(*(F.pad(each, (0, 3)) for each in args), **kwargs)[..., :-3]

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", padded)
        with in_one_order():
            result = F.scaled_dot_product_attention(*[heads(5)] * 3)
    assert modes_of(result) == {ERROR}


def test_what_is_no_kernels_is_left_alone() -> None:
    with in_one_order():
        masked = F.scaled_dot_product_attention(
            *[heads()] * 3, attn_mask=torch.randn(5, 5, requires_grad=True)
        )
        with torch.no_grad():
            assert F.scaled_dot_product_attention(*[heads()] * 3).grad_fn is None
    with Modes() as modes:
        masked.sum().backward()
    assert set().union(*modes.of.values()) == {DEFAULT}


def test_a_mode_of_the_users_stays() -> None:
    with in_one_order():
        result = F.scaled_dot_product_attention(*[heads()] * 3)
    torch.set_deterministic_debug_mode(WARN)
    try:
        assert modes_of(result) == {ERROR}
        assert torch.get_deterministic_debug_mode() == WARN
    finally:
        torch.set_deterministic_debug_mode(DEFAULT)


def test_after_a_kernel_that_failed_the_next_pass_is_as_any() -> None:
    class Fails(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.__name__.startswith(KERNEL):
                raise MemoryError
            return func(*args, **(kwargs or {}))

    with in_one_order():
        result = F.scaled_dot_product_attention(*[heads()] * 3)
    with pytest.raises(MemoryError), Fails():
        result.sum().backward()
    with in_one_order():
        assert torch.get_deterministic_debug_mode() == DEFAULT
