"""The mask-classification models against the reference's arrays, in float64 and float32."""

import pytest
import torch

from reference_masks import (
    CASES,
    SIZES,
    check_array,
    reference_backbone,
    reference_image,
    reference_pixel_decoder,
)

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


@DTYPES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_features_and_pixel_decoder_equal_reference(
    case: str, size: str, dtype: torch.dtype
) -> None:
    file = f"eval_{size}.npz"
    backbone = reference_backbone(case).to(dtype)
    decoder = reference_pixel_decoder(case).to(dtype)
    with torch.no_grad():
        outputs = backbone(reference_image(case, file).to(dtype), return_priors=True)
        mask_features, multi_scale_features = decoder(outputs)
    for stage in range(4):
        check_array(case, file, f"feat{stage}", outputs[f"res{stage + 2}"])
        check_array(case, file, f"prior{stage}", outputs[f"prior{stage + 2}"])
    check_array(case, file, "mask_features", mask_features)
    height, width = map(int, size.split("x"))
    assert [tuple(each.shape) for each in multi_scale_features] == [
        (1, decoder.channels, height // stride, width // stride) for stride in decoder.strides
    ]
