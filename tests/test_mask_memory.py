"""The memory of a prediction of masks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak"
)
def test_300_queries_at_2048_pixels_fit_into_4_gib() -> None:
    """A whole model, with instances encoded as in evaluation and segments; the whole process."""
    result = subprocess.run(
        [sys.executable, "-c", LARGE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    peak, instances = map(int, result.stdout.split())
    assert peak < 4 * 2**20  # KiB
    assert instances == 300


LARGE = """
import re
from pathlib import Path
import torch
import semask
import tiny_masks
from semask.evaluation.instance_evaluators import coco_results
from semask.inference.model_outputs import predict
from semask.modeling.mask_decoder.postprocess import PanopticRule
from semask.ops.apply import FAST_PATHS, apply_fast_paths

torch.set_num_threads(1)
test = {"MASK_FORMER__TEST__SEMANTIC_ON": False, "MASK_FORMER__TEST__INSTANCE_ON": True}
model = tiny_masks.build(
    MASK_FORMER__NUM_OBJECT_QUERIES=300, SEM_SEG_HEAD__NUM_CLASSES=133, SWIN__WINDOW_SIZE=8, **test
)
model.panoptic_on = True
model.detections_per_image = 300
model.panoptic_rule = PanopticRule(
    things=range(133), object_mask_threshold=0.0, overlap_threshold=0.0
)
model = apply_fast_paths(model, FAST_PATHS)
image = torch.randint(0, 256, (3, 2048, 2048), dtype=torch.uint8)
with torch.no_grad():
    output = predict(model, {"image": image}, priors=False)
    assert output["panoptic_seg"][0].shape == (2048, 2048)
    found = coco_results(output["instances"], 1)
# Not getrusage's figure, which counts what the parent held when it started this process.
peak = re.search("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)
print(peak, len(found))
"""
