"""The map that supervises a detector's priors, against drawings by hand."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks

from semask.data import PriorTarget
from semask.data.mappers.prior_target import Region, paint, panoptic_to_semantic
from semask.data.segments import segment_ids
from tiny_instances import box_polygon

SIZE = (12, 16)


def instances(masks: list[np.ndarray], classes: list[int]) -> Instances:
    result = Instances(SIZE)
    result.gt_classes = torch.tensor(classes)
    result.gt_masks = BitMasks(torch.from_numpy(np.stack(masks)))
    return result


def paint_instances(target: PriorTarget, given: Instances) -> np.ndarray:
    """The map of Detectron2's instances, by way of their annotations."""
    fields = [given.gt_classes.tolist()]
    key = "bbox"
    if not given.has("gt_masks"):
        fields.append(given.gt_boxes.tensor.tolist())
    else:
        key, masks = "segmentation", given.gt_masks
        polygons = isinstance(masks, PolygonMasks)
        fields.append(masks.polygons if polygons else list(masks.tensor.numpy()))
    annotations = [{"category_id": c, key: entry} for c, entry in zip(*fields, strict=True)]
    return target.from_annotations(annotations, given.image_size)


def rectangle(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def test_smaller_instances_are_painted_over_larger_ones_in_any_order() -> None:
    large, small, smallest = rectangle(0, 10, 0, 10), rectangle(4, 9, 4, 14), rectangle(5, 7, 5, 7)
    expected = np.full(SIZE, 3)
    expected[large], expected[small], expected[smallest] = 0, 1, 2
    target = PriorTarget(num_categories=3)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        masks = [(large, small, smallest)[i] for i in order]
        assert np.array_equal(paint_instances(target, instances(masks, order)), expected)


def test_instances_that_touch_keep_all_their_pixels() -> None:
    left, right = rectangle(2, 8, 1, 5), rectangle(2, 8, 5, 9)
    painted = paint_instances(PriorTarget(num_categories=2), instances([left, right], [0, 1]))
    assert np.array_equal(painted == 0, left)
    assert np.array_equal(painted == 1, right)
    assert np.array_equal(painted == 2, ~(left | right))


def test_crowds_are_ignored_where_no_instance_is() -> None:
    crowd, inside = rectangle(0, 6, 0, 6), rectangle(2, 4, 2, 9)
    annotations = [
        {"category_id": 1, "segmentation": inside.astype(np.uint8), "bbox": [2, 2, 9, 4]},
        {"category_id": 0, "iscrowd": 1, "segmentation": crowd, "bbox": [0, 0, 6, 6]},
    ]
    painted = PriorTarget(num_categories=2).from_annotations(annotations, SIZE)
    expected = np.full(SIZE, 2)
    expected[crowd] = 255
    expected[inside] = 1
    assert np.array_equal(painted, expected)


def test_an_image_without_instances_is_background() -> None:
    empty = Instances(SIZE)
    empty.gt_classes = torch.zeros(0, dtype=torch.int64)
    empty.gt_boxes = Boxes(torch.zeros(0, 4))
    target = PriorTarget(num_categories=4)
    assert target.background == 4
    assert (paint_instances(target, empty) == 4).all()
    assert (target.from_annotations([], SIZE) == 4).all()
    assert target.from_annotations([], SIZE).shape == SIZE


def test_outside_is_ignored_where_that_is_asked_for() -> None:
    target = PriorTarget(num_categories=2, ignore_outside=True)
    mask = rectangle(1, 4, 1, 4)
    painted = paint_instances(target, instances([mask], [1]))
    assert (painted[mask] == 1).all()
    assert (painted[~mask] == 255).all()


def test_empty_masks_paint_nothing() -> None:
    painted = paint_instances(
        PriorTarget(num_categories=1), instances([rectangle(3, 3, 2, 2)], [0])
    )
    assert (painted == 1).all()


def test_boxes_are_the_last_resort() -> None:
    boxed = Instances(SIZE)
    boxed.gt_classes = torch.tensor([1, 0])
    boxed.gt_boxes = Boxes(torch.tensor([[2.0, 3.0, 7.0, 9.0], [-5.0, 10.6, 30.0, 40.0]]))
    painted = paint_instances(PriorTarget(num_categories=2), boxed)
    expected = np.full(SIZE, 2)
    expected[3:9, 2:7] = 1
    expected[11:, :] = 0  # row 10 has its centre, 10.5, outside of the box
    assert np.array_equal(painted, expected)
    annotation = {"category_id": 1, "bbox": [2, 3, 5, 6], "bbox_mode": BoxMode.XYWH_ABS}
    assert np.array_equal(
        PriorTarget(num_categories=2).from_annotations([annotation], SIZE) == 1, expected == 1
    )


def test_polygons_are_drawn_as_coco_draws_them_wherever_they_lie() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        polygons = [rng.uniform(-6, 20, 2 * rng.integers(3, 7)) for _ in range(rng.integers(1, 3))]
        rles = mask_util.frPyObjects([p.tolist() for p in polygons], *SIZE)
        whole = mask_util.decode(mask_util.merge(rles)).astype(bool)
        window, pixels = Region(0, polygons=polygons).pixels(*SIZE)
        drawn = np.zeros(SIZE, dtype=bool)
        drawn[window] = pixels
        assert np.array_equal(drawn, whole)


def test_polygons_and_masks_of_the_same_instances_give_the_same() -> None:
    boxes = [(1, 1, 9, 7), (6, 5, 4, 4)]
    polygons = Instances(SIZE)
    polygons.gt_classes = torch.tensor([0, 1])
    polygons.gt_masks = PolygonMasks([[np.array(box_polygon(*box))] for box in boxes])
    masks = [rectangle(y, y + h, x, x + w) for x, y, w, h in boxes]
    target = PriorTarget(num_categories=2)
    assert np.array_equal(
        paint_instances(target, polygons), paint_instances(target, instances(masks, [0, 1]))
    )


def test_rle_masks_are_painted() -> None:
    mask = rectangle(2, 5, 3, 8)
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    annotation = {"category_id": 0, "segmentation": rle, "bbox": [3, 2, 8, 5]}
    painted = PriorTarget(num_categories=1).from_annotations([annotation], SIZE)
    assert np.array_equal(painted == 0, mask)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(12, 16\)"):
        paint([Region(0, mask=np.ones((3, 3)))], SIZE, 1)


@pytest.mark.parametrize(("categories", "ignore"), [(0, 255), (255, 255), (3, 3), (3, 256)])
def test_classes_have_to_fit_beside_the_ignore_value(categories: int, ignore: int) -> None:
    with pytest.raises(ValueError, match="categories"):
        PriorTarget(num_categories=categories, ignore_value=ignore)


def test_panoptic_maps_become_semantic_ones() -> None:
    ids = np.array([[1, 70000, 70000], [258, 258, 0]])
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    segments = [
        {"id": 1, "category_id": 5},
        {"id": 70000, "category_id": 0},
        {"id": 258, "category_id": 5, "iscrowd": 1},
    ]
    expected = [[5, 0, 0], [255, 255, 255]]
    assert panoptic_to_semantic(segment_ids(rgb), segments).tolist() == expected
