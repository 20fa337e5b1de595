"""What every head keeps to. A new one is a line in `HEADS`."""

from __future__ import annotations

import pytest
import torch

from tests.encoders.test_heads import HEADS, B, batch, build


@pytest.mark.parametrize("name", HEADS)
def test_head(name):
    head, (features, has) = build(name), batch()
    # terms are named scalars of the loss, and random alone through torch's generator
    torch.manual_seed(3)
    terms = head(features, has)
    assert "rebuild" in terms and all(value.shape == () and value.isfinite() for value in terms.values())
    again = build(name)
    torch.manual_seed(3)
    for key, value in again(features, has).items():
        assert torch.equal(value, terms[key])

    # latents are the same whatever else is in the batch, one modality or both; nothing says the prior
    head.eval()
    mu, logvar = head.posterior(features, has)
    assert mu.shape == logvar.shape == (B, 3)
    part = {n: x[4:7] for n, x in features.items()}, {n: x[4:7] for n, x in has.items()}
    torch.testing.assert_close(head.posterior(*part)[0], mu[4:7])
    nothing = {n: torch.zeros(B, dtype=torch.bool) for n in has}
    prior = head.posterior(features, nothing)
    assert not prior[0].any() and not prior[1].any()

    # what is rebuilt has the sizes of the features; numbers are finite and read nothing random
    rebuilt = head.decode(mu)
    assert {n: x.shape for n, x in rebuilt.items()} == {n: x.shape for n, x in features.items()}
    numbers = head.numbers(features, has)
    assert numbers == head.numbers(features, has) and set(numbers) >= {"elbo", "kl", "active", "explained_image"}

    # a saved head goes on: all that it has learned is in its state
    copy = build(name).eval()
    copy.load_state_dict(head.state_dict())
    assert torch.equal(copy.posterior(features, has)[0], mu)
