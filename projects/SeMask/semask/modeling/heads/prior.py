"""The decoder of the semantic-prior maps, used in training only (arXiv 2112.12782, section 3.3)."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from semask.modeling.layers.resize import double, resize


class SemanticPriorHead(nn.Module):
    """Up-sample each stage's prior map to the common stride and sum them. No parameters.

    Args:
        strides: stride of each prior map, by name, e.g. ``{"prior2": 4, "prior3": 8}``.
        common_stride: stride of the output.
    """

    def __init__(self, *, strides: Mapping[str, int], common_stride: int = 4) -> None:
        super().__init__()
        self.doublings = {
            name: max(0, int(math.log2(stride / common_stride))) for name, stride in strides.items()
        }

    def forward(self, priors: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Prior logits at the common stride.

        Args:
            priors: {name: (B, K, h, w)}; entries that are no prior maps are passed over.
            size: height and width of the output, in tokens of the common stride.

        Returns:
            (B, K, *size).

        Raises:
            ValueError: a prior map is missing.
        """
        missing = [name for name in self.doublings if name not in priors]
        if missing:
            raise ValueError(
                f"The backbone returned no {', '.join(missing)}; it returned {', '.join(priors)}. "
                "Priors are returned in training, or with return_priors=True, by the stages "
                "whose MODEL.SEMASK.ATTENTION is not 'none'"
            )
        maps = []
        for name, doublings in self.doublings.items():
            prior = priors[name]
            for _ in range(doublings):  # one step of x8 would give other values than three of x2
                prior = double(prior)
            maps.append(resize(prior, size))
        return sum(maps[1:], maps[0])
