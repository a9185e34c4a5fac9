"""The mask-classification models against the reference's arrays, in float64 and float32."""

import pytest
import torch

from reference_masks import CASES, SIZES, check_array, reference_backbone, reference_image

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


@DTYPES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_features_and_priors_equal_reference(case: str, size: str, dtype: torch.dtype) -> None:
    file = f"eval_{size}.npz"
    backbone = reference_backbone(case).to(dtype)
    with torch.no_grad():
        outputs = backbone(reference_image(case, file).to(dtype), return_priors=True)
    for stage in range(4):
        check_array(case, file, f"feat{stage}", outputs[f"res{stage + 2}"])
        check_array(case, file, f"prior{stage}", outputs[f"prior{stage + 2}"])
