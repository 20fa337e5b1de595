"""What every encoder keeps to, with towers that train, are adapted or frozen. A new one is a line in `ENCODERS`."""

from __future__ import annotations

import pytest
import torch

from tests.encoders.test_encoders import ENCODERS, build, pixels, with_modes


@pytest.mark.parametrize("modes", [("full", "full"), ("lora", "lora"), ("lora", "full")], ids="-".join)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name, modes, tmp_path):
    config = with_modes(name, *modes)
    encoder = build(name, **config)
    image = pixels(3, encoder.image_size)
    input_ids = encoder.tokenize(["a red circle", "", "a blue star"])
    assert input_ids.shape[0] == 3 and not torch.is_floating_point(input_ids)
    assert not torch.equal(input_ids[0], input_ids[2])
    assert torch.equal(input_ids, encoder.tokenize(["a red circle", "", "a blue star"]))

    # features are (U, image_dim) and (U, text_dim), of one size where they share a space; rows do not see each other
    assert encoder.image_dim == encoder.text_dim or not encoder.shares_space
    towers = (
        (encoder.encode_image, image, encoder.image_dim),
        (encoder.encode_text, input_ids.long(), encoder.text_dim),
    )
    for encode, values, dim in towers:
        with torch.no_grad():
            features = encode(values) if encoder.train() else None
            features = encoder.eval() and encode(values)
            assert features.shape == (3, dim) and features.isfinite().all()
            assert not torch.allclose(features[0], features[2])
            torch.testing.assert_close(encode(values[1:]), features[1:], rtol=1e-4, atol=1e-5)

    # every parameter that wants a gradient gets one: others would stop data-parallel training
    encoder.train()
    (encoder.encode_image(image).square().sum() + encoder.encode_text(input_ids.long()).square().sum()).backward()
    assert [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []

    # fresh weights have no temperature of their own; a saved folder builds the same architecture and tokenizer
    assert encoder.logit_scale is None and encoder.logit_bias is None
    encoder.eval().save(tmp_path)
    from pydantic import TypeAdapter

    from mmctr.encoders import EncoderConfig

    again = TypeAdapter(EncoderConfig).validate_python(ENCODERS[name] | config).build(tmp_path).eval()
    again.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(again.encode_image(image), encoder.encode_image(image))
        assert torch.equal(again.encode_text(input_ids.long()), encoder.encode_text(input_ids.long()))
    assert torch.equal(again.tokenize(["a red circle"]), encoder.tokenize(["a red circle"]))
    assert again.image_mean.equal(encoder.image_mean) and again.image_std.equal(encoder.image_std)
